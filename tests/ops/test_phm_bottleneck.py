"""`fastadapt.functional.phm_bottleneck` on every backend: options, shapes, dtypes, strides, what is computed and kept, and the recorded Compacters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import backend, functional
from tests import golden
from tests.golden import Case, load_case
from tests.ops import checks
from tests.ops.checks import CPU, REFERENCE, TRITON, every_backend, every_kernel, every_pair
from tests.ops.specs import ACTIVATIONS, DTYPES, FP32, MIXED, PHM, random_specs, specs
from tests.ops.test_bottleneck import ACTIVATION

RANDOM = random_specs(PHM, 200)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> PHM:
    return PHM(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [
    PHM(),
    *(PHM(activation=a) for a in ACTIVATIONS[1:]),
    *(PHM(biases=b) for b in ("none", "down", "up")),
    *(PHM(residual=r, scale=s) for r in ("other", None, "input") for s in (1.0, 0.3, 0.0)),
    *(PHM(division=n, factor_rank=k, biases=b) for n, k in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 3), (12, 1)) for b in ("both", "none")),
    *(PHM(norm_before=b, norm_after=a, residual=r, scale=0.3) for b, a in ((True, False), (False, True), (True, True)) for r in ("input", "other", None)),
]
EVERYTHING = PHM(lead=(3, 23), residual="other", scale=0.7, factor_rank=2)
SHAPES = [over(d, lead=(t,), rank=r, width=64) for d in (FP32, MIXED) for t in (0, 1, 63, 65, 300) for r in (4, 24, 96, 100)] + [
    over(d, width=w, rank=r) for d in (FP32, MIXED) for w in (4, 36, 768) for r in (12, 96)
]
ALL_SHAPES = [over(d, lead=(t,), rank=r, width=w, factor_rank=k) for d in DTYPES for t in (0, 1, 63, 65, 300) for r in (4, 24, 96, 100) for w in (4, 36, 64, 768) for k in (1, 2)]
REAL = [over(d, lead=(2, 65), width=w, rank=r) for d in (FP32, MIXED, DTYPES[4]) for w in (768, 1024) for r in (24, 96, 192)]
ALL_REAL = [
    over(d, lead=(2, 165), width=w, rank=r, division=n, factor_rank=k) for d in DTYPES for w in (768, 1024) for r in (24, 96, 192) for n, k in ((2, 1), (4, 1), (4, 4), (8, 1))
]


@specs([s for s in OPTIONS if not (s.norm_before or s.norm_after)])
def test_gradcheck(spec: PHM) -> None:
    checks.assert_gradcheck(replace(spec, lead=(2,), width=spec.division * 2, rank=spec.division))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: PHM) -> None:
    checks.assert_exact_reference(spec)


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs(OPTIONS)
def test_options(spec: PHM, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(RANDOM[:40])
def test_random_on_reference(spec: PHM) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@pytest.mark.full
@every_kernel
@specs(ALL_SHAPES)
def test_all_shapes(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(REAL)
def test_real_sizes(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_kernel
@specs([over(d, lead=(t,), width=96, rank=16) for d in (FP32, MIXED) for t in (100, 4000)])
def test_rows_all_alike(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device, change=checks.alike)


@pytest.mark.full
@every_backend
@specs(ALL_REAL)
def test_all_real_sizes(spec: PHM, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs([over(d, lead=lead) for d in DTYPES for lead in ((0,), (0, 5), (5, 0))])
def test_no_rows(spec: PHM, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs([EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]), PHM(lead=(70,), width=36, activation="relu")])
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: PHM, name: str, device: str) -> None:
        # Triton's compiler spreads the tiles' shares, which one kernel adds up, over threads as their width allows, which is that of all gradients asked for together. In half
        # precision it adds up dz itself, for d b_down, as the products of the other gradients have it. Alone the order may be another; equal calls have equal bits.
        parameters = spec.shapes().keys() - {"x", "residual"}
        checks.assert_single_gradients(spec, name, device, rounded=parameters if name == "triton" else ())

    def test_without_gradients(self, spec: PHM, name: str, device: str) -> None:
        checks.assert_no_grad_path(spec, name, device)

    def test_arguments_are_untouched(self, spec: PHM, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: PHM, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device)


@every_kernel
@specs([over(d, lead=(300,), width=w, rank=r, factor_rank=k) for d in (FP32, MIXED, DTYPES[4]) for w, r, k in ((96, 24, 1), (768, 96, 1), (36, 12, 3))])
def test_deterministic(spec: PHM, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_kernel
@specs([over(d, lead=(70,), width=w, rank=r) for d in (MIXED, DTYPES[4]) for w, r in ((48, 12), (160, 40))])
def test_parameters_are_rounded_first(spec: PHM, name: str, device: str) -> None:
    checks.assert_rounds_parameters(spec, name, device)


@every_pair
@specs([over(d, lead=(70,), activation=a, factor_rank=k) for d in (FP32, MIXED, DTYPES[3]) for a, k in (("gelu_new", 1), ("silu", 2))])
def test_any_backward_after_any_forward(spec: PHM, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@pytest.mark.parametrize(("name", "device"), [REFERENCE, CPU, TRITON])
def test_rows_beyond_2_31_elements(name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    spec = over(DTYPES[4], lead=(3,), width=40, rank=8)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    apart = []
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    for t in (tensors["x"], dy):
        rows = torch.empty(2 * 2**30 + 8 + spec.width, dtype=spec.dtype, device=device).as_strided((3, spec.width), (2**30 + 4, 1))
        apart.append(rows.copy_(t))
    checks.assert_same_bits(expected, checks.fused(spec, name, {**tensors, "x": apart[0]}, apart[1]))


@every_backend
def test_zero_right_factor_of_the_up_projection_is_the_identity(name: str, device: str) -> None:
    spec = PHM()
    tensors = spec.draw(0, device)
    tensors["right_up"].zero_(), tensors["b_up"].zero_()
    assert torch.equal(checks.fused(spec, name, tensors, None)["y"], tensors["x"])


@every_backend
def test_relu_has_no_gradient_at_zero(name: str, device: str) -> None:
    """Torch's convention, relu'(0) = 0: rows of zeros without a bias get no gradient."""
    spec = PHM(activation="relu", biases="none", residual=None)
    tensors = spec.draw(0, device)
    tensors["x"].zero_()
    assert not checks.fused(spec, name, tensors, spec.cotangent(0, device))["d x"].any()


@every_backend
def test_what_calls_share_gets_the_sum_of_their_gradients(name: str, device: str) -> None:
    """Shared rules and shared factors (Compacter, section 3.2): one tensor in both projections and in two calls."""
    spec = PHM(rank=48, lead=(70,))  # as wide as x: down and up can share every factor
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    once = ("rule", "left", "right")
    shared = {f: tensors[f"{f}_down"].clone().requires_grad_() for f in once}
    with backend.use(name):
        for x in (tensors["x"], -tensors["x"]):
            spec.call(functional, {**tensors, "x": x, **{f"{f}_{side}": t for f, t in shared.items() for side in ("down", "up")}}).backward(dy)
        single = {n: tensors[f"{n.split('_')[0]}_down"] if n.split("_")[0] in once else t for n, t in tensors.items()}
        separate = [checks.fused(spec, name, {**single, "x": x}, dy) for x in (tensors["x"], -tensors["x"])]
    for f, t in shared.items():
        expected = sum(r[f"d {f}_{side}"].double() for r in separate for side in ("down", "up"))
        assert t.grad is not None
        torch.testing.assert_close(t.grad.double(), expected, rtol=1e-5, atol=1e-5)


# Recorded cases with W of low rank.
RECORDED = [c for c in golden.case_ids() if c.startswith(("vla_phm_n4_rank", "comp_compacter"))]


def build(ops: Any, case: Case, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter controller, once per recorded output."""
    outputs = {}
    for name in case.outputs:
        suffix = name.removeprefix("y_out").removeprefix("y")
        task = suffix.removeprefix("_") or case.options["tasks"][0]
        p = {k.removeprefix(f"adapters.{task}."): v for k, v in params.items()}
        outputs[name] = ops.phm_bottleneck(inputs[f"x{suffix}"], **factors(p), activation=ACTIVATION[case.options["activation"]], residual="input")
    return outputs


def factors(p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of `phm_bottleneck` from an adapter's state dict; a factorised rule is a product."""
    out = {}
    for side in ("down", "up"):
        of = {k.removeprefix(f"{side}_sampler."): v for k, v in p.items() if k.startswith(f"{side}_sampler.")}
        out[f"rule_{side}"] = of["phm_rule"] if "phm_rule" in of else torch.bmm(of["phm_rule_left"], of["phm_rule_right"])
        out |= {f"left_{side}": of["W_left"], f"right_{side}": of["W_right"], f"b_{side}": of["b"]}
    return out


@pytest.mark.parametrize("case_id", RECORDED)
def test_recorded_in_fp64(case_id: str) -> None:
    checks.assert_recorded_in_fp64(build, load_case(case_id))


@pytest.mark.parametrize("case_id", RECORDED)
@every_backend
def test_recorded_in_fp32(case_id: str, name: str, device: str) -> None:
    checks.assert_recorded(build, load_case(case_id), "phm_bottleneck", name, device)


@every_backend
def test_recorded_cases_by_backend(name: str, device: str) -> None:
    """Which recorded cases ran on which backend (``pytest -s`` shows the table); a demanded backend ran all of them, forward and backward."""
    table = checks.recorded_table(build, [load_case(c) for c in RECORDED], name, device)
    print("\n".join(f"{case:55} {name:10} {what}" for case, what in table.items()))
    assert len(RECORDED) == 5
    assert all(what == f"backward {name} x1, forward {name} x1" for what in table.values())
