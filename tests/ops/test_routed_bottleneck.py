"""`fastadapt.functional.routed_bottleneck` on every backend: a batch of several tasks against one call a task, shared parameters, absent tasks, rows of no task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import functional
from tests.ops import checks
from tests.ops.checks import every_backend, every_kernel, every_pair
from tests.ops.specs import ACTIVATIONS, DTYPES, FP32, MIXED, Routed, random_specs, specs

RANDOM = random_specs(Routed, 200)


def over(dtypes: tuple[torch.dtype, torch.dtype], **options: Any) -> Routed:
    return Routed(dtype=dtypes[0], param_dtype=dtypes[1], **options)


OPTIONS = [
    Routed(),
    *(Routed(activation=a, ids="row") for a in ACTIVATIONS[1:]),
    *(Routed(biases=b) for b in ("none", "down", "up")),
    *(Routed(residual=r, scale=s, outside=True) for r in ("other", None, "input") for s in (1.0, 0.3, 0.0)),
    *(Routed(shared=s, tasks=g, biases=b, ids=i) for s in ("down", "up", "") for g in (1, 4) for b in ("both", "none") for i in ("sample", "row")),
]
EVERYTHING = Routed(lead=(7, 23), tasks=4, residual="other", scale=0.7, outside=True, shared="up")
SHAPES = [over(d, lead=(t,), rank=r, width=64, ids="row") for d in (FP32, MIXED) for t in (0, 1, 63, 65, 300) for r in (1, 7, 24, 96, 100)] + [
    over(d, width=w, rank=r) for d in (FP32, MIXED) for w in (1, 33, 768) for r in (7, 96)
]
ALL_SHAPES = [over(d, lead=(t,), rank=r, width=w, ids="row") for d in DTYPES for t in (0, 1, 63, 65, 300) for r in (1, 7, 24, 96, 100) for w in (1, 33, 64, 768)]
REAL = [over(d, lead=(8, 56), width=w, rank=r, tasks=4) for d in (FP32, MIXED, DTYPES[4]) for w in (768, 1024) for r in (96,)]


@specs(OPTIONS)
def test_gradcheck(spec: Routed) -> None:
    checks.assert_gradcheck(replace(spec, lead=(3, 2), width=4, rank=3))


@specs([*OPTIONS, *RANDOM[:60]])
def test_reference_is_exact(spec: Routed) -> None:
    checks.assert_exact_reference(spec)


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@specs(OPTIONS)
def test_options(spec: Routed, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    checks.assert_within_rule(replace(spec, dtype=dtypes[0], param_dtype=dtypes[1]), name, device)


@every_kernel
@specs(RANDOM)
def test_random(spec: Routed, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@specs(RANDOM[:40])
def test_random_on_reference(spec: Routed) -> None:
    checks.assert_within_rule(spec, "reference", "cpu")


@every_kernel
@specs(SHAPES)
def test_shapes(spec: Routed, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@pytest.mark.full
@every_kernel
@specs(ALL_SHAPES)
def test_all_shapes(spec: Routed, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs(REAL)
def test_real_sizes(spec: Routed, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


@every_backend
@specs([over(d, lead=lead, outside=o) for d in DTYPES for lead in ((0,), (0, 5), (5, 0)) for o in (False, True)])
def test_no_rows(spec: Routed, name: str, device: str) -> None:
    """Zero rows: an empty output, and gradients of zero."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got = checks.fused(spec, name, tensors, dy)
    assert got.pop("y").shape == dy.shape
    assert all(g.shape == tensors[n[2:]].shape and not g.any() for n, g in got.items())


@every_backend
@specs([EVERYTHING, replace(EVERYTHING, dtype=MIXED[0], param_dtype=MIXED[1], ids="row"), Routed(lead=(70,), width=33, rank=7, activation="relu")])
class TestCall:
    """What holds for each call, whatever its numbers."""

    def test_gradients_asked_alone(self, spec: Routed, name: str, device: str) -> None:
        checks.assert_single_gradients(spec, name, device)

    def test_without_gradients(self, spec: Routed, name: str, device: str) -> None:
        checks.assert_no_grad_path(spec, name, device)

    def test_arguments_are_untouched(self, spec: Routed, name: str, device: str) -> None:
        checks.assert_untouched(spec, name, device)

    def test_any_layout(self, spec: Routed, name: str, device: str) -> None:
        checks.assert_any_layout(spec, name, device)


@every_kernel
@specs([over(d, lead=(300,), width=w, rank=r, ids="row", outside=True) for d in (FP32, MIXED, DTYPES[4]) for w, r in ((96, 24), (768, 96), (33, 7))])
def test_deterministic(spec: Routed, name: str, device: str) -> None:
    checks.assert_deterministic(spec, name, device)


@every_kernel
@specs([over(d, lead=(70,), width=w, rank=r) for d in (MIXED, DTYPES[4]) for w, r in ((48, 12), (160, 40))])
def test_parameters_are_rounded_first(spec: Routed, name: str, device: str) -> None:
    checks.assert_rounds_parameters(spec, name, device)


@every_pair
@specs([over(d, lead=(70,), activation=a, shared=s, outside=True) for d in (FP32, MIXED, DTYPES[3]) for a, s in (("gelu_new", ""), ("silu", "down"))])
def test_any_backward_after_any_forward(spec: Routed, forward: str, backward: str, device: str) -> None:
    checks.assert_within_rule(spec, forward, device, backward=backward)


@every_backend
def test_rows_beyond_2_31_elements(name: str, device: str) -> None:
    """Rows 2^30 elements apart: the offset of the third does not fit in 32 bits. The 4 GiB are reserved, not touched."""
    spec = over(DTYPES[4], lead=(3,), width=40, rank=8, tasks=2)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected = checks.fused(spec, name, tensors, dy)
    apart = []
    torch.use_deterministic_algorithms(False)  # or the whole buffer would be filled with NaN
    for t in (tensors["x"], dy):
        rows = torch.empty(2 * 2**30 + 8 + spec.width, dtype=spec.dtype, device=device).as_strided((3, spec.width), (2**30 + 4, 1))
        apart.append(rows.copy_(t))
    checks.assert_same_bits(expected, checks.fused(spec, name, {**tensors, "x": apart[0]}, apart[1]))


def of_task(spec: Routed, tensors: dict[str, Tensor], task: int) -> dict[str, Tensor]:
    return {n: t if n in spec.activations else t[task if len(t) > 1 else 0] for n, t in tensors.items()}


@every_kernel
@pytest.mark.parametrize("dtypes", [FP32, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("shared", ["", "down", "up"])
@pytest.mark.parametrize("ids", ["sample", "row"])
def test_a_mixed_batch_gives_row_for_row_what_batches_of_one_task_give(ids: str, shared: str, dtypes: tuple[torch.dtype, torch.dtype], name: str, device: str) -> None:
    """Four tasks in one batch against four calls of `bottleneck`: the very bits of outputs, of dx and of every task's own gradients."""
    spec = over(dtypes, lead=(12, 70), tasks=4, ids=ids, shared=shared, width=96, rank=24)
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    mixed = checks.fused(spec, name, tensors, dy)
    rows_of_ids = spec.task_ids(device).repeat_interleave(70 if ids == "sample" else 1)
    x, flat = tensors["x"].reshape(-1, spec.width), {n: mixed[n].reshape(-1, spec.width) for n in ("y", "d x")}
    for task in range(spec.tasks):
        own = rows_of_ids == task
        leaves = {n: t.detach().clone().requires_grad_() for n, t in of_task(spec, {**tensors, "x": x[own]}, task).items()}
        with checks.runs_on("bottleneck", name):
            y = functional.bottleneck(**leaves)
            y.backward(dy.reshape(-1, spec.width)[own])
        separate = {"y": y.detach(), "d x": leaves["x"].grad}
        together = {n: t[own] for n, t in flat.items()}
        for n, t in leaves.items():
            if n != "x" and len(tensors[n]) > 1:
                separate[f"d {n}"], together[f"d {n}"] = t.grad, mixed[f"d {n}"][task]
        checks.assert_same_bits(together, separate)  # type: ignore[arg-type]


@every_backend
def test_rows_of_no_task_pass_untouched_and_absent_tasks_have_zero_gradients(name: str, device: str) -> None:
    spec = replace(EVERYTHING, residual="input", shared="")
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    got, ids = checks.fused(spec, name, tensors, dy), spec.task_ids(device)
    assert (ids == -1).any() and not (ids == spec.tasks - 1).any()
    assert torch.equal(got["y"][ids == -1], tensors["x"][ids == -1]) and torch.equal(got["d x"][ids == -1], dy[ids == -1])
    for n in ("w_down", "w_up", "b_down", "b_up"):
        assert not got[f"d {n}"][-1].any() and got[f"d {n}"][0].any()


def spoilt_by_task_0(spec: Routed, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Arguments and the cotangent, the same with NaN in the rows and the weights of task 0, and the ids."""
    drawn, ids = {**spec.draw(0, device), "dy": spec.cotangent(0, device)}, spec.task_ids(device)
    assert (ids == 0).any() and (ids == 1).any() and (ids == -1).any()
    own_rows = {n: ids == 0 for n in ("dy", *spec.activations)}
    return drawn, {n: t.index_fill(0, own_rows[n].nonzero()[:, 0] if n in own_rows else ids.new_tensor([0]), math.nan) for n, t in drawn.items()}, ids


def of_other_tasks(results: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    return {n: t[ids != 0] if len(t) == len(ids) else t[1:] for n, t in results.items()}


@every_backend
def test_nan_of_one_task_reaches_no_other(name: str, device: str) -> None:
    spec = replace(EVERYTHING, shared="")
    drawn, spoilt, ids = spoilt_by_task_0(spec, device)
    clean, got = (checks.fused(spec, name, {n: t for n, t in d.items() if n != "dy"}, d["dy"]) for d in (drawn, spoilt))
    assert all(t.isnan().any() for t in got.values())
    checks.assert_same_bits(of_other_tasks(got, ids), of_other_tasks(clean, ids))


@every_backend
def test_nan_of_a_task_without_rows_reaches_nothing(name: str, device: str) -> None:
    spec = replace(EVERYTHING, shared="")
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    clean = checks.fused(spec, name, tensors, dy)
    for parameter in ("w_down", "b_down", "w_up", "b_up"):
        tensors[parameter][-1] = math.nan
    checks.assert_same_bits(checks.fused(spec, name, tensors, dy), clean)


def test_nan_of_one_task_reaches_no_other_under_functorch() -> None:
    spec = replace(EVERYTHING, shared="")
    drawn, spoilt, ids = spoilt_by_task_0(spec, "cpu")
    clean, got = ({}, {})
    for results, d in ((clean, drawn), (got, spoilt)):
        y, vjp = torch.func.vjp(lambda tensors: spec.call(functional, tensors), {n: t for n, t in d.items() if n != "dy"})
        results |= {"y": y, **{f"d {n}": t for n, t in vjp(d["dy"])[0].items()}}
    checks.assert_same_bits(of_other_tasks(got, ids), of_other_tasks(clean, ids))


@every_backend
def test_ids_far_outside_touch_nothing(name: str, device: str) -> None:
    x, w = torch.randn(5, 8, device=device), torch.randn(2, 3, 8, device=device)
    ids = torch.tensor([2, -(2**62), 2**62, -1, 99], device=device)
    with checks.runs_on("routed_bottleneck", name, counts=(1, 0)):
        assert torch.equal(functional.routed_bottleneck(x, ids, w, w.transpose(1, 2)), x)
