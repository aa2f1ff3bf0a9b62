"""Hugging Face's ``Trainer`` with checkpoints that hold the adapters alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from fastadapt.checkpoint import CONFIG
from fastadapt.patching import Handle, _reshard, _shards

_BESIDE = "adapters"
"""Where in a folder with a model the adapters are."""


class AdapterCheckpoint(TrainerCallback):
    """Writes the adapters (`Handle.save`) into every checkpoint of a ``Trainer``, and into its output directory when training ends::

        transformers.Trainer(model, args, train_dataset=data, callbacks=[AdapterCheckpoint(handle)])

    Works with any subclass of ``Trainer``. A plain one also writes the whole model into its checkpoints and resumes from that; no callback can keep it from doing so. Its
    adapters are in a folder ``adapters`` of their own: where PEFT is installed, ``from_pretrained`` takes an ``adapter_config.json`` next to the weights for PEFT's.
    `AdapterTrainer` writes the adapters alone and resumes from them. Where FSDP2 shards the parameters, every process gathers them and the first one writes. The checkpoints of a
    hyperparameter search are in folders that callbacks are not told of: use `AdapterTrainer` there.

    Args:
        handle: of the model that is trained. Where the trainer has made another one since (``model_init``), that one's adapters are written.

    Raises:
        TypeError: ``handle`` is something else.
    """

    def __init__(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            raise TypeError(f"handle: must be a fastadapt.Handle, not {type(handle).__name__}")
        self.handle = handle
        self.alone = False  # `AdapterTrainer` writes no model

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A trainer that begins is a plain one until it says otherwise."""
        self.alone = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the handle of the model that is trained.

        Raises:
            ValueError: it is not patched.
        """
        model = kwargs.get("model")
        if model is not None and not any(module is self.handle.model for module in model.modules()):
            self.handle = Handle.of(model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the adapters into ``checkpoint-<step>``, unless `AdapterTrainer` has."""
        if not self.alone:
            self._write(args, os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the adapters, with ``load_best_model_at_end`` the best ones, into the output directory."""
        self._write(args, str(args.output_dir))

    def _write(self, args: TrainingArguments, directory: str) -> None:
        if args.should_save or _shards(self.handle.model):
            self.handle.save(directory if self.alone else os.path.join(directory, _BESIDE))


class AdapterTrainer(Trainer):
    """A ``Trainer`` that saves and loads the adapters of a patched model in place of its whole weights; also a mix-in::

        class Tuner(AdapterTrainer, transformers.Seq2SeqTrainer):
            pass

        tuner = Tuner(model, args, train_dataset=data, callbacks=[AdapterCheckpoint(handle)])
        tuner.train(resume_from_checkpoint=True)

    Checkpoints and ``save_model`` hold what `Handle.save` writes, the tokenizer and the training arguments; optimiser, schedule and random state are there as ever, or not with
    ``save_only_model``. Resuming and ``load_best_model_at_end`` read the adapters back into the model, whose base must be the one that was trained. Quantised bases are taken.

    With FSDP2 (``fsdp=True``) the files are the same: all processes gather the adapters, never the base, and the first one writes them. (accelerate 1.15 shards on accelerators
    only, on CPUs it trains with DDP; and it cannot shard a BART's or T5's token table that three modules share.) FSDP1 keeps parameters as parts of flat ones and DeepSpeed in an
    engine of its own, out of which no adapter file can be written.

    Raises:
        ValueError: the model is not patched, or the run shards parameters with FSDP1 or DeepSpeed.
        fastadapt.patching.AdapterFileError: the checkpoint to resume from does not hold the adapters of this patch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        model = kwargs.get("model", args[0] if args else None)
        with _with_adapters_attached(model):
            super().__init__(*args, **kwargs)
        self._handle()
        self._alone()
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and getattr(self._fsdp(), "fsdp_version", 1) != 2):
            raise ValueError("args: must not shard parameters with FSDP1 or DeepSpeed, which cannot gather the adapters; FSDP2 can (fsdp_config={'version': 2})")

    def add_callback(self, callback: Any) -> None:
        """As the stock method."""
        super().add_callback(callback)
        self._alone()

    def _alone(self) -> None:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, AdapterCheckpoint):
                callback.alone = True

    def _handle(self) -> Handle:
        return Handle.of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False))

    def _fsdp(self) -> Any:
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapters; with FSDP2 every process calls it."""
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)  # the stock method gathers the whole model first
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        # The stock method writes the whole model beside these.
        from accelerate.utils import save_fsdp_optimizer

        _reshard(self.model)  # type: ignore[arg-type]  # which its model's state dict would do
        save_fsdp_optimizer(self._fsdp(), self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))  # type: ignore[union-attr]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        directory = str(output_dir or self.args.output_dir)
        if self.args.should_save or self.is_fsdp_enabled:
            self._handle().save(directory)
        if not self.args.should_save:
            return
        if (tokenizer := self.processing_class or getattr(self.data_collator, "tokenizer", None)) is not None:
            tokenizer.save_pretrained(directory)
        torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load(str(self.state.best_model_checkpoint))

    def _load(self, checkpoint: str) -> None:
        folders = [checkpoint, os.path.join(checkpoint, _BESIDE)]  # the second one of a plain ``Trainer`` with an `AdapterCheckpoint`
        written = {os.path.getmtime(config): folder for folder in folders if os.path.exists(config := os.path.join(folder, CONFIG))}
        self._handle().load(written[max(written)] if written else checkpoint)  # of runs into one directory, the last one's


@contextlib.contextmanager
def _with_adapters_attached(model: Any) -> Iterator[None]:
    """A quantised model says inside the block, as with an adapter of PEFT, that it has one: the stock trainer refuses to train it else."""
    if not (isinstance(model, PreTrainedModel) and getattr(model, "is_quantized", False) and not model._hf_peft_config_loaded):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded
