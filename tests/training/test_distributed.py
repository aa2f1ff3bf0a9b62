"""Two processes under torchrun (DDP and FSDP2, gloo) train as one does on the whole batch, also with tasks mixed and one absent from a process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.ops import checks
from tests.tolerance import assert_close_to_f64, assert_matches_recorded
from tests.training import distributed
from tests.training.torchrun import in_two_processes


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def out(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    out = tmp_path_factory.mktemp(request.param)
    in_two_processes("tests.training.distributed", request.param, str(out))
    return out


def two(out: Path, method: str, dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    folder = distributed.folder(out, method, dtype)
    written, again = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapters", "again"))
    assert written.keys() == again.keys() and all(torch.equal(written[name], t) for name, t in again.items())
    losses = [torch.load(folder / f"losses{rank}.pt") for rank in (0, 1)]
    assert losses[0] == losses[1]
    return losses[0], written


def alone(method: str, dtype: torch.dtype, out: Path) -> tuple[list[float], dict[str, Tensor]]:
    handle = distributed.patched(method, dtype)
    losses = distributed.train(handle, "one", slice(None))
    handle.save(out)
    return losses, load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("method", (*distributed.METHODS, distributed.FUSED))
def test_two_processes_are_one(method: str, out: Path, tmp_path: Path) -> None:
    """In fp64, where both compute the same to the last digits; DDP sees no parameter without a gradient, though a process lacks a task."""
    whole, want = alone(method, torch.float64, tmp_path)
    losses, got = two(out, method, torch.float64)
    assert_matches_recorded("losses", torch.tensor(losses, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_matches_recorded(name, got[name], tensor)


@pytest.mark.skipif(checks._NO_CPU, reason="the cpu backend needs x86-64 with AVX2 and a compiler")
@pytest.mark.parametrize("method", ["vl_adapter", distributed.FUSED])
def test_fused_kernels_in_two_processes(method: str, out: Path, tmp_path: Path) -> None:
    """As far from fp64 as one process is; all parameters as one vector, since AdamW's first steps turn the noise of a gradient near zero into whole steps."""
    _, exact = alone(method, torch.float64, tmp_path / "exact")
    _, one = alone(method, torch.float32, tmp_path / "one")
    got, want, eager = (torch.cat([tensors[name].flatten() for name in exact]) for tensors in (two(out, method, torch.float32)[1], exact, one))
    assert_close_to_f64("parameters", got, want, eager, gradient=True)
