"""The mask that kernels draw, where no test of a whole op comes: rows above 2^32, and the probabilities at both ends."""

import pytest
import torch

from fastadapt.ops.philox import philox, threshold

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

from fastadapt.ops import _triton  # noqa: E402


@triton.jit
def mask_kernel(SEED, MASK, threshold, first, start, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    i, j = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    kept = _triton.keep(tl.load(SEED), threshold, first + i, start, BLOCK_D)
    tl.store(MASK + i[:, None] * BLOCK_D + j[None, :], kept.to(tl.int8))


def drawn(seed: int, first: int, start: int, p: float) -> torch.Tensor:
    mask = torch.empty(16, 32, dtype=torch.int8)
    mask_kernel[(1,)](torch.tensor([seed]), mask, threshold(p) - 2**31, torch.tensor(first).item(), start, BLOCK_T=16, BLOCK_D=32)
    return mask.bool()


@pytest.mark.parametrize("seed", [0, 1, -1, 0x123456789ABCDEF0, -(2**63)])
@pytest.mark.parametrize(("first", "start"), [(2**32 - 8, 0), (2**32 + 2**31 - 3, 64), (5 * 2**32 + 7, 4096)])
def test_rows_and_seeds_of_64_bits(seed: int, first: int, start: int) -> None:
    low, group, row = 2**32 - 1, torch.arange(start // 4, start // 4 + 8), torch.arange(first, first + 16)[:, None]
    words = philox((group, row & low, row >> 32, 0), (torch.tensor(seed) & low, torch.tensor(seed) >> 32 & low))
    expected = torch.stack(torch.broadcast_tensors(*words), -1).flatten(1) >= threshold(0.3)
    assert torch.equal(drawn(seed, first, start, 0.3), expected) and expected.any() and not expected.all()


@pytest.mark.parametrize(("p", "share"), [(1e-12, 1.0), (0.5, 0.5), (1 - 2**-33, 0.0)])
def test_thresholds_of_32_bits(p: float, share: float) -> None:
    kept = drawn(7, 2**33, 0, p).float().mean()
    assert kept == share or 0.4 < kept < 0.6
