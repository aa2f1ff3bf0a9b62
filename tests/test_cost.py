"""The modelled times of `fastadapt.ops._cost`: that the model says of the kernels what is so, that it is sane, and what it chooses."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.launches import Counted
from fastadapt import backend
from fastadapt.backend import Call
from fastadapt.ops import _cost, _triton
from fastadapt.ops.bottleneck import reference as bottleneck_reference
from fastadapt.ops.bottleneck.plan import PLAN as BOTTLENECK
from fastadapt.ops.dropout_add_norm import reference as norm_reference
from fastadapt.ops.dropout_add_norm.plan import PLAN as NORM
from fastadapt.ops.dropout_add_norm.schema import NORMS
from fastadapt.ops.gated_bottleneck import reference as gated_reference
from fastadapt.ops.gated_bottleneck.plan import PLAN as GATED
from fastadapt.ops.lora import reference as lora_reference
from fastadapt.ops.lora.plan import PLAN as LORA
from fastadapt.ops.phm_bottleneck import reference as phm_reference
from fastadapt.ops.phm_bottleneck.plan import PLAN as PHM
from fastadapt.ops.routed_bottleneck import reference as routed_reference
from fastadapt.ops.routed_bottleneck.plan import PLAN as ROUTED

ROOT = Path(__file__).parents[1]
PLANS = {"bottleneck": BOTTLENECK, "gated_bottleneck": GATED, "lora": LORA, "phm_bottleneck": PHM, "routed_bottleneck": ROUTED, "dropout_add_norm": NORM}
ARCHS = (80, 86, 89, 90, 100, 120)
KINDS = ("large", "logits", "middleX", "middleY", "small")


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file of this machine's user has a say."""
    monkeypatch.setenv("FASTADAPT_CALIBRATION", "")
    _forget()
    with backend.use("auto"):
        yield
    _forget()


def _forget() -> None:
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()


def call(op: str = "bottleneck", *, kind: str = "large", gate_rank: int | None = None, tasks: int = 4, division: int = 4, factor_rank: int = 1, **changes: Any) -> Call:
    shape = {"device": "cuda", "dtype": torch.bfloat16, "param_dtype": torch.float32, "rows": 16384, "width": 768, "rank": 96, "arch": 90, **changes}
    if op == "gated_bottleneck":
        rank = shape["rank"] if gate_rank is None else gate_rank
        shape["options"] = (("gate_rank", rank if kind == "large" else 0), ("granularity", kind))
    elif op == "phm_bottleneck":
        shape["options"] = (("division", division), ("factor_rank", factor_rank))
    elif op == "routed_bottleneck":
        shape["options"] = (("tasks", tasks),)
    elif op == "lora":
        shape["options"] = (("dropout", kind == "dropout"), ("out_width", 320))
    elif op == "dropout_add_norm":  # kind: the norm, then "dropout" and "wide"
        shape |= {"rank": 0, "options": (("dropout", "dropout" in kind), ("norm", next((norm for norm in NORMS if norm in kind), "layer")), ("wide", "wide" in kind))}
    return Call(op=op, **shape)


def estimate(name: str, of: Call) -> _cost.Estimate:
    found = PLANS[of.op].estimate(name, of)
    assert found is not None
    return found


def explained(of: Call) -> backend.Explanation:
    return backend._explain(of, backend.AUTO, True)


# What the model says of the code.


def phm_arguments(of: Call) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Factors of the down- and of the up-projection, and biases."""
    n, k = of.option("division"), of.option("factor_rank")
    sides = ((of.width, of.rank), (of.rank, of.width))
    down, up = ([torch.randn(s, dtype=of.param_dtype) for s in ((n, n, n), (n, wide // n, k), (n, k, out // n))] for wide, out in sides)
    return down, up, *(torch.randn(s, dtype=of.param_dtype) for s in (of.rank, of.width))


def eager_operations(of: Call) -> list[Counted]:
    """Forward and backward of the reference, run and counted."""
    a, p, t, d, r = of.dtype, of.param_dtype, of.rows, of.width, of.rank
    if of.op == "dropout_add_norm":
        return eager_norm_operations(of)
    projections = [torch.randn(s, dtype=p) for s in ((r, d), (r,), (d, r), (d,))]
    wd, _, wu, bu = projections
    x, dy = torch.randn(t, d, dtype=a), torch.randn(t, d, dtype=a)
    counts = [Counted(), Counted()]
    if of.op == "phm_bottleneck":
        down, up, bd, bu = phm_arguments(of)
        with counts[0]:
            _, z = phm_reference.forward(x, *down, bd, *up, bu, None, 1.0, 3, True, True)
        with counts[1]:
            phm_reference.backward(dy, x, z, *down, *up, 1.0, 3, True, [True] * 9)
        return counts
    if of.op == "bottleneck":
        with counts[0]:
            _, z = bottleneck_reference.forward(x, *projections, None, None, None, 1.0, 3, True, True)
        with counts[1]:
            bottleneck_reference.backward(dy, x, z, wd, wu, bu, None, None, 1.0, 3, True, [True] * 5 + [False] * 2)
        return counts
    if of.op == "lora":
        dropout, y, wu = 0.1 if of.option("dropout") else 0.0, torch.randn(t, of.option("out_width"), dtype=a), torch.randn(of.option("out_width"), r, dtype=p)
        seed, bu = torch.zeros(1, dtype=torch.int64) if dropout else None, wu[:, 0].contiguous()
        with counts[0]:
            _, z = lora_reference.forward(x, y, wd, wu, bu, seed, 0.5, dropout, True)
        with counts[1]:
            lora_reference.backward(y, x, z, wd, wu, seed, 0.5, dropout, [True] * 4)
        return counts
    if of.op == "routed_bottleneck":
        ids, banks = torch.zeros(8, dtype=torch.int64), [p.expand(of.option("tasks"), *p.shape) for p in projections]
        with counts[0]:
            _, z = routed_reference.forward(x, ids, *banks, x, 1.0, 3, False, True)
        with counts[1]:
            routed_reference.backward(dy, x, ids, z, *banks, 1.0, 3, False, [True] * 5)
        return counts
    kind = of.option("granularity")
    shapes = {"large": ((r, d), (r,), (d, r), (d,)), "logits": (), "middleX": ((d,), (1,)), "middleY": ((d,),), "small": ((2 * d,), (1,))}[kind]
    gates = [torch.randn(s, dtype=p) for s in shapes] + [None] * (4 - len(shapes))
    h, options = torch.randn(t, d, dtype=a), (1.0, 1.0, 1.0, 3, gated_reference.KINDS.index(kind), False, 4)
    with counts[0]:
        _, *saved = gated_reference.forward(h, x, *projections, *gates, *options, 0, True)
    with counts[1]:
        gated_reference.backward(dy, h, x, *saved, *projections, *gates, *options, [True] * 6 + [g is not None for g in gates])
    return counts


def norm_arguments(of: Call) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Of forward, and what backward gets beside its gradient: what functional asks for where everything is trained."""
    t, d, norm, dropout = of.rows, of.width, NORMS.index(of.option("norm")), 0.1 if of.option("dropout") else 0.0
    x, residual = torch.randn(t, d, dtype=of.dtype), torch.randn(t, d, dtype=torch.float32 if of.option("wide") else of.dtype)
    w, seed, of_row = torch.randn(d, dtype=of.param_dtype) if norm else None, torch.zeros(1, dtype=torch.int64) if dropout else None, torch.ones(t)
    saved = (residual if norm else None, None if norm else residual, residual if norm else None, of_row if norm == 1 else None, of_row if norm else None)
    needs = [bool(dropout) or of.option("wide"), norm > 0, norm > 0, norm == 1]
    return (x, residual, w, w if norm == 1 else None, seed, norm, 1e-5, dropout, True), (*saved, w, seed, norm, dropout, of.dtype, needs)


def eager_norm_operations(of: Call) -> list[Counted]:
    counts, (forward, backward) = [Counted(), Counted()], norm_arguments(of)
    with counts[0]:
        norm_reference.forward(*forward)
    with counts[1]:
        if any(backward[-1]):
            norm_reference.backward(*backward)
    return counts


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("op", "kind"), [("bottleneck", ""), ("routed_bottleneck", ""), ("lora", ""), ("lora", "dropout"), *(("gated_bottleneck", kind) for kind in KINDS)])
def test_the_reference_is_modelled_as_it_runs(op: str, kind: str, param_dtype: torch.dtype) -> None:
    """The same number of operations, and their bytes to 3 %."""
    of = call(op, kind=kind, param_dtype=param_dtype, rows=512, width=192, rank=24)
    model = PLANS[op].models["reference"](of)
    for kernels, counted in zip((model.forward, model.backward), eager_operations(of), strict=True):
        assert sum(kernel.launches for kernel in kernels) == counted.launches
        assert sum(kernel.hbm + kernel.again + kernel.l2 for kernel in kernels) == pytest.approx(counted.bytes, rel=0.03)


@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("division", "factor_rank"), [(1, 1), (1, 2), (4, 1), (4, 3), (8, 2)])
def test_compacter_s_reference_is_modelled_as_it_runs(division: int, factor_rank: int, param_dtype: torch.dtype) -> None:
    of = call("phm_bottleneck", division=division, factor_rank=factor_rank, param_dtype=param_dtype, rows=512, width=192, rank=24)
    model = PHM.models["reference"](of)
    for kernels, counted in zip((model.forward, model.backward), eager_operations(of), strict=True):
        assert sum(kernel.launches for kernel in kernels) == counted.launches
        assert sum(kernel.hbm + kernel.again + kernel.l2 for kernel in kernels) == pytest.approx(counted.bytes, rel=0.03)


NORM_KINDS = ("layer", "layer dropout", "layer wide", "rms", "rms dropout", "rms dropout wide", "none", "none dropout", "none wide")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)], ids=["bf16", "mixed", "fp32"])
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_norm_s_reference_is_modelled_as_it_runs(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if "wide" in kind and dtypes != (torch.bfloat16, torch.float32):
        return
    of = call("dropout_add_norm", kind=kind, dtype=dtypes[0], param_dtype=dtypes[1], rows=512, width=192)
    model = NORM.models["reference"](of)
    for kernels, counted in zip((model.forward, model.backward), eager_operations(of), strict=True):
        assert sum(kernel.launches for kernel in kernels) == counted.launches
        assert sum(kernel.hbm + kernel.again + kernel.l2 for kernel in kernels) == pytest.approx(counted.bytes, rel=0.03)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the Triton kernels that the launchers ask for, none of which runs, and "pack" for torch's that rounds fp32 weights."""
    names: list[str] = []
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, given: names.append("pack"))
    monkeypatch.setattr(_triton, "launch", lambda kernel, *args, **constants: names.append(kernel.fn.__name__ if hasattr(kernel, "fn") else kernel.__name__))
    return names


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize(("op", "kind"), [("bottleneck", ""), ("routed_bottleneck", ""), *(("gated_bottleneck", kind) for kind in KINDS)])
def test_triton_is_modelled_with_the_launches_it_makes(launches: list[str], op: str, kind: str, width: int, param_dtype: torch.dtype) -> None:
    """And one more, of torch's own, to round fp32 weights at a width where kernels do not."""
    of = call(op, kind=kind, param_dtype=param_dtype, rows=300, width=width, rank=24)
    module, model = PLANS[op].module("triton"), PLANS[op].models["triton"](of)
    t, d, r = of.rows, of.width, of.rank
    x, dy, z, empty = torch.zeros(t, d, dtype=of.dtype), torch.zeros(t, d, dtype=of.dtype), torch.zeros(t, r, dtype=of.dtype), torch.empty(0)
    wd, bd, wu, bu = (torch.zeros(s, dtype=param_dtype) for s in ((r, d), (r,), (d, r), (d,)))
    if op == "bottleneck":
        module.forward(x, wd, bd, wu, bu, None, None, None, 1.0, 3, True, True)
        forward = len(launches)
        module.backward(dy, x, z, wd, wu, bu, None, None, 1.0, 3, True, [True] * 5 + [False] * 2)
    elif op == "routed_bottleneck":
        ids, banks = torch.zeros(3, dtype=torch.int64), [p.repeat(of.option("tasks"), *[1] * p.dim()) for p in (wd, bd, wu, bu)]
        module.forward(x, ids, *banks, None, 1.0, 3, True, True)
        forward = len(launches)
        module.backward(dy, x, ids, z, *banks, 1.0, 3, True, [True] * 5)
    else:
        shapes = {"large": ((r, d), (r,), (d, r), (d,)), "logits": (), "middleX": ((d,), (1,)), "middleY": ((d,),), "small": ((2 * d,), (1,))}[kind]
        gates = [torch.zeros(s, dtype=param_dtype) for s in shapes] + [None] * (4 - len(shapes))
        options = (1.0, 1.0, 1.0, 3, gated_reference.KINDS.index(kind), False, 4)
        module.forward(x, x, wd, bd, wu, bu, *gates, *options, 0, True)
        forward = len(launches)
        module.backward(dy, x, x, z, z, torch.zeros(t), empty, empty, wd, bd, wu, bu, *gates, *options, [True] * 6 + [g is not None for g in gates])
    assert launches.count("pack") == 2 * (param_dtype != of.dtype and width == 96)
    assert sum(kernel.launches for kernel in model.forward) == forward
    assert sum(kernel.launches for kernel in model.backward) == len(launches) - forward


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
def test_fp32_weights_are_rounded_on_load_until_that_reads_too_much(launches: list[str]) -> None:
    """The bound in bytes is met from both sides, per row tile and per rank; banks of tasks count as one task's weights, since a tile reads no other."""
    most = _triton.ROUND_ON_LOAD_BYTES // (2 * 2 * 768 * 96) * 64
    for rows, rank, tasks, packs in ((most, 96, 1, 0), (most + 1, 96, 1, 1), (most, 96, 4, 0), (64, 96, 1, 0), (64, 97, 1, 1)):
        x, shape = torch.empty(rows, 768, dtype=torch.bfloat16, device="meta"), ((rank, 768), (768, rank))
        weights = [torch.empty(*[tasks] * (tasks > 1), *s, device="meta") for s in shape]
        found = _triton.rounded(x, 768, rank, weights[0], None, weights[1])
        assert len(launches) == packs and found[1] is None
        assert all(w.dtype == (torch.bfloat16 if packs else torch.float32) for w in (found[0], found[2]))
        op = "bottleneck" if tasks == 1 else "routed_bottleneck"
        names = [kernel.name for kernel in PLANS[op].models["triton"](call(op, rows=rows, rank=rank, tasks=tasks)).forward]
        assert names.count("pack") == packs, (rows, rank, tasks)
        launches.clear()


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("gate_rank", [24, 40])
def test_two_bottlenecks_of_one_rank_share_their_launches(launches: list[str], gate_rank: int) -> None:
    """Of two ranks, the last alone."""
    of = call("gated_bottleneck", gate_rank=gate_rank, param_dtype=torch.bfloat16, rows=300, width=64, rank=24)
    x, z, zg, empty = (torch.zeros(300, wide, dtype=of.dtype) for wide in (64, 24, gate_rank, 0))
    weights = [torch.zeros(s, dtype=of.dtype) for r in (24, gate_rank) for s in ((r, 64), (r,), (64, r), (64,))]
    PLANS[of.op].module("triton").backward(x, x, x, z, zg, empty, empty, empty, *weights, 1.0, 1.0, 1.0, 3, gated_reference.KINDS.index("large"), False, 1, [True] * 10)
    assert launches == ["gates_kernel", *["rows_kernel", "weights_kernel"] * (1 if gate_rank == 24 else 2), "reduce_kernel"]
    assert [kernel.name for kernel in PLANS[of.op].models["triton"](of).backward] == [name.removesuffix("_kernel") for name in launches]


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("shared", [(), (0, 1), (2,)])
def test_shared_and_own_parameters_are_added_in_one_launch(launches: list[str], shared: tuple[int, ...]) -> None:
    x, z, ids = torch.zeros(300, 64), torch.zeros(300, 24), torch.zeros(3, dtype=torch.int64)
    banks = [torch.zeros(1 if i in shared else 4, *s) for i, s in enumerate(((24, 64), (24,), (64, 24), (64,)))]
    PLANS["routed_bottleneck"].module("triton").backward(x, x, ids, z, *banks, 1.0, 3, True, [True] * 5)
    assert launches == ["sort_kernel", "rows_kernel", "weights_kernel", "reduce_kernel"]


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("param_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_triton_runs_compacter_in_one_launch_and_two(launches: list[str], param_dtype: torch.dtype) -> None:
    """Factors are rounded as they are loaded: none more for fp32 parameters."""
    of = call("phm_bottleneck", param_dtype=param_dtype, rows=300, width=64, rank=24)
    module, model = PHM.module("triton"), PHM.models["triton"](of)
    down, up, bd, bu = phm_arguments(of)
    x, z = torch.zeros(of.rows, of.width, dtype=of.dtype), torch.zeros(of.rows, of.rank, dtype=of.dtype)
    module.forward(x, *down, bd, *up, bu, None, 1.0, 3, True, True)
    module.backward(x, x, z, *down, *up, 1.0, 3, True, [True] * 9)
    assert launches == ["forward_kernel", "backward_kernel", "sums_kernel"]
    assert [kernel.launches for kernel in (*model.forward, *model.backward)] == [1, 1, 1]


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize(("param_dtype", "out", "packs"), [(torch.bfloat16, 96, []), (torch.float32, 128, []), (torch.float32, 96, ["pack"])])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_triton_runs_lora_in_one_launch_and_three(launches: list[str], dropout: float, param_dtype: torch.dtype, out: int, packs: list[str]) -> None:
    of = call("lora", param_dtype=param_dtype, rows=300, width=64, rank=24)._replace(options=(("dropout", dropout > 0), ("out_width", out)))
    module, model = LORA.module("triton"), LORA.models["triton"](of)
    x, y, z = (torch.zeros(300, wide, dtype=of.dtype) for wide in (64, out, 24))
    wd, wu, seed = torch.zeros(24, 64, dtype=param_dtype), torch.zeros(out, 24, dtype=param_dtype), torch.zeros(1, dtype=torch.int64) if dropout else None
    module.forward(x, y, wd, wu, None, seed, 1.0, dropout, True)
    module.backward(y, x, z, wd, wu, seed, 1.0, dropout, [True, True, True, False])
    assert launches == [*packs, "forward_kernel", *packs, "rows_kernel", "weights_kernel", "reduce_kernel"]
    assert [sum(kernel.launches for kernel in kernels) for kernels in (model.forward, model.backward)] == [1 + len(packs), 3 + len(packs)]


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_triton_runs_a_norm_in_one_launch_and_two(launches: list[str], kind: str) -> None:
    """And moves the bytes of its arguments and results: v, y, the residual and their gradients in the residual's dtype, x and its gradient in x's."""
    of = call("dropout_add_norm", kind=kind, rows=200_000)
    module, model, (forward, backward) = NORM.module("triton"), NORM.models["triton"](of), norm_arguments(of._replace(rows=300, width=64))
    module.forward(*forward)
    if any(backward[-1]):
        module.backward(*backward)
    normed, own = of.option("norm") != "none", of.option("dropout") or of.option("wide")
    assert launches == ["forward_kernel", *["backward_kernel"] * (normed or own), *["sums_kernel"] * normed]
    assert [sum(kernel.launches for kernel in kernels) for kernels in (model.forward, model.backward)] == [1, len(launches) - 1]
    x, v = (of.rows * of.width * size for size in (2, 4 if of.option("wide") else 2))
    assert sum(kernel.hbm for kernel in model.forward) == pytest.approx(x + (3 if normed else 2) * v, rel=0.01)
    assert sum(kernel.hbm for kernel in model.backward) == pytest.approx((3 * v if normed else v * own) + x * own, rel=0.01)
    if of.option("dropout"):
        dropped, kept = (estimate("triton", of._replace(options=(("dropout", p), *of.options[1:]))) for p in (True, False))
        assert dropped.forward.gpu > kept.forward.gpu and dropped.backward.gpu > kept.backward.gpu


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
@pytest.mark.parametrize(("width", "out"), [(768, 768), (768, 3072), (3072, 768), (770, 1030)])
def test_lora_s_bytes(width: int, out: int) -> None:
    """Forward reads x and y and writes y' and z, backward reads dy and x twice, z once, and writes dx and dz, which it reads again; a mask moves none, but takes time."""
    of = call("lora", param_dtype=torch.bfloat16, rows=200_000, width=width, rank=16)._replace(options=(("dropout", False), ("out_width", out)))
    kept, dropped = (LORA.estimate("triton", of._replace(options=(("dropout", p), ("out_width", out)))) for p in (False, True))
    assert kept is not None and dropped is not None
    t, r = 2 * of.rows, of.rank
    assert kept.forward.bytes == pytest.approx(t * (width + 2 * out + r), rel=0.02)
    assert kept.backward.bytes == pytest.approx(t * (2 * width + 2 * out + 3 * r), rel=0.02)
    assert (dropped.forward.bytes, dropped.backward.bytes) == (kept.forward.bytes, kept.backward.bytes)
    assert dropped.forward.gpu > kept.forward.gpu and dropped.backward.gpu > kept.backward.gpu


PLAN_H = ROOT / "csrc" / "include" / "cuda_plan.h"


@pytest.mark.skipif(not PLAN_H.exists() or not shutil.which("g++"), reason="needs csrc/include/cuda_plan.h and g++")
def test_the_tiles_of_cuda_are_those_of_its_plan(tmp_path: Path) -> None:
    """Tiles, splits and shared memory, as the compiler has them."""
    program = """
        #include "cuda_plan.h"
        #include <cstdio>
        #include <initializer_list>
        using namespace fastadapt::cuda::plan;
        int main() {
          std::printf("{\\"ranks\\": [");
          for (int r : kRanks) std::printf("%d%s", r, r == kMaxRank ? "], \\"gated\\": [" : ", ");
          for (int r : kGatedRanks) std::printf("%d%s", r, r == kMaxRank ? "], \\"tiles\\": [" : ", ");
          for (int r : kRanks) {
            const auto t = row_tile(r), u = row_tile(r, true);
            const auto s = slab_tile(r);
            std::printf("[%d,%d,%d,%d, %d,%d,%d,%d, %d, %d,%d, %d,%d,%d,%d,%d,%d]%s", t.rows(), t.depth, t.columns, t.stages, u.rows(), u.depth,
                        u.columns, u.stages, down_part(r, true), s.rows, s.stages,
                        forward_shared(r, false), forward_shared(r, true), rows_shared(r), gates_shared(r, false), gates_shared(r, true),
                        slab_shared(r), r == kMaxRank ? "], " : ", ");
          }
          std::printf("\\"splits\\": [");
          for (int64_t t : {1, 300, 1024, 16384, 50000})
            for (int64_t d : {64, 768, 1024, 4096}) std::printf("[%d,%d]%s", (int)splits(t, d).count, (int)splits(t, d).rows, t == 50000 && d == 4096 ? "]}" : ", ");
        }
    """
    (tmp_path / "plan.cpp").write_text(program)
    subprocess.run(["g++", "-std=c++20", f"-I{PLAN_H.parent}", "-o", str(tmp_path / "plan"), str(tmp_path / "plan.cpp")], check=True)
    plan = json.loads(subprocess.run([str(tmp_path / "plan")], check=True, capture_output=True, text=True).stdout)
    assert (tuple(plan["ranks"]), tuple(plan["gated"])) == (_cost.CUDA_RANKS, _cost.CUDA_GATED_RANKS)
    for rank, row in zip(_cost.CUDA_RANKS, plan["tiles"], strict=True):
        kernels = ("forward", "forward dual", "rows", "gates", "gates dual", "slabs")
        shared = [_cost.modelled_shared_bytes(kernel, rank) for kernel in kernels]
        assert row == [*_cost.row_tile(rank), *_cost.row_tile(rank, dual=True), _cost.down_part(rank, True), *_cost.slab_tile(rank), *shared], rank
    assert plan["splits"] == [list(_cost.slab_splits(t, d)) for t in (1, 300, 1024, 16384, 50000) for d in (64, 768, 1024, 4096)]


def test_the_study_s_bytes() -> None:
    """kernels.md, D.2: the fused forward moves 4 T d + 2 T r bytes, the backward 8 T d + 10 T r where the rows are too many for L2 (which holds the partial sums)."""
    of = call(param_dtype=torch.bfloat16, rows=200_000)
    td, tr = of.rows * of.width, of.rows * of.rank
    found = estimate("cuda", of)
    assert found.forward.bytes == pytest.approx(4 * td + 2 * tr, rel=0.01)
    assert found.backward.bytes == pytest.approx(8 * td + 10 * tr, rel=0.02)
    large = estimate("cuda", call("gated_bottleneck", param_dtype=torch.bfloat16, rows=200_000))
    assert large.forward.bytes == pytest.approx(6 * td + 4 * tr, rel=0.01)
    assert large.backward.bytes == pytest.approx(24 * td + 24 * tr, rel=0.05)


def test_compacter_s_bytes() -> None:
    """kernels.md, D.6 (3): forward 4 T d + 2 T r bytes; backward reads dy, x and z and writes dx."""
    of = call("phm_bottleneck", rows=200_000)
    td, tr = of.rows * of.width, of.rows * of.rank
    for name in ("cuda", "triton"):
        found = estimate(name, of)
        assert found.forward.bytes == pytest.approx(4 * td + 2 * tr, rel=0.01)
        assert found.backward.bytes == pytest.approx(6 * td + 2 * tr, rel=0.01)


@pytest.mark.parametrize(("width", "out"), [(768, 768), (768, 3072), (3072, 768)])
def test_lora_s_bytes_on_cuda(width: int, out: int) -> None:
    """Forward reads x and y and writes y' and z; backward reads dy twice, x once, z twice, and writes dx and dz, which it reads again. A mask moves nothing, but takes time."""
    of = call("lora", param_dtype=torch.bfloat16, rows=200_000, width=width, rank=16)
    kept, dropped = (LORA.estimate("cuda", of._replace(options=(("dropout", p), ("out_width", out)))) for p in (False, True))
    assert kept is not None and dropped is not None
    t, r = 2 * of.rows, of.rank
    assert kept.forward.bytes == pytest.approx(t * (width + 2 * out + r), rel=0.01)
    assert kept.backward.bytes == pytest.approx(t * (2 * width + 2 * out + 4 * r), rel=0.01)
    assert (dropped.forward.bytes, dropped.backward.bytes) == (kept.forward.bytes, kept.backward.bytes)
    assert dropped.forward.gpu > kept.forward.gpu and dropped.backward.gpu > kept.backward.gpu
    assert (kept.forward.launches, kept.backward.launches) == (dropped.forward.launches, dropped.backward.launches) == (1, 3)
    for change, forward, backward in (({"param_dtype": torch.float32}, 2, 4), ({"rank": 7}, 3, 4)):
        found = LORA.estimate("cuda", of._replace(**change))
        assert found is not None and (found.forward.launches, found.backward.launches) == (forward, backward)


@pytest.mark.parametrize("width", [768, 4096, 8192])
@pytest.mark.parametrize("kind", NORM_KINDS)
def test_a_norm_s_bytes_on_cuda(kind: str, width: int) -> None:
    """Forward reads x and the residual and writes y and v; backward reads dy and v and writes the residual's gradient, and x's where it is another. A mask takes time alone."""
    of = call("dropout_add_norm", kind=kind, rows=200_000, width=width)
    found, normed, own = NORM.estimate("cuda", of), of.option("norm") != "none", of.option("dropout") or of.option("wide")
    assert found is not None and (found.forward.launches, found.backward.launches) == (1, 2 if normed else int(own))
    x, v = (of.rows * of.width * size for size in (2, 4 if of.option("wide") else 2))
    assert found.forward.bytes == pytest.approx(x + (3 if normed else 2) * v, rel=0.01)
    assert found.backward.bytes == pytest.approx((3 * v if normed else v * own) + x * own, rel=0.01)
    if of.option("dropout"):
        kept = NORM.estimate("cuda", of._replace(options=(("dropout", False), *of.options[1:])))
        assert kept is not None and found.forward.gpu > kept.forward.gpu and found.backward.gpu > kept.backward.gpu


def test_launches_of_cuda() -> None:
    for param_dtype, rank, packs in ((torch.bfloat16, 96, 0), (torch.float32, 96, 1), (torch.bfloat16, 100, 1)):
        found = estimate("cuda", call(param_dtype=param_dtype, rank=rank))
        assert (found.forward.launches, found.backward.launches) == (1 + packs + (rank == 100), 3 + packs)
        for kind in KINDS:
            found = estimate("cuda", call("gated_bottleneck", kind=kind, param_dtype=param_dtype, rank=rank))
            small, folds = kind == "small", kind in ("small", "middleX")
            assert (found.forward.launches, found.backward.launches) == (1 + small + max(packs, folds) + (rank == 100), 4 + small + packs), kind


# That it is sane.


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", PLANS)
@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_more_is_never_cheaper(name: str, op: str, arch: int) -> None:
    """More rows, a wider layer, a larger rank: never less time, arithmetic apart never fewer bytes; of the device's time, not of the host's, which hides it."""

    def gpu(**changes: Any) -> float:
        found = estimate(name, call(op, arch=arch, **changes))
        assert all(term.microseconds > 0 for d in (found.forward, found.backward) for term in d.terms)
        return found.forward.gpu + found.backward.gpu

    rows = [gpu(rows=n) for n in (1, 64, 1024, 4096, 16384, 65536, 262144)]
    widths = [gpu(width=n) for n in (256, 512, 1024, 2048, 4096)]
    assert rows == sorted(rows) and widths == sorted(widths)
    of_ranks = (16, 64, 96) if name == "triton" else (16, 64, 96, 192, 256)  # Triton's tiles change shape above, and below where 8 does not divide a part of z
    ranks = [gpu(rank=n) for n in ((32, 64, 96, 192, 256) if op == "phm_bottleneck" else of_ranks)]
    assert ranks == sorted(ranks)
    if op == "phm_bottleneck":
        divided = [gpu(division=4, factor_rank=k) for k in (1, 2, 4, 8)]
        assert divided == sorted(divided)


def test_a_term_grows_with_its_bytes() -> None:
    device = _cost.device_of(80)
    assert device is not None
    for what in ("flops", "hbm", "again", "l2", "steps"):
        times = [_cost.time_of(_cost.Kernel("k", blocks=100, **{what: size}), device, warm=False).microseconds for size in (0.0, 1e3, 1e6, 1e9, 1e10)]
        assert times == sorted(times) and times[-1] > times[0], what
    cold, warm = (_cost.time_of(_cost.Kernel("k", again=1e9), device, warm).microseconds for warm in (False, True))
    assert warm < cold


def test_a_direction_is_the_longer_of_device_and_host() -> None:
    small, many = estimate("cuda", call(rows=16)), estimate("cuda", call(rows=500_000))
    assert small.forward.dominant == small.backward.dominant == "host" and small.forward.microseconds == small.forward.host
    assert many.backward.microseconds == many.backward.gpu > many.backward.host and many.backward.dominant in ("hbm", "l2")


def test_every_kernel_fits_every_architecture() -> None:
    for device in _cost.DEVICES:
        for rank in _cost.CUDA_RANKS:
            assert _cost.too_large(BOTTLENECK.cuda_kernels, call(rank=rank, arch=device.arch)) == []
            assert _cost.too_large(GATED.cuda_kernels, call("gated_bottleneck", rank=rank, arch=device.arch)) == []
            assert _cost.too_large(LORA.cuda_kernels, call("lora", rank=rank, arch=device.arch)) == []


def test_a_kernel_that_does_not_fit_excludes_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cost, "shared_bytes", lambda kernel, rank: 120 * 1024 if kernel == "slabs" and rank > 192 else 1024)
    for arch, fits in ((80, True), (90, True), (86, False), (89, False), (120, False)):
        told = explained(call(rank=256, arch=arch))
        assert told.chosen == ("cuda" if fits else "triton")
        assert told.reasons["cuda"] == ([] if fits else [f"its slabs kernel needs 122880 bytes of shared memory at rank 256, a block has 101376 on sm_{arch}"])
        assert explained(call(rank=192, arch=arch)).chosen == "cuda"


# What is chosen.


def test_the_choice_is_pure() -> None:
    """Equal calls choose equally, in any order, with nothing remembered in between."""
    calls = [
        call(op, kind=kind, rows=rows, rank=rank, dtype=dtype, arch=arch)
        for op, kind in (("bottleneck", ""), ("gated_bottleneck", "large"), ("gated_bottleneck", "small"))
        for rows in (1, 500, 16384)
        for rank in (8, 96, 300)
        for dtype in (torch.bfloat16, torch.float32)
        for arch in (80, 90)
        if not (op == "gated_bottleneck" and rank == 300 and dtype == torch.float32)
    ]
    once = {c: explained(c).chosen for c in calls}
    _forget()
    assert {c: explained(c).chosen for c in reversed(calls)} == {c: once[c] for c in reversed(calls)}


# (op, kind, rows, width, rank, dtype): the backends on sm_80, 86, 89, 90, 100, 120.
BF16, FP32 = torch.bfloat16, torch.float32
CUDA, TRITON = ("cuda",) * 6, ("triton",) * 6
ANCHORS: list[tuple[tuple[str, str, int, int, int, torch.dtype], tuple[str, ...]]] = [
    (("bottleneck", "", 16384, 768, 96, BF16), CUDA),
    (("gated_bottleneck", "large", 16384, 768, 96, BF16), CUDA),
    (("bottleneck", "", 1024, 768, 96, BF16), CUDA),
    (("bottleneck", "", 1, 768, 96, BF16), CUDA),
    (("gated_bottleneck", "small", 4096, 1024, 192, BF16), ("cuda", "triton", *("cuda",) * 4)),
    (("gated_bottleneck", "middleX", 4096, 768, 7, BF16), CUDA),
    (("bottleneck", "", 16384, 768, 96, FP32), TRITON),
    (("bottleneck", "", 16384, 770, 96, BF16), TRITON),
    (("bottleneck", "", 16384, 768, 300, BF16), TRITON),
]


@pytest.mark.parametrize(("shape", "expected"), ANCHORS, ids=lambda value: "-".join(map(str, value)) if len(value) and not isinstance(value[0], str) else None)
def test_choices(shape: tuple[str, str, int, int, int, torch.dtype], expected: tuple[str, ...]) -> None:
    op, kind, rows, width, rank, dtype = shape
    told = [explained(call(op, kind=kind, rows=rows, width=width, rank=rank, dtype=dtype, arch=arch)) for arch in ARCHS]
    for arch, e in zip(ARCHS, told, strict=True):
        print(f"{op} {kind} T={rows} d={width} r={rank} {dtype} sm_{arch}: {e.chosen} of {', '.join(f'{n} {x.microseconds:.0f} us' for n, x in e.estimates.items())} (modelled)")
    assert tuple(e.chosen for e in told) == expected


def test_what_cuda_cannot_run_has_its_reason() -> None:
    for changes, why in (({"dtype": FP32}, "not torch.float32"), ({"width": 770}, "multiple of 8"), ({"rank": 300}, "ranks from 1 to 256")):
        told = explained(call(**changes))
        assert told.chosen == "triton" and any(why in reason for reason in told.reasons["cuda"]) and "cuda" not in told.estimates
    told = explained(call("gated_bottleneck", gate_rank=300))
    assert told.chosen == "triton" and any("ranks from 1 to 256" in reason for reason in told.reasons["cuda"])


def test_a_later_backend_must_be_clearly_faster() -> None:
    """The margin: fp32 on an A100, where the plain bottleneck's reference is modelled faster, but not by 1.25; and a case where it is."""
    told = explained(call(dtype=FP32, arch=80))
    ratio = told.estimates["triton"].microseconds / told.estimates["reference"].microseconds
    assert 1.0 < ratio < backend.MARGIN and told.chosen == "triton"
    told = explained(call(dtype=FP32, arch=80, rank=512))
    assert told.estimates["triton"].microseconds > backend.MARGIN * told.estimates["reference"].microseconds and told.chosen == "reference"
    assert told.passed_over == (f"fastadapt: bottleneck runs on 'reference' instead of 'cuda': {'; '.join(told.reasons['cuda'])}",)  # of being slower nobody is warned


def test_older_and_newer_devices() -> None:
    old = explained(call(arch=75))
    assert old.chosen == "reference" and old.reasons["cuda"] == old.reasons["triton"] == ["needs compute capability 8.0, sm_75 is older"]
    assert old.estimates == {} and "no times: sm_75 has no model" in str(old)
    for arch, name in ((87, "RTX 3090"), (103, "B200"), (121, "RTX 5090")):
        assert explained(call(arch=arch)).estimates["cuda"].device == name


# Calibration.


def calibrated(path: Path, monkeypatch: pytest.MonkeyPatch, factors: dict[str, Any], arch: int = 90) -> None:
    _cost.write_calibration(path, _cost.Calibration("NVIDIA H100 80GB HBM3", arch, "2026-12-01", factors))
    monkeypatch.setenv("FASTADAPT_CALIBRATION", str(path))
    _forget()


def test_a_calibration_goes_round_and_changes_the_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert explained(call()).chosen == "cuda"
    factors = {"cuda": {"bottleneck": {"forward": 4.0, "backward": 4.0}}, "triton": {"bottleneck": {"forward": 1.0, "backward": 1.0}}}
    calibrated(tmp_path / "calibration.json", monkeypatch, factors)
    assert _cost.read_calibration(tmp_path / "calibration.json").factors == factors
    told = explained(call())
    assert told.chosen == "triton" and told.estimates["cuda"].forward.factor == 4.0
    assert "calibrated on NVIDIA H100 80GB HBM3, 2026-12-01" in str(told) and "us calibrated" in str(told) and "us modelled" in str(told)
    assert explained(call("gated_bottleneck")).chosen == "cuda" and "not measured" in str(explained(call("gated_bottleneck")))
    assert explained(call(arch=80)).chosen == "cuda", "a calibration of another architecture has no say"


def test_calibrated_times_need_less_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modelled = {name: estimate(name, call()) for name in ("cuda", "triton")}
    factor = modelled["cuda"].microseconds / modelled["triton"].microseconds / 1.15  # Triton 1.15 times faster
    calibrated(tmp_path / "c.json", monkeypatch, {"triton": {"bottleneck": {"forward": factor, "backward": factor}}})
    assert explained(call()).chosen == "cuda"
    same = {"forward": 1.0, "backward": 1.0}
    calibrated(tmp_path / "c.json", monkeypatch, {"triton": {"bottleneck": {"forward": factor, "backward": factor}}, "cuda": {"bottleneck": same}})
    assert explained(call()).chosen == "triton"


def test_this_user_s_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTADAPT_CALIBRATION")
    monkeypatch.setenv("HOME", str(tmp_path))
    _forget()
    assert explained(call()).chosen == "cuda"
    _cost.write_calibration(
        tmp_path / ".cache" / "fastadapt" / "calibration-sm_90.json", _cost.Calibration("d", 90, "today", {"cuda": {"bottleneck": {"forward": 9.0, "backward": 9.0}}})
    )
    _forget()
    assert explained(call()).chosen == "triton"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FASTADAPT_CALIBRATION", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    _cost.calibration.cache_clear()
    assert _cost.calibration(90) is None and not recwarn.list


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "Expecting property name"),
        ("[]", "not a calibration of format 1"),
        ('{"format": 2}', "not a calibration of format 1"),
        ('{"format": 1, "arch": 90, "date": "d", "factors": {}}', "device"),
        ('{"format": 1, "device": "x", "arch": 90, "date": "d", "factors": {"cuda": 3}}', "AttributeError"),
        ('{"format": 1, "device": "x", "arch": 90, "date": "d", "factors": {"cuda": {"bottleneck": {"forward": -1}}}}', "factor -1 is not between"),
        ('{"format": 1, "device": "x", "arch": 90, "date": "d", "factors": {"cuda": {"bottleneck": {"forward": "fast"}}}}', "factor 'fast' is not between"),
        ('{"format": 1, "device": "x", "arch": 90, "date": "d", "factors": {"cuda": {"bottleneck": {"sideways": 1}}}}', "unknown direction"),
        (None, "No such file"),
    ],
)
def test_a_corrupt_calibration_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, why: str) -> None:
    path = tmp_path / "calibration.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("FASTADAPT_CALIBRATION", str(path))
    _forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [explained(call(rows=rows, arch=arch)).chosen for rows in (1024, 2048) for arch in (80, 90)] == ["cuda"] * 4
    (warning,) = caught
    assert f"the calibration {path} is not used" in str(warning.message) and why in str(warning.message) and "make gpu-check" in str(warning.message)
