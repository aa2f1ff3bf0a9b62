"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the counter-based generator behind every backend's dropout, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """The four output words of a counter of four words under a key of two; words are int64 from 0 to 2^32 - 1."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for i in range(10):
        # Products wrap in int64: the bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ (k0 + i * _WEYL[0] & _LOW), p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ (k1 + i * _WEYL[1] & _LOW), p0 & _LOW
    return c0, c1, c2, c3  # type: ignore[return-value]


def threshold(p: float) -> int:
    """Of the 2^32 values of a word, as many drop an element."""
    return min(_LOW, round(p * 2**32))


def keep(seed: Tensor, rows: int, width: int, p: float) -> Tensor:
    """The elements of (rows, width) that dropout with probability p keeps, a boolean mask on the device of ``seed``, an int64 tensor of one element.

    Element (t, j) is word j % 4 of counter (j / 4, low and high 32 bits of t, 0) under the seed as key, and kept where that is not below `threshold`.
    """
    t, group = torch.arange(rows, device=seed.device)[:, None], torch.arange((width + 3) // 4, device=seed.device)
    words = philox((group, t & _LOW, t >> 32, 0), (seed & _LOW, seed >> 32 & _LOW))
    return torch.stack(torch.broadcast_tensors(*words), -1).flatten(1)[:, :width] >= threshold(p)
