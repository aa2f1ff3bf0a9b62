"""`fastadapt.functional.gated_bottleneck` on every backend: granularities, options, shapes, dtypes, strides, what is computed and kept, and the recorded sites of VL-PET."""

from __future__ import annotations

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
from tests.ops.specs import ACTIVATIONS, DTYPES, FP32, GRANULARITIES, MIXED, Gated, random_specs, specs
from tests.ops.test_bottleneck import stacked_heads

RANDOM = random_specs(Gated, 240)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Gated:
    return Gated(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [
    *(Gated(granularity=g, combine=c) for g in GRANULARITIES for c in ("multiply", "add")),
    *(Gated(granularity=g, activation=a) for g in ("large", "middleX") for a in ACTIVATIONS[1:]),
    *(Gated(granularity=g, biases="none", gate_bias=False) for g in GRANULARITIES),
    *(Gated(granularity=g, input_scale=0.25, adapter_scale=0.5, scale=0.3, save_gate=s) for g in GRANULARITIES for s in (True, False)),
    *(Gated(granularity=g, heads=4, biases=b) for g in GRANULARITIES for b in ("both", "up")),
]
# One row under `small` is one gate: nine samples, so that the rule judges more than one number.
SHAPES = [
    over(d, lead=(9 if t == 1 else 1, t), rank=r, width=64, granularity=g, gate_rank=25)
    for g in ("large", "small")
    for d in (FP32, MIXED)
    for t in (1, 63, 65, 300)
    for r in (1, 7, 24, 96, 100)
]
SHAPES += [over(d, lead=(3, 22), width=w, rank=7, granularity=g, gate_rank=gr) for d in (FP32, MIXED) for g in GRANULARITIES for w, gr in ((1, 1), (33, 40))]
ALL_SHAPES = [
    over(d, lead=(9 if t == 1 else 1, t), rank=r, width=w, granularity=g, gate_rank=max(1, r // 2))
    for g in GRANULARITIES
    for d in DTYPES
    for t in (1, 63, 65, 300)
    for r in (1, 7, 24, 96, 100)
    for w in (1, 33, 64, 768)
]
# One or two tiles, of every height of the last one, whose columns the CPU's threads share; ranks and widths that fill panels and blocks and that do not.
COLUMNS = [
    over(d, lead=(2, t), width=w, rank=r, gate_rank=gr, granularity=g, combine=c, scale=0.3)
    for d in DTYPES
    for g in GRANULARITIES
    for t, r, gr in ((2, 7, 7), (5, 36, 7), (10, 32, 64), (20, 100, 36), (30, 7, 40), (64, 40, 32))
    for w, c in ((64, "add"), (77, "multiply"), (264, "multiply"))
]
REAL = [
    over(d, lead=(2, 65), width=w, rank=r, gate_rank=gr, granularity=g, scale=0.3)
    for d in (FP32, MIXED, DTYPES[4])
    for g, w, r, gr in (("large", 768, 96, 48), ("large", 1024, 192, 96), ("middleY", 768, 96, 1), ("middleY", 1024, 96, 1))
]
REAL += [over(MIXED, lead=(2, 65), width=w, rank=r, granularity=g, scale=0.3) for g, w, r in (("small", 768, 192), ("middleX", 1024, 96))]
ALL_REAL = [over(d, lead=(2, 165), width=w, rank=r, gate_rank=r, granularity=g, scale=0.3) for d in DTYPES for g in GRANULARITIES for w in (768, 1024) for r in (96, 192)]
CALLS = [Gated(granularity=g) for g in GRANULARITIES] + [
    Gated(granularity="large", lead=(2, 35), width=33, rank=7, gate_rank=5, combine="add", save_gate=False),
    over(MIXED, granularity="middleX", scale=0.3, heads=4),
    *(over(d, lead=(2, 70), width=64, rank=r, gate_rank=rg) for d in (FP32, MIXED) for r, rg in ((24, 104), (104, 24))),
]


@specs(OPTIONS[:18])
def test_gradcheck(spec: Gated) -> None:
    checks.assert_gradcheck(replace(spec, lead=(2, 1), width=4, rank=2, gate_rank=2))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: Gated) -> None:
    checks.assert_exact_reference(spec)


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs(OPTIONS)
def test_options(spec: Gated, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(RANDOM[:40])
def test_random_on_reference(spec: Gated) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(COLUMNS)
def test_few_tiles(spec: Gated) -> None:
    checks.assert_within_rule(spec, "cpu", "cpu")


@pytest.mark.full
@every_kernel
@specs(ALL_SHAPES)
def test_all_shapes(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(REAL)
def test_real_sizes(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_kernel
@specs(
    [over(d, lead=(2, t), width=96, rank=16, gate_rank=12, granularity=g, combine=c) for d in (FP32, MIXED) for t in (50, 2000) for g in GRANULARITIES for c in ("multiply", "add")]
)
def test_rows_all_alike(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device, change=checks.alike)


@pytest.mark.full
@every_backend
@specs(ALL_REAL)
def test_all_real_sizes(spec: Gated, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(
    [
        over(d, lead=lead, rank=7, granularity=g, save_gate=s)
        for d in (FP32, MIXED)
        for g in GRANULARITIES
        for lead in ((0,), (0, 5), (5, 0))
        for s in (None, False)
        if g != "small" or lead == (0, 5)
    ]
)
def test_no_rows(spec: Gated, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs(CALLS)
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: Gated, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device)

    def test_without_gradients(self, spec: Gated, name: str, device: str) -> None:
        checks.assert_no_grad_path(spec, name, device)

    def test_arguments_are_untouched(self, spec: Gated, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Gated, name: str, device: str) -> None:
        # In fp32 Triton's compiler spreads a tile over threads as its loads are widest, which strides decide, and with them the order of a row's dot product with a small gate.
        checks.assert_any_layout(spec, name, device, rounded=name == "triton" and spec.granularity == "small" and spec.dtype == torch.float32)


@every_kernel
@specs(
    [
        over(d, lead=(3, 100), width=w, rank=r, gate_rank=r // 2, granularity=g)
        for d in (FP32, MIXED)
        for g in GRANULARITIES
        for w, r in ((96, 24), (768, 96))
        if (g, w) != ("large_full", 768)
    ]
)
def test_deterministic(spec: Gated, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_backend
@specs([Gated(granularity=g, save_gate=s) for g in GRANULARITIES if g != "middleY" for s in (True, False)])
def test_gates_far_from_zero(spec: Gated, name: str, device: str) -> None:
    checks.assert_finite_far_from_zero(spec, name, device)


@every_kernel
@specs([over(d, granularity=g, save_gate=s) for d in (MIXED, DTYPES[4]) for g in GRANULARITIES for s in (True, False)])
def test_parameters_are_rounded_first(spec: Gated, name: str, device: str) -> None:
    checks.assert_rounds_parameters(spec, name, device)


@every_pair
@specs(
    [over(d, granularity=g, combine=c, save_gate=s, scale=0.3) for d in (FP32, MIXED) for g in GRANULARITIES for c, s in (("multiply", None), ("multiply", False), ("add", True))]
)
def test_any_backward_after_any_forward(spec: Gated, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@every_backend
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_save_gate_says_what_is_kept(granularity: str, name: str, device: str) -> None:
    """`save_gate` keeps H' and, for large, the gate in the activations' dtype; it changes results by rounding at most."""
    kept = {}
    for save in (True, False):
        spec = over(MIXED, granularity=granularity, save_gate=save)
        with checks.spied() as calls:
            checks.fused(spec, name, spec.draw(0, device), spec.cotangent(0, device))
        kept[save] = [(tuple(t.shape), t.dtype) for t in calls[0][2][1:]]
    rows, wide = 65, torch.float32
    small = [((rows, 12), MIXED[0]), ((rows, 6) if granularity == "large" else (0,), MIXED[0]), ((rows,) if granularity in ("middleX", "small") else (0,), wide)]
    assert kept[False] == [*small, ((0,), MIXED[0]), ((0,), MIXED[0])]
    assert kept[True] == [*small, ((rows, 48), MIXED[0]), ((rows, 48) if granularity == "large" else (0,), MIXED[0])]


@pytest.mark.parametrize(("name", "device"), [REFERENCE, CPU, TRITON])
def test_rows_beyond_2_31_elements(name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    spec = over(DTYPES[4], lead=(3,), width=40, rank=8)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    apart = [
        torch.empty(2 * 2**30 + 8 + spec.width, dtype=spec.dtype, device=device).as_strided((3, spec.width), (2**30 + 4, 1)).copy_(t) for t in (tensors["h"], tensors["x"], dy)
    ]
    checks.assert_same_bits(expected, checks.fused(spec, name, {**tensors, "h": apart[0], "x": apart[1]}, apart[2]))


@every_backend
def test_small_gates_each_sample_by_its_own_mean(name: str, device: str) -> None:
    """One sample's output does not depend on the others of its batch, and depends on its padded length."""
    spec = Gated(granularity="small", lead=(4, 9))
    tensors = spec.draw(0, device)
    whole = checks.fused(spec, name, tensors, None)["y"]
    one = checks.fused(spec, name, {n: t[2:3] if n in "hx" else t for n, t in tensors.items()}, None)["y"]
    longer = checks.fused(spec, name, {n: torch.cat([t, t[:, :4]], 1) if n in "hx" else t for n, t in tensors.items()}, None)["y"][:, :9]
    assert torch.allclose(one, whole[2:3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(longer, whole, rtol=1e-3)


@every_backend
def test_rows_of_a_sample_have_one_gate(name: str, device: str) -> None:
    """Bit for bit, in whatever tiles they lie: H' = 1, so that y is the gate."""
    spec = Gated(granularity="small", lead=(3, 130), input_scale=0.0)
    tensors = spec.draw(0, device)
    y = checks.fused(spec, name, {**tensors, "w_up": torch.zeros_like(tensors["w_up"]), "b_up": torch.ones_like(tensors["b_up"])}, None)["y"]
    assert torch.equal(y, y[:, :1, :1].expand_as(y)) and len(y[:, 0, 0].unique()) == 3


# Recorded sites: VL-PET's adapter and gate after a sublayer.
RECORDED = [c for c in golden.case_ids("vlpet_") if "_site_" in c and "no_gate" not in c and "gating_only" not in c]
GATES = {"large_x_down": "large", "large_x": "large_full", "middle_xy_add": "middleX", "middle_ia3_add": "middleY", "small_xy_cat": "small"}


def build(ops: Any, case: Case, inputs: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A site with its gate; T5's sites add the stream x."""
    adapter, heads = stacked_heads(params)
    gates = {k.split("adapter_gating_")[1]: v for k, v in params.items() if "adapter_gating_" in k}
    granularity = next(GATES[k.split(".")[0]] for k in gates if k.split(".")[0] in GATES)
    weight = next(v for k, v in gates.items() if k in ("large_x_down.weight", "large_x.weight", "middle_xy_add.weight", "small_xy_cat.weight", "middle_ia3_add"))
    bias = next((v for k, v in gates.items() if k in ("large_x_down.bias", "large_x.bias", "middle_xy_add.bias", "small_xy_cat.bias")), None)
    scales = {name: case.options.get(f"encoder_{key}_scaling_factor", 1.0) for name, key in (("input_scale", "x2"), ("adapter_scale", "adapter"), ("scale", "gating"))}
    y = ops.gated_bottleneck(
        inputs["h"],
        inputs.get("x"),
        **adapter,
        **scales,
        heads=heads,
        granularity=granularity,
        gate_weight=weight.squeeze(0) if granularity in ("middleX", "small") else weight,
        gate_bias=bias,
        gate_up_weight=gates.get("large_x_up.weight"),
        gate_up_bias=gates.get("large_x_up.bias"),
        combine="add" if "gating_add" in case.flags else "multiply",
    )
    return {"y": inputs["x"] + y if "_t5_" in case.id else y}


@pytest.mark.parametrize("case_id", RECORDED)
def test_recorded_in_fp64(case_id: str) -> None:
    checks.assert_recorded_in_fp64(build, load_case(case_id))


@pytest.mark.parametrize("case_id", RECORDED)
@every_backend
def test_recorded_in_fp32(case_id: str, name: str, device: str) -> None:
    checks.assert_recorded(build, load_case(case_id), "gated_bottleneck", name, device)


@every_backend
def test_recorded_cases_by_backend(name: str, device: str) -> None:
    """Which recorded cases ran on which backend (``pytest -s`` shows the table); a demanded backend ran all of them, forward and backward."""
    table = checks.recorded_table(build, [load_case(c) for c in RECORDED], name, device)
    print("\n".join(f"{case:55} {name:10} {what}" for case, what in table.items()))
    assert len(RECORDED) == 21
    assert all(what == f"backward {name} x1, forward {name} x1" for what in table.values())


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gates_saturate_and_keep_what_is_no_number(dtype: torch.dtype, name: str, device: str) -> None:
    """Far from zero a gate is 0 or 1 and has no gradient; an undefined logit makes its row undefined."""
    width, rank = 40, 8
    h, x = (torch.randn(4, width, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    x[3, 0] = float("nan")
    down, up = torch.full((rank, width), 0.1, dtype=dtype, device=device), torch.full((width, rank), 0.1, dtype=dtype, device=device)
    bias = torch.cat([torch.full((width // 2,), sign * 1e4) for sign in (1, -1)]).to(device, dtype).requires_grad_()
    gate = {"granularity": "large", "gate_weight": down, "gate_up_weight": up, "gate_up_bias": bias}
    with runs_on("gated_bottleneck", name):
        y = functional.gated_bottleneck(h, x, down, up, **gate)  # type: ignore[arg-type]
        y[:3].sum().backward()
    with runs_on("bottleneck", name, counts=(1, 0)):  # backends differ in the last bit
        total = functional.bottleneck(h, down, up)
    assert torch.equal(y[:3, : width // 2], total[:3, : width // 2]) and y[:3, width // 2 :].abs().max() < 1e-6 and y[3].isnan().all()
    assert bias.grad is not None and bias.grad.nan_to_num().abs().max() < 1e-6
