"""`AdapterTrainer` in two processes under torchrun whose parameters accelerate's FSDP2 shards (gloo): as one process on the whole batches, and files of the adapters alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.interop.same import assert_agree
from tests.tolerance import assert_matches_recorded
from tests.training import sharded_trainer
from tests.training.test_trainer import ADAPTERS, ALWAYS, files
from tests.training.torchrun import in_two_processes

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")
CHECKPOINT = ADAPTERS | ALWAYS | {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp("sharded")
    in_two_processes("tests.training.sharded_trainer", str(out))
    return out


def adapters(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def same(got: Path, want: Path) -> bool:
    one, other = adapters(got), adapters(want)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(out: Path, name: str) -> list[float]:
    first, second = (torch.load(out / f"{name}{process}.pt") for process in (0, 1))
    assert first == second
    return first  # type: ignore[no-any-return]


def test_two_processes_are_one(out: Path, tmp_path: Path) -> None:
    """In fp64, where both compute the same to the last digits; the Trainer keeps losses in fp32."""
    want = sharded_trainer.train(sharded_trainer.patched(), sharded_trainer.arguments(tmp_path, 1))
    got = losses(out, "whole")
    assert len(set(got)) == sharded_trainer.STEPS
    assert_agree(torch.tensor(got), torch.tensor(want))
    ours, alone = adapters(out / "whole"), adapters(tmp_path)
    assert ours.keys() == alone.keys()
    for name, tensor in alone.items():
        assert_matches_recorded(name, ours[name], tensor)


def test_checkpoints_hold_the_adapters_alone_and_resume_exactly(out: Path) -> None:
    whole = out / "whole"
    assert files(whole) == ADAPTERS | {"checkpoint-2", "checkpoint-4", "saved"} and files(whole / "saved") == ADAPTERS | {"training_args.bin"}
    assert files(whole / "checkpoint-2") == CHECKPOINT | {"optimizer.bin"}
    assert same(whole, whole / "checkpoint-4") and same(whole, whole / "saved") and not same(whole, whole / "checkpoint-2")
    assert losses(out, "resumed") == losses(out, "whole") and same(out / "resumed", whole)  # the first losses come with the checkpoint's log


def test_a_sharded_optimiser(out: Path) -> None:
    assert files(out / "pieces" / "checkpoint-2") == CHECKPOINT | {"optimizer_0"}
    assert losses(out, "pieces") == losses(out, "whole") and same(out / "pieces", out / "whole")


def test_the_best_checkpoint_is_loaded(out: Path) -> None:
    """The loss falls, so by the greatest evaluation loss the first checkpoint is the best one."""
    best = out / "best"
    assert files(best) == ADAPTERS | {"checkpoint-2", "checkpoint-4", "saved"}
    assert same(best, best / "checkpoint-2") and same(best / "saved", best / "checkpoint-2") and not same(best, best / "checkpoint-4")
