"""`fastadapt.functional.multimodal_bottleneck` on every backend: UniAdapter's modalities, against its two projections, sum and norm one by one.

The recorded cases run through the module: tests/nn/test_uni_adapter.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt import backend, functional
from tests.ops import checks
from tests.ops.checks import every_backend, every_kernel, one_backend_or_cuda
from tests.ops.specs import FP32, MIXED, Multimodal, random_specs, specs

RANDOM = random_specs(Multimodal, 120)
OPTIONS = [
    *(Multimodal(cross=c, residual=r) for c in (False, True) for r in ("input", "other", None)),
    *(Multimodal(biases=b) for b in ("none", "down", "up")),
    *(Multimodal(norm_before=before, norm_cross=True, scale=s, residual=r) for before in (False, True) for s in (0.1, "tensor") for r in ("other", None)),
    Multimodal(cross=False, norm_before=True, scale="tensor"),
]
EVERYTHING = Multimodal(lead=(3, 22), rank=20, residual="other", norm_before=True, norm_cross=True, scale="tensor")
SHAPES = [replace(EVERYTHING, lead=(t,), rank=r) for t in (1, 63, 65) for r in (7, 64)]
REAL = [replace(EVERYTHING, lead=(4, 56), width=768, rank=r, dtype=d[0], param_dtype=d[1]) for d in (FP32, MIXED) for r in (64, 512)]


@specs([*OPTIONS, *RANDOM[:40]])
def test_reference_is_exact(spec: Multimodal) -> None:
    checks.assert_exact_reference(spec)


@specs(OPTIONS)
def test_gradcheck(spec: Multimodal) -> None:
    checks.assert_gradcheck(replace(spec, lead=(3, 2), width=4, rank=3))


@every_backend
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs([*OPTIONS, *SHAPES])
def test_options(spec: Multimodal, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs([*RANDOM, *REAL])
def test_random_and_real(spec: Multimodal, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs([replace(EVERYTHING, lead=(0, 5)), replace(EVERYTHING, lead=(0,), dtype=MIXED[0], param_dtype=MIXED[1])])
def test_no_rows(spec: Multimodal, name: str, device: str) -> None:
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs([EVERYTHING, Multimodal(dtype=MIXED[0], param_dtype=MIXED[1], residual="other")])
class TestCall:
    def test_arguments_are_untouched(self, spec: Multimodal, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_deterministic(self, spec: Multimodal, name: str, device: str) -> None:
        checks.assert_deterministic(spec, name, device)


@one_backend_or_cuda
@specs([EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1])])
def test_compiled_and_checkpointed(spec: Multimodal, name: str, device: str) -> None:
    """One graph, and recomputed in backward: the numbers of a plain call."""
    if name == "cuda" and spec.dtype == torch.float32:
        pytest.skip("the cuda kernels take half precision")
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    plain = checks.fused(spec, name, tensors, dy)

    def again(t: Mapping[str, Tensor]) -> Tensor:
        return checkpoint(lambda: spec.call(functional, t), use_reentrant=False)  # type: ignore[no-any-return]

    with backend.use(name):
        checks.assert_same_bits(plain, checks.evaluate(again, tensors, dy))
        compiled = checks.evaluate(torch.compile(lambda t: spec.call(functional, t), fullgraph=True, backend="aot_eager"), tensors, dy)
    checks.assert_same_bits(plain, compiled)


@one_backend_or_cuda
def test_autocast(name: str, device: str) -> None:
    """fp32 arguments under autocast give what half-precision activations with fp32 parameters give."""
    spec = replace(EVERYTHING, lead=(70,))
    tensors = spec.draw(0, device)
    half = {n: t.bfloat16() if n in spec.activations else t for n, t in tensors.items()}
    with backend.use(name):
        expected = spec.call(functional, half)
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(spec.call(functional, tensors), expected)


def test_modalities_share_one_down_projection() -> None:
    """Image, text and cross-modal calls: the down-projection's gradient is the sum over all three, the text's up-projection gets those of text and cross-modal calls."""
    spec = Multimodal(biases="none", residual=None)
    t = {n: p.double().requires_grad_() for n, p in spec.draw(0).items()}
    visual = torch.randn_like(t["w_up"]).requires_grad_()
    calls = [
        functional.multimodal_bottleneck(t["x"], t["w_down"], visual, residual=None),
        functional.multimodal_bottleneck(t["x"], t["w_down"], t["w_up"], residual=None),
        functional.multimodal_bottleneck(t["x"], t["w_down"], t["w_up"], t["w_cross"], residual=None),
    ]
    names = [t["w_down"], t["w_up"], t["w_cross"], visual]
    alone = [torch.autograd.grad(y.sin().sum(), names, retain_graph=True, allow_unused=True) for y in calls]
    together = torch.autograd.grad(sum(y.sin().sum() for y in calls), names)  # type: ignore[arg-type]
    for i, got in enumerate(together):
        torch.testing.assert_close(got, sum(g[i] for g in alone if g[i] is not None))
    assert [g is not None for g in alone[0]] == [True, False, False, True]
    assert torch.equal(alone[2][1], alone[2][2])


def test_a_scale_of_one_element_has_any_shape() -> None:
    tensors = Multimodal().draw(0)
    norm = torch.ones(48), torch.zeros(48), 1e-5
    expected, *others = (functional.multimodal_bottleneck(**{**tensors, "scale": torch.full(shape, 0.5), "norm_cross": norm}) for shape in ((1,), (), (1, 1)))
    assert all(torch.equal(y, expected) for y in others)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w_cross": torch.zeros(48, 11)}, ValueError, r"w_cross: shape \(48, 11\) must equal that of w_up, \(48, 12\)"),
        ({"w_cross": torch.zeros(48, 12).bfloat16()}, TypeError, "w_cross: dtype torch.bfloat16 must equal that of w_up"),
        ({"w_cross": [1.0]}, TypeError, "w_cross: must be a tensor, not list"),
        ({"b_cross": torch.zeros(1)}, ValueError, r"b_cross: shape \(1,\) must equal that of b_up, \(48,\)"),
        ({"w_cross": None}, ValueError, "b_cross: there is no cross-modal up-projection"),
        ({"norm_cross": (torch.ones(47), torch.ones(48), 1e-5)}, ValueError, r"norm_cross weight: shape \(47,\) must be \(48,\)"),
        ({"scale": float("nan")}, ValueError, "scale: must be a finite number"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.multimodal_bottleneck(**{**Multimodal().draw(0), **change})
