"""Adapter checkpoints in real runs of Hugging Face's ``Trainer``, on a tiny BART."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, default_data_collator

from fastadapt import Handle, load, patch
from fastadapt.patching import AdapterFileError
from fastadapt.training import AdapterCheckpoint, AdapterTrainer
from tests.hosts.tiny import SMALL, logits, randomize, tiny

ADAPTERS = {"adapter_config.json", "adapter_model.safetensors"}
WEIGHTS = {"config.json", "generation_config.json", "model.safetensors"}
RESUMABLE = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
ALWAYS = {"trainer_state.json", "training_args.bin"}

trains = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")


def patched(method: str = "vl_adapter", seed: int = 0) -> Handle:
    """Adapters on the base that every run shares; ``seed`` is that of the adapters, which are far from their start and so have something to lose."""
    handle = patch(tiny("bart", dropout=0.1), method, **SMALL[method])
    randomize(handle, seed)
    return handle


def data(n: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randint(3, 90, (length,), generator=generator) for name, length in (("input_ids", 7), ("labels", 4))} for _ in range(n)]


def trainer(handle: Handle, directory: Path, kind: type[Trainer] = AdapterTrainer, callbacks: tuple[Any, ...] = (), **options: Any) -> Trainer:
    """Four steps, a checkpoint after two."""
    common = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "seed": 3}
    args = TrainingArguments(output_dir=str(directory), disable_tqdm=True, **{**common, **options})
    return kind(handle.model, args, train_dataset=data(), eval_dataset=data(4), callbacks=list(callbacks))


def handle_of(run: Trainer) -> Handle:
    assert run.model is not None
    return Handle.of(run.model)


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def state(handle: Handle) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in handle.model.named_parameters()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and [name for name in want if not torch.equal(got[name], want[name])] == []


@trains
def test_checkpoints_hold_the_adapters_alone_and_resume_exactly(tmp_path: Path) -> None:
    whole = patched()
    run = trainer(whole, tmp_path, callbacks=(AdapterCheckpoint(whole),))
    run.train()
    assert len(set(losses(run))) == 4
    assert files(tmp_path) == {"checkpoint-2", "checkpoint-4"} | ADAPTERS
    assert files(tmp_path / "checkpoint-2") == ADAPTERS | RESUMABLE | ALWAYS
    assert_equal(state(load(tiny("bart"), tmp_path)), state(whole))

    late = patched(seed=5)
    resumed = trainer(late, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(run)  # the first two come with the checkpoint's log
    assert_equal(state(late), state(whole))

    forgetful = trainer(patched(seed=5), tmp_path / "forgetful")
    forgetful._load_from_checkpoint = lambda *_: None  # type: ignore[method-assign]
    forgetful.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(forgetful)[2:] != losses(run)[2:]


@trains
def test_a_plain_trainer_writes_both_and_resumes(tmp_path: Path) -> None:
    whole = patched()
    run = trainer(whole, tmp_path, Trainer, (AdapterCheckpoint(whole),))
    run.train()
    assert files(tmp_path) == {"checkpoint-2", "checkpoint-4", "adapters"}
    assert files(tmp_path / "checkpoint-2") == {"adapters"} | WEIGHTS | RESUMABLE | ALWAYS and files(tmp_path / "checkpoint-2" / "adapters") == ADAPTERS
    assert torch.equal(logits(load(tiny("bart"), tmp_path / "checkpoint-4" / "adapters").model), logits(whole.model.eval()))
    run.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        type(tiny("bart")).from_pretrained(folder)  # also where PEFT is installed, whose adapters' files have the same names
    late = patched(seed=5)
    resumed = trainer(late, tmp_path / "resumed", Trainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    assert_equal(state(late), state(whole))
    adapters = patched(seed=5)
    other = trainer(adapters, tmp_path / "other")
    other._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
    other.add_callback(late_one := AdapterCheckpoint(adapters))
    assert late_one.alone
    assert_equal(state(adapters), state(whole))


@trains
def test_the_model_that_a_trainer_makes_is_the_one_that_is_written(tmp_path: Path) -> None:
    """``model_init`` is called for the trainer, and again when training begins: a callback's handle is then of another model."""
    for kind, folder in ((AdapterTrainer, ""), (Trainer, "adapters")):
        args = TrainingArguments(output_dir=str(tmp_path / kind.__name__), max_steps=2, save_steps=2, learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True)
        run = kind(model_init=lambda: patched().model, args=args, train_dataset=data())
        run.add_callback(AdapterCheckpoint(handle_of(run)))
        run.train()
        trained = state(handle_of(run))
        assert any(not torch.equal(t, state(patched())[name]) for name, t in trained.items())
        for written in (tmp_path / kind.__name__ / folder, tmp_path / kind.__name__ / "checkpoint-2" / folder):
            assert_equal(state(load(tiny("bart"), written)), trained)
    callback = AdapterCheckpoint(patched())
    with pytest.raises(ValueError, match="model: this BartForConditionalGeneration is not patched"):
        Trainer(tiny("bart"), args, train_dataset=data(), callbacks=[callback]).train()


@trains
@pytest.mark.parametrize("kind", [AdapterTrainer, Trainer])
def test_a_checkpoint_is_written_once(kind: type[Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, written, save = patched(), [], Handle.save

    def saving(handle: Handle, directory: Any, **options: Any) -> None:
        written.append(Path(directory))
        save(handle, directory, **options)

    monkeypatch.setattr(Handle, "save", saving)
    trainer(handle, tmp_path, kind, (AdapterCheckpoint(handle),)).train()
    beside = "" if kind is AdapterTrainer else "adapters"
    assert written == [tmp_path / "checkpoint-2" / beside, tmp_path / "checkpoint-4" / beside, tmp_path / beside]


@trains
def test_of_runs_into_one_directory_the_last_ones_adapters_are_read(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(patched())
    trainer(callback.handle, tmp_path, Trainer, (callback,)).train()
    for seed, kind in ((1, AdapterTrainer), (2, Trainer)):
        last = patched(seed=seed)
        callback.handle = last
        trainer(last, tmp_path, kind, (callback,)).train()
        resumed = patched(seed=5)
        trainer(resumed, tmp_path / "other")._load_from_checkpoint(str(tmp_path / "checkpoint-4"))
        assert_equal(state(resumed), state(last))
        assert callback.alone == (kind is AdapterTrainer)


@trains
def test_a_quantised_base_is_trained(tmp_path: Path) -> None:
    """A stock trainer refuses one that no adapter of PEFT is on."""
    handle = patched()
    handle.model.is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(handle, tmp_path, Trainer)
    run = trainer(handle, tmp_path)
    run.train()
    assert len(losses(run)) == 4 and "_hf_peft_config_loaded" not in handle.model.__dict__


@trains
def test_save_only_model_best_model_and_save_model(tmp_path: Path) -> None:
    """The loss falls, so by the greatest evaluation loss the first checkpoint is the best one."""
    handle = patched()
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(handle, tmp_path, callbacks=(AdapterCheckpoint(handle),), save_only_model=True, **best)
    run.train()
    assert files(tmp_path / "checkpoint-2") == ADAPTERS | ALWAYS
    first, last = (state(load(tiny("bart"), tmp_path / f"checkpoint-{n}")) for n in (2, 4))
    assert any(not torch.equal(first[name], last[name]) for name in first)
    assert_equal(state(handle), first)
    assert_equal(state(load(tiny("bart"), tmp_path)), first)
    randomize(handle)
    run.save_model(str(tmp_path / "saved"))
    assert files(tmp_path / "saved") == ADAPTERS | {"training_args.bin"}
    assert_equal(state(load(tiny("bart"), tmp_path / "saved")), state(handle))


class Tokenizer:
    def save_pretrained(self, directory: str) -> None:
        (Path(directory) / "tokenizer.json").touch()


class Collator:
    tokenizer = Tokenizer()

    def __call__(self, features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return default_data_collator(features)


@trains
@pytest.mark.parametrize("options", [{"processing_class": Tokenizer()}, {"data_collator": Collator()}], ids=["trainer's", "collator's"])
def test_a_mix_in_with_a_tokenizer(options: dict[str, Any], tmp_path: Path) -> None:
    class Tuner(AdapterTrainer, Seq2SeqTrainer):
        pass

    handle = patched("vlpet")
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", predict_with_generate=True)
    Tuner(handle.model, args, **options).save_model()
    assert files(tmp_path) == ADAPTERS | {"tokenizer.json", "training_args.bin"}


@trains
def test_what_cannot_be_resumed_from(tmp_path: Path) -> None:
    for name, holds in (("other", "vlpet"), ("empty", None)):
        (tmp_path / name).mkdir()
        if holds is not None:
            patched(holds).save(tmp_path / name)
        handle = patched()
        before = state(handle)
        with pytest.raises(AdapterFileError, match="holds an adapter of 'vlpet'" if holds else "must hold adapter_config.json"):
            trainer(handle, tmp_path).train(resume_from_checkpoint=str(tmp_path / name))
        assert_equal(state(handle), before)


@trains
def test_only_the_process_that_should_save_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda _: False))
    handle = patched()
    run = trainer(handle, tmp_path, callbacks=(AdapterCheckpoint(handle),), save_only_model=True)
    run.train()
    assert len(losses(run)) == 4 and files(tmp_path) == set()


@trains
def test_models_and_runs_that_are_refused(tmp_path: Path) -> None:
    class Sharding(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.is_fsdp_enabled = True

    class Sharded(AdapterTrainer, Sharding):
        pass

    with pytest.raises(ValueError, match="model: this BartForConditionalGeneration is not patched"):
        AdapterTrainer(tiny("bart"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="args: must not shard parameters with FSDP1 or DeepSpeed"):
        trainer(patched(), tmp_path, Sharded)


def test_the_callback_needs_a_handle() -> None:
    with pytest.raises(TypeError, match=r"handle: must be a fastadapt\.Handle, not Linear"):
        AdapterCheckpoint(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_training_needs_no_transformers() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import fastadapt.training as t\n"
        "[getattr(t, name) for name in t.__all__ if not name.startswith('Adapter')]\n"
        "try: t.AdapterTrainer\n"
        "except ImportError as error: print(error)\n"
        "try: t.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "transformers" in done.stdout and "module 'fastadapt.training' has no attribute 'nothing'" in done.stdout
