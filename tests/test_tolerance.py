"""The error rule itself: what it lets through and what not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.tolerance import FLOOR, Compared, assert_close_to_f64, assert_matches_recorded, assert_rule, relative_error

EXACT = torch.arange(1.0, 101.0, dtype=torch.float64)


def off(by: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """EXACT with a relative error of ``by``."""
    return (EXACT * (1.0 + by)).to(dtype)


def test_relative_error() -> None:
    zero = torch.zeros(3)
    assert relative_error(off(1e-3), EXACT) == pytest.approx(1e-3)
    assert relative_error(zero, zero) == 0.0 and relative_error(zero[:0], zero[:0]) == 0.0
    assert relative_error(zero + 1e-30, zero) == math.inf
    for poison in (math.nan, math.inf):
        assert relative_error(torch.full((3,), poison), zero + 1) == math.inf
    with pytest.raises(AssertionError, match="shape"):
        relative_error(EXACT, EXACT[None])
    with pytest.raises(AssertionError, match="not finite"):
        relative_error(EXACT, EXACT * math.nan)


@pytest.mark.parametrize(("gradient", "factor"), [(False, 2.0), (True, 3.0)])
@pytest.mark.parametrize("eager_error", [0.0, 1e-2, math.nan])
@pytest.mark.parametrize("dtype", list(FLOOR))
def test_the_limit_is_a_multiple_of_eager_or_of_the_floor(dtype: torch.dtype, eager_error: float, gradient: bool, factor: float) -> None:
    limit = factor * max(0.0 if math.isnan(eager_error) else eager_error, FLOOR[dtype])
    eager = off(eager_error)
    assert_close_to_f64("t", off(0.9 * limit), EXACT, eager, gradient=gradient, dtype=dtype)
    for wrong in (off(1.1 * limit), off(math.nan), torch.cat([EXACT[:-1], EXACT[:1] * math.inf])):
        with pytest.raises(AssertionError, match="t: error"):
            assert_close_to_f64("t", wrong, EXACT, eager, gradient=gradient, dtype=dtype)


def test_small_tensors_are_judged_over_eight_seeds() -> None:
    """Seed by seed, eager is exact in all but one; a kernel as good as eager on the whole passes, one that is four times worse does not."""

    def case(kernel_error: float) -> None:
        seeds = []

        def run(seed: int) -> dict[str, Compared]:
            seeds.append(seed)
            exact = torch.tensor([1.0 + seed], dtype=torch.float64)
            return {"s": Compared(exact * (1 + kernel_error), exact, exact * (1 + (1e-3 if seed == 7 else 0.0)), True), "large": Compared(EXACT, EXACT, EXACT, True)}

        assert_rule(run, torch.float32)
        assert seeds == list(range(8))

    case(5e-4)
    with pytest.raises(AssertionError, match=r"s: error .* over 48 seeds"):
        case(4e-3)
    with pytest.raises(AssertionError, match="too few"):
        assert_close_to_f64("s", EXACT[:1], EXACT[:1], EXACT[:1], gradient=True)


def test_large_tensors_take_one_seed() -> None:
    seeds = []
    assert_rule(lambda seed: seeds.append(seed) or {"y": Compared(off(1e-7), EXACT, EXACT, False)}, torch.float32)
    assert seeds == [0]
    with pytest.raises(AssertionError, match="y: error"):
        assert_rule(lambda seed: {"y": Compared(off(1e-6), EXACT, EXACT, False)}, torch.float32)


def test_what_exceeds_its_limit_is_decided_over_many_seeds() -> None:
    """A tensor that eager happens to hit in one seed passes if it is as good as eager on the whole, and fails if it is not."""
    seeds: list[int] = []

    def run(seed: int, kernel_error: float) -> dict[str, Compared]:
        seeds.append(seed)
        return {"y": Compared(off(kernel_error), EXACT, off(0.0 if seed == 0 else 1e-4), False)}

    assert_rule(lambda seed: run(seed, 1e-4), torch.float32)
    assert seeds == list(range(48))
    with pytest.raises(AssertionError, match=r"y: error .* over 48 seeds"):
        assert_rule(lambda seed: run(seed, 2.1e-4), torch.float32)


def test_recorded() -> None:
    assert_matches_recorded("t", EXACT + 0.9e-7, EXACT)
    with pytest.raises(AssertionError, match="t: differs"):
        assert_matches_recorded("t", EXACT + 1.1e-7, EXACT)
    with pytest.raises(AssertionError, match="t: differs"):
        assert_matches_recorded("t", EXACT * math.nan, EXACT)
    with pytest.raises(AssertionError, match="float32"):
        assert_matches_recorded("t", EXACT.float(), EXACT)
    with pytest.raises(AssertionError, match="shape"):
        assert_matches_recorded("t", EXACT[:5], EXACT)
