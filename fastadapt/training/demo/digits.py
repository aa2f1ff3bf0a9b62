"""Pictures for the demo: scenes of one to four handwritten digits on a 2 x 2 grid.

The digits are the 1,797 scans of 8 x 8 pixels that scikit-learn ships (Optical Recognition of Handwritten Digits, UCI, CC BY 4.0). Scans and *layouts* (which digit stands in which
cell) are both split into train, val and test: a test picture is a layout never trained on, drawn with scans never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.datasets import load_digits

SPLITS = ("train", "val", "test")
CELLS = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = 10
PATCH = 8
PATCHES = 4


@dataclass(frozen=True)
class Scenes:
    """N scenes: ``digits`` (N, 4), the digit of each cell or `EMPTY`, and ``scans`` (N, 4), which scan it is drawn with (-1: none)."""

    digits: np.ndarray
    scans: np.ndarray

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, rows: slice | np.ndarray) -> Scenes:
        return Scenes(self.digits[rows], self.scans[rows])

    def pixels(self) -> np.ndarray:
        """(N, 16, 16) in 0 .. 1."""
        return self.patches().reshape(-1, 2, 2, PATCH, PATCH).transpose(0, 1, 3, 2, 4).reshape(-1, 2 * PATCH, 2 * PATCH)

    def patches(self) -> np.ndarray:
        """(N, 4, 64): the pixels of each cell, the features of one visual token."""
        images, _ = scans()
        blank = np.concatenate([images, np.zeros((1, PATCH, PATCH), np.float32)])
        return blank[self.scans].reshape(-1, PATCHES, PATCH * PATCH)


def patch_boxes() -> np.ndarray:
    """(4, 4): each cell's ``(x1, x2, y1, y2)`` in 0 .. 1."""
    row, column = np.divmod(np.arange(PATCHES), 2)
    return np.stack([column, column + 1, row, row + 1], 1).astype(np.float32) / 2


@cache
def scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans (1797, 8, 8) in 0 .. 1 and their digits (1797,)."""
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


def split_index(split: str) -> int:
    """0, 1, 2 for train, val, test."""
    if split not in SPLITS:
        raise ValueError(f"split: must be one of {', '.join(SPLITS)}, not {split!r}")
    return SPLITS.index(split)


@cache
def scans_of(split: str) -> np.ndarray:
    """Indices of a split's scans: of each digit 76 % train, 8 % val, 16 % test, whatever the demo's seed."""
    bounds = ((0.0, 0.76), (0.76, 0.84), (0.84, 1.0))[split_index(split)]
    _, targets = scans()
    chosen = []
    for digit in range(10):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(targets == digit))
        chosen.append(rows[round(bounds[0] * len(rows)) : round(bounds[1] * len(rows))])
    return np.concatenate(chosen)


def split_of(digits: np.ndarray) -> np.ndarray:
    """Which split each layout (N, 4) belongs to, as an index into `SPLITS`: a fixed hash puts 10 % into val and 15 % into test."""
    code = (digits.astype(np.uint64) * np.array([1, 11, 121, 1331], np.uint64)).sum(-1)
    hashed = (code + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(29)
    share = (hashed * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(40)).astype(np.float64) / 2**24
    return np.where(share < 0.75, 0, np.where(share < 0.85, 1, 2))


def draw(n: int, split: str, rng: np.random.Generator, least: int = 1) -> Scenes:
    """``n`` random scenes of a split with ``least`` to four digits, every number of digits equally often."""
    pool, (_, targets) = scans_of(split), scans()
    found: list[Scenes] = []
    while sum(map(len, found)) < n:
        size = 2 * n + 64
        count = rng.integers(least, 5, size)
        filled = rng.random((size, 4)).argsort(1).argsort(1) < count[:, None]
        picked = pool[rng.integers(0, len(pool), (size, 4))]
        scenes = Scenes(np.where(filled, targets[picked], EMPTY), np.where(filled, picked, -1))
        keep = np.flatnonzero(split_of(scenes.digits) == split_index(split))
        # Few layouts have one digit, so a split need not hold them in proportion: rows are taken by number of digits.
        counts, quota = count[keep], -(-(n - sum(map(len, found))) // (5 - least))
        keep = np.sort(np.concatenate([keep[counts == k][:quota] for k in range(least, 5)]))
        found.append(scenes[keep])
    return Scenes(np.concatenate([s.digits for s in found])[:n], np.concatenate([s.scans for s in found])[:n])
