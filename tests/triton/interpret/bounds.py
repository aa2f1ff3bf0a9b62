"""Makes Triton's interpreter refuse every load and store outside the tensors that the launch was given, padding between rows included.

The interpreter follows raw pointers: without this, a missing mask reads a neighbour's memory unseen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class OutOfBounds(AssertionError):
    """A kernel touched memory that it was not given."""


class Regions:
    """The memory of the tensors of a launch: sorted byte ranges, and for 2-D tensors with padded rows the bytes of a row and of its step."""

    def __init__(self, tensors: list[Tensor]) -> None:
        regions = sorted({region(t) for t in tensors if t.numel()})
        self.start, self.end, self.used, self.step = (np.array(column, dtype=np.int64) for column in zip(*regions)) if regions else (np.empty(0, np.int64),) * 4

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        addresses = addresses.astype(np.int64)[mask.astype(bool)]
        if addresses.size == 0:
            return
        if self.start.size and self._inside(addresses, np.maximum(np.searchsorted(self.start, addresses, "right") - 1, 0), size).all():
            return
        # Tensors of one launch may overlap (a residual that is the input): the address must lie in any of them.
        inside = self._inside(addresses[:, None], np.arange(self.start.size)[None, :], size).any(1)
        if not inside.all():
            raise OutOfBounds(f"out of bounds: {(~inside).sum()} of {addresses.size} elements that a kernel reads or writes lie outside its arguments")

    def _inside(self, addresses: np.ndarray, regions: np.ndarray, size: int) -> np.ndarray:
        offset = addresses - self.start[regions]
        return (offset >= 0) & (addresses + size <= self.end[regions]) & (offset % self.step[regions] < self.used[regions])


def region(t: Tensor) -> tuple[int, int, int, int]:
    size, start = t.element_size(), t.data_ptr()
    end = start + size * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())))
    rows = t.dim() == 2 and t.stride(1) == 1 and t.stride(0) > t.shape[1]
    return (start, end, t.shape[1] * size, t.stride(0) * size) if rows else (start, end, end - start, end - start)


def install() -> None:
    """Patches the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "bounded", False):
        return
    InterpreterBuilder.bounded = True
    current: list[Regions] = []
    run, load, store = GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def bounded_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        current.append(Regions([a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]))
        try:
            return run(self, *args, **kwargs)
        finally:
            current.pop()

    def bounded_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        current[-1].check(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return load(self, pointers, mask, *rest)

    def bounded_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        current[-1].check(pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8)
        return store(self, pointers, value, mask, *rest)

    GridExecutor.__call__, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = bounded_run, bounded_load, bounded_store
