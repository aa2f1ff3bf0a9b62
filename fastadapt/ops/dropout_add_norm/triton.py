"""Dropout, sum and norm on CUDA devices of compute capability 8.0 and newer: programs over whole rows, and the sums of their partials for the gradients of weight and bias."""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.backend import Call
from fastadapt.ops import _triton
from fastadapt.ops._library import none
from fastadapt.ops._triton import Tile, cdiv, jit, keep, load_tile, power_of_two, store_tile, tile_rows, tl
from fastadapt.ops.philox import threshold


@jit
def load_parameter(P, columns, D):
    """A weight or bias in fp32, as it is: torch's norms do not round theirs to the activations' dtype either."""
    return tl.load(P + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]


@jit
def forward_kernel(
    X, RESIDUAL, W, B, SEED, Y, V, MEAN, RSTD, threshold, kept, eps, T, D, stride_x, stride_residual,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """v = residual + M (.) x kept, rounded, and y = w (.) (v - mean) rstd + b (layer, NORM 1) or w (.) v rstd + b (rms, 2). Each tensor is read or written once."""
    rows, valid = tile_rows(T, BLOCK_T)
    columns = tl.arange(0, BLOCK_D)
    x = load_tile(X, stride_x, rows, valid, columns, D, EVEN)
    exact = x.to(tl.float32)
    if SEED is not None:
        exact = tl.where(keep(tl.load(SEED), threshold, rows, 0, BLOCK_D), exact * kept, 0.0)
    v = exact.to(x.dtype)
    if RESIDUAL is not None:
        residual = load_tile(RESIDUAL, stride_residual, rows, valid, columns, D, EVEN)
        v = (exact + residual.to(tl.float32)).to(residual.dtype)
    if V is not None:
        store_tile(V, D, rows, valid, columns, D, v, EVEN)
    if NORM != 0:
        y = v.to(tl.float32)
        if NORM == 1:
            mean = tl.sum(y, 1) / D
            y = tl.where((columns < D)[None, :], y - mean[:, None], 0.0)
            if MEAN is not None:
                tl.store(MEAN + rows, mean, mask=valid)
        rstd = tl.rsqrt(tl.sum(y * y, 1) / D + eps)
        if RSTD is not None:
            tl.store(RSTD + rows, rstd, mask=valid)
        y = y * rstd[:, None]
        if W is not None:
            y = y * load_parameter(W, columns, D)
        if B is not None:
            y = y + load_parameter(B, columns, D)
        store_tile(Y, D, rows, valid, columns, D, y, EVEN)


@jit
def backward_kernel(
    DY, DV, V, MEAN, RSTD, W, SEED, DX, DRESIDUAL, DW, DB, threshold, kept, T, D, size, stride_dy, stride_dv, stride_v,
    NORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """With c = dy (.) w: g = rstd (c - xhat mean(c (.) xhat) [- mean(c)]) + dv, the gradient of the residual, dx = M (.) g kept, and this part's sums of dy (.) xhat and dy."""
    part = tl.program_id(0).to(tl.int64)
    first = part * size
    last = tl.minimum(first + size, T)
    columns = tl.arange(0, BLOCK_D)
    dw = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    db = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in tl.range(first, last, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < last
        if NORM == 0:
            g = load_tile(DV, stride_dv, rows, valid, columns, D, EVEN).to(tl.float32)
        else:
            c = load_tile(DY, stride_dy, rows, valid, columns, D, EVEN).to(tl.float32)
            xhat = load_tile(V, stride_v, rows, valid, columns, D, EVEN).to(tl.float32)
            if NORM == 1:
                xhat = xhat - tl.load(MEAN + rows, mask=valid, other=0.0)[:, None]
            rstd = tl.load(RSTD + rows, mask=valid, other=0.0)[:, None]
            xhat = xhat * rstd  # where there is no column it is not zero, but dy is
            if DW is not None:
                dw += c * xhat
            if DB is not None:
                db += c
            if W is not None:
                c = c * load_parameter(W, columns, D)
            g = c - xhat * (tl.sum(c * xhat, 1) / D)[:, None]
            if NORM == 1:
                g = g - (tl.sum(c, 1) / D)[:, None]
            g = g * rstd
            if DV is not None:
                g = g + load_tile(DV, stride_dv, rows, valid, columns, D, EVEN).to(tl.float32)
        if DRESIDUAL is not None:
            store_tile(DRESIDUAL, D, rows, valid, columns, D, g, EVEN)
        if DX is not None:
            if SEED is not None:
                g = tl.where(keep(tl.load(SEED), threshold, rows, 0, BLOCK_D), g * kept, 0.0)
            store_tile(DX, D, rows, valid, columns, D, g, EVEN)
    if DW is not None:
        tl.store(DW + part * D + columns, tl.sum(dw, 0), mask=columns < D)
    if DB is not None:
        tl.store(DB + part * D + columns, tl.sum(db, 0), mask=columns < D)


@jit
def sums_kernel(DW_PARTS, DB_PARTS, DW, DB, parts, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Column sums of the fp32 partials (parts, C) of each gradient, added in order."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    for i in tl.static_range(2):
        PARTS = DW_PARTS if i == 0 else DB_PARTS
        OUT = DW if i == 0 else DB
        if OUT is not None:
            total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
            for start in tl.range(0, parts, BLOCK_N):
                part = start + tl.arange(0, BLOCK_N)
                total += tl.load(PARTS + part.to(tl.int64)[:, None] * C + columns[None, :], mask=(part < parts)[:, None] & (columns < C)[None, :], other=0.0)
            tl.store(OUT + columns, tl.sum(total, 0).to(OUT.dtype.element_ty), mask=columns < C)


MAX_WIDTH, MAX_RAGGED = 8192, 2048
"""A row is one block of 16 numbers a thread, which at 16 warps has 128 registers: too few for longer rows, and for the masks and narrow loads of those that 16 does not divide."""
MAX_PARTS, LEAST_ROWS = 256, 8
SUMS_N, SUMS_C = 32, 32


def tile(width: int, registers: int = 0) -> Tile:
    """16 numbers a thread, of one row or of several: a function of the width alone. ``registers``: a bound, where so many warps can have
    it: without one ptxas spills a word or two of some backwards to get under 96, with one it fills up those with masks, and spills."""
    block_d = max(16, power_of_two(width))
    block_t = max(1, 2048 // block_d)
    warps = block_t * block_d // 512
    return Tile(block_t, block_d, warps, 1, 0, min(registers, 2048 // warps))


def part_rows(rows: int, block_t: int) -> int:
    """Rows of a partial: a function of the shape alone, so that equal calls add in equal order."""
    return cdiv(max(LEAST_ROWS, cdiv(rows, MAX_PARTS)), block_t) * block_t


def reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot run a call."""
    out = _triton.reasons(call)
    if call.width > MAX_WIDTH:
        out.append(f"width {call.width} is above {MAX_WIDTH}, the longest row that a program holds")
    elif call.width > MAX_RAGGED and call.width % 16:
        out.append(f"width {call.width} is above {MAX_RAGGED} and no multiple of 16")
    return out


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, norm: int, eps: float, dropout: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, v, mean and rstd, as ``reference.forward``: one launch."""
    (t, d), like = x.shape, x if residual is None else residual

    def new(needed: bool, *shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    y, v = new(norm > 0, t, d), new(norm == 0 or (save and (residual is not None or dropout > 0)), t, d)
    mean, rstd = new(save and norm == 1, t, dtype=torch.float32), new(save and norm > 0, t, dtype=torch.float32)
    if t:
        shape = tile(d)
        outputs = (out if out.numel() else None for out in (y, v, mean, rstd))
        args = (x, residual, weight, bias, seed, *outputs, threshold(dropout) - 2**31, 1 / (1 - dropout), eps, t, d, x.stride(0), _stride(residual))
        _triton.launch(forward_kernel, (cdiv(t, shape.block_t),), x, *args, NORM=norm, BLOCK_T=shape.block_t, BLOCK_D=shape.block_d, EVEN=d == shape.block_d, tile=shape)
    return y, v, mean, rstd


def backward(
    dy: Tensor | None, dv: Tensor | None, v: Tensor | None, mean: Tensor | None, rstd: Tensor | None, weight: Tensor | None, seed: Tensor | None,
    norm: int, dropout: float, dtype: torch.dtype, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that ``needs`` asks for, as ``reference.backward``: a launch over the rows, and one to add their partials."""
    like: Tensor = dv if dy is None else dy  # type: ignore[assignment]
    t, d = like.shape
    need_x, need_residual, need_weight, need_bias = needs

    def new(needed: bool, *shape: int, dtype: torch.dtype = like.dtype) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=like.device) if needed else None

    dx, dresidual = new(need_x, t, d, dtype=dtype), new(need_residual, t, d)
    dweight, dbias = (new(need, d, dtype=weight.dtype if weight is not None else like.dtype) for need in (need_weight, need_bias))
    if t:
        shape, sums = tile(d, 0 if d % 16 else 255), need_weight or need_bias
        size = part_rows(t, shape.block_t) if sums else shape.block_t
        parts = cdiv(t, size)
        of_weight, of_bias = (new(need, parts, d, dtype=torch.float32) for need in (need_weight, need_bias))
        args = (dy, dv, v, mean, rstd, weight, seed, dx, dresidual, of_weight, of_bias, threshold(dropout) - 2**31, 1 / (1 - dropout), t, d, size, *map(_stride, (dy, dv, v)))
        _triton.launch(backward_kernel, (parts,), like, *args, NORM=norm, BLOCK_T=shape.block_t, BLOCK_D=shape.block_d, EVEN=d == shape.block_d, tile=shape)
        if sums:
            _triton.launch(sums_kernel, (cdiv(d, SUMS_C),), like, of_weight, of_bias, dweight, dbias, parts, d, BLOCK_N=SUMS_N, BLOCK_C=SUMS_C)
    else:
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
    return tuple(none(like) if gradient is None else gradient for gradient in (dx, dresidual, dweight, dbias))
