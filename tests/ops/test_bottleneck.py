"""`fastadapt.functional.bottleneck` on every backend: options, shapes, dtypes, strides, what is computed and kept, and the recorded adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import functional
from tests import golden
from tests.golden import Case, load_case
from tests.ops import checks
from tests.ops.checks import CPU, REFERENCE, TRITON, every_backend, every_kernel, every_pair, runs_on
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, FP32, MIXED, Bottleneck, random_specs, specs
from tests.tolerance import assert_close_to_f64

RANDOM = random_specs(Bottleneck, 200)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Bottleneck:
    return Bottleneck(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [
    Bottleneck(),
    *(Bottleneck(activation=a) for a in ACTIVATIONS[1:]),
    *(Bottleneck(biases=b) for b in ("none", "down", "up")),
    *(Bottleneck(residual=r) for r in ("other", None)),
    *(Bottleneck(scale=s, residual=r) for s in (0.3, 0.0, "tensor") for r in ("input", None)),
    *(Bottleneck(gate=True, scale=s, biases=b) for s in (0.3, "tensor") for b in ("both", "none")),
    *(Bottleneck(heads=h, biases=b) for h in (2, 4) for b in ("both", "none")),
    *(Bottleneck(norm_before=b, norm_after=a, residual=r, scale=s) for b, a in ((True, False), (False, True), (True, True)) for r in ("input", "other", None) for s in (0.3,)),
]
EVERYTHING = Bottleneck(lead=(3, 23), residual="other", scale="tensor", gate=True)
SHAPES = [over(d, lead=(t,), rank=r, width=64) for d in (FP32, MIXED) for t in (0, 1, 63, 65, 300) for r in (1, 7, 24, 96, 100)] + [
    over(d, width=w, rank=r) for d in (FP32, MIXED) for w in (1, 33, 768) for r in (7, 96)
]
ALL_SHAPES = [over(d, lead=(t,), rank=r, width=w) for d in DTYPES for t in (0, 1, 63, 65, 300) for r in (1, 7, 24, 96, 100) for w in (1, 33, 64, 768)]
FEW = [
    over(d, lead=lead, width=w, rank=r, **options)
    for d in DTYPES
    for lead, r in (((1,), 16), ((1, 2), 33), ((3,), 64), ((4,), 100), ((5,), 128), ((8,), 130))
    for w, options in ((40, {}), (77, {"residual": "other", "scale": "tensor", "gate": True}), (264, {"residual": None, "biases": "none", "scale": 0.3}))
]
# Up to four tiles, of every height of the last one, whose columns the CPU's threads share; ranks and widths that fill panels and blocks and that do not.
COLUMNS = [
    over(d, lead=(t,), width=w, rank=r, **options)
    for d in DTYPES
    for t, r in ((9, 7), (20, 36), (40, 100), (60, 32), (150, 33), (256, 64))
    for w, options in ((64, {}), (77, {"residual": "other", "scale": "tensor", "gate": True}), (264, {"residual": None, "biases": "none", "scale": 0.3}))
]
REAL = [over(d, lead=(2, 65), width=w, rank=r) for d in (FP32, MIXED, DTYPES[4]) for w in (768, 1024) for r in (96, 192)]
ALL_REAL = [over(d, lead=(2, 165), width=w, rank=r, scale="tensor", gate=True) for d in DTYPES for w in (768, 1024) for r in (96, 192)]


@specs([s for s in OPTIONS if not (s.norm_before or s.norm_after)])
def test_gradcheck(spec: Bottleneck) -> None:
    checks.assert_gradcheck(replace(spec, lead=(2,), width=4, rank=4))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: Bottleneck) -> None:
    checks.assert_exact_reference(spec)


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs(OPTIONS)
def test_options(spec: Bottleneck, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(RANDOM[:40])
def test_random_on_reference(spec: Bottleneck) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_kernel
@specs(FEW)
def test_few_rows(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(COLUMNS)
def test_few_tiles(spec: Bottleneck) -> None:
    checks.assert_within_rule(spec, "cpu", "cpu")


@pytest.mark.full
@every_kernel
@specs(ALL_SHAPES)
def test_all_shapes(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(REAL)
def test_real_sizes(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_kernel
@specs([over(d, lead=(t,), width=96, rank=16, scale="tensor", gate=True) for d in (FP32, MIXED) for t in (100, 4000)])
def test_rows_all_alike(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device, change=checks.alike)


@every_backend
@pytest.mark.parametrize(("width", "rank"), [(16, 16), (33, 7)])
def test_a_scale_of_one_element_has_any_shape(width: int, rank: int, name: str, device: str) -> None:
    spec = Bottleneck(lead=(5,), width=width, rank=rank, scale="tensor", gate=True)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    for shape in ((), (1, 1), (1, 1, 1)):
        got = checks.fused(spec, name, {**tensors, "scale": tensors["scale"].reshape(shape)}, dy)
        assert got["d scale"].shape == shape
        checks.assert_same_bits({**got, "d scale": got["d scale"].reshape(1)}, expected)


def test_the_reference_sums_what_fp16_can_hold() -> None:
    """Eager code scales dy before the product with the activations."""
    spec = Bottleneck(lead=(2048,), width=64, rank=8, activation="relu", scale=1e-3, dtype=torch.float16, param_dtype=torch.float16)
    tensors = {n: t.abs() * (30 if n == "x" else 1) for n, t in spec.draw(0).items()}
    assert checks.fused(spec, "reference", tensors, torch.ones(2048, 64).half())["d w_up"].isfinite().all()


@pytest.mark.full
@every_backend
@specs(ALL_REAL)
def test_all_real_sizes(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@pytest.mark.parametrize("dtypes", DTYPES[::2], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation: str, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    """One number a row, from -90 to 90: nothing overflows, and derivatives keep their accuracy where the activation is nearly the identity, whatever form it is computed in."""
    spec = over(dtypes, lead=(3001,), width=1, rank=1, activation=activation, biases="none", residual=None)
    tensors = {**spec.draw(0, device), "w_down": torch.ones(1, 1, device=device, dtype=dtypes[1]), "w_up": torch.ones(1, 1, device=device, dtype=dtypes[1])}
    for low, high in ((-90, 90), (-6, 6), (3, 6)):
        tensors["x"] = torch.linspace(low, high, 3001, device=device)[:, None].to(dtypes[0])
        dy = torch.ones_like(tensors["x"])
        got, same, exact64 = checks.fused(spec, name, tensors, dy, needs=("x",)), checks.in_eager(spec, tensors, dy), checks.exact(spec, tensors, dy)
        for key in got:
            assert_close_to_f64(f"{key} in {low} .. {high}", got[key], exact64[key], same[key], gradient=key != "y")


@every_backend
@specs([over(d, lead=lead, rank=7, scale="tensor", gate=True) for d in DTYPES for lead in ((0,), (0, 5), (5, 0))])
def test_no_rows(spec: Bottleneck, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs([EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1]), Bottleneck(lead=(70,), width=33, rank=7, activation="relu"), Bottleneck(heads=4, scale=0.3)])
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: Bottleneck, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device)

    def test_without_gradients(self, spec: Bottleneck, name: str, device: str) -> None:
        checks.assert_no_grad_path(spec, name, device)

    def test_arguments_are_untouched(self, spec: Bottleneck, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Bottleneck, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device)


@every_kernel
@specs([over(d, lead=(300,), width=w, rank=r, scale="tensor", gate=True) for d in (FP32, MIXED, DTYPES[4]) for w, r in ((96, 24), (768, 96), (33, 7))])
def test_deterministic(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_kernel
@specs([over(d, lead=(70,), scale="tensor", gate=True, width=w, rank=r) for d in (MIXED, DTYPES[4]) for w, r in ((48, 12), (160, 40))])
def test_parameters_are_rounded_first(spec: Bottleneck, name: str, device: str) -> None:
    checks.assert_rounds_parameters(spec, name, device)


@every_pair
@specs([over(d, lead=(70,), scale="tensor", gate=True, activation=a, heads=h) for d in (FP32, MIXED, DTYPES[3]) for a, h in (("gelu_new", 1), ("silu", 4))])
def test_any_backward_after_any_forward(spec: Bottleneck, forward: str, backward: str, device: str) -> None:
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


@every_kernel
@specs([over(d, lead=(t,), width=64, rank=8) for d in (FP32, BF16) for t in (64, 128)])
def test_whole_tiles_of_rows_far_apart(spec: Bottleneck, name: str, device: str) -> None:
    """The first tokens of long sequences: a tile of 64 rows spans more than 2^31 bytes. The memory between them is reserved, not touched."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    apart = [torch.empty(*spec.lead, 2**26 // spec.dtype.itemsize, dtype=spec.dtype, device=device)[:, : spec.width].copy_(t) for t in (tensors["x"], dy)]
    checks.assert_same_bits(checks.fused(spec, name, tensors, dy), checks.fused(spec, name, {**tensors, "x": apart[0]}, apart[1]))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=["fp32", "bf16", "bf16, fp32", "fp16", "fp16, fp32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_pre_activations(activation: str, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_extreme_pre_activations(over(dtypes, lead=(3,), width=8, rank=8, activation=activation, biases="down", residual=None), name, device)


@pytest.mark.parametrize(("name", "device"), [CPU])
def test_runs_after_memory_ran_out(name: str, device: str) -> None:
    """A kernel that got no working memory raises, and the next call works."""
    script = """
import resource, torch
from fastadapt import backend, functional
x, down, up = torch.randn(65, 2**18), torch.randn(8, 2**18), torch.randn(2**18, 8)
def limit_to(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more if more else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.set_num_threads(1)
with backend.use("cpu"):
    few = x[:, :64], down[:, :64], up[:64]
    y = functional.bottleneck(*few)
    errors = []
    for mib in range(16, 320, 16):
        limit_to(mib * 2**20)
        try:
            functional.bottleneck(x, down, up)
        except (MemoryError, RuntimeError) as error:
            errors.append(type(error).__name__)
    limit_to(None)
    assert torch.equal(y, functional.bottleneck(*few))
print(*errors)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert {"MemoryError", "RuntimeError"} == set(ran.stdout.split())


def test_per_head_projections_are_one_stacked_weight() -> None:
    """Several heads' down- or up-projections, concatenated, are one bottleneck with stacked weights; the pair variant equals its block-diagonal weight."""
    tensors = {n: t.double() for n, t in Bottleneck(heads=4).draw(0).items()}
    dense = torch.block_diag(*tensors["w_up"].chunk(4))
    with checks.runs_on("bottleneck", "reference", counts=(2, 0)):
        pair, stacked = functional.bottleneck(**tensors, heads=4), functional.bottleneck(**{**tensors, "w_up": dense})
    assert torch.equal(pair, stacked)


@every_backend
def test_zero_up_projection_is_the_identity(name: str, device: str) -> None:
    spec = Bottleneck()
    tensors = spec.draw(0, device)
    tensors["w_up"].zero_(), tensors["b_up"].zero_()
    assert torch.equal(checks.fused(spec, name, tensors, None)["y"], tensors["x"])


@every_backend
def test_relu_has_no_gradient_at_zero(name: str, device: str) -> None:
    """Torch's convention, relu'(0) = 0: rows of zeros without a bias get no gradient."""
    spec = Bottleneck(activation="relu", biases="none", residual=None)
    tensors = spec.draw(0, device)
    tensors["x"].zero_()
    assert not checks.fused(spec, name, tensors, spec.cotangent(0, device))["d x"].any()


# Recorded cases whose adapter is a plain bottleneck.
CONTROLLERS = [c for c in golden.case_ids() if c.startswith(("vla_adapter_", "comp_adapter_", "vlpet_parallel_value_adapter_controller")) and "multiple" not in c]
SITES = [c for c in golden.case_ids("vlpet_") if "no_gate" in c]
RECORDED = [*CONTROLLERS, "vla_clipvil_adapter_gated", *SITES]


def controller(ops: Any, case: Case, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter controller, once per recorded output: layer norms where it has them, its own residual, or y's where it is parallel; CLIP-ViL's scalar gate is a scale."""
    outputs = {}
    for name in case.outputs:
        suffix = name.removeprefix("y_out").removeprefix("y")
        task = suffix.removeprefix("_") or case.options["tasks"][0]
        p = {k.removeprefix(f"adapters.{task}."): v for k, v in params.items()}
        norms = {
            f"norm_{when}": (p[f"{key}_layer_norm.weight"], p[f"{key}_layer_norm.bias"], 1e-5)
            for when, key in (("before", "pre"), ("after", "post"))
            if f"{key}_layer_norm.weight" in p
        }
        outputs[name] = ops.bottleneck(
            inputs[f"x{suffix}"], p["down_sampler.weight"], p["up_sampler.weight"], p["down_sampler.bias"], p["up_sampler.bias"],
            activation=ACTIVATION[case.options["activation"]], residual=inputs.get(f"y{suffix}", "input"), scale=params.get("adapters.vqa.gate", 1.0), **norms,
        )  # fmt: skip
    return outputs


ACTIVATION = {"swish": "silu", "gelu_new": "gelu_new", "relu": "relu"}


def site(ops: Any, case: Case, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VL-PET site without gate: stacked heads after the frozen sublayer's output h; T5's sites add the stream x."""
    adapter, heads = stacked_heads(params)
    scale_h = case.options.get("encoder_x2_scaling_factor", 1.0)
    y = ops.bottleneck(inputs["h"], **adapter, heads=heads, scale=case.options.get("encoder_adapter_scaling_factor", 1.0), residual=scale_h * inputs["h"])
    return {"y": inputs["x"] + y if "_t5_" in case.id else y}


def stacked_heads(params: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The projections of a multi-head or plain adapter as the arguments of `bottleneck`, and the number of heads of a pair."""
    out = {}
    for argument, key in (("w_down", "down.weight"), ("w_up", "up.weight"), ("b_down", "down.bias"), ("b_up", "up.bias")):
        side, kind = key.split(".")
        found = [v for k, v in sorted(params.items()) if f"multihead_{side}." in k and k.endswith(kind)] or [
            v for k, v in params.items() if k.endswith(f"adapters.vqa.{side}_sampler.{kind}")
        ]
        out[argument] = torch.cat(found)
    return out, out["w_down"].shape[0] // out["w_up"].shape[1]


def build(ops: Any, case: Case, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return (site if case.id in SITES else controller)(ops, case, inputs, params)


@pytest.mark.parametrize("case_id", RECORDED)
def test_recorded_in_fp64(case_id: str) -> None:
    checks.assert_recorded_in_fp64(build, load_case(case_id))


@pytest.mark.parametrize("case_id", RECORDED)
@every_backend
def test_recorded_in_fp32(case_id: str, name: str, device: str) -> None:
    checks.assert_recorded(build, load_case(case_id), "bottleneck", name, device)


@every_backend
def test_recorded_cases_by_backend(name: str, device: str) -> None:
    """Which recorded cases ran on which backend (``pytest -s`` shows the table); a demanded backend ran all of them, forward and backward."""
    table = checks.recorded_table(build, [load_case(c) for c in RECORDED], name, device)
    print("\n".join(f"{case:55} {name:10} {what}" for case, what in table.items()))
    assert len(RECORDED) == 15
    assert all(what == f"backward {name} x1, forward {name} x1" for what in table.values())


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_and_undefined_numbers(activation: str, dtype: torch.dtype, name: str, device: str) -> None:
    """Far from zero an activation is 0 or its argument, and its slope 0 or 1; what is no number in a row stays in that row, in the output and in the gradient."""
    width, far = 24, 1e4
    x = torch.zeros(5, width, dtype=dtype, device=device)
    x[0, 0], x[1, 0], x[2, 0] = far, -far, float("nan")
    x.requires_grad_()
    identity = torch.eye(width, dtype=dtype, device=device)
    with runs_on("bottleneck", name):
        y = functional.bottleneck(x, identity, identity, activation=activation, residual=None)
        y.sum().backward()
    assert x.grad is not None
    even, expected, slopes = activation == "identity", x.detach().clone(), torch.ones_like(x)
    if not even:
        expected[1, 0] = slopes[1, 0] = 0.0
        slopes[[0, 3, 4]], slopes[0, 0] = x.grad[3], 1.0  # at zero
        slopes[1, 1:] = x.grad[3, 1:]
    rest = [0, 1, 3, 4]
    assert (y[rest] - expected[rest]).abs().max() < 1e-6 and (x.grad[rest] - slopes[rest]).abs().max() < 1e-6
    assert x.grad[3].isfinite().all() and y[2].isnan().any() and (even or activation == "relu" or x.grad[2].isnan().any())
