"""The bottleneck on CUDA devices of compute capability 8.0 and newer."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.ops import _triton
from fastadapt.ops._library import none
from fastadapt.ops._triton import (
    Bottleneck,
    Projection,
    Routing,
    activate_chunks,
    add_bias,
    cdiv,
    chunks,
    contiguous,
    expand,
    jit,
    load_tile,
    load_vector,
    project,
    reasons,
    rounded,
    store_chunks,
    store_tile,
    task_stride,
    tile_of_task,
    tile_rows,
    times,
    tl,
    zero_unless,
)

__all__ = ["backward", "forward", "reasons"]


@jit
def forward_kernel(
    X, WD, BD, WU, BU, G, S, RESIDUAL, Y, Z, scale, T, D, stride_x, stride_residual,
    R: tl.constexpr, CHUNKS: tl.constexpr, ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ORDER=None, STARTS=None, stride_wd=None, stride_bd=None, stride_wu=None, stride_bu=None, TASKS: tl.constexpr = 0,
    D_OUT=None, SEED=None, threshold=None, factor=None,
):  # fmt: skip
    """One tile of rows: down-projection over all of D, activation, up-projection slab by slab.

    Global memory a row in half precision: 4 D + 2 R bytes (x once, y, z), 2 D more for another residual; the second reading of x hits L2. Beside a projection, whose output is the
    residual: 2 D + 4 D_OUT + 2 R. ``factor`` makes up for what dropout drops, in fp32 on the sums: kernels only zero elements of x, exactly.
    """
    dtype: tl.constexpr = X.dtype.element_ty
    if ORDER is None:
        rows, valid = tile_rows(T, BLOCK_T)
    else:
        task, rows, valid = tile_of_task(ORDER, STARTS, T, BLOCK_T, TASKS)
        if task > TASKS:
            return
        own = tl.minimum(task, TASKS - 1)  # rows of no task go through the last one's weights, and come out as zero
        WD += own * stride_wd
        WU += own * stride_wu
        if BD is not None:
            BD += own * stride_bd
        if BU is not None:
            BU += own * stride_bu
    seed = None if SEED is None else tl.load(SEED)
    z = project(X, stride_x, rows, valid, D, None, WD, D, 1, R, CHUNKS, BLOCK_D, EVEN, PRECISION, seed, threshold)
    if SEED is not None:
        z = times(z, factor, CHUNKS)
    z = add_bias(z, BD, R, CHUNKS, dtype)
    if ORDER is not None:
        z = zero_unless(task < TASKS, z, CHUNKS)
    if Z is not None:
        store_chunks(Z, rows, valid, z, R, CHUNKS)
    a = activate_chunks(z, ACTIVATION, CHUNKS)
    if S is not None:
        scale *= tl.load(S).to(dtype).to(tl.float32)
    C = D if D_OUT is None else D_OUT
    for start in tl.range(0, C, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        y = expand(a, WU, columns, R, 1, C, R, CHUNKS, EVEN, PRECISION)
        if BU is not None:
            y += load_vector(BU, columns, C, dtype)[None, :]
        y *= scale
        if G is not None:
            y *= load_vector(G, columns, C, dtype)[None, :]
        if ORDER is not None:
            y = tl.where(task < TASKS, y, 0.0)
        if ADD_INPUT:
            y += load_tile(X, stride_x, rows, valid, columns, C, EVEN).to(tl.float32)
        if RESIDUAL is not None:
            y += load_tile(RESIDUAL, stride_residual, rows, valid, columns, C, EVEN).to(tl.float32)
        store_tile(Y, C, rows, valid, columns, C, y, EVEN)


def forward(
    x: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None, gate: Tensor | None, scale_tensor: Tensor | None, residual: Tensor | None,
    scale: float, activation: int, add_input: bool, save: bool, routing: Routing | None = None, projection: Projection | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and z for backward, as ``reference.forward``: one launch, and one to round fp32 weights where `rounded` does. With ``routing`` parameters are banks."""
    (t, d), r, d_out = x.shape, w_down.shape[-2], w_up.shape[-2]
    y = torch.empty((t, d_out), dtype=x.dtype, device=x.device)
    z = torch.empty((t, r), dtype=x.dtype, device=x.device) if save else None
    if t:
        even = math.gcd(d, d_out)
        kernel = "routed_forward" if routing is not None else "forward" if projection is None or projection.seed is None else "dropout_forward"
        w_down, w_up = rounded(x, even, r, w_down, w_up)
        tile = _triton.tile(kernel, r, even, x.dtype, w_up.dtype)
        b_down, b_up, gate = contiguous(b_down, b_up, gate)
        args = (x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, y, z, scale, t, d, x.stride(0), 0 if residual is None else residual.stride(0))
        constants: dict[str, Any] = {"ACTIVATION": activation, "ADD_INPUT": add_input, "BLOCK_T": tile.block_t, "BLOCK_D": tile.block_d, "EVEN": even % tile.block_d == 0}
        tiles = cdiv(t, tile.block_t)
        if routing is not None:
            strides = {f"stride_{name}": task_stride(p) for name, p in (("wd", w_down), ("bd", b_down), ("wu", w_up), ("bu", b_up))}
            tiles, constants = routing.pieces(t, tile.block_t), {**constants, **routing.by_row(**strides)}
        if projection is not None:
            constants |= {**projection.options(masks=True), "factor": projection.factor}
        _triton.launch(forward_kernel, (tiles,), x, *args, tile=tile, R=r, CHUNKS=chunks(r), PRECISION=_triton.precision(x.dtype), **constants)
    return y, none(x) if z is None else z


def backward(
    dy: Tensor, x: Tensor, z: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None, gate: Tensor | None, scale_tensor: Tensor | None,
    scale: float, activation: int, add_input: bool, needs: Sequence[bool], routing: Routing | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that ``needs`` asks for, as ``reference.backward``: a launch over row tiles, one over slabs of D and splits of the rows, one to add partials."""
    rounded_down, rounded_up = rounded(x, x.shape[1], z.shape[1], w_down, w_up)
    b_up, gate = contiguous(b_up, gate)
    problem = Bottleneck(dy, x, z, rounded_down, rounded_up, b_up, gate, scale_tensor, scale, 1.0 if add_input else None, needs)
    return _triton.bottleneck_backward([problem], activation, w_down.dtype, routing)[0]
