"""The shipped CUDA kernels as nvcc compiled them: the ops run their PTX in the interpreter, under the rule of tests/tolerance.py.

To have a new kernel here, add a call that launches it to CASES: `test_every_shipped_kernel_runs` fails for a kernel that none launches.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda import nvcc, ptx, ptx_device
from tests.ops import checks
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, specs

FP16, FP16_MIXED = DTYPES[3:]
pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=str(nvcc.missing()))


def plain(dtypes: tuple[torch.dtype, torch.dtype], **options: object) -> Bottleneck:
    """Without a gradient of fewer than 64 elements, the rule asks for one seed."""
    return Bottleneck(**{"dtype": dtypes[0], "param_dtype": dtypes[1], "lead": (70,), "width": 72, "biases": "up", "gate": True, "scale": 0.5, **options})


def gated(dtypes: tuple[torch.dtype, torch.dtype], **options: object) -> Gated:
    return Gated(**{"dtype": dtypes[0], "param_dtype": dtypes[1], "lead": (5, 14), "width": 72, "biases": "up", "gate_bias": False, "scale": 0.5, **options})


def phm(dtypes: tuple[torch.dtype, torch.dtype], **options: object) -> PHM:
    return PHM(**{"dtype": dtypes[0], "param_dtype": dtypes[1], "lead": (37,), "width": 64, "rank": 64, "scale": 0.5, **options})


def routed(dtypes: tuple[torch.dtype, torch.dtype], **options: object) -> Routed:
    return Routed(**{"dtype": dtypes[0], "param_dtype": dtypes[1], "lead": (5, 14), "width": 72, "biases": "up", "scale": 0.5, "outside": True, **options})


def lora(dtypes: tuple[torch.dtype, torch.dtype], **options: object) -> Lora:
    return Lora(**{"dtype": dtypes[0], "param_dtype": dtypes[1], "lead": (70,), "width": 72, "out": 136, "rank": 16, "scale": 0.5, **options})


def norm(dtype: torch.dtype, **options: object) -> Norm:
    return Norm(**{"dtype": dtype, "lead": (9,), "width": 72, "dropout": 0.3, "returns": "both", **options})


# One kernel per template and dtype, with two bottlenecks or dropout and without.
CASES: list[Spec] = [
    plain(MIXED, rank=96),
    plain(FP16, rank=20, activation="gelu"),
    plain(FP16_MIXED, rank=64, biases="none", residual=None),
    gated(MIXED, rank=24, gate_rank=96, biases="none", save_gate=False),
    gated(FP16, rank=96, gate_rank=72, biases="none"),
    gated(BF16, rank=24, granularity="middleX", save_gate=False),
    gated(FP16_MIXED, rank=24, granularity="small", save_gate=False),
    phm(MIXED),
    phm(FP16, width=68, residual="other", lead=(9,)),
    phm(BF16, width=68, residual=None, lead=(9,), activation="relu"),
    phm(FP16_MIXED, activation="silu", lead=(9,)),
    routed(MIXED, rank=24),
    routed(FP16, rank=20, tasks=2, ids="row", residual="other"),
    lora(MIXED, dropout=0.3, biases="up"),
    lora(BF16, width=136, out=72),
    lora(FP16_MIXED, dropout=0.5, width=136, out=64, rank=7),
    lora(FP16),
    *(norm(d, width=w, norm=n, biases=b) for d in (torch.bfloat16, torch.half, torch.float32) for w, n, b in ((72, "layer", "both"), (67, "rms", "none"))),
]
# Every instance, every option of the ops.
ALL_CASES: list[Spec] = [
    *(plain(d, rank=r, activation=a) for d in (MIXED, FP16) for r, a in zip((32, 64, 96, 128, 192, 256), ACTIVATIONS * 2)),
    *(gated(d, rank=r, gate_rank=r - 8, biases="none") for d in (BF16, FP16_MIXED) for r in (32, 96, 192, 256)),
    *(gated(d, rank=r, granularity=g) for d in (MIXED, FP16) for r, g in zip((32, 96, 192, 256), ("small", "middleX", "middleY", "middleX"))),
    *(gated(d, rank=40, gate_rank=24, granularity=g, activation=a, combine=c) for d, c in ((BF16, "add"), (FP16, "multiply")) for g, a in zip(GRANULARITIES, ACTIVATIONS)),
    *(routed(d, rank=r, activation=a, shared=s) for d in (MIXED, FP16) for r, a, s in zip((32, 96, 192, 256), ACTIVATIONS, ("", "up", "down", ""))),
    routed(BF16, rank=7, biases="both", residual=None, lead=(130,), tasks=33, ids="row"),
    *(lora(d, rank=r, dropout=p, biases="up") for d in (MIXED, FP16) for r in (32, 64, 96, 128, 192, 256) for p in (0.0, 0.3)),
    plain(BF16, rank=7, biases="both", scale="tensor", residual="other", lead=(3, 23)),
    plain(FP16_MIXED, rank=96, width=768, lead=(300,)),
    *(phm(d, width=w, activation=a) for (d, w), a in zip(((MIXED, 96), (FP16, 100), (BF16, 132), (FP16_MIXED, 160), (BF16, 64)), ACTIVATIONS, strict=True)),
    *(phm(d, division=n, factor_rank=k, width=16 * n) for d, n, k in ((MIXED, 8, 2), (FP16, 16, 1), (BF16, 4, 8))),
    phm(BF16, width=768, rank=96, lead=(65,)),
    phm(BF16, lead=(8210,)),
    *(
        norm(d, width=w, norm=n, residual=r, biases=b, lead=(9 if w < 4096 else 2,))
        for d, r in ((torch.bfloat16, "same"), (torch.bfloat16, "wide"), (torch.half, "same"), (torch.half, "wide"), (torch.float32, "same"))
        for b, n, widths in (("both", "layer", (768, 65, 1032, 1027, 4104, 4101)), ("none", "rms", (64, 69, 2056, 1029, 8192, 4099)))
        for w in widths
    ),
    norm(torch.bfloat16, norm=None, biases="none"),
    norm(torch.bfloat16, width=64, lead=(1040,), param_dtype=torch.float32),
]


def within_rule(spec: Spec, perturb: ptx.Perturb = 0) -> set[str]:
    """Checks a call and returns the kernels that it launched."""
    with ptx_device.device(perturb) as launches:
        checks.assert_within_rule(spec, "emulated-cuda", "cpu")
    return set(launches)


def templates(kernels: set[str]) -> set[tuple[str, str]]:
    """Template, and dtype with whether it has two bottlenecks or dropout."""
    return {(name.split("<")[0], "".join(word for word in ("bf16", "half", "true") if word in name)) for name in kernels}


def test_one_kernel_of_each_template(poisoned_empty: None) -> None:
    ran = set().union(*(within_rule(spec) for spec in CASES))
    assert templates(ran) == templates(ptx_device.shipped())


def test_every_shipped_kernel_has_a_case() -> None:
    """The host code runs, the kernels do not."""
    with ptx_device.device(run=False) as launches:
        for spec in [*CASES, *ALL_CASES]:
            checks.fused(spec, "emulated-cuda", spec.draw(0), spec.cotangent(0))
    assert set(launches) == ptx_device.shipped()


@pytest.mark.full
def test_every_shipped_kernel_runs(poisoned_empty: None) -> None:
    ran = set().union(*(within_rule(spec) for spec in [*CASES, *ALL_CASES]))
    assert ran == ptx_device.shipped()


@pytest.mark.full
@pytest.mark.parametrize("perturb", [1, -1, {"ex2": 1, "rcp": -1}, {"ex2": -1, "rcp": 1}], ids=str)
@specs([plain(BF16, rank=24, activation="gelu_new"), plain(FP16, rank=24, activation="silu"), gated(FP16, rank=24, gate_rank=40, activation="gelu_new"), phm(FP16, lead=(9,))])
def test_approximations_that_are_wrong_by_their_bound(spec: Spec, perturb: ptx.Perturb, poisoned_empty: None) -> None:
    within_rule(spec, perturb)
