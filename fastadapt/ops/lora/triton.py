"""LoRA's update on CUDA devices of compute capability 8.0 and newer: the kernels of the bottleneck, beside a projection."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from torch import Tensor

from fastadapt.ops import _triton
from fastadapt.ops._triton import Bottleneck, Projection, reasons, rounded
from fastadapt.ops.bottleneck import triton as bottleneck

__all__ = ["backward", "forward", "reasons"]


def forward(x: Tensor, y: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None, seed: Tensor | None, scale: float, dropout: float, save: bool) -> tuple[Tensor, Tensor]:
    """y', and z for backward, as ``reference.forward``: one launch, and one to round fp32 weights where `rounded` does."""
    projection = Projection(y.shape[1], seed, dropout)
    return bottleneck.forward(x, w_down, None, w_up, b_up, None, None, y, scale, 0, False, save, projection=projection)


def backward(dy: Tensor, x: Tensor, z: Tensor, w_down: Tensor, w_up: Tensor, seed: Tensor | None, scale: float, dropout: float, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """The gradients that ``needs`` asks for, as ``reference.backward``: a launch over row tiles, one over slabs of the widths and splits of the rows, one to add partials."""
    need_x, need_wd, need_wu, need_bu = needs
    rounded_down, rounded_up = rounded(x, gcd(x.shape[1], dy.shape[1]), z.shape[1], w_down, w_up)
    problem = Bottleneck(dy, x, z, rounded_down, rounded_up, None, None, None, scale, None, (need_x, need_wd, False, need_wu, need_bu, False, False))
    ((dx, dwd, _, dwu, dbu, *_),) = _triton.bottleneck_backward([problem], 0, w_down.dtype, projection=Projection(dy.shape[1], seed, dropout))
    return dx, dwd, dwu, dbu
