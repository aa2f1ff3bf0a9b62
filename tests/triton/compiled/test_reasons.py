"""Why the triton backend cannot run a call, and that nothing of it is loaded before it is asked."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastadapt import backend
from fastadapt.ops import _triton
from fastadapt.ops.bottleneck import triton as bottleneck
from fastadapt.ops.dropout_add_norm import triton as dropout_add_norm
from fastadapt.ops.gated_bottleneck import triton as gated_bottleneck
from fastadapt.ops.lora import triton as lora
from fastadapt.ops.phm_bottleneck import triton as phm_bottleneck
from fastadapt.ops.routed_bottleneck import triton as routed_bottleneck
from tests.triton.compiled.aot import recorded


def call(**changes: Any) -> backend.Call:
    common = {"op": "bottleneck", "device": "cuda", "dtype": torch.bfloat16, "param_dtype": torch.float32, "rows": 64, "width": 768, "rank": 96, "arch": 90}
    return backend.Call(**{**common, **changes})


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a device and a C compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton, "c_compiler", lambda: True)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 96, 512])
def test_a_device_can_run_it(device: pytest.MonkeyPatch, dtype: torch.dtype, rank: int) -> None:
    assert bottleneck.reasons(call(dtype=dtype, rank=rank)) == []
    assert routed_bottleneck.reasons(call(op="routed_bottleneck", dtype=dtype, rank=rank, options=(("tasks", 64),))) == []
    assert routed_bottleneck.reasons(call(op="routed_bottleneck", dtype=dtype, rank=rank, rows=0, options=(("tasks", 10**6),))) == []
    assert lora.reasons(call(op="lora", dtype=dtype, rank=rank, options=(("dropout", True), ("out_width", 3072)))) == []
    assert gated_bottleneck.reasons(call(op="gated_bottleneck", options=(("gate_rank", rank), ("granularity", "large")))) == []
    assert dropout_add_norm.reasons(call(op="dropout_add_norm", dtype=dtype, rank=0, width=16 * rank)) == []


def test_rows_that_are_one_block(device: pytest.MonkeyPatch) -> None:
    assert dropout_add_norm.reasons(call(op="dropout_add_norm", rank=0, width=8193)) == ["width 8193 is above 8192, the longest row that a program holds"]
    assert dropout_add_norm.reasons(call(op="dropout_add_norm", rank=0, width=2049)) == ["width 2049 is above 2048 and no multiple of 16"]
    for width in range(1, dropout_add_norm.MAX_WIDTH + 1):
        shape = dropout_add_norm.tile(width)
        assert width <= shape.block_d < max(17, 2 * width) and 2048 <= shape.block_t * shape.block_d == 512 * shape.warps <= 8192
        for rows in (1, 63, 300, 4096, 10**7):
            size = dropout_add_norm.part_rows(rows, shape.block_t)
            assert size % shape.block_t == 0 and size >= dropout_add_norm.LEAST_ROWS and -(-rows // size) <= dropout_add_norm.MAX_PARTS


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"device": "cpu"}, "needs a CUDA device, not cpu"),
        ({"dtype": torch.float64}, "torch.float64 is not supported"),
        ({"rank": 513}, "rank 513 is above 512"),
        ({"width": 2**22 + 1}, "width 4194305 is above 4194304"),
        ({"op": "lora", "options": (("dropout", False), ("out_width", 2**22 + 1))}, "width 4194305 is above 4194304"),
        ({"op": "routed_bottleneck", "rank": 513, "options": (("tasks", 4),)}, "rank 513 is above 512"),
        ({"op": "gated_bottleneck", "options": (("gate_rank", 600),)}, "gate rank 600 is above 512"),
        ({"op": "gated_bottleneck", "options": (("gate_rank", 300),), "dtype": torch.float32}, "float32 with rank or gate rank 300 is above 256"),
    ],
)
def test_it_cannot(device: pytest.MonkeyPatch, changes: dict[str, Any], text: str) -> None:
    (reason,) = bottleneck.reasons(call(**changes))
    assert text in reason


def phm(division: int, factor_rank: int, **changes: Any) -> backend.Call:
    return call(op="phm_bottleneck", options=(("division", division), ("factor_rank", factor_rank)), **changes)


@pytest.mark.parametrize("division", range(1, 17))
def test_compacter(device: pytest.MonkeyPatch, division: int) -> None:
    """Factor rank 1 runs at every division, 8 up to 4 in half precision; whatever runs has tiles."""
    for factor_rank in range(1, 17):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            told = phm_bottleneck.reasons(phm(division, factor_rank, dtype=dtype))
            assert not told or (factor_rank > 1 and (division > 4 or factor_rank > 8 or (dtype == torch.float32 and division * factor_rank > 8)))
            for kernel in ("forward", "backward") if not told else ():
                for width, rank in ((768, 96), (division, division)):
                    phm_bottleneck.tile(kernel, division, factor_rank, width, rank, dtype)


@pytest.mark.parametrize(
    ("of", "text"),
    [
        (phm(4, 9), "division 4 and factor rank 9 takes 64 columns a part of a row, more than 32"),
        (phm(4, 5, dtype=torch.float32), "torch.float32 with division 4 and factor rank 5 takes 32 columns a part of a row, more than 16"),
        (phm(8, 3), "division 8 with factor rank 3 takes 256 columns a row, more than 128"),
        (phm(17, 1), "division 17 with factor rank 1 takes 1024 columns a row, more than 128"),
        (phm(4, 1, rank=516), "rank 516 is above 512"),
        (phm(4, 1, device="cpu"), "needs a CUDA device, not cpu"),
    ],
)
def test_compacter_cannot(device: pytest.MonkeyPatch, of: backend.Call, text: str) -> None:
    (reason,) = phm_bottleneck.reasons(of)
    assert text in reason


def test_old_and_absent_devices(device: pytest.MonkeyPatch) -> None:
    """What counts is the device of the call, not the current one."""
    assert bottleneck.reasons(call(arch=75)) == ["needs compute capability 8.0, the device has 7.5"]
    device.setattr(torch.cuda, "is_available", lambda: False)
    assert bottleneck.reasons(call()) == ["torch sees no CUDA device"]


def test_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton, "c_compiler", _triton.c_compiler.__wrapped__)  # which remembers its answer
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert bottleneck.reasons(call()) == ["triton needs a C compiler to launch kernels: gcc or clang on the path, or the one that CC names"]
    monkeypatch.setenv("CC", "cc")
    assert bottleneck.reasons(call()) == []


def test_demand_names_the_reason() -> None:
    with backend.use("triton"), pytest.raises(backend.BackendError, match="needs a CUDA device, not cpu"):
        backend.explain("bottleneck", rows=4, width=8, rank=2)


def test_every_rank_has_chunks_and_tiles() -> None:
    for rank in range(1, _triton.MAX_RANK + 1):
        chunks = _triton.chunks(rank)
        assert chunks[0][0] == 0 and all(a[0] + a[1] == b[0] for a, b in pairwise(chunks))
        assert all(size >= 16 and size & (size - 1) == 0 for _, size in chunks)
        assert rank <= sum(size for _, size in chunks) <= max(16, 2 * rank)
        for dtype in (torch.float32, torch.bfloat16):
            for width in (768, 770):
                for kernel in ("forward", "dropout_forward", "rows", "projection_rows", "weights", "projection_weights", "gated_forward", "gates"):
                    if dtype == torch.bfloat16 or rank <= _triton.MAX_RANK_GATED_FP32 or "gate" not in kernel:
                        _triton.tile(kernel, rank, width, dtype)


@pytest.mark.parametrize(
    "program",
    [
        "import fastadapt, fastadapt.functional, sys; assert 'triton' not in sys.modules",
        "import sys; sys.modules['triton'] = None; import fastadapt; from fastadapt import backend\n"
        "from fastadapt.ops.bottleneck import triton as b; from fastadapt.ops.gated_bottleneck import triton as g\n"
        "from fastadapt.ops.phm_bottleneck import triton as p; from fastadapt.ops.routed_bottleneck import triton as r; from fastadapt.ops.lora import triton as l\n"
        "from fastadapt.ops.dropout_add_norm import triton as n\n"
        "import torch; call = backend.Call('bottleneck', 'cuda', torch.float32, torch.float32, 4, 8, 2)\n"
        "assert b.reasons(call) == g.reasons(call) == p.reasons(call) == r.reasons(call) == l.reasons(call) == n.reasons(call) == ['triton is not installed']",
    ],
    ids=["lazy", "absent"],
)
def test_without_triton(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_ids_are_never_read_on_the_host() -> None:
    """Tensors without data launch the same: nothing waits for the device, a CUDA graph holds for all ids, and no ids compile anew."""
    made = []
    for device in ("cpu", "meta"):
        x, ids = torch.empty(300, 64, device=device, dtype=torch.bfloat16), torch.zeros(100, dtype=torch.int64, device=device)
        wd, bd, wu, bu = (torch.empty(shape, device=device) for shape in ((4, 24, 64), (4, 24), (1, 64, 24), (1, 64)))
        with recorded() as launches:
            _, z = routed_bottleneck.forward(x, ids, wd, bd, wu, bu, x, 1.0, 3, True, True)
            routed_bottleneck.backward(x, x, ids, z, wd, bd, wu, bu, 1.0, 3, True, [True] * 5)
        made.append([(launch.kernel, launch.grid, [a if isinstance(a, (int, float)) else None for a in tree_leaves(launch.arguments)], launch.options) for launch in launches])
    assert made[0] == made[1] and len(made[0]) == 6


@pytest.mark.parametrize(("rows", "rank", "most"), [(64, 24, 65_534), (70_000, 24, 65_352), (70_000, 300, 65_498)])
def test_as_many_tasks_as_make_a_grid(device: pytest.MonkeyPatch, rows: int, rank: int, most: int) -> None:
    """The launches of what is taken have at most 65535 blocks along y; with a task more one has one more."""
    for tasks in (most, most + 1):
        of = call(op="routed_bottleneck", rows=rows, width=64, rank=rank, options=(("tasks", tasks),))
        assert bool(routed_bottleneck.reasons(of)) == (tasks > most)
        x, ids = torch.empty(rows, 64, device="meta", dtype=torch.bfloat16), torch.empty(rows, device="meta", dtype=torch.int64)
        wd, wu, bu = (torch.empty(shape, device="meta") for shape in ((tasks, rank, 64), (1, 64, rank), (1, 64)))
        with recorded() as launches:
            _, z = routed_bottleneck.forward(x, ids, wd, None, wu, bu, x, 1.0, 3, True, True)
            routed_bottleneck.backward(x, x, ids, z, wd, None, wu, bu, 1.0, 3, True, [True, True, False, True, True])
        assert max(launch.grid[1] for launch in launches if len(launch.grid) > 1) == (65_535 if tasks == most else 65_536)


def test_a_seed_is_never_read_on_the_host() -> None:
    """Nor does another seed compile anew: it is a tensor to every launch."""
    made = []
    for device in ("cpu", "meta"):
        x, y, seed = torch.empty(300, 64, device=device), torch.empty(300, 96, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        wd, wu = torch.empty(8, 64, device=device), torch.empty(96, 8, device=device)
        with recorded() as launches:
            _, z = lora.forward(x, y, wd, wu, None, seed, 1.0, 0.1, True)
            lora.backward(y, x, z, wd, wu, seed, 1.0, 0.1, [True, True, True, False])
        made.append([(launch.kernel, launch.grid, [a if isinstance(a, (int, float)) else None for a in tree_leaves(launch.arguments)], launch.options) for launch in launches])
        assert [launch.constants.get("SEED") is seed for launch in launches] == [True, True, True, False]
    assert made[0] == made[1]


def test_a_norm_s_seed_is_never_read_on_the_host() -> None:
    made = []
    for device in ("cpu", "meta"):
        x, seed, w, of_row = torch.empty(300, 64, device=device), torch.zeros(1, dtype=torch.int64, device=device), torch.empty(64, device=device), torch.empty(300, device=device)
        with recorded() as launches:
            dropout_add_norm.forward(x, x, w, w, seed, 1, 1e-5, 0.1, True)
            dropout_add_norm.backward(x, x, x, of_row, of_row, w, seed, 1, 0.1, x.dtype, [True] * 4)
        made.append([(launch.kernel, launch.grid, [a if isinstance(a, (int, float)) else None for a in tree_leaves(launch.arguments)], launch.options) for launch in launches])
        assert [any(a is seed for a in launch.arguments) for launch in launches] == [True, True, False]
    assert made[0] == made[1]
