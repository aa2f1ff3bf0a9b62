"""The one error rule of the whole test suite.

The error of a tensor is ||got - exact|| / ||exact||, with ``exact`` from the fp64 reference. It may be at most 2x (gradients 3x) the larger of

* the error of *eager*: the original authors' code in plain torch, in the same dtypes, on the same inputs;
* a floor of the activations' dtype, since eager is sometimes exact by luck.

Tensors of fewer than 64 elements are judged by root mean squares over 8 fixed seeds, rms(got - exact) / rms(exact): eager's own error of a single number is sometimes nearly
zero, and correct code fails a bare 3x rule for 5 to 7 of 40 seeds. (A mean of the 8 quotients would be decided by the one seed whose exact number happens to be nearly zero, for
eager and kernel alike: that is one seed again.)

A large tensor's error can be that of a few numbers all the same: under a gate per sample the whole gradient of x is one scalar's error, times a vector. And of ten thousand
comparisons of a sweep a few fall outside any limit over 8 seeds. So what exceeds its limit is decided by the root mean squares over 48 fixed seeds, under the same factors: there
the kernels are at 0.3 to 1.5 times eager's error (measured on the CPU, on nine calls that exceeded it), and a wrong one is wrong in every seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = {torch.float32: 2e-7, torch.float16: 1.5e-4, torch.bfloat16: 1.2e-3}
OUTPUT, GRADIENT = 2.0, 3.0
SMALL = 64
SEEDS = range(8)
DECIDING = range(48)
RECORDED = 1e-9
CURVE = 1e-5
"""Between the losses of one training run in float32, fused and unfused, each relative to its own size."""


class Compared(NamedTuple):
    """One tensor of a test case in its three versions."""

    got: Tensor
    exact64: Tensor
    eager: Tensor
    gradient: bool


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; 0 for equal tensors (also empty or all zero), infinite where ``got`` is not finite, or not zero against an exact zero."""
    if got.shape != exact.shape:
        raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(exact.shape)}")
    got, exact = got.detach().to("cpu", torch.float64), exact.detach().to("cpu", torch.float64)
    assert torch.isfinite(exact).all(), "the exact tensor is not finite"
    difference, size = (got - exact).norm().item(), exact.norm().item()
    if difference == 0.0:
        return 0.0
    return difference / size if size > 0.0 and math.isfinite(difference) else math.inf


def limit_of(eager_error: float, dtype: torch.dtype, *, gradient: bool) -> float:
    """The largest error allowed beside eager's. An eager run that is not finite excuses nothing."""
    if not math.isfinite(eager_error):
        eager_error = 0.0
    return (GRADIENT if gradient else OUTPUT) * max(eager_error, FLOOR[dtype])


def assert_close_to_f64(name: str, got: Tensor, exact64: Tensor, eager: Tensor, *, gradient: bool, dtype: torch.dtype | None = None) -> None:
    """The rule for one tensor of at least 64 elements; smaller ones need `assert_rule`.

    Args:
        dtype: the activations' dtype, which sets the floor; by default eager's. Gradients of fp32 parameters over bf16 activations carry bf16's error: give bf16 there.
    """
    if 0 < got.numel() < SMALL:
        raise AssertionError(f"{name}: {got.numel()} elements are too few for a single comparison; use assert_rule")
    _judge(name, [Compared(got, exact64, eager, gradient)], dtype or eager.dtype)


def assert_rule(run: Callable[[int], Mapping[str, Compared]], dtype: torch.dtype) -> None:
    """The rule for every tensor of a case.

    Args:
        run: ``run(seed)`` draws the inputs of the case from ``seed`` and returns its tensors by name. Called once, for 7 more seeds where a tensor has fewer than 64 elements, and
            for 48 where one exceeds its limit.
        dtype: the activations' dtype.
    """
    first = run(SEEDS[0])
    small = [name for name, c in first.items() if 0 < c.exact64.numel() < SMALL]
    others = [run(seed) for seed in SEEDS[1:]] if small else []
    runs = {name: [compared, *(run_[name] for run_ in others)] if name in small else [compared] for name, compared in first.items()}
    if exceeding := [name for name, tensors in runs.items() if _excess(name, tensors, dtype)]:
        deciding = [first, *others, *(run(seed) for seed in DECIDING[1 + len(others) :])]
        for name in exceeding:
            _judge(name, [run_[name] for run_ in deciding], dtype)


def _judge(name: str, runs: list[Compared], dtype: torch.dtype) -> None:
    if excess := _excess(name, runs, dtype):
        raise AssertionError(excess)


def _excess(name: str, runs: list[Compared], dtype: torch.dtype) -> str:
    """How the tensor exceeds its limit, or nothing."""
    gradient = runs[0].gradient
    got, exact, eager = (
        torch.cat([t.detach().to("cpu", torch.float64).flatten() for t in tensors]) for tensors in ([c.got for c in runs], [c.exact64 for c in runs], [c.eager for c in runs])
    )
    for c in runs:
        assert c.got.shape == c.exact64.shape, f"{name}: shape {tuple(c.got.shape)} instead of {tuple(c.exact64.shape)}"
    error, eager_error = relative_error(got, exact), relative_error(eager, exact)
    limit = limit_of(eager_error, dtype, gradient=gradient)
    over = f"root mean square over {len(runs)} seeds, " if len(runs) > 1 else ""
    return "" if error <= limit else f"{name}: error {error:.3g} > {limit:.3g} ({over}eager {eager_error:.3g}, {'gradient' if gradient else 'output'}, {dtype})"


def assert_matches_recorded(name: str, got64: Tensor, recorded: Tensor) -> None:
    """An fp64 result against a recorded fp64 tensor: 1e-9 of the tensor's largest magnitude; 1e-14 is left to gradients that are zero up to rounding."""
    assert got64.dtype == torch.float64, f"{name}: {got64.dtype} instead of float64"
    assert got64.shape == recorded.shape, f"{name}: shape {tuple(got64.shape)} instead of {tuple(recorded.shape)}"
    if recorded.numel() == 0:
        return
    difference, largest = (got64.detach() - recorded).abs().max().item(), recorded.abs().max().item()
    assert difference <= max(RECORDED * largest, 1e-14), f"{name}: differs by {difference:.3g} from the recorded tensor, whose largest magnitude is {largest:.3g}"
