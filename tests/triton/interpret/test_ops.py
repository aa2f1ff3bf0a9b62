"""The kernels themselves, run by Triton's interpreter on CPU tensors through the public functions: numbers, shapes, layouts, gradients alone and together.

Rows beyond 2^31 elements cannot be tried here, since the interpreter copies each tensor's whole storage: tests/triton/compiled reads the 64-bit offsets from the code.

Programs run one after another, so a race cannot show here; the kernels have none to show: no atomics, and no program reads what another of the same launch writes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fastadapt import functional
from fastadapt.ops import _triton
from tests.ops import checks, test_dropout_add_norm, test_gated_bottleneck, test_routed_bottleneck
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, FP32, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, random_specs, specs

TRITON = ("triton", "cpu")
FP16, FP16_MIXED = DTYPES[3:]
# Without a down bias, and with a width of 64 or more, no gradient has fewer than 64 elements, and the rule needs one seed instead of eight.
ONE_SEED: dict[str, Any] = {"biases": "up", "width": 96}


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


SHAPES = [
    *(over(FP32, lead=(t,), rank=r, **ONE_SEED) for t, r in ((1, 48), (37, 1), (65, 24))),
    *(over(BF16, lead=(t,), rank=r, **ONE_SEED) for t, r in ((1, 7), (37, 96), (65, 1))),
    *(over(MIXED, lead=(t,), rank=r, **ONE_SEED) for t, r in ((37, 7), (65, 48))),
    *(over(FP16, lead=(t,), rank=r, **ONE_SEED) for t, r in ((37, 24), (65, 96))),
    *(over(FP16_MIXED, lead=(t,), rank=r, **ONE_SEED) for t, r in ((1, 96), (65, 7))),
]
WIDTHS = [
    *(over(d, lead=(65,), rank=96, width=w, gate=True) for d, w in ((FP32, 128), (MIXED, 131))),
    over(BF16, lead=(5,), rank=7, width=33),
    over(FP32, lead=(3,), rank=1, width=1),
]
OPTIONS = [
    *(over(MIXED, rank=96, lead=(37,), width=96, activation=a) for a in ACTIVATIONS),
    over(FP32, rank=24, lead=(37,), width=96, activation="relu"),  # in bf16 flipped signs of z near 0 give eager itself an error of 5 %
    *(over(MIXED, rank=96, lead=(37,), width=96, biases=b) for b in ("none", "down")),
    over(MIXED, rank=96, lead=(37,), width=96, residual=None),
    over(MIXED, rank=96, lead=(37,), width=96, residual="other", gate=True, scale=0.3),
    over(MIXED, rank=40, lead=(37,), width=96, residual=None, gate=True, biases="none"),
    over(MIXED, rank=96, lead=(37,), width=96, heads=2),
    over(FP32, lead=(9,), rank=6, width=33, scale="tensor", gate=True),
]
SCALES: dict[str, Any] = {"input_scale": 0.5, "adapter_scale": -1.5, "scale": 0.3}
WIDE: dict[str, Any] = {"lead": (3, 23), "rank": 96, "gate_rank": 72, "width": 96}
GATED = [
    *(over(FP32, Gated, granularity=g, gate_bias=g == "large", save_gate=False, **WIDE, **SCALES) for g in ("large", "small")),
    *(over(FP32, Gated, lead=(37,), rank=r, gate_rank=rg, width=96, biases="up", gate_bias=False) for r, rg in ((24, 72), (72, 24), (40, 40))),
    *(over(MIXED, Gated, granularity=g, gate_bias=g == "large", save_gate=False, combine="add", **WIDE, **SCALES) for g in GRANULARITIES),
    *(over(BF16, Gated, granularity=g, gate_bias=g == "large", save_gate=True, **WIDE, **SCALES) for g in GRANULARITIES),
]
# Ragged widths; a gate bias is one number, which takes eight seeds.
GATED_SMALL = [
    over(FP32, Gated, lead=(2, 9), rank=7, width=33, granularity="middleX", activation="silu"),
    over(FP16_MIXED, Gated, lead=(2, 9), rank=7, width=33, granularity="small"),
    over(MIXED, Gated, lead=(2, 9), rank=7, width=33, granularity="middleY"),
]
# Samples and rows of three to seven tasks, some of none and some tasks without rows; with a rank of 24 every bank but a shared down bias has at least 64 elements.
BANKS: dict[str, Any] = {"width": 96, "rank": 24}
ROUTED = [
    over(MIXED, Routed, lead=(4, 19), outside=True, residual="other", scale=0.7, **BANKS),
    over(FP32, Routed, lead=(50,), ids="row", tasks=7, outside=True, residual=None, **BANKS),
    over(BF16, Routed, lead=(40,), ids="row", shared="up", activation="silu", **BANKS),
    over(FP16_MIXED, Routed, lead=(3, 13), shared="down", biases="up", activation="relu", **BANKS),
    over(MIXED, Routed, lead=(37,), ids="row", tasks=2, width=33, rank=40),
    over(FP32, Routed, lead=(2, 70), tasks=1, biases="none", residual="other", **BANKS),
]
# Three splits of each task, more row tiles than one step of their column sums takes, and more ids than one step of the sort takes.
STRETCHES = [over(FP32, Routed, lead=(1100,), ids="row", tasks=2, width=64, rank=64, scale=0.5)]
# Widths of one to three slabs, below and above each other and equal; tiles with and without masks; seeds with either sign.
LORA = [
    over(FP32, Lora, lead=(65,), width=96, out=70, rank=1, dropout=0.1),
    over(BF16, Lora, lead=(37,), width=70, out=131, rank=8, biases="up", scale=0.5, dropout=0.5),
    over(MIXED, Lora, lead=(3, 23), width=131, out=64, rank=96, scale=-2.0, biases="up"),
    over(FP16_MIXED, Lora, lead=(37,), width=64, out=192, rank=16, dropout=0.3, seed=-2),
    over(FP16, Lora, lead=(1,), width=96, out=96, rank=4, dropout=0.2, biases="up"),
    over(FP32, Lora, lead=(19,), width=128, out=32, rank=24, dropout=0.75, scale=0.3, biases="up"),
    over(FP32, Lora, lead=(37,), width=96, out=96, rank=40),
]
# A row of one column, and a projection to one.
LORA_SMALL = [over(FP32, Lora, lead=(9,), width=1, out=33, rank=7, dropout=0.5), over(FP32, Lora, lead=(9,), width=33, out=1, rank=7, biases="up", dropout=0.1)]
LORA_REAL = [over(MIXED, Lora, lead=(65,), width=768, out=256, rank=16, dropout=0.1)]
LORA_SPLITS = [over(FP32, Lora, lead=(600,), width=64, out=96, rank=64, dropout=0.1, scale=0.5, biases="up")]
REAL = [over(MIXED, lead=(65,), width=768, rank=96, scale=0.3), over(MIXED, Gated, lead=(5, 13), width=768, rank=96, gate_rank=96)]
# More rows in a sample than one step of the mean takes, and more samples in a tile.
LONG = [over(MIXED, Gated, lead=lead, width=64, rank=7, granularity="small", biases="none", gate_bias=False) for lead in ((2, 150), (40, 2))]
# Three splits, and in fp32 more row tiles than one step of their column sums takes.
SPLITS = [over(d, lead=(600,), rank=r, width=64, gate=True, scale=0.5) for d, r in ((FP32, 64), (MIXED, 96))]
CALLS = [
    over(MIXED, lead=(3, 13), residual="other", scale="tensor", gate=True),
    over(FP32, Gated, lead=(3, 5)),
    over(FP16, Gated, lead=(3, 5), granularity="small"),
    *(over(MIXED, Gated, lead=(2, 70), width=64, rank=r, gate_rank=rg) for r, rg in ((24, 104), (104, 24))),
    over(MIXED, Routed, lead=(3, 13), outside=True, residual="other", shared="up"),
    over(MIXED, Lora, lead=(3, 13), out=70, biases="up", dropout=0.3),
]
MORE_CALLS = [over(BF16, Gated, lead=(3, 13), granularity=g, combine=c, save_gate=s) for g in GRANULARITIES for c, s in (("multiply", True), ("add", False))]
ROUNDED = [
    over(MIXED, lead=(13,), scale="tensor", gate=True),
    *(over(MIXED, Gated, lead=(3, 5), granularity=g, save_gate=False) for g in GRANULARITIES),
    over(MIXED, Routed, lead=(13,)),
    over(MIXED, Lora, lead=(13,), biases="up", dropout=0.3),
]
EMPTY = [
    *(over(d, lead=(0,), scale="tensor", gate=True) for d in (FP32, MIXED)),
    *(over(d, Gated, lead=lead, granularity=g) for d in (FP32, MIXED) for lead, g in (((0,), "large"), ((0, 5), "small"))),
    *(over(MIXED, Routed, lead=lead, shared="down") for lead in ((0,), (0, 5), (5, 0))),
    *(over(MIXED, Lora, lead=(0,), biases="up", dropout=p) for p in (0.0, 0.1)),
]
PAIRS = [
    over(MIXED, lead=(39,), gate=True, width=70, rank=70),
    *(
        over(MIXED, Gated, lead=(3, 13), granularity=g, save_gate=s, biases="none", rank=70, gate_rank=70, width=70, gate_bias=False)
        for g, s in (("large", True), ("small", False))
    ),
    over(MIXED, Routed, lead=(3, 13), outside=True, **BANKS),
    over(MIXED, Lora, lead=(39,), width=70, out=90, rank=70, biases="up", dropout=0.3),
]
# Parts of 24, 9 (and 6), 6, 24 (and 25), 9 and 1 columns; parts of 16 and more pairs, and padded divisions and factor ranks.
PHM_SHAPES = [
    over(FP32, PHM, lead=(37,), width=96, rank=96, biases="up"),
    over(FP16, PHM, lead=(37,), width=36, rank=24, factor_rank=3, biases="none", activation="gelu"),
    over(BF16, PHM, lead=(5,), width=64, rank=64, division=16),
    over(MIXED, PHM, lead=(19,), width=96, rank=100, factor_rank=4, residual="other", scale=0.3, activation="silu"),
    over(FP32, PHM, lead=(17,), width=27, rank=18, division=3, factor_rank=3, scale=-2.0),
    over(FP16_MIXED, PHM, lead=(5,), width=2, rank=50, division=2, factor_rank=2, residual=None),
]
PHM_OPTIONS = [
    *(over(MIXED, PHM, lead=(37,), width=96, rank=96, activation=a) for a in ("gelu", "identity")),
    over(FP32, PHM, lead=(37,), width=96, rank=96, activation="relu", biases="none", residual=None),
    over(FP32, PHM, lead=(5,), width=72, rank=72, division=1, factor_rank=1, biases="down"),
]
PHM_REAL = [over(MIXED, PHM, lead=(65,), width=768, rank=96)]
# More row tiles than one step of their sums takes.
PHM_LONG = [over(FP32, PHM, lead=(1040,), width=8, rank=8, division=2, residual=None, biases="none")]
PHM_CALLS = [over(MIXED, PHM, lead=(2, 20), residual="other", scale=0.7), over(FP32, PHM, lead=(9,), width=36, rank=24, division=3, factor_rank=2)]
PHM_ROUNDED = [over(MIXED, PHM, lead=(13,), factor_rank=2)]

# Several rows a program and one; rows of a block exactly, of almost one and of little more than half; v in x's dtype and in float32; partials of one part and of several.
NORM = [
    over(FP32, Norm, lead=(37,), width=96, dropout=0.1),
    over(FP32, Norm, lead=(70,), width=64, norm="rms", biases="weight", returns="both"),
    over(MIXED, Norm, lead=(3, 23), width=70, residual="wide", dropout=0.5, returns="both"),
    over(BF16, Norm, lead=(37,), width=128, norm="rms", dropout=0.2, eps=0.1),
    over(FP16_MIXED, Norm, lead=(5,), width=127, biases="none", dropout=0.3, seed=-2, returns="both"),
    over(FP16, Norm, lead=(17,), width=65, residual=None, biases="weight"),
    over(MIXED, Norm, lead=(37,), width=96, residual=None, norm="rms", dropout=0.1),
    over(MIXED, Norm, lead=(37,), width=96, residual="wide", norm="rms", biases="none"),
    *(over(d, Norm, lead=(37,), width=96, residual=r, norm=None, biases="none", dropout=p) for d, r, p in ((FP32, "same", 0.1), (MIXED, "wide", 0.0), (BF16, None, 0.5))),
    over(MIXED, Norm, lead=(37,), width=96, biases="none", dropout=0.1, returns="sum"),
]
NORM_SMALL = [over(FP32, Norm, lead=(9,), width=1, norm="rms", dropout=0.5), over(FP32, Norm, lead=(300,), width=7, dropout=0.1)]
NORM_REAL = [over(MIXED, Norm, lead=(65,), width=768, dropout=0.1, residual="wide"), over(FP32, Norm, lead=(9,), width=2064, norm="rms", dropout=0.1)]
# Parts of 32 rows, more of them than one step of the sums takes.
NORM_LONG = [over(FP32, Norm, lead=(1100,), width=64, dropout=0.1)]
NORM_CALLS = [over(MIXED, Norm, lead=(2, 20), dropout=0.3, returns="both"), over(FP32, Norm, lead=(9,), width=36, norm="rms"), over(FP32, Norm, lead=(9,), width=36, residual=None)]


@specs([*NORM, *NORM_SMALL, *NORM_REAL, *NORM_LONG])
def test_norm_within_rule(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


def test_the_statistics_are_of_the_rounded_sum() -> None:
    test_dropout_add_norm.test_the_statistics_are_of_the_rounded_sum(torch.bfloat16, *TRITON)


@pytest.mark.full
@specs(random_specs(Norm, 60, seed=35))
def test_norm_random(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


@specs([*PHM_SHAPES, *PHM_OPTIONS, *PHM_REAL])
def test_phm_within_rule(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


@pytest.mark.full
@specs([*random_specs(PHM, 60, seed=33), *PHM_LONG])
def test_phm_random(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


@specs([*SHAPES, *WIDTHS, *OPTIONS, *GATED, *GATED_SMALL, *LONG, *ROUTED, *REAL, *LORA, *LORA_SMALL, *LORA_REAL])
def test_within_rule(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


@pytest.mark.full
@specs([*random_specs(Bottleneck, 60, seed=31), *random_specs(Gated, 90, seed=32), *random_specs(Routed, 60, seed=33), *random_specs(Lora, 60, seed=34)])
def test_random(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


@pytest.mark.full
@specs([over(d, lead=(t,), rank=r, width=w, gate=True, scale=0.5) for d in DTYPES for t, r, w in ((130, 192, 96), (70, 300, 160), (33, 512, 64), (700, 24, 64))])
def test_large_ranks_and_several_splits(spec: Spec) -> None:
    checks.assert_within_rule(spec, *TRITON)


def test_rows_of_a_sample_have_one_gate() -> None:
    test_gated_bottleneck.test_rows_of_a_sample_have_one_gate(*TRITON)


@specs(SPLITS)
def test_several_splits(spec: Spec) -> None:
    """Three splits of the rows and partials of several row tiles."""
    assert _triton.token_splits(600, 1)[0] == 3
    checks.assert_within_rule(spec, *TRITON)


@specs(STRETCHES)
def test_several_splits_of_each_task(spec: Routed) -> None:
    counts = spec.task_ids().bincount()
    assert _triton.token_splits(1100, 1)[1] == 256 and all(512 < n <= 768 for n in counts)
    checks.assert_within_rule(spec, *TRITON)


@specs(LORA_SPLITS)
def test_several_splits_beside_a_projection(spec: Lora) -> None:
    assert _triton.token_splits(600, 2 * (2 + 3))[0] == 3
    checks.assert_within_rule(spec, *TRITON)


@pytest.mark.parametrize(("ids", "shared", "dtypes"), [("sample", "up", MIXED), pytest.param("row", "", FP32, marks=pytest.mark.full)])
def test_a_mixed_batch_gives_row_for_row_what_batches_of_one_task_give(ids: str, shared: str, dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit while a split has 256 rows whatever the batch, up to 49152 of them in slabs and rank chunks of one program; beyond, the size of the splits differs. And where the
    tiles of rows have one height: in fp32 at width 96 the routed ones, which spilled, have half the other's, and d b_down is added in another order."""
    product = np.matmul  # whose bits of a row in fp32 depend on where in the tile the row lies, as a tensor core's do not
    monkeypatch.setattr(np, "matmul", lambda a, b, **options: np.concatenate([product(a[i : i + 1], b, **options) for i in range(len(a))]))
    width = 768 if dtypes == FP32 else 96
    assert len({_triton.tile(kernel, 24, width, *dtypes).block_t for kernel in ("rows", "routed_rows")}) == 1
    monkeypatch.setattr(test_routed_bottleneck, "over", lambda dtypes, **options: over(dtypes, Routed, **{**options, "width": width}))
    test_routed_bottleneck.test_a_mixed_batch_gives_row_for_row_what_batches_of_one_task_give(ids, shared, dtypes, *TRITON)


@pytest.mark.full
def test_64_tasks() -> None:
    checks.assert_within_rule(over(MIXED, Routed, lead=(90,), ids="row", tasks=64, **BANKS), *TRITON)


def test_rows_of_no_task_see_no_weights() -> None:
    """Not even those that are NaN."""
    x, w_down, w_up, b = torch.randn(5, 40), torch.full((2, 24, 40), torch.nan), torch.full((2, 40, 24), torch.nan), torch.full((2, 24), torch.nan)
    ids, dy = torch.tensor([2, -1, -(2**62), 2**62, 3]), torch.randn(5, 40)
    leaves = [t.requires_grad_() for t in (x, w_down, w_up, b)]
    with checks.spied() as calls, checks.runs_on("routed_bottleneck", "triton"):
        y = functional.routed_bottleneck(x, ids, w_down, w_up, b)
        dx, *gradients = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(y, x) and torch.equal(dx, dy) and not any(g.any() for g in (calls[0][2][1], *gradients))


def test_nan_of_one_task_reaches_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_routed_bottleneck, "EVERYTHING", replace(test_routed_bottleneck.EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]))
    test_routed_bottleneck.test_nan_of_one_task_reaches_no_other(*TRITON)


@specs([*EMPTY, *(over(d, kind, lead=(0,)) for d in (FP32, MIXED) for kind in (PHM, Norm))])
def test_no_rows(spec: Spec) -> None:
    """Zero rows: an empty output, gradients of zero, nothing launched."""
    tensors, dy = spec.draw(0), spec.cotangent(0)
    got = checks.fused(spec, "triton", tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


def check_call(spec: Spec) -> None:
    checks.assert_single_gradients(spec, *TRITON)
    checks.assert_no_grad_path(replace(spec, returns="y") if isinstance(spec, Norm) else spec, *TRITON)
    checks.assert_untouched(spec, *TRITON)
    tensors, dy = spec.draw(0), spec.cotangent(0)
    checks.assert_same_bits(checks.fused(spec, "triton", tensors, dy), checks.fused(spec, "triton", tensors, dy))


@specs([*CALLS, *PHM_CALLS, *NORM_CALLS])
def test_calls(spec: Spec) -> None:
    """Gradients alone and together, no gradients, arguments untouched, and a rerun: all with the same bits."""
    check_call(spec)


@specs([*ROUNDED, *PHM_ROUNDED])
def test_parameters_are_rounded_first(spec: Spec) -> None:
    checks.assert_rounds_parameters(spec, *TRITON)


@pytest.mark.full
@specs(MORE_CALLS)
def test_more_calls(spec: Spec) -> None:
    check_call(spec)


@specs(
    [
        over(MIXED, Routed, lead=(2, 7), residual="other"),
        over(MIXED, lead=(2, 7), residual="other", gate=True),
        over(FP32, Gated, lead=(2, 7), granularity="middleX", biases="none", gate_bias=False),
        over(MIXED, PHM, lead=(2, 3), division=2, residual="other"),
        over(MIXED, Lora, lead=(2, 7), dropout=0.3),
        over(MIXED, Norm, lead=(2, 7), dropout=0.3, returns="both"),
        over(FP32, Norm, lead=(2, 7), residual=None),
    ]
)
def test_any_layout(spec: Spec) -> None:
    checks.assert_any_layout(spec, *TRITON)


@pytest.mark.parametrize(("forward", "backward"), [("reference", "triton"), ("triton", "reference")])
@specs([*PAIRS, over(MIXED, PHM, lead=(39,), width=72, rank=72), over(MIXED, Norm, lead=(39,), width=72, dropout=0.3, residual="wide")])
def test_any_backward_after_any_forward(spec: Spec, forward: str, backward: str) -> None:
    checks.assert_within_rule(spec, forward, "cpu", backward=backward)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities
@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "bf16, fp32", "fp16", "fp16, fp32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_pre_activations(activation: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    checks.assert_extreme_pre_activations(over(dtypes, lead=(3,), width=8, rank=8, activation=activation, biases="down", residual=None), *TRITON)


def test_tf32_only_where_torch_allows_it() -> None:
    """And in products alone: the column sums behind d b_up are no product to torch."""
    spec = over(FP32, lead=(37,), rank=96, width=96)
    tensors, dy = spec.draw(0), spec.cotangent(0)
    exact, errors, before = checks.exact(spec, tensors, dy), [], torch.backends.cuda.matmul.fp32_precision
    try:
        for allowed in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = allowed
            got = checks.fused(spec, "triton", tensors, dy)
            errors.append(max(checks.relative_error(got[n], exact[n]) for n in exact))
            assert checks.relative_error(got["d b_up"], exact["d b_up"]) < 1e-6
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 1e-6 and 1e-5 < errors[1] < 2e-3
