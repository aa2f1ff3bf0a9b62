"""Hugging Face's ``Trainer`` with checkpoints that hold the adapters alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from fastadapt.patching import Handle


class AdapterCheckpoint(TrainerCallback):
    """Writes the adapters (`Handle.save`) into every checkpoint of a ``Trainer``, and into its output directory when training ends::

        transformers.Trainer(model, args, train_dataset=data, callbacks=[AdapterCheckpoint(handle)])

    Works with any subclass of ``Trainer``. A plain one also writes the whole model into its checkpoints and resumes from that; no callback can keep it from doing so.
    `AdapterTrainer` writes the adapters alone and resumes from them.

    Args:
        handle: of the model that is trained.

    Raises:
        TypeError: ``handle`` is something else.
    """

    def __init__(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            raise TypeError(f"handle: must be a fastadapt.Handle, not {type(handle).__name__}")
        self.handle = handle

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the adapters into ``checkpoint-<step>``."""
        if args.should_save:
            self.handle.save(os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the adapters, with ``load_best_model_at_end`` the best ones, into the output directory."""
        if args.should_save:
            self.handle.save(str(args.output_dir))


class AdapterTrainer(Trainer):
    """A ``Trainer`` that saves and loads the adapters of a patched model in place of its whole weights; also a mix-in::

        class Tuner(AdapterTrainer, transformers.Seq2SeqTrainer):
            pass

        tuner = Tuner(model, args, train_dataset=data, callbacks=[AdapterCheckpoint(handle)])
        tuner.train(resume_from_checkpoint=True)

    Checkpoints and ``save_model`` hold what `Handle.save` writes, the tokenizer and the training arguments; optimiser, schedule and random state are there as ever, or not with
    ``save_only_model``. Resuming and ``load_best_model_at_end`` read the adapters back into the model, whose base must be the one that was trained.

    Raises:
        ValueError: the model is not patched, or the run shards parameters (FSDP, DeepSpeed), of which a process cannot write an adapter file.
        fastadapt.patching.AdapterFileError: the checkpoint to resume from does not hold the adapters of this patch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._handle()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args: must not shard parameters (FSDP, DeepSpeed); an adapter file needs them whole")

    def _handle(self) -> Handle:
        return Handle.of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = str(output_dir or self.args.output_dir)
        self._handle().save(directory)
        if (tokenizer := self.processing_class or getattr(self.data_collator, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(directory)
        torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._handle().load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._handle().load(str(self.state.best_model_checkpoint))
