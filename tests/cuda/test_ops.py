"""The CUDA kernels through the public functions: numbers, options, shapes, layouts, gradients alone and together, recorded tensors.

Here they run in the emulator, on CPU tensors, where a race, a bank conflict or an access outside the arguments of a launch fails the test. Where there is a CUDA device, the same
tests run on it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastadapt import backend, functional
from fastadapt.ops import _cuda
from fastadapt.ops.gated_bottleneck.reference import KINDS
from fastadapt.ops.philox import keep, philox
from tests.cuda import emulator
from tests.golden import load_case
from tests.ops import checks, test_bottleneck, test_dropout_add_norm, test_gated_bottleneck, test_lora, test_phm_bottleneck, test_routed_bottleneck
from tests.ops.checks import CUDA
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, FP32, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, random_specs, specs
from tests.tolerance import assert_close_to_f64

FP16, FP16_MIXED = DTYPES[3:]
HALF = DTYPES[1:]
EMULATED = pytest.param("emulated-cuda", "cpu", id="emulated")
on_kernels = pytest.mark.parametrize(("name", "device"), [EMULATED, CUDA])
# Without a down bias, and with a width of 64 or more, no gradient has fewer than 64 elements, and the rule needs one seed instead of eight.
ONE_SEED: dict[str, Any] = {"biases": "up", "width": 96}


@pytest.fixture(autouse=True)
def emulated_device(poisoned_empty: None, request: pytest.FixtureRequest) -> None:
    """Tests on CPU tensors run on the emulated device. What torch allocates holds NaN; what the emulated ops allocate does by themselves."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("device") == "cpu":
        request.getfixturevalue("machine")


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


def supported(count: int, kind: type[Bottleneck] | type[Gated] | type[Routed] | type[Lora], seed: int) -> list[Spec]:
    """Random calls that the kernels take: half precision, widths that are multiples of 8; some wide ranks and more rows than a tile has."""
    rng, out = random.Random(seed), []
    for spec in random_specs(kind, count, seed):
        dtypes = rng.choice(HALF) if spec.dtype == torch.float32 else (spec.dtype, spec.param_dtype)
        changes: dict[str, Any] = {"width": max(8, spec.width // 8 * 8), "dtype": dtypes[0], "param_dtype": dtypes[1]}
        if rng.random() < 0.2:
            heads = getattr(spec, "heads", 1)
            changes["rank"] = heads * rng.randint(1, 256 // heads)
        if len(spec.lead) == 1 and rng.random() < 0.2:
            changes["lead"] = (rng.randint(100, 400),)
        if isinstance(spec, Gated) and rng.random() < 0.1:
            changes["gate_rank"] = rng.randint(41, 256)
        if isinstance(spec, Lora):
            changes["out"] = max(8, spec.out // 8 * 8)
        out.append(replace(spec, **changes))
    return out


RANDOM = [*supported(100, Bottleneck, 41), *supported(140, Gated, 42)]
RANDOM_ROUTED = supported(120, Routed, 43)
RANDOM_LORA = supported(120, Lora, 44)
ROWS, RANKS = (1, 63, 64, 65, 129), (1, 7, 8, 16, 24, 33, 64, 96, 100, 128, 192, 256)
SHAPES = [over(HALF[i % 4], lead=(ROWS[i % 5],), rank=r, **ONE_SEED) for i, r in enumerate(RANKS)]
SHAPES += [over(HALF[(i + 1) % 4], lead=(t,), rank=96, width=w, biases="up") for i, (t, w) in enumerate(((130, 64), (65, 72), (37, 136), (64, 768), (65, 1024)))]
ALL_SHAPES = [over(d, lead=(t,), rank=r, width=w, gate=True, scale=0.5, biases="up") for d in HALF for t in ROWS for r in RANKS for w in (64, 200)]
ALL_ROUTED = [
    over(d, Routed, lead=(t,), ids="row", rank=r, width=w, tasks=g, outside=t > 1, shared=s, scale=0.5, biases="up" if r * g < 64 else "both")
    for d, (r, s) in zip(HALF, ((1, ""), (96, "down"), (100, "up"), (256, ""))) for t in ROWS for w in (64, 200) for g in (1, 3, 16)
]  # fmt: skip
OPTIONS = [
    *(over(d, lead=(37,), rank=24, width=64, activation=a, biases="up") for d in (MIXED, FP16) for a in ACTIVATIONS),
    *(over(MIXED, lead=(37,), rank=24, width=64, biases=b) for b in ("none", "down", "both")),
    over(BF16, lead=(37,), rank=96, width=96, residual=None),
    over(MIXED, lead=(37,), rank=96, width=96, residual="other", gate=True, scale=0.3),
    over(FP16, lead=(37,), rank=40, width=96, residual=None, gate=True, biases="none"),
    over(MIXED, lead=(37,), rank=96, width=96, heads=2),
    *(over(d, lead=(9,), rank=6, width=48, scale="tensor", gate=True, residual=r) for d, r in ((MIXED, "input"), (BF16, None), (FP16_MIXED, "other"))),
    *(over(MIXED, lead=(37,), rank=24, width=64, norm_before=b, norm_after=a, biases="up") for b, a in ((True, False), (False, True))),
]
SCALES: dict[str, Any] = {"input_scale": 0.5, "adapter_scale": -1.5, "scale": 0.3}
WIDE: dict[str, Any] = {"lead": (3, 23), "rank": 96, "gate_rank": 72, "width": 96}
GATED = [
    *(over(MIXED, Gated, granularity=g, gate_bias=g == "large", save_gate=False, combine="add", **WIDE, **SCALES) for g in GRANULARITIES),
    *(over(BF16, Gated, granularity=g, gate_bias=g == "large", save_gate=True, **WIDE, **SCALES) for g in GRANULARITIES),
    *(over(FP16_MIXED, Gated, granularity=g, gate_bias=g == "large", save_gate=False, **WIDE) for g in GRANULARITIES),
    *(over(FP16, Gated, lead=(5, 13), width=64, rank=r, gate_rank=rg) for r, rg in ((7, 40), (40, 7), (200, 24), (24, 200), (256, 256))),
    *(over(MIXED, Gated, lead=(5, 13), width=64, rank=24, gate_rank=12, heads=4, granularity=g) for g in ("large", "small")),
]
# Their gate bias is one number, which takes eight seeds.
GATED_SMALL = [
    over(d, Gated, lead=(2, 9), rank=7, width=40, granularity=g, activation=a)
    for d, g, a in ((BF16, "middleX", "silu"), (FP16_MIXED, "small", "gelu_new"), (MIXED, "small", "gelu"))
]
REAL = [
    over(MIXED, lead=(65,), width=768, rank=96, scale=0.3),
    over(FP16, lead=(130,), width=1024, rank=192),
    over(MIXED, Gated, lead=(5, 13), width=768, rank=96, gate_rank=96),
    *(over(BF16, Gated, lead=(5, 13), width=768, rank=96, granularity=g, scale=0.3) for g in ("middleX", "middleY", "small")),
]
ROUTED = [
    *(over(d, Routed, lead=(9, 17), width=72, rank=r, tasks=g, residual=v, outside=o, scale=0.7) for d, r, g, v, o in (
        (MIXED, 33, 4, "other", True), (BF16, 96, 1, None, False), (FP16, 192, 3, "input", True), (FP16_MIXED, 7, 2, None, True), (MIXED, 256, 2, "other", False)
    )),
    *(over(MIXED, Routed, lead=(9, 17), width=64, rank=24, biases=b, shared=s, activation=a) for b, s, a in (
        ("up", "down", "silu"), ("none", "up", "relu"), ("both", "up", "gelu"), ("down", "down", "identity")
    )),
    over(FP16, Routed, lead=(70,), width=40, rank=9, tasks=64, ids="row", biases="none"),
    over(BF16, Routed, lead=(1,), width=40, rank=8, tasks=5, biases="none"),
    over(BF16, Routed, lead=(700,), width=64, rank=24, tasks=2, ids="row", outside=True, biases="up"),
]  # fmt: skip
# Slabs that only x or only y has columns of, or both in part; a seed of either sign; splits of rows.
DROPS: dict[str, Any] = {"dropout": 0.3, "seed": -0x123456789ABCDEF}
LORA_SHAPES = (
    *((1, 64, 200, 64), (63, 200, 64, 64), (65, 72, 136, 33), (64, 136, 72, 16), (129, 64, 64, 100)),
    *((37, 328, 96, 200), (70, 96, 328, 128), (130, 64, 192, 256), (9, 192, 64, 192)),
)
LORA = [
    *(
        over(HALF[i % 4], Lora, lead=(t,), width=w, out=o, rank=r, biases="up" if i % 2 else "none", scale=(1.0, 0.25, -2.0)[i % 3], **(DROPS if i % 3 else {}))
        for i, (t, w, o, r) in enumerate(LORA_SHAPES)
    ),
    *(over(HALF[i % 4], Lora, lead=(5, 13), width=w, out=o, rank=r, **DROPS) for i, (w, o, r) in enumerate(((64, 72, 4), (72, 64, 7), (200, 64, 1), (8, 264, 16), (264, 8, 16)))),
    *(over(d, Lora, lead=(600,), width=w, out=o, rank=r, biases="up", **DROPS) for d, w, o, r in ((MIXED, 64, 136, 16), (FP16, 136, 64, 96))),
    *(over(MIXED, Lora, lead=(70,), width=64, out=72, rank=16, dropout=p) for p in (1e-12, 0.999)),
    over(MIXED, Lora, lead=(33,), width=768, out=768, rank=16, dropout=0.1),
]
ALL_LORA = [
    over(d, Lora, lead=(t,), width=w, out=o, rank=r, biases="up", scale=0.5, dropout=p)
    for d, r in zip(HALF, (4, 64, 100, 256)) for t in ROWS for w, o in ((64, 200), (200, 64), (72, 72)) for p in (0.0, 0.1)
]  # fmt: skip
# Several row tiles of a sample, and samples that end inside a tile.
LONG = [over(MIXED, Gated, lead=lead, width=64, rank=7, granularity="small", biases="none", gate_bias=False) for lead in ((2, 150), (7, 37))]
# Parts of a multiple of 8 columns or not, of part of a step and of several; rows of more vectors than a block has threads. (With R from 64 and n from 4 one seed is enough.)
PHM_RANDOM = [
    replace(
        spec,
        dtype=dtypes[0],
        param_dtype=dtypes[1],
        width=spec.width if i % 4 == 3 else spec.division * 8 * max(1, spec.width // (8 * spec.division)),
        lead=(300,) if i % 9 == 5 and spec.division < 8 else spec.lead,
    )
    for i, spec in enumerate(random_specs(PHM, 80, 43))
    for dtypes in [HALF[i % 4] if spec.dtype == torch.float32 else (spec.dtype, spec.param_dtype)]
]
PHM_SHAPES = [
    *(over(HALF[i % 4], PHM, lead=(t,), rank=64 + 4 * i, width=w) for i, (t, w) in enumerate(((1, 64), (31, 64), (32, 96), (33, 160), (65, 256), (100, 288)))),
    *(over(d, PHM, lead=(37,), rank=68, width=w) for d, w in ((MIXED, 68), (FP16, 132), (BF16, 180))),
    over(MIXED, PHM, lead=(9,), rank=80, width=2144, division=1, factor_rank=2),  # 268 vectors of a row
    over(FP16, PHM, lead=(37,), rank=64, width=128, division=8),
    # Tiles of 8 and of 4 tokens, of 24 and 36 rows, which 16 does not divide.
    over(FP16, PHM, lead=(9,), rank=2400, width=24, division=3, biases="up"),
    over(MIXED, PHM, lead=(5,), rank=72, width=72, division=9, factor_rank=8),
    over(BF16, PHM, lead=(20,), rank=64, width=256, division=16),
    over(MIXED, PHM, lead=(11,), rank=64, width=64, division=8, factor_rank=8),
    over(FP16_MIXED, PHM, lead=(37,), rank=72, width=96, factor_rank=3),
]
PHM_OPTIONS = [
    *(over(d, PHM, lead=(37,), rank=64, width=64, activation=a, scale=0.5) for d in (MIXED, FP16) for a in ACTIVATIONS),
    *(over(MIXED, PHM, lead=(37,), rank=64, width=64, biases=b, residual=r) for b, r in (("none", None), ("down", "other"), ("up", "input"), ("both", "other"))),
    over(MIXED, PHM, lead=(37,), rank=64, width=64, norm_before=True, norm_after=True),
]
PHM_REAL = [over(MIXED, PHM, lead=(65,), width=768, rank=96), over(FP16, PHM, lead=(33,), width=1024, rank=192, residual="other", scale=0.3)]
ALL_PHM = [
    over(HALF[i % 4], PHM, lead=(t,), width=8 * n * w, rank=n * r, division=n, factor_rank=k, residual=("input", "other", None)[i % 3], scale=0.5)
    for i, (n, k, w, r) in enumerate((n, k, w, r) for n in (1, 2, 3, 4, 8, 16) for k in (1, 2, 3, 8) for w, r in ((1, 1), (2, 7), (5, 24)) if n * k < 65)
    for t in (1, 32, 75)
]
# Units of a row that are whole and ragged, of all threads and of some, of a narrow and of a wide block; every type of x, of the sum and of the parameters.
NORM_RANDOM = random_specs(Norm, 160, 45)
WIDTHS = (1, 7, 8, 64, 65, 513, 768, 1024, 1025, 1100, 2050, 4096, 8191, 8192)
STREAMS = (*((d, None, "same") for d in (*HALF[::2], FP32)), (MIXED, "fp32", "same"), (MIXED, None, "wide"), (FP16_MIXED, None, "wide"))
NORM_SHAPES = [
    over((d[0], torch.float32 if p else None), Norm, lead=(max(64 // w, t),), width=w, residual=r, norm=("layer", "rms")[i // 2 % 2], dropout=(0.0, 0.3)[i % 2], returns="both")
    for i, (t, w) in enumerate(zip((1, 2, 3, 5, 9) * 3, WIDTHS))
    for d, p, r in STREAMS[i % 3 :: 3]
]
NORM_OPTIONS = [
    *(
        over(d, Norm, lead=(37,), width=72, norm=n, biases=b, residual=r, returns=v, eps=0.1)
        for d, n, b, r, v in (
            (BF16, "layer", "none", "same", "both"),
            (MIXED, "rms", "weight", "wide", "y"),
            (FP16, "rms", "both", None, "y"),
            (FP32, "layer", "weight", None, "both"),
            (FP16_MIXED, "layer", "none", "wide", "sum"),
            (MIXED, "rms", "none", "same", "sum"),
        )
    ),
    *(
        over(d, Norm, lead=(37,), width=w, norm=None, biases="none", residual=r, dropout=p)
        for d, w, r, p in ((BF16, 72, "same", 0.3), (FP32, 33, None, 0.5), (MIXED, 1100, "wide", 0.1), (FP16, 40, "wide", 0.0), (FP32, 40, "same", 0.0))
    ),
    *(over(MIXED, Norm, lead=(70,), width=64, dropout=p) for p in (1e-12, 0.999)),
]
ALL_NORM = [
    over((d[0], torch.float32 if p else None), Norm, lead=(t,), width=w, residual=r, norm=n, dropout=q, returns="both")
    for d, p, r in STREAMS
    for t, w in ((63, 64), (65, 200), (1040, 72), (129, 768), (9, 1032), (5, 3001))
    for n, q in (("layer", 0.1), ("rms", 0.0))
]
# More than one split of the rows, the last one ragged.
SPLITS = [over(d, lead=(t,), rank=r, width=64, gate=True, biases=b, scale=0.5) for d, t, r, b in ((MIXED, 600, 7, "up"), (FP16, 1000, 96, "both"))]
SPLITS += [over(BF16, Gated, lead=(3, 200), rank=24, gate_rank=40, width=64, granularity=g) for g in ("large", "middleX")]
# And more than one tile a split, the last split of one and less.
SPLITS += [over(MIXED, PHM, lead=(300,), width=64, rank=64), over(FP16, PHM, lead=(8210,), width=64, rank=64, biases="none")]
SPLITS += [over(MIXED, Norm, lead=(2055,), width=64, residual="wide", dropout=0.1), over(BF16, Norm, lead=(515,), width=1040, norm="rms")]
CALLS = [
    over(MIXED, lead=(3, 13), residual="other", scale="tensor", gate=True),
    over(BF16, lead=(70,), width=40, rank=7),
    # Not large_full, whose gate is a product of torch's own.
    *(over(d, Gated, lead=(3, 23), granularity=g) for d, g in ((MIXED, "large"), (FP16, "middleX"), (MIXED, "middleY"), (FP16_MIXED, "small"))),
    over(MIXED, Gated, lead=(3, 13), combine="add", save_gate=False, rank=7, gate_rank=5),
    # The narrower problem alone goes through the kernels of the wider, whose tiles have more rows.
    *(over(d, Gated, lead=(2, 70), width=64, rank=r, gate_rank=rg) for d, r, rg in ((MIXED, 24, 104), (BF16, 104, 24), (FP16, 96, 200))),
    over(MIXED, PHM, lead=(3, 13), width=64, rank=20, residual="other", scale=0.7, factor_rank=2),
    over(FP16, PHM, lead=(37,), width=36, rank=12, activation="silu"),
]
CALLS += [over(MIXED, Routed, lead=(3, 23), rank=7, residual="other", scale=0.7, outside=True, shared="up"), over(FP16, Routed, lead=(70,), ids="row")]
EMPTY = [
    over(MIXED, Routed, lead=(0, 5)),
    *(over(d, Lora, lead=(0, 5), out=64, width=40, biases="up", **DROPS) for d in (MIXED, FP16)),
    *(over(d, lead=lead, scale="tensor", gate=True) for d in (BF16, FP16_MIXED) for lead in ((0,), (5, 0))),
    *(over(d, Gated, lead=(0, 5), granularity=g, save_gate=s) for d in (MIXED, FP16) for g in GRANULARITIES for s in (True, False)),
    *(over(d, PHM, lead=lead, width=64) for d in (MIXED, FP16) for lead in ((0,), (5, 0))),
    *(over(d, Norm, lead=(0, 5), residual="wide", norm=n, returns="both", dropout=0.1) for d in (MIXED, FP32) for n in ("layer", "rms")),
]
CALLS += [
    over(d, Norm, lead=(3, 23), width=w, residual=r, norm=n, dropout=0.3, returns="both")
    for d, w, r, n in ((MIXED, 40, "wide", "layer"), (FP16, 33, None, "rms"), (FP32, 1032, "same", "layer"), (MIXED, 1027, "same", "rms"))
]
CALLS += [over(MIXED, Lora, lead=(3, 23), width=40, out=72, rank=7, biases="up", scale=0.7, **DROPS), over(FP16, Lora, lead=(70,), width=72, out=40, rank=8)]
PAIRS = [
    *(over(d, lead=(70,), gate=True, scale="tensor", width=72, rank=r, activation=a) for d, r, a in ((MIXED, 70, "gelu_new"), (FP16, 24, "silu"))),
    *(over(d, Gated, lead=(3, 23), granularity=g, save_gate=s, rank=30, gate_rank=20) for d, s in ((MIXED, True), (FP16, False)) for g in GRANULARITIES),
    *(over(d, PHM, lead=(37,), width=64, rank=64, activation=a) for d, a in ((MIXED, "gelu_new"), (FP16, "silu"))),
    over(MIXED, Routed, lead=(70,), rank=30, outside=True, shared="up", ids="row"),
    *(over(d, Lora, lead=(70,), width=w, out=o, rank=30, **DROPS) for d, w, o in ((MIXED, 72, 64), (FP16, 64, 72))),
    *(over(d, Norm, lead=(70,), width=72, residual=r, norm=n, dropout=0.3, returns="both") for d, r, n in ((MIXED, "wide", "layer"), (FP16, None, "rms"), (FP32, "same", "rms"))),
]


ALL_ROWS = [*SHAPES, *OPTIONS, *GATED, *GATED_SMALL, *LONG, *SPLITS, *REAL, *PHM_SHAPES, *PHM_OPTIONS, *PHM_REAL, *ROUTED, *LORA, *NORM_SHAPES, *NORM_OPTIONS]


@on_kernels
@specs([*ALL_ROWS, *RANDOM[:30], *RANDOM[100:140], *PHM_RANDOM[:20], *RANDOM_ROUTED[:24], *RANDOM_LORA[:24], *NORM_RANDOM[:30]])
def test_within_rule(spec: Spec, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@pytest.mark.full
@on_kernels
@specs([*RANDOM[30:100], *RANDOM[140:], *ALL_SHAPES, *PHM_RANDOM[20:], *ALL_PHM, *RANDOM_ROUTED[24:], *ALL_ROUTED, *RANDOM_LORA[24:], *ALL_LORA, *NORM_RANDOM[30:], *ALL_NORM])
def test_more_within_rule(spec: Spec, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@on_kernels
@specs(EMPTY)
def test_no_rows(spec: Spec, name: str, device: str, request: pytest.FixtureRequest) -> None:
    """Zero rows: an empty output, gradients of zero, nothing launched."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())
    if name == "emulated-cuda":
        assert request.getfixturevalue("machine").stats() == {}


@on_kernels
@specs([spec for spec in CALLS if spec.dtype != spec.param_dtype])
def test_placeholders_are_those_of_the_fake_implementation(spec: Spec, name: str, device: str) -> None:
    """Of a gradient that nobody asked for, in a call of two dtypes: torch's tracer takes the fake's word for it."""
    with checks.spied() as calls:
        checks.fused(spec, name, spec.draw(0, device), spec.cotangent(0, device))
    *args, needs = calls[-1][1]
    op = getattr(torch.ops.fastadapt, f"{spec.op}_backward").default
    for asked in ([False] * len(needs), [need and i % 2 == 0 for i, need in enumerate(needs)], [need and i % 2 == 1 for i, need in enumerate(needs)]):
        assert torch.library.opcheck(op, (*args, asked, backend.index(name)), test_utils="test_faketensor") == {"test_faketensor": "SUCCESS"}


@on_kernels
@specs(CALLS)
class TestCall:
    """What holds for each call, whatever its numbers: all with the same bits."""

    def test_gradients_asked_alone(self, spec: Spec, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device)

    def test_without_gradients(self, spec: Spec, name: str, device: str) -> None:
        checks.assert_no_grad_path(replace(spec, returns="y") if isinstance(spec, Norm) else spec, name, device)

    def test_arguments_are_untouched(self, spec: Spec, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Spec, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device)

    def test_deterministic(self, spec: Spec, name: str, device: str) -> None:
        checks.assert_deterministic(spec, name, device)


@specs([SPLITS[0], SPLITS[2], GATED[4], LONG[0], PHM_SHAPES[5], ROUTED[-1], LORA[-5], SPLITS[-1], SPLITS[-2]])
def test_schedules_change_no_bit(spec: Spec, emulated: None) -> None:
    """Warps and blocks in any order: sums are added in an order of their own."""
    tensors, dy = spec.draw(0), spec.cotangent(0)
    results = []
    for policy, seed in emulator.schedules():
        with emulator.device(policy, seed, global_races=True):
            results.append(checks.fused(spec, "emulated-cuda", tensors, dy))
    for other in results[1:]:
        checks.assert_same_bits(results[0], other)


@pytest.mark.parametrize(
    ("forward", "backward", "device"),
    [
        *(pytest.param(f, b, "cpu", id=f"{f}-{b}") for other in ("reference", "cpu") for f, b in ((other, "emulated-cuda"), ("emulated-cuda", other))),
        *(pytest.param(f, b, "cuda", id=f"{f}-{b}", marks=CUDA.marks) for other in ("reference", "triton") for f, b in ((other, "cuda"), ("cuda", other))),
    ],
)
@specs(PAIRS)
def test_any_backward_after_any_forward(spec: Spec, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@on_kernels
@pytest.mark.parametrize("dtypes", HALF[::2], ids=["bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation: str, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    """One number an element, from -90 to 90: nothing overflows, and derivatives keep their accuracy where the activation is nearly the identity."""
    spec = over(dtypes, lead=(376,), width=8, rank=8, activation=activation, biases="none", residual=None)
    one = torch.eye(8, device=device, dtype=dtypes[1])
    for low, high in ((-90, 90), (-6, 6), (3, 6)):
        tensors = {"x": torch.linspace(low, high, 376 * 8, device=device).view(376, 8).to(dtypes[0]), "w_down": one, "w_up": one}
        dy = torch.ones_like(tensors["x"])
        got, same, exact64 = checks.fused(spec, name, tensors, dy, needs=("x",)), checks.in_eager(spec, tensors, dy), checks.exact(spec, tensors, dy)
        for key in got:
            assert_close_to_f64(f"{key} in {low} .. {high}", got[key], exact64[key], same[key], gradient=key != "y")


@on_kernels
@specs(
    [
        *(over(d, kind, lead=(3,), width=64, rank=8, biases="up") for d in (BF16, FP16_MIXED) for kind in (Bottleneck, Gated, PHM, Routed, Lora)),
        *(over(d, Norm, lead=(3,), width=w, residual=r, dropout=0.3) for d, w, r in ((BF16, 64, "same"), (FP16, 1030, "same"), (MIXED, 65, "wide"))),
    ]
)
def test_rows_beyond_2_31_elements(spec: Spec, name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN

    def apart(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(2 * 2**30 + 16 + t.shape[1], dtype=t.dtype, device=device).as_strided(t.shape, (2**30 + 8, 1)).copy_(t)

    checks.assert_same_bits(expected, checks.fused(spec, name, {n: apart(t) if n in spec.activations else t for n, t in tensors.items()}, apart(dy)))


@on_kernels
@pytest.mark.parametrize("dtypes", HALF[::3], ids=["bf16", "fp16 and fp32"])
@pytest.mark.parametrize(("shared", "ids", "rank"), [("", "sample", 24), ("down", "row", 24), ("up", "row", 110)])
def test_a_mixed_batch_gives_row_for_row_what_batches_of_one_task_give(
    shared: str, ids: str, rank: int, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very bits, of ranks in the same bucket of both ops and not, with several tiles and splits a task."""
    monkeypatch.setattr(test_routed_bottleneck, "over", lambda _, **options: over(dtypes, Routed, **{**options, "rank": rank, "lead": (20, 70)}))
    test_routed_bottleneck.test_a_mixed_batch_gives_row_for_row_what_batches_of_one_task_give(ids, shared, dtypes, name, device)


@on_kernels
def test_rows_of_no_task_and_absent_tasks(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_routed_bottleneck, "EVERYTHING", replace(test_routed_bottleneck.EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]))
    test_routed_bottleneck.test_rows_of_no_task_pass_untouched_and_absent_tasks_have_zero_gradients(name, device)


@on_kernels
def test_nan_of_one_task_reaches_no_other(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_routed_bottleneck, "EVERYTHING", replace(test_routed_bottleneck.EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]))
    test_routed_bottleneck.test_nan_of_one_task_reaches_no_other(name, device)


@on_kernels
@pytest.mark.parametrize(("rows", "width"), [(65, 32), (300, 72), (130, 256)])
def test_forward_and_backward_drop_what_the_definition_says(rows: int, width: int, name: str, device: str) -> None:
    """Element for element, also where a probability is the very number of an element, which is kept. The gradient of w_down is the mask where dz is an identity."""
    seed = torch.tensor([-7], device=device)
    at = int(philox((9 // 4, 5, 0, 0), (-7 & 0xFFFFFFFF, 0xFFFFFFFF))[9 % 4])
    for p in (0.5, 0.03, at / 2**32, (at + 1) / 2**32):
        kept = keep(seed, rows, width, p)
        factor = torch.where(kept, 1 / (1 - p), 0.0).to(torch.bfloat16)
        one = torch.eye(width, dtype=torch.bfloat16, device=device)
        w_down, square = one.clone().requires_grad_(), torch.ones(width, width, dtype=torch.bfloat16, device=device)
        with checks.runs_on("lora", name, counts=(2, 2)):
            forward, backward = test_lora.masks(torch.ones(rows, width, dtype=torch.bfloat16, device=device), p, seed)
            y = functional.lora(square, torch.zeros_like(square), w_down, one, dropout=p, seed=seed)
            (d_down,) = torch.autograd.grad(y, w_down, one)
        assert torch.equal(forward, factor) and torch.equal(backward, factor)
        count = min(rows, width)
        assert torch.equal(d_down[:count], factor[:count])
    assert keep(seed, 6, 12, at / 2**32)[5, 9] and not keep(seed, 6, 12, (at + 1) / 2**32)[5, 9]


@on_kernels
@pytest.mark.parametrize(("rows", "width", "dtype"), [(65, 32, torch.bfloat16), (9, 1027, torch.half), (7, 1100, torch.float32)], ids=["whole", "ragged", "fp32"])
def test_the_norm_s_mask_is_the_definition_s(rows: int, width: int, dtype: torch.dtype, name: str, device: str) -> None:
    """Element for element, forward and backward, also where a probability is the very number of an element; what is dropped may be infinite."""
    seed = torch.tensor([-7], device=device)
    number = int(philox((9 // 4, 5, 0, 0), (-7 & 0xFFFFFFFF, 0xFFFFFFFF))[9 % 4])
    for p in (0.5, number / 2**32, (number + 1) / 2**32):
        kept = keep(seed, rows, width, p)
        x, one = torch.ones(rows, width, dtype=dtype, device=device, requires_grad=True), torch.ones((), dtype=dtype, device=device)
        with checks.runs_on("dropout_add_norm", name, counts=(2, 1)):
            y, of_ones = (functional.dropout_add_norm(t, norm=None, dropout=p, seed=seed) for t in (torch.where(kept, x, torch.inf), x))
            (d_x,) = torch.autograd.grad(of_ones, x, torch.where(kept, one, torch.inf))
        factor = torch.where(kept, torch.tensor(1 / (1 - p), dtype=torch.float32, device=device), 0.0).to(dtype)
        assert torch.equal(y, factor) and torch.equal(d_x, factor)


NORM_TESTS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *(
        (test_dropout_add_norm.test_parameters_are_not_rounded, {"spec": over(MIXED, Norm, lead=(70,), width=w, residual=r, norm=n)})
        for w, r, n in ((48, "same", "layer"), (50, "wide", "rms"), (1042, "same", "rms"))
    ),
    *((test_dropout_add_norm.test_the_statistics_are_of_the_rounded_sum, {"dtype": dtype}) for dtype in (torch.float32, torch.bfloat16)),
    *((test_dropout_add_norm.test_what_would_be_x_is_x, {"norm": norm}) for norm in ("layer", "rms", None)),
    *((test_dropout_add_norm.test_the_same_gradient_is_written_once, {"dtype": torch.bfloat16, "residual": residual}) for residual in ("same", "wide")),
    *((test_dropout_add_norm.test_the_sum_alone_is_differentiated, {"dropout": dropout}) for dropout in (0.0, 0.3)),
    *((test_dropout_add_norm.test_a_mean_far_from_zero_and_numbers_far_from_one, {"scale": scale}) for scale in (1e-15, 1e15)),
    (test_dropout_add_norm.test_constant_rows_are_finite, {}),
    (test_dropout_add_norm.test_what_is_dropped_is_never_multiplied, {}),
    (test_dropout_add_norm.test_it_is_torchs_layer_norm_and_t5s, {}),
    (test_dropout_add_norm.test_a_checkpointed_call_draws_its_mask_again, {"reentrant": False}),
    (test_dropout_add_norm.test_autocast_leaves_dtypes, {"compiled": True}),
]


@on_kernels
@pytest.mark.parametrize(("test", "arguments"), NORM_TESTS, ids=[f"{test.__name__.removeprefix('test_')}-{'-'.join(map(str, of.values()))}" for test, of in NORM_TESTS])
def test_what_holds_of_a_norm_on_every_backend(test: Callable[..., None], arguments: dict[str, Any], name: str, device: str) -> None:
    test(**arguments, name=name, device=device)


@on_kernels
def test_what_is_dropped_is_never_multiplied(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_lora, "EVERYTHING", replace(test_lora.EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]))
    test_lora.test_what_is_dropped_is_never_multiplied(name, device)


@on_kernels
@specs([over(d, Lora, lead=(130,), width=w, out=w, rank=r, scale=0.7) for d in HALF for w, r in ((32, 7), (96, 24), (72, 170))])
def test_lora_without_dropout_is_a_bottleneck_of_identity(spec: Lora, name: str, device: str) -> None:
    test_lora.test_without_dropout_it_is_a_bottleneck_of_identity(spec, name, device)


@on_kernels
def test_rows_of_no_task_meet_no_weight(name: str, device: str) -> None:
    """Neither a weight nor a neighbour that is not finite reaches them, and what they hold reaches no gradient."""
    spec = over(BF16, Routed, lead=(40,), ids="row", outside=True)
    tensors, dy, ids = spec.draw(0, device), spec.cotangent(0, device), spec.task_ids(device)
    none, x = ids == -1, tensors["x"].clone()
    expected = checks.fused(spec, name, tensors, dy)
    x[none] = torch.inf
    got = checks.fused(spec, name, {**tensors, "x": x}, dy)
    assert torch.equal(got["y"][none], x[none]) and torch.equal(got["d x"][none], dy[none])
    checks.assert_same_bits({n: t[~none] if n in ("y", "d x") else t for n, t in got.items()}, {n: t[~none] if n in ("y", "d x") else t for n, t in expected.items()})
    nan = {n: t if n == "x" else torch.full_like(t, torch.nan) for n, t in tensors.items()}
    got = checks.fused(spec, name, nan, dy)
    assert torch.equal(got["y"][none], tensors["x"][none]) and torch.equal(got["d x"][none], dy[none]) and got["y"][~none].isnan().all()


@on_kernels
@pytest.mark.parametrize("shared", [("w_up",), ("b_up",), ("w_down",), ("b_down", "w_up"), ("w_down", "b_up")], ids="-".join)
def test_any_parameter_is_shared_or_not(shared: tuple[str, ...], name: str, device: str) -> None:
    spec = over(FP16_MIXED, Routed, lead=(90,), ids="row", rank=64, width=64)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    tensors = {n: t[:1] if n in shared else t for n, t in tensors.items()}
    got, same, exact64 = checks.fused(spec, name, tensors, dy), checks.in_eager(spec, tensors, dy), checks.exact(spec, tensors, dy)
    for key in got:
        assert got[key].shape == exact64[key].shape
        assert_close_to_f64(key, got[key], exact64[key], same[key], gradient=key != "y")


@on_kernels
def test_ids_far_outside_touch_nothing(name: str, device: str) -> None:
    x, w = torch.randn(5, 8, device=device, dtype=torch.half), torch.randn(2, 3, 8, device=device, dtype=torch.half)
    ids = torch.tensor([2, -(2**62), 2**62, -1, 99], device=device)
    with checks.runs_on("routed_bottleneck", name, counts=(1, 0)):
        assert torch.equal(functional.routed_bottleneck(x, ids, w, w.transpose(1, 2)), x)


@on_kernels
def test_zero_up_projection_is_the_identity(name: str, device: str) -> None:
    spec = over(MIXED)
    tensors = spec.draw(0, device)
    tensors["w_up"].zero_(), tensors["b_up"].zero_()
    assert torch.equal(checks.fused(spec, name, tensors, None)["y"], tensors["x"])


@on_kernels
def test_relu_has_no_gradient_at_zero(name: str, device: str) -> None:
    spec = over(MIXED, activation="relu", biases="none", residual=None)
    tensors = spec.draw(0, device)
    tensors["x"].zero_()
    assert not checks.fused(spec, name, tensors, spec.cotangent(0, device))["d x"].any()


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gates_saturate_and_keep_what_is_no_number(dtype: torch.dtype, name: str, device: str) -> None:
    test_gated_bottleneck.test_gates_saturate_and_keep_what_is_no_number(dtype, name, device)


@on_kernels
@specs(
    [
        *(over(d, kind, lead=(3, 5), width=64, rank=16, activation=a) for d, kind in ((FP16, Bottleneck), (BF16, PHM)) for a in ACTIVATIONS),
        over(MIXED, Routed, lead=(3, 5), width=64, rank=16, tasks=1),  # whose reference lets what is undefined into the gradients of other tasks
        *(over(d, Gated, lead=(3, 5), width=64, granularity=g, save_gate=s) for d, s in ((MIXED, False), (FP16, True)) for g in GRANULARITIES),
        *(over(BF16, Gated, lead=(3, 5), width=64, granularity=g, combine="add") for g in GRANULARITIES),
        over(MIXED, Lora, lead=(3, 5), width=64, out=72, rank=16),
        *(over(d, Norm, lead=(3, 5), width=w, residual=r, norm=n) for d, w, r, n in ((MIXED, 64, "wide", "layer"), (FP16, 33, "same", "rms"))),
        over(BF16, Norm, lead=(3, 5), width=40, norm=None, biases="none"),
    ]
)
def test_what_is_no_number_is_where_the_reference_has_it(spec: Spec, name: str, device: str) -> None:
    """In the output and in every gradient: nothing that follows from an undefined input looks defined, and nothing else is undefined."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    tensors["h" if "h" in tensors else "x"][1, 2, 3] = torch.nan
    got, expected = checks.fused(spec, name, tensors, dy), checks.fused(spec, "reference", tensors, dy)
    wrong = {key: (int(t.isnan().sum()), int(expected[key].isnan().sum())) for key, t in got.items() if not torch.equal(t.isnan(), expected[key].isnan())}
    assert expected["y"].isnan().any() and not wrong


@on_kernels
@specs([over(FP16, kind, lead=(9,), width=64, rank=16, activation="relu") for kind in (Bottleneck, PHM, Routed)])
def test_relu_of_a_pre_activation_that_overflows_downwards(spec: Spec, name: str, device: str) -> None:
    """It is minus infinity in fp16, and relu makes 0 of it like of any other."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    tensors["b_down"].fill_(-torch.inf)
    got, expected = checks.fused(spec, name, tensors, dy), checks.fused(spec, "reference", tensors, dy)
    assert all(t.isfinite().all() and expected[key].isfinite().all() for key, t in got.items()) and not got["d w_down" if "d w_down" in got else "d left_down"].any()


@on_kernels
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_save_gate_says_what_is_kept(granularity: str, name: str, device: str) -> None:
    """`save_gate` keeps H' and, for large, the gate in the activations' dtype; z, zg and the fp32 logits of a row gate are kept in any case."""
    for save in (True, False):
        spec = over(MIXED, Gated, granularity=granularity, save_gate=save)
        with checks.spied() as calls:
            checks.fused(spec, name, spec.draw(0, device), spec.cotangent(0, device))
        kept = [(tuple(t.shape), t.dtype) for t in calls[0][2][1:]]
        large, none = granularity == "large", ((0,), torch.bfloat16)
        assert kept[:3] == [((65, 12), torch.bfloat16), ((65, 6), torch.bfloat16) if large else none, ((65 if granularity in ("middleX", "small") else 0,), torch.float32)]
        assert kept[3:] == [((65, 48), torch.bfloat16) if save else none, ((65, 48), torch.bfloat16) if save and large else none]


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case_id", test_bottleneck.RECORDED)
def test_recorded_bottleneck(case_id: str, dtype: torch.dtype, name: str, device: str) -> None:
    checks.assert_recorded(test_bottleneck.build, load_case(case_id), "bottleneck", name, device, dtype)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case_id", test_gated_bottleneck.RECORDED)
def test_recorded_gated_bottleneck(case_id: str, dtype: torch.dtype, name: str, device: str) -> None:
    checks.assert_recorded(test_gated_bottleneck.build, load_case(case_id), "gated_bottleneck", name, device, dtype)


@on_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case_id", test_phm_bottleneck.RECORDED)
def test_recorded_phm_bottleneck(case_id: str, dtype: torch.dtype, name: str, device: str) -> None:
    checks.assert_recorded(test_phm_bottleneck.build, load_case(case_id), "phm_bottleneck", name, device, dtype)


@on_kernels
@pytest.mark.parametrize("spec", [over(MIXED), over(MIXED, PHM, width=64)], ids=["bottleneck", "phm_bottleneck"])
def test_under_autocast(spec: Spec, name: str, device: str) -> None:
    """fp32 parameters, activations in autocast's dtype: the kernels' own mixture, and the bits of a call without autocast."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    with torch.autocast(device, torch.bfloat16):
        checks.assert_same_bits(expected, checks.fused(spec, name, tensors, dy))


@on_kernels
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 44}, "a width that is a multiple of 8"),
        ({"width": 4}, "a width that is a multiple of 8"),
        ({"rank": 257}, "ranks from 1 to 256"),
        ({"dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
        ({"dtype": torch.float64}, "bfloat16 and float16, not torch.float64"),
    ],
    ids=["ragged width", "narrow", "rank", "fp32", "fp64"],
)
def test_what_it_cannot_take_is_refused_with_the_reason(changes: Mapping[str, Any], reason: str, name: str, device: str) -> None:
    spec = replace(over(BF16), **{**changes, **({"param_dtype": changes["dtype"]} if "dtype" in changes else {})})
    tensors = spec.draw(0, device)
    with backend.use(name), pytest.raises(backend.BackendError, match=f"'{name}' was demanded but cannot run bottleneck.*{reason}"):
        spec.call(functional, tensors)
    with backend.use("auto"):  # another backend takes it
        before = backend.ran(reset=True)
        assert spec.call(functional, tensors).shape == (65, spec.width)
        assert [key for key in backend.ran() if key[2] != name] and not [key for key in backend.ran() if key[2] == name]
        for key, n in before.items():
            for _ in range(n):
                backend.count(*key)


@on_kernels
def test_a_gate_rank_it_cannot_take(name: str, device: str) -> None:
    spec = over(BF16, Gated, gate_rank=257)
    with backend.use(name), pytest.raises(backend.BackendError, match="ranks from 1 to 256"):
        spec.call(functional, spec.draw(0, device))


@on_kernels
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 17 * 8, "rank": 17, "division": 17}, "divisions from 1 to 16"),
        ({"width": 32, "rank": 4, "factor_rank": 9}, "factor ranks from 1 to 8"),
        ({"width": 4, "rank": 32768}, "do not fit the 99 KB of shared memory"),
        ({"width": 32, "dtype": torch.float32}, "bfloat16 and float16, not torch.float32"),
    ],
    ids=["division", "factor rank", "too large", "fp32"],
)
def test_a_phm_it_cannot_take(changes: Mapping[str, Any], reason: str, name: str, device: str) -> None:
    spec = replace(over(BF16, PHM), **{**changes, **({"param_dtype": changes["dtype"]} if "dtype" in changes else {})})
    with backend.use(name), pytest.raises(backend.BackendError, match=f"'{name}' was demanded but cannot run phm_bottleneck.*{reason}"):
        spec.call(functional, spec.draw(0, device))


@on_kernels
@pytest.mark.parametrize(
    ("spec", "reason"),
    [(over(BF16, Norm, width=8193, lead=(2,)), "norms of a width from 1 to 8192"), (Norm(dtype=torch.float64), "bfloat16, float16 and float32, not torch.float64")],
    ids=["width", "fp64"],
)
def test_a_norm_it_cannot_take(spec: Norm, reason: str, name: str, device: str) -> None:
    with backend.use(name), pytest.raises(backend.BackendError, match=f"'{name}' was demanded but cannot run dropout_add_norm.*{reason}"):
        spec.call(functional, spec.draw(0, device))


def test_the_raw_norm_op_refuses_it_too(machine: emulator.Machine) -> None:
    x, ops = torch.zeros(2, 8193, dtype=torch.half), torch.ops.fastadapt_cuda_emulated
    with pytest.raises(RuntimeError, match=r"a width from 1 to 8192 \(rows 2, width 8193\)"):
        ops.dropout_add_norm(x, None, None, None, None, 1, 1e-5, 0.0, True)
    with pytest.raises(RuntimeError, match="weight and bias must have the sum's type or float32"):
        ops.dropout_add_norm(x[:, :8], x[:, :8].float(), x[0, :8], None, None, 1, 1e-5, 0.0, True)


def test_more_rows_than_a_grid_has_blocks(machine: emulator.Machine) -> None:
    """A norm has a block a row, and the backward of a mixed batch a row of blocks a split. (Rows that are one and the same take no memory.)"""
    ops = torch.ops.fastadapt_cuda_emulated
    assert ops.norm_why_not(2, 2, 2, 1, 2**31 - 1) == "" and "fewer than 2^31 rows" in ops.norm_why_not(2, 2, 2, 1, 2**31)
    dy = torch.zeros(1, 1, dtype=torch.half).expand(2**31, 1)
    with pytest.raises(RuntimeError, match=r"norms of fewer than 2\^31 rows \(rows 2147483648, width 1\)"):
        ops.dropout_add_norm_backward(dy, None, None, None, None, None, None, 2, 0.0, torch.half, 0)
    # A row a task, 256 rows a split, and one more of each for no task.
    assert ops.routed_why_not(65535, 64, 65279) == "" and "more splits than a grid has blocks" in ops.routed_why_not(65535, 64, 65280)
    assert ops.routed_why_not(2**31 - 1, 64, 340) == "" and ops.routed_why_not(2**31 - 1, 64, 341) != ""
    x, w = torch.zeros(65535, 8, dtype=torch.half), torch.zeros(65280, 1, 8, dtype=torch.half)
    ids, z = torch.arange(65535), torch.zeros(65535, 1, dtype=torch.half)
    with pytest.raises(RuntimeError, match=r"a grid has blocks \(65535\) \(rows 65535, width 8, tasks 65280\)"):
        ops.routed_bottleneck_backward(x, x, ids, z, w, None, w.transpose(1, 2), None, 1.0, 0, True, 0)


def test_the_raw_phm_op_refuses_it_too(machine: emulator.Machine) -> None:
    tensors = list(over(BF16, PHM, biases="none", residual=None, factor_rank=9).draw(0).values())
    with pytest.raises(RuntimeError, match=r"factor ranks from 1 to 8 \(width 48, rank 12, division 4, factor rank 9\)"):
        torch.ops.fastadapt_cuda_emulated.phm_bottleneck(*tensors[:4], None, *tensors[4:], None, None, 1.0, 0, False, True)


@pytest.mark.parametrize(
    ("width", "rank", "dtype", "reason"),
    [(44, 8, torch.half, "multiple of 8"), (48, 257, torch.half, "ranks from 1 to 256"), (48, 8, torch.float32, "bfloat16 and float16"), (48, 8, torch.float64, "not dtype")],
)
def test_the_raw_op_refuses_it_too(width: int, rank: int, dtype: torch.dtype, reason: str, machine: emulator.Machine) -> None:
    x, w_down, w_up = torch.zeros(5, width, dtype=dtype), torch.zeros(rank, width, dtype=dtype), torch.zeros(width, rank, dtype=dtype)
    with pytest.raises(RuntimeError, match=reason):
        torch.ops.fastadapt_cuda_emulated.bottleneck(x, w_down, None, w_up, None, None, None, None, 1.0, 0, True, True)


def test_a_failed_launch_reaches_the_caller(emulated: None) -> None:
    """A saved tensor of too few rows: the error of the device and the shape of the call."""
    x, w_down, w_up = (torch.zeros(shape, dtype=torch.half) for shape in ((65, 48), (8, 48), (48, 8)))
    with pytest.raises(emulator.EmulatorError), emulator.device(), pytest.raises(RuntimeError, match=r"the cuda kernels failed: .*out of bounds.*rows 65, width 48, rank 8"):
        torch.ops.fastadapt_cuda_emulated.bottleneck_backward(x, x, torch.zeros(64, 8, dtype=torch.half), w_down, w_up, None, None, None, 1.0, 0, True, 1)


def test_the_numbers_of_the_granularities() -> None:
    """`Granularity` of csrc/include/gated_bottleneck.h stands beside KINDS."""
    text = (emulator.CSRC / "include" / "gated_bottleneck.h").read_text()
    assert re.search(r"enum Granularity : int \{ (.*) \}", text)[1].replace("k", "").lower().split(", ") == [kind.lower() for kind in KINDS]


def test_without_the_emulator_its_backend_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "_emulated", [])
    with backend.use("emulated-cuda"), pytest.raises(backend.BackendError, match=r"for tests, which build and load them"):
        backend.explain("bottleneck", rows=1, width=8, rank=77)
