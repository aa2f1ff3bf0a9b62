"""Calls of the ops as detectors of mutants: one seed each, the first that is wrong ends the trial."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tests.mutation.forks import last_line
from tests.ops import checks, test_bottleneck, test_dropout_add_norm
from tests.ops.specs import Bottleneck, Gated, Spec
from tests.tolerance import SMALL, limit_of, relative_error


class Prepared(NamedTuple):
    """A call with what it should give."""

    spec: Spec
    tensors: dict[str, Tensor]
    dy: Tensor
    exact: checks.Results
    eager: checks.Results


def prepare(spec: Spec) -> Prepared:
    tensors, dy = spec.draw(0), spec.cotangent(0)
    return Prepared(spec, tensors, dy, checks.exact(spec, tensors, dy), checks.in_eager(spec, tensors, dy))


def first_wrong(calls: Sequence[Prepared], backend: str) -> str:
    """What is wrong with the first wrong call, or "". Tensors of fewer than 64 elements have 5 times the limit of `tests.tolerance`, since one seed says little of them."""
    for call in calls:
        try:
            got = checks.fused(call.spec, backend, {name: t.clone() for name, t in call.tensors.items()}, call.dy.clone())  # in this process's memory, which may be guarded
        except Exception as error:
            return f"{call.spec.op}[{call.spec}]: {type(error).__name__}: {last_line(error)}"
        for name in got:
            limit = limit_of(relative_error(call.eager[name], call.exact[name]), call.spec.out_dtype, gradient=name.startswith("d "))
            limit *= 1 if call.exact[name].numel() >= SMALL else 5
            error = relative_error(got[name], call.exact[name])
            if not error <= limit:
                return f"{name} of {call.spec.op}[{call.spec}]: error {error:.2g} > {limit:.2g}"
    return ""


def first_failing(check: Callable[[Spec, str, str], object], specs: Sequence[Spec], backend: str) -> str:
    """The same for a check of `tests.ops.checks`."""
    for spec in specs:
        try:
            check(spec, backend, "cpu")
        except Exception as error:
            return f"{check.__name__} of {spec.op}[{spec}]: {type(error).__name__}: {last_line(error)}"
    return ""


def statistics_of_the_exact_sum(backend: str) -> str:
    try:
        test_dropout_add_norm.test_the_statistics_are_of_the_rounded_sum(torch.bfloat16, backend, "cpu")
    except Exception as error:
        return f"statistics of the rounded sum: {type(error).__name__}: {last_line(error)}"
    return ""


def long_sums(backend: str) -> str:
    try:
        test_dropout_add_norm.assert_long_sums_round_nothing_away(backend, 600)
    except Exception as error:
        return f"long sums: {type(error).__name__}: {last_line(error)}"
    return ""


def gates_far_from_zero(backend: str) -> str:
    return first_failing(checks.assert_finite_far_from_zero, [Gated(granularity=g) for g in ("large", "middleX", "small")], backend)


def rows_far_apart(backend: str) -> str:
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        test_bottleneck.test_whole_tiles_of_rows_far_apart(Bottleneck(lead=(64,), width=64, rank=8), backend, "cpu")
    except Exception as error:
        return f"rows far apart: {type(error).__name__}: {last_line(error)}"
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return ""


def extreme_pre_activations(backend: str, dtypes: Sequence[torch.dtype]) -> str:
    one = Bottleneck(lead=(3,), width=8, rank=8, param_dtype=torch.float32, biases="down", residual=None)
    specs = [replace(one, dtype=d, activation=a) for a in ("gelu_new", "silu") for d in dtypes]
    return first_failing(checks.assert_extreme_pre_activations, specs, backend)


def relu_at_zero(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """relu'(0) = 0, which no drawn number meets: rows of zeros without a bias get no gradient."""
    spec = Bottleneck(lead=(3,), dtype=dtype, activation="relu", biases="none", residual=None)
    tensors = spec.draw(0)
    tensors["x"].zero_()
    try:
        return "d x of relu at 0" if checks.fused(spec, backend, tensors, spec.cotangent(0))["d x"].any() else ""
    except Exception as error:
        return f"relu at 0: {type(error).__name__}: {last_line(error)}"
