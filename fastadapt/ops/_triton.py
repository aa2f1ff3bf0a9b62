"""What the Triton kernels of all ops share: tile loads, projections, activations, the backward of a bottleneck, reductions in a fixed order, tile tables and launches.

Conventions. X, Y, Z, ... are pointers and None stands for an absent tensor or an output that nobody asked for: the branch is then not compiled. COUNT is how many
PROBLEMS there are, THERE what they have: Triton 3.6 takes neither a tuple's length nor an element that is None for a constant. Rows are 64-bit numbers from the program id on, so
no row offset can overflow. A rank is cut into power-of-two chunks, ((start, size), ...), the last one padded with zeros: 96 is 64 + 32. A tensor that is
rank wide is a tuple with one tile a chunk. Sums over rows are cut by shape alone, each piece has its own fp32 partial, partials are added in order: no atomics.

Rows of several tasks (ORDER is not None): ORDER (T,) lists the rows sorted by task, STARTS (TASKS + 1,) says where each task's begin, those of no task last. Tiles and splits are
pieces of one task's stretch of ORDER, `piece` finds a program's from its number, and a launch has as many programs as there can be pieces: nothing of the ids is known on the host.

Beside a projection (LoRA; D_OUT is not None) y has D_OUT columns and x has D. With dropout (SEED is not None) M (.) x stands in place of x: `keep` draws M again for each tile.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.backend import Call
from fastadapt.ops._library import none
from fastadapt.ops.philox import threshold

try:
    import triton
    import triton.language as tl
except ImportError:  # `reasons` says so, and nothing below is called
    triton = tl = None

jit = triton.jit if triton else lambda kernel: kernel


@jit
def activate(z, ACTIVATION: tl.constexpr):
    """phi(z) in fp32, numbered as in `_library.ACTIVATIONS`."""
    if ACTIVATION == 0:
        return z
    elif ACTIVATION == 1:
        return tl.where(z < 0.0, 0.0, z)  # NaN stays: the hardware's maximum drops it
    elif ACTIVATION == 2:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:  # 0.5 (1 + tanh u) = sigmoid(2u), 2u = sqrt(8 / pi) (z + 0.044715 z^3): one ex2.approx and one division, no tanh
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    else:
        return z * tl.sigmoid(z)


@jit
def logistic(v):
    """sigma(v) and 1 - sigma(v), which the subtraction would round away near sigma = 1: gelu_new's slope multiplies that error by about 35. Below -80 sigma is 0, however large
    what it multiplies."""
    e = tl.exp(-tl.maximum(v, -80.0))
    s = 1.0 / (1.0 + e)
    return tl.where(v < -80.0, 0.0, s), e * s


@jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """phi'(z) in fp32; relu'(0) = 0."""
    if ACTIVATION == 0:
        return 1.0
    elif ACTIVATION == 1:
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == 2:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == 3:
        s, rest = logistic(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * rest * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        s, rest = logistic(z)
        return s * (1.0 + z * rest)


@jit
def tile_rows(T, BLOCK_T: tl.constexpr):
    """The rows of this program's tile, and which of them exist."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    return rows, rows < T


@jit
def segments(STARTS, T, SIZE, TASKS: tl.constexpr):
    """Of each task and, at TASKS, of no task: its number, first position in ORDER, end, and how many pieces of SIZE positions it has; then empty ones up to a power of two."""
    g = tl.arange(0, triton.next_power_of_2(TASKS + 1))
    first = tl.load(STARTS + g, mask=g <= TASKS, other=T)
    end = tl.load(STARTS + g + 1, mask=g < TASKS, other=T)
    return g, first, end, tl.cdiv(end - first, SIZE)


@jit
def piece(STARTS, program, T, SIZE, TASKS: tl.constexpr):
    """The task of the piece with this number, and its first position and end in ORDER. Behind the last piece the task is above TASKS."""
    g, first, end, pieces = segments(STARTS, T, SIZE, TASKS)
    through = tl.cumsum(pieces, 0)
    task = tl.sum((through <= program).to(tl.int64), 0)
    begin = tl.sum(tl.where(g == task, first + (program - through + pieces) * SIZE, 0), 0)
    return task, begin, tl.minimum(begin + SIZE, tl.sum(tl.where(g == task, end, 0), 0))


@jit
def pieces_to_add(STARTS, task, T, SIZE, SHARED: tl.constexpr, TASKS: tl.constexpr):
    """The range of pieces whose partials make up a gradient: those of a task, or those of all tasks for a shared parameter."""
    g, _, _, pieces = segments(STARTS, T, SIZE, TASKS)
    return tl.sum(tl.where(g < task, pieces, 0), 0), tl.sum(tl.where(g < (TASKS if SHARED else task + 1), pieces, 0), 0)


@jit
def tile_of_task(ORDER, STARTS, T, BLOCK_T: tl.constexpr, TASKS: tl.constexpr):
    """The task of this program's tile, its rows, and which of them exist."""
    task, first, last = piece(STARTS, tl.program_id(0).to(tl.int64), T, BLOCK_T, TASKS)
    positions = first + tl.arange(0, BLOCK_T)
    valid = positions < last
    return task, tl.load(ORDER + positions, mask=valid, other=0), valid


@jit
def load_tile(X, stride, rows, valid, columns, D, EVEN: tl.constexpr):
    """X[rows, columns], zero outside."""
    mask = valid[:, None] if EVEN else valid[:, None] & (columns < D)[None, :]
    return tl.load(X + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@jit
def load_across(X, stride, rows, valid, columns, D, EVEN: tl.constexpr):
    """X[rows, columns] transposed, zero outside. (tl.trans of `load_tile` costs 90 more registers on compute capability 8.0.)"""
    mask = valid[None, :] if EVEN else valid[None, :] & (columns < D)[:, None]
    return tl.load(X + rows[None, :] * stride + columns[:, None], mask=mask, other=0.0)


@jit
def keep(seed, threshold, rows, start, BLOCK_D: tl.constexpr):
    """M[rows, start to start + BLOCK_D - 1] of `fastadapt.ops.philox.keep`; ``threshold`` is 2^31 below the one there, so that it fits a signed number of 32 bits.

    One counter makes the words of four columns, which lie side by side in a thread: joined, they need no exchange.
    """
    groups = start // 4 + tl.arange(0, BLOCK_D // 4)
    a, b, c, d = tl.philox(seed, groups[None, :], rows.to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None], 0)
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(rows.shape[0], BLOCK_D)
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@jit
def store_tile(Y, stride, rows, valid, columns, D, y, EVEN: tl.constexpr):
    mask = valid[:, None] if EVEN else valid[:, None] & (columns < D)[None, :]
    tl.store(Y + rows[:, None] * stride + columns[None, :], y.to(Y.dtype.element_ty), mask=mask)


@jit
def load_vector(V, columns, D, dtype: tl.constexpr):
    """A parameter vector, rounded to the activations' dtype, in fp32."""
    return tl.load(V + columns, mask=columns < D, other=0.0).to(dtype).to(tl.float32)


@jit
def load_weight(W, i, stride_i, end_i, j, stride_j, end_j, EVEN_I: tl.constexpr, EVEN_J: tl.constexpr):
    """The tile of a weight with i down and j across, zero outside, in the weight's own dtype."""
    at = W + i[:, None] * stride_i + j[None, :] * stride_j
    if EVEN_I and EVEN_J:
        return tl.load(at)
    elif EVEN_J:
        return tl.load(at, mask=(i < end_i)[:, None], other=0.0)
    elif EVEN_I:
        return tl.load(at, mask=(j < end_j)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(i < end_i)[:, None] & (j < end_j)[None, :], other=0.0)


@jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """An fp32 tile. (Triton before 3.8 takes no element of a tuple in a shape.)"""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@jit
def project(
    X, stride, rows, valid, D, G, W, step_r, step_d, R: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    seed=None, threshold=None,
):  # fmt: skip
    """(M (.) X (.) G) W' for a weight (R, D) that lies in memory with steps step_r and step_d: one fp32 tile (rows, chunk) a rank chunk. G, a vector (D,), and M may be None."""
    z = ()
    for i in tl.static_range(len(CHUNKS)):
        z = z + (zeros(rows.shape[0], CHUNKS[i][1]),)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        x = load_tile(X, stride, rows, valid, columns, D, EVEN)
        if seed is not None:
            x = tl.where(keep(seed, threshold, rows, start, BLOCK_D), x, 0.0)
        if G is not None:
            x = (x.to(tl.float32) * load_vector(G, columns, D, x.dtype)[None, :]).to(x.dtype)
        following = ()
        for i in tl.static_range(len(CHUNKS)):
            r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
            w = load_weight(W, columns, step_d, D, r, step_r, R, EVEN, CHUNKS[i][0] + CHUNKS[i][1] <= R)
            following = following + (tl.dot(x, w.to(x.dtype), z[i], input_precision=PRECISION),)
        z = following
    return z


@jit
def expand(a, W, columns, step_d, step_r, D, R: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """a W' for a weight (D, R) that lies in memory with steps step_d and step_r: the fp32 tile (rows, columns)."""
    u = tl.zeros((a[0].shape[0], columns.shape[0]), tl.float32)
    for i in tl.static_range(len(CHUNKS)):
        r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        w = load_weight(W, r, step_r, R, columns, step_d, D, CHUNKS[i][0] + CHUNKS[i][1] <= R, EVEN)
        u = tl.dot(a[i], w.to(a[i].dtype), u, input_precision=PRECISION)
    return u


@jit
def add_bias(z, B, R: tl.constexpr, CHUNKS: tl.constexpr, dtype: tl.constexpr):
    """z + B, rounded to the activations' dtype: the pre-activation as it is saved."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        out = out + ((z[i] if B is None else z[i] + load_vector(B, r, R, dtype)[None, :]).to(dtype),)
    return out


@jit
def zero_unless(condition, z, CHUNKS: tl.constexpr):
    """z, or zero whatever it is: a product with 0 would let a NaN through."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (tl.where(condition, z[i], 0.0).to(z[i].dtype),)
    return out


@jit
def times(z, factor, CHUNKS: tl.constexpr):
    """z times a number."""
    out = ()
    for i in tl.static_range(len(CHUNKS)):
        out = out + (z[i] * factor,)
    return out


@jit
def load_chunks(Z, rows, valid, R: tl.constexpr, CHUNKS: tl.constexpr):
    z = ()
    for i in tl.static_range(len(CHUNKS)):
        r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        z = z + (load_tile(Z, R, rows, valid, r, R, CHUNKS[i][0] + CHUNKS[i][1] <= R),)
    return z


@jit
def store_chunks(Z, rows, valid, z, R: tl.constexpr, CHUNKS: tl.constexpr):
    for i in tl.static_range(len(CHUNKS)):
        r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
        store_tile(Z, R, rows, valid, r, R, z[i], CHUNKS[i][0] + CHUNKS[i][1] <= R)


@jit
def activate_chunks(z, ACTIVATION: tl.constexpr, CHUNKS: tl.constexpr):
    """phi of the rounded pre-activations, rounded again: what the up-projection multiplies."""
    a = ()
    for i in tl.static_range(len(CHUNKS)):
        a = a + (activate(z[i].to(tl.float32), ACTIVATION).to(z[i].dtype),)
    return a


@jit
def row_gradients(
    DY, Z, WD, WU, G, S, DX, DZ, A, SUMS, scale, add, stride_dy, stride_wd, stride_wu, rows, valid, task, D, D_OUT, SEED, threshold,
    R: tl.constexpr, CHUNKS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, TASKS: tl.constexpr,
):  # fmt: skip
    """Of one bottleneck and one tile: dz = s ((dy (.) g) Wu) (.) phi'(z), its column sums, a = phi(z), and dx = M (.) (dz Wd) + add dy.

    Global memory a row: reads 2 (D + R) bytes in half precision (dy once more from L2), writes 2 (D + 2 R): a is stored because each of the D / BLOCK_D programs of
    `weights_kernel` would have to evaluate it again. The identity's a is z: neither is then read nor written.
    """
    dtype: tl.constexpr = DY.dtype.element_ty
    if task is not None:
        WD += tl.minimum(task, TASKS - 1) * stride_wd
        WU += tl.minimum(task, TASKS - 1) * stride_wu
    if DZ is not None or SUMS is not None or DX is not None:
        da = project(DY, stride_dy, rows, valid, D if D_OUT is None else D_OUT, G, WU, 1, R, R, CHUNKS, BLOCK_D, EVEN, PRECISION)
    z = load_chunks(Z, rows, valid, R, CHUNKS)  # not before the loop, which needs the registers
    if A is not None:
        store_chunks(A, rows, valid, activate_chunks(z, ACTIVATION, CHUNKS), R, CHUNKS)
    if DZ is not None or SUMS is not None or DX is not None:
        if S is not None:
            scale *= tl.load(S).to(dtype).to(tl.float32)
        dz = ()
        for i in tl.static_range(len(CHUNKS)):
            exact = da[i] * scale * activation_slope(z[i].to(tl.float32), ACTIVATION)
            dz = dz + (exact.to(dtype),)
            if SUMS is not None:
                r = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
                tl.store(SUMS + tl.program_id(0).to(tl.int64) * R + r, tl.sum(exact, 0), mask=r < R)
        if DZ is not None:
            store_chunks(DZ, rows, valid, dz, R, CHUNKS)
        if DX is not None:
            seed = None if SEED is None else tl.load(SEED)
            for start in tl.range(0, D, BLOCK_D):
                columns = start + tl.arange(0, BLOCK_D)
                dx = expand(dz, WD, columns, 1, D, D, R, CHUNKS, EVEN, PRECISION)
                if SEED is not None:
                    dx = tl.where(keep(seed, threshold, rows, start, BLOCK_D), dx, 0.0)
                if task is not None:
                    dx = tl.where(task < TASKS, dx, 0.0)
                if add is not None:
                    dx += add * load_tile(DY, stride_dy, rows, valid, columns, D, EVEN).to(tl.float32)
                store_tile(DX, D, rows, valid, columns, D, dx, EVEN)


@jit
def rows_kernel(
    PROBLEMS, COUNT: tl.constexpr, T, D,
    R: tl.constexpr, CHUNKS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ORDER=None, STARTS=None, TASKS: tl.constexpr = 0, D_OUT=None, SEED=None, threshold=None,
):  # fmt: skip
    """`row_gradients` of one bottleneck, or of two of one rank. Grid: tiles of rows, bottlenecks."""
    task = None
    if ORDER is None:
        rows, valid = tile_rows(T, BLOCK_T)
    else:
        task, rows, valid = tile_of_task(ORDER, STARTS, T, BLOCK_T, TASKS)
        if task > TASKS:
            return
    if COUNT == 1 or tl.program_id(1) == 0:
        row_gradients(*PROBLEMS[0], rows, valid, task, D, D_OUT, SEED, threshold, R, CHUNKS, ACTIVATION, BLOCK_D, EVEN, PRECISION, TASKS)
    else:
        row_gradients(*PROBLEMS[1], rows, valid, task, D, D_OUT, SEED, threshold, R, CHUNKS, ACTIVATION, BLOCK_D, EVEN, PRECISION, TASKS)


@jit
def slab_sums(
    DY, A, X, DZ, P, Q, S, stride_dy, stride_x, slab, part, split, first, last, D, ORDER, SEED, threshold,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one bottleneck, the columns of one slab, the rows of one split and a chunk of R: P = dy' a and Q = (M (.) x)' dz, (D, R) each, and S = column sums of dy, (D,).

    S is a product with ones on the matrix unit, where tl.sum would cost 30 more registers. Where products may use tf32 it is three of them, since torch's sums never round to tf32.
    """
    columns = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    r = part * BLOCK_R + tl.arange(0, BLOCK_R)
    p = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    q = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    s = tl.zeros((BLOCK_D, 16), tl.float32)
    seed = None if SEED is None else tl.load(SEED)
    for start in tl.range(first, last, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        valid = rows < last
        if ORDER is not None:
            rows = tl.load(ORDER + rows, mask=valid, other=0)
        if P is not None or S is not None:
            dy = load_across(DY, stride_dy, rows, valid, columns, D, EVEN)
            if P is not None:
                p = tl.dot(dy, load_tile(A, R, rows, valid, r, R, R % BLOCK_R == 0), p, input_precision=PRECISION)
            if S is not None:
                s = tl.dot(dy, tl.full((BLOCK_T, 16), 1.0, dy.dtype), s, input_precision="tf32x3" if PRECISION == "tf32" else PRECISION)
        if Q is not None:
            x = load_across(X, stride_x, rows, valid, columns, D, EVEN)
            if SEED is not None:
                x = tl.where(tl.trans(keep(seed, threshold, rows, slab * BLOCK_D, BLOCK_D)), x, 0.0)
            q = tl.dot(x, load_tile(DZ, R, rows, valid, r, R, R % BLOCK_R == 0), q, input_precision=PRECISION)
    exists = columns < D
    if P is not None:
        tl.store(P + split * D * R + columns[:, None] * R + r[None, :], p, mask=exists[:, None] & (r < R)[None, :])
    if Q is not None:
        tl.store(Q + split * D * R + columns[:, None] * R + r[None, :], q, mask=exists[:, None] & (r < R)[None, :])
    if S is not None:
        if part == 0:
            tl.store(S + split * D + columns, tl.sum(s, 1) * 0.0625, mask=exists)


@jit
def weights_kernel(
    PROBLEMS, COUNT: tl.constexpr, T, D, rows_per_split,
    R: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ORDER=None, STARTS=None, TASKS: tl.constexpr = 0, D_OUT=None, SEED=None, threshold=None,
):  # fmt: skip
    """`slab_sums` of one bottleneck, or of two of one rank, over one split of the rows. Grid: slabs of D, splits, chunks of R of the one and behind its PARTS those of the other.

    Beside a projection P and S are of slabs of D_OUT, and Q is of those of D, which the grid has behind them: no program holds both sums.
    """
    slab = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    if ORDER is None:
        first = split * rows_per_split
        last = tl.minimum(first + rows_per_split, T)
    else:
        task, first, last = piece(STARTS, split, T, rows_per_split, TASKS)
        if task >= TASKS:
            return
    if D_OUT is not None:
        DY, A, X, DZ, P, Q, S, stride_dy, stride_x = PROBLEMS[0]
        slabs = tl.cdiv(D_OUT, BLOCK_D)
        if slab < slabs:
            slab_sums(
                DY, A, X, DZ, P, None, S, stride_dy, stride_x, slab, part, split, first, last, D_OUT, ORDER, None, None,
                R, BLOCK_R, BLOCK_T, BLOCK_D, EVEN, PRECISION,
            )  # fmt: skip
        else:
            slab_sums(
                DY, A, X, DZ, None, Q, None, stride_dy, stride_x, slab - slabs, part, split, first, last, D, ORDER, SEED, threshold,
                R, BLOCK_R, BLOCK_T, BLOCK_D, EVEN, PRECISION,
            )  # fmt: skip
    elif COUNT == 1 or part < PARTS:
        slab_sums(*PROBLEMS[0], slab, part, split, first, last, D, ORDER, SEED, threshold, R, BLOCK_R, BLOCK_T, BLOCK_D, EVEN, PRECISION)
    else:
        slab_sums(*PROBLEMS[1], slab, part - PARTS, split, first, last, D, ORDER, SEED, threshold, R, BLOCK_R, BLOCK_T, BLOCK_D, EVEN, PRECISION)


@jit
def add_splits(
    P, Q, S, WU, BU, G, SCALE, DWD, DWU, DBU, DG, DSCALE, scale, splits, slab, task, D, C, STARTS, T, rows_per_split,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, SHARED: tl.constexpr, TASKS: tl.constexpr,
):  # fmt: skip
    """Adds one bottleneck's partials in the order of the splits. dWd = Q', dWu = s g (.) P, dbu = s g (.) S, dg = s b and, summed over D elsewhere, ds = g (.) b, with
    b = rowsum(Wu (.) P) + bu (.) S: the gradients of gate and scale need no up-projection. P and S are C wide, Q is D wide."""
    columns = slab * BLOCK_D + tl.arange(0, BLOCK_D)
    exists = columns < D
    of_up = columns < C
    first, last = 0, splits
    if STARTS is not None:
        first, last = pieces_to_add(STARTS, task, T, rows_per_split, SHARED, TASKS)
        if DBU is not None:
            DBU += task * C
        if DWU is not None:
            DWU += task * C * R
        if DWD is not None:
            DWD += task * D * R
    full = scale
    if SCALE is not None:
        full = scale * tl.load(SCALE).to(DTYPE).to(tl.float32)
    g = tl.full((BLOCK_D,), 1.0, tl.float32)
    if G is not None:
        g = load_vector(G, columns, D, DTYPE)
    b = tl.zeros((BLOCK_D,), tl.float32)
    if S is not None:
        s = tl.zeros((BLOCK_D,), tl.float32)
        part = S + first * C + columns
        for _ in tl.range(first, last):
            s += tl.load(part, mask=of_up, other=0.0)
            part += C
        if DBU is not None:
            tl.store(DBU + columns, (full * g * s).to(DBU.dtype.element_ty), mask=of_up)
        if BU is not None:
            b = load_vector(BU, columns, D, DTYPE) * s
    for start in tl.static_range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mask = exists[:, None] & (r < R)[None, :]
        mask_up = of_up[:, None] & (r < R)[None, :]
        at = columns[:, None] * R + r[None, :]
        if P is not None:
            p = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
            part = P + first * C * R + at
            for _ in tl.range(first, last):
                p += tl.load(part, mask=mask_up, other=0.0)
                part += C * R
            if DWU is not None:
                tl.store(DWU + at, (full * g[:, None] * p).to(DWU.dtype.element_ty), mask=mask_up)
            if DG is not None or DSCALE is not None:
                b += tl.sum(tl.load(WU + at, mask=mask, other=0.0).to(DTYPE).to(tl.float32) * p, 1)
        if Q is not None:
            q = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
            part = Q + first * D * R + at
            for _ in tl.range(first, last):
                q += tl.load(part, mask=mask, other=0.0)
                part += D * R
            tl.store(DWD + r[None, :] * D + columns[:, None], q.to(DWD.dtype.element_ty), mask=mask)
    if DG is not None:
        tl.store(DG + columns, (full * b).to(DG.dtype.element_ty), mask=exists)
    if DSCALE is not None:
        tl.store(DSCALE + columns, scale * g * b, mask=exists)


@jit
def add_tiles(
    PARTIALS, OUT, REST, parts, C, W, block, task, STARTS, T, rows_per_tile, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, SHARED: tl.constexpr, TASKS: tl.constexpr
):  # fmt: skip
    """Column sums of fp32 partials (parts, C), one part a tile of rows, added in order: columns below W go to OUT, column W to REST. Either may be None."""
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    first = 0
    if STARTS is not None:
        first, parts = pieces_to_add(STARTS, task, T, rows_per_tile, SHARED, TASKS)
        OUT += task * W
    for start in tl.range(first, parts, BLOCK_N):
        part = start + tl.arange(0, BLOCK_N)
        total += tl.load(PARTIALS + part.to(tl.int64)[:, None] * C + columns[None, :], mask=(part < parts)[:, None] & (columns < C)[None, :], other=0.0)
    sums = tl.sum(total, 0)
    if OUT is not None:
        tl.store(OUT + columns, sums.to(OUT.dtype.element_ty), mask=columns < W)
    if REST is not None:
        tl.store(REST + columns - W, sums.to(REST.dtype.element_ty), mask=columns == W)


@jit
def add_partials(
    SPLITS, TILES, task, slabs, D, C, STARTS, T, rows_per_split, rows_per_tile, HAS_SPLITS: tl.constexpr, HAS_TILES: tl.constexpr,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr, SHARED: tl.constexpr, TASKS: tl.constexpr,
):  # fmt: skip
    """Of one problem: the programs below ``slabs`` add what there is a split of the rows, the others what there is a tile. Either may be None."""
    block = tl.program_id(0)
    if not HAS_TILES or block < slabs:
        if HAS_SPLITS:
            add_splits(*SPLITS, block, task, D, C, STARTS, T, rows_per_split, R, BLOCK_R, BLOCK_D, DTYPE, SHARED, TASKS)
    else:
        add_tiles(*TILES, block - slabs, task, STARTS, T, rows_per_tile, BLOCK_N, BLOCK_C, SHARED, TASKS)


@jit
def reduce_kernel(
    PROBLEMS, COUNT: tl.constexpr, THERE: tl.constexpr, slabs, D, RANKS: tl.constexpr, BANKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr,
    STARTS=None, T=None, rows_per_split=None, rows_per_tile=None, TASKS: tl.constexpr = 0, D_OUT=None,
):  # fmt: skip
    """`add_partials` of one problem, or of two: bottlenecks, parameters of each task and those that all share, or a bottleneck and other sums over row tiles. Grid: slabs of the
    wider of D and D_OUT and behind them blocks of column sums; the tasks of the one problem and behind them those of the other, BANKS of each. THERE: which parts a problem has."""
    task = tl.program_id(1).to(tl.int64)
    C = D if D_OUT is None else D_OUT
    if COUNT == 1 or task < BANKS[0]:
        add_partials(
            *PROBLEMS[0], task, slabs, D, C, STARTS, T, rows_per_split, rows_per_tile, THERE[0][0], THERE[0][1],
            RANKS[0], BLOCK_R, BLOCK_D, BLOCK_N, BLOCK_C, DTYPE, BANKS[0] == 1, TASKS,
        )  # fmt: skip
    else:
        add_partials(
            *PROBLEMS[1], task - BANKS[0], slabs, D, C, STARTS, T, rows_per_split, rows_per_tile, THERE[1][0], THERE[1][1],
            RANKS[1], BLOCK_R, BLOCK_D, BLOCK_N, BLOCK_C, DTYPE, BANKS[1] == 1, TASKS,
        )  # fmt: skip


interpreted = triton is not None and not isinstance(rows_kernel, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when triton was imported: the kernels then run on the CPU, on CPU tensors, and nowhere else."""

MAX_RANK = 512
MAX_WIDTH = 2**31 // MAX_RANK


class Tile(NamedTuple):
    """Shape and launch options of a kernel's programs; ``block_r`` is the rank chunk of `weights_kernel`.

    ``registers``: a bound for ptxas, 0 for none. Without one it spills a word or two of some fp32 kernels to get under 80 or 128 registers, for the sake of one more block;
    with one it fills up others with loads that it moves ahead, and spills. Which of the two a kernel needs is tried, not derived.
    """

    block_t: int
    block_d: int
    warps: int
    stages: int
    block_r: int = 0
    registers: int = 0


# Chosen by the compiler's register and shared-memory counts on compute capabilities 8.0 to 12.0, since no kernel may spill: tests/triton/compiled holds each entry to that.
# The first entry whose bound is not below the padded rank is taken; wider ranks leave registers for fewer rows. A width that 64 does not divide needs masks and narrow loads, and
# with them the registers of twice the rank, at least 128. fp32 products run on FMA units unless tf32 is allowed.
_ROW_TILES = {
    "half": (
        (16, Tile(64, 64, 4, 3, 0, 255)), (64, Tile(64, 64, 4, 3)), (192, Tile(64, 64, 8, 3)), (256, Tile(32, 64, 8, 2)), (512, Tile(32, 32, 8, 2)), (1024, Tile(16, 32, 8, 2)),
    ),
    "fp32": ((192, Tile(32, 32, 8, 2, 0, 255)), (256, Tile(16, 32, 8, 2, 0, 255)), (1024, Tile(16, 16, 8, 2, 0, 255))),
}  # fmt: skip
_SLOPE_TILES = {
    "half": ((64, Tile(64, 64, 4, 3)), (96, Tile(64, 64, 8, 3)), (128, Tile(64, 64, 8, 2)), (256, Tile(32, 64, 8, 2)), (1024, Tile(16, 32, 8, 2))),
    "fp32": _ROW_TILES["fp32"],
}
"""Of `rows_kernel`, which holds the slopes of the activation beside two rank-wide tiles."""
_ROUTED_ROW_TILES = {
    "half": _SLOPE_TILES["half"],
    "fp32": ((96, Tile(32, 32, 8, 2, 0, 255)), (192, Tile(16, 32, 8, 2, 0, 255)), (1024, Tile(16, 16, 8, 1, 0, 255))),
}
_ROUTED_SLOPE_TILES = {
    "half": _SLOPE_TILES["half"],
    "fp32": ((96, Tile(32, 32, 8, 1, 0, 255)), (192, Tile(16, 32, 8, 2, 0, 255)), (256, Tile(16, 16, 8, 2, 0, 255)), (1024, Tile(16, 16, 16, 2))),
}
"""Of the same kernels over the rows of several tasks, whose loaded numbers take more registers than counted ones."""
_DROPOUT_TILES = {"half": tuple((bound, shape._replace(registers=255)) for bound, shape in _ROW_TILES["half"]), "fp32": _ROW_TILES["fp32"]}
"""Of a forward that draws masks."""
_GATE_TILES = {
    "half": ((64, Tile(64, 64, 8, 3)), (128, Tile(64, 32, 8, 2)), (256, Tile(32, 32, 8, 2)), (512, Tile(16, 32, 8, 2)), (1024, Tile(16, 16, 8, 2))),
    "fp32": ((128, Tile(32, 32, 8, 2)), (512, Tile(16, 16, 8, 2, 0, 255))),
}
_WEIGHT_TILES = {
    "half": ((16, Tile(64, 64, 4, 3, 16, 255)), (32, Tile(64, 64, 4, 3, 32)), (64, Tile(64, 64, 4, 3, 64)), (96, Tile(64, 128, 8, 3, 32)), (1024, Tile(64, 64, 4, 3, 64))),
    "fp32": ((16, Tile(32, 32, 8, 2, 16)), (1024, Tile(32, 32, 8, 2, 32))),
}
_ROUTED_WEIGHT_TILES = {
    "half": tuple((bound, shape._replace(warps=8, registers=255)) for bound, shape in _WEIGHT_TILES["half"]),
    "fp32": _WEIGHT_TILES["fp32"],
}
_PROJECTION_WEIGHT_TILES = {
    "half": tuple((bound, shape._replace(registers=255)) for bound, shape in _WEIGHT_TILES["half"]),
    "fp32": _WEIGHT_TILES["fp32"],
}
"""Of `weights_kernel` where a program does one of the two products."""
_MASKED_TILES = {
    "forward": ((192, Tile(64, 32, 8, 2, 0, 255)), *_ROW_TILES["half"][3:]),
    "routed_forward": ((192, Tile(64, 32, 8, 2, 0, 255)), *_ROW_TILES["half"][3:-1], (1024, Tile(16, 16, 8, 2))),
    "dropout_forward": ((192, Tile(64, 32, 8, 2, 0, 255)), *_ROW_TILES["half"][3:-1], (1024, Tile(16, 16, 8, 2))),
    "rows": (*_SLOPE_TILES["half"][:-1], (512, Tile(16, 32, 8, 2)), (1024, Tile(16, 16, 8, 2))),
    "projection_rows": tuple((bound, shape._replace(registers=255)) for bound, shape in (*_SLOPE_TILES["half"][:-1], (512, Tile(16, 32, 8, 2)), (1024, Tile(16, 16, 8, 2)))),
    "weights": _PROJECTION_WEIGHT_TILES["half"],
    "routed_rows": (*_SLOPE_TILES["half"][:-1], (1024, Tile(16, 16, 8, 2, 0, 255))),
    "gated_forward": (*_GATE_TILES["half"][:2], (256, Tile(32, 16, 8, 2)), *_GATE_TILES["half"][3:]),
}
"""Of half precision with masks, where some activation on some architecture spills with the tile of the same number of registers without masks."""
_REDUCE_TILE = Tile(16, 8, 8, 3, 128, 255)
_REDUCE_COLUMNS = 64
"""Column sums of this many columns a program, 16 partials a step."""
MAX_RANK_GATED_FP32 = 256
"""Above it the gated kernels with fp32 products spill whatever the tile."""


def tile(kernel: str, rank: int, width: int, dtype: torch.dtype, weights: torch.dtype | None = None) -> Tile:
    """The tile of a kernel, a function of shape and dtypes alone: nothing is timed at run time, so equal calls run equal code. ``weights``: the dtype of those that it reads, where
    it may be another one. Of fp32 ones tiles are narrow: no other shape that was tried is without spills on every architecture."""
    tables = {
        "rows": _SLOPE_TILES, "weights": _WEIGHT_TILES, "gated_forward": _GATE_TILES, "gates": _GATE_TILES, "dropout_forward": _DROPOUT_TILES, "projection_rows": _SLOPE_TILES,
        "projection_weights": _PROJECTION_WEIGHT_TILES,
        "routed_forward": _ROUTED_ROW_TILES, "routed_rows": _ROUTED_SLOPE_TILES, "routed_weights": _ROUTED_WEIGHT_TILES,
    }  # fmt: skip
    table = tables.get(kernel, _ROW_TILES)["fp32" if dtype == torch.float32 else "half"]
    padded = sum(size for _, size in chunks(rank))
    if width % 64:
        if dtype != torch.float32:
            table = _MASKED_TILES.get(kernel, table)
        if "weights" not in kernel:
            padded = max(128, 2 * padded)
    shape = next(shape for bound, shape in table if padded <= bound)
    if weights in (None, dtype):
        return shape
    return shape._replace(block_d=32, stages=2, registers=255 if padded == 96 or "rows" not in kernel else shape.registers)


@functools.cache
def c_compiler() -> bool:
    """Whether there is one where triton looks for it."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))


def reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot run a call."""
    if triton is None:
        return ["triton is not installed"]
    out = []
    if interpreted:
        if call.device != "cpu":
            out.append(f"triton's interpreter (TRITON_INTERPRET) takes CPU tensors, not {call.device}")
    elif call.device != "cuda":
        out.append(f"needs a CUDA device, not {call.device}")
    elif not torch.cuda.is_available():
        out.append("torch sees no CUDA device")
    elif call.arch < 80:
        out.append(f"needs compute capability 8.0, the device has {call.arch // 10}.{call.arch % 10}")
    elif not c_compiler():
        out.append("triton needs a C compiler to launch kernels: gcc or clang on the path, or the one that CC names")
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        out.append(f"{call.dtype} is not supported, only float32, float16 and bfloat16")
    if call.rank > MAX_RANK:
        out.append(f"rank {call.rank} is above {MAX_RANK}")
    if (gate_rank := call.option("gate_rank", 0)) > MAX_RANK:
        out.append(f"gate rank {gate_rank} is above {MAX_RANK}")
    if call.op == "gated_bottleneck" and call.dtype == torch.float32 and max(call.rank, gate_rank) > MAX_RANK_GATED_FP32:
        out.append(f"float32 with rank or gate rank {max(call.rank, gate_rank)} is above {MAX_RANK_GATED_FP32}")
    if (width := max(call.width, call.option("out_width", 0))) > MAX_WIDTH:
        out.append(f"width {width} is above {MAX_WIDTH}, where the offsets of a weight no longer fit 32 bits")
    return out


def precision(dtype: torch.dtype) -> str:
    """fp32 products are exact unless torch's own setting lets its matrix products use tf32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def chunks(rank: int) -> tuple[tuple[int, int], ...]:
    """The rank as powers of two of at least 16, the smallest side of a matrix product: two of them where that wastes less than padding to one. 96 is 64 + 32, not 128."""
    whole = max(16, power_of_two(rank))
    half = whole // 2
    rest = max(16, power_of_two(rank - half)) if rank > half else whole
    return ((0, half), (half, rest)) if half >= 16 and half + rest < whole else ((0, whole),)


def launch_options(tile: Tile | None) -> dict[str, Any]:
    if tile is None:
        return {"enable_fp_fusion": True}
    return {"enable_fp_fusion": True, "num_warps": tile.warps, "num_stages": tile.stages, **({"maxnreg": tile.registers} if tile.registers else {})}


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, tile: Tile | None = None, **constants: Any) -> None:
    """Runs a kernel on the device of ``on``, which need not be the current one."""
    constants.update(launch_options(tile))
    if on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


ROUND_ON_LOAD_BYTES = 40_000_000
"""What kernels may read more, from L2, for a launch less: 7 us of an H100's bandwidth, where a launch takes 2 on the device and 20 on the host (`_cost`)."""
ROUND_ON_LOAD_RANK = 96
"""The widest that spills on no architecture; up to it the tiles of all kernels that read weights have 64 rows."""


def rounds_on_load(rows: int, width: int, rank: int, elements: int) -> bool:
    """Whether kernels read fp32 weights of ``elements`` in all as they are under half-precision activations: every tile of 64 rows reads 2 bytes more of each element."""
    return width % 64 == 0 and rank <= ROUND_ON_LOAD_RANK and cdiv(rows, 64) * elements * 2 <= ROUND_ON_LOAD_BYTES


def rounded(x: Tensor, width: int, rank: int, *weights: Tensor | None) -> list[Any]:
    """The matrices of a call over the rows of x, as its kernels take them: fp32 ones under half-precision activations as they are, where kernels round them on load, else rounded
    by one launch for all, 6 bytes an element. ``rank`` is the widest; of a bank a tile reads one task's."""
    given = [w for w in weights if w is not None and w.dtype != x.dtype]
    if rounds_on_load(len(x), width, rank, sum(w.shape[-2] * w.shape[-1] for w in given)) or not given:
        return list(weights)
    out = [torch.empty(w.shape, dtype=x.dtype, device=w.device) for w in given]
    torch._foreach_copy_(out, given)
    fresh = iter(out)
    return [w if w is None or w.dtype == x.dtype else next(fresh) for w in weights]


def contiguous(*vectors: Tensor | None) -> list[Any]:
    return [v if v is None else v.contiguous() for v in vectors]


class Routing(NamedTuple):
    """Which rows belong to which task, as kernels find it on the device."""

    order: Tensor
    starts: Tensor
    tasks: int
    stretches: int
    """At most so many tasks, no task among them, have rows."""
    banks: tuple[int, ...]
    """How many tasks w_down, b_down, w_up and b_up are of: all or 1."""

    def by_row(self, **strides: int) -> dict[str, Any]:
        """What kernels over rows take."""
        return {"ORDER": self.order, "STARTS": self.starts, "TASKS": self.tasks, **strides}

    def by_task(self, **rows_of_pieces: int) -> dict[str, Any]:
        """What the kernel that adds partials takes."""
        return {"STARTS": self.starts, "T": len(self.order), "TASKS": self.tasks, **rows_of_pieces}

    def pieces(self, rows: int, size: int) -> int:
        """An upper bound: each stretch has at most one piece that is not full, and the last would be one anyway."""
        return cdiv(rows, size) + self.stretches - 1


class Projection(NamedTuple):
    """What a call beside a projection has and a bottleneck has not: another width of y, and dropout of x."""

    width: int
    seed: Tensor | None
    dropout: float

    @property
    def factor(self) -> float:
        """By which dropout makes up for what it drops."""
        return 1.0 / (1.0 - self.dropout)

    def options(self, *, masks: bool) -> dict[str, Any]:
        """What kernels take; ``masks``: the one that has tiles of x."""
        return {"D_OUT": self.width, **({"SEED": self.seed, "threshold": threshold(self.dropout) - 2**31} if masks and self.seed is not None else {})}


def task_stride(parameter: Tensor | None) -> int:
    """Elements from one task's to the next; 0 where all share one."""
    return 0 if parameter is None or len(parameter) == 1 else parameter.stride(0)


def token_splits(rows: int, programs: int) -> tuple[int, int]:
    """Splits of the rows and rows in each: about 192 programs in all, at least 256 rows in a split. A function of the shape alone, so that equal calls add in equal order."""
    splits = max(1, min(cdiv(192, programs), cdiv(rows, 256)))
    size = cdiv(cdiv(rows, splits), 128) * 128
    return cdiv(rows, size), size


class Bottleneck(NamedTuple):
    """One y = s g (.) (phi(x Wd' + bd) Wu' + bu) + add x whose gradients are asked for: those of x, Wd, bd, Wu, bu, g and s that it ``needs``. w_down and w_up are as `rounded`
    gives them, vectors contiguous. Without needs dy may be None."""

    dy: Any
    x: Tensor
    z: Tensor
    w_down: Tensor
    w_up: Tensor
    b_up: Tensor | None
    gate: Tensor | None
    scale_tensor: Tensor | None
    scale: float
    add: float | None
    needs: Sequence[bool]


class Rows(NamedTuple):
    """What `row_gradients` takes of a bottleneck. Kernels know the strides by their names."""

    DY: Any
    Z: Any
    WD: Any
    WU: Any
    G: Any
    S: Any
    DX: Any
    DZ: Any
    A: Any
    SUMS: Any
    scale: float
    add: float | None
    stride_dy: int
    stride_wd: int | None
    stride_wu: int | None


class Weights(NamedTuple):
    """What `slab_sums` takes of a bottleneck."""

    DY: Any
    A: Any
    X: Any
    DZ: Any
    P: Any
    Q: Any
    S: Any
    stride_dy: int
    stride_x: int


class TileSums(NamedTuple):
    """What `add_tiles` takes of a bottleneck."""

    PARTIALS: Any
    OUT: Any
    REST: Any
    parts: int
    C: int
    W: int


def bottleneck_backward(
    problems: Sequence[Bottleneck], activation: int, param_dtype: torch.dtype, routing: Routing | None = None, projection: Projection | None = None, sums: TileSums | None = None
) -> list[tuple[Tensor, ...]]:
    """The gradients of one bottleneck or two over the same number of rows, each as ``reference.backward`` returns them: a launch over row tiles, one over slabs of the width and
    splits of the rows, and one to add partials, in which those of one bottleneck may have ``sums`` beside them. Two of different ranks share the last alone: kernels of every two
    ranks would not all do without spills (96 and 16 on 10.0). With ``projection`` the one is s (D(x) Wd' Wu' + bu), in which dropout's D(x) is k M (.) x.

    With ``routing`` the parameters of the one are banks of tasks, and there is neither gate nor scale tensor. A task's gradients have the bits of a call with its rows alone while
    the splits of both have 256 rows; their size is one for all tasks, or each would have 192 programs.
    """
    x = problems[0].x
    (t, d), dtype = x.shape, x.dtype
    d_out = d if projection is None else projection.width
    even = math.gcd(d, d_out)
    wd, bd, wu, bu = ((),) * 4 if routing is None else ((bank,) for bank in routing.banks)

    def new(needed: bool, *shape: int, of: torch.dtype = param_dtype) -> Any:
        return torch.empty(shape, dtype=of, device=x.device) if needed else None

    def options(*, masks: bool) -> dict[str, Any]:
        return {**({} if routing is None else routing.by_row()), **({} if projection is None else projection.options(masks=masks)), "PRECISION": precision(dtype)}

    gradients = []
    for p in problems:
        r, (need_x, need_wd, need_bd, need_wu, need_bu, need_gate, need_scale) = p.z.shape[1], p.needs
        of_weights = new(need_wd, *wd, r, d), new(need_bd, *bd, r), new(need_wu, *wu, d_out, r), new(need_bu, *bu, d_out)
        gradients.append([new(need_x, t, d, of=dtype), *of_weights, new(need_gate, d), new(need_scale, d, of=torch.float32)])
    if t == 0:
        for gradient in (g for of_one in gradients for g in of_one if g is not None):
            gradient.zero_()
    else:
        kind = "routed_" if routing is not None else "projection_" if projection is not None else ""
        partials: list[Any] = []
        for r in dict.fromkeys(p.z.shape[1] for p in problems):
            row_tile, slab_tile = tile(kind + "rows", r, even, dtype, problems[0].w_up.dtype), tile(kind + "weights", r, even, dtype)
            tiles = cdiv(t, row_tile.block_t) if routing is None else routing.pieces(t, row_tile.block_t)
            slabs, parts = cdiv(d, slab_tile.block_d) + (0 if projection is None else cdiv(d_out, slab_tile.block_d)), cdiv(r, slab_tile.block_r)
            splits, size = token_splits(t, slabs * parts)
            splits = splits if routing is None else routing.pieces(t, size)
            by_row, by_slab, of_parts = [], [], []
            for p, (dx, dwd, dbd, dwu, dbu, dg, ds) in zip(problems, gradients, strict=True):
                if p.z.shape[1] != r:
                    continue
                bracket = dg is not None or ds is not None
                activated, dz = new((dwu is not None or bracket) and activation != 0, t, r, of=dtype), new(dwd is not None, t, r, of=dtype)
                a = p.z if (dwu is not None or bracket) and activation == 0 else activated
                of_tiles = new(dbd is not None, tiles, r, of=torch.float32)
                if any(v is not None for v in (dx, dwd, dbd, activated)):
                    full = p.scale if projection is None else p.scale * projection.factor
                    strides = (None, None) if routing is None else (task_stride(p.w_down), task_stride(p.w_up))
                    by_row.append(Rows(p.dy, p.z, p.w_down, p.w_up, p.gate, p.scale_tensor, dx, dz, activated, of_tiles, full, p.add, p.dy.stride(0), *strides))
                of_up, of_down = new(a is not None, splits, d_out, r, of=torch.float32), new(dwd is not None, splits, d, r, of=torch.float32)
                of_bias = new(dbu is not None or (bracket and p.b_up is not None), splits, d_out, of=torch.float32)
                if any(v is not None for v in (of_up, of_down, of_bias)):
                    by_slab.append(Weights(p.dy, a, p.x, dz, of_up, of_down, of_bias, p.dy.stride(0), p.x.stride(0)))
                    of_parts.append(1 if of_up is None and of_down is None else parts)
                pairs = ((of_up, dwu), (of_down, dwd), (of_bias, dbu), (of_tiles, dbd))
                for tasks in [1] if routing is None else dict.fromkeys(len(g) for _, g in pairs if g is not None):  # a problem for each number of tasks that have their own
                    (u, du), (v, dv), (b, db), (s, dz_sums) = (pair if routing is None or (pair[1] is not None and len(pair[1]) == tasks) else (None, None) for pair in pairs)
                    of_splits = (u, v, b, p.w_up, p.b_up, p.gate, p.scale_tensor, dv, du, db, dg, ds, p.scale, splits)
                    given = None if u is None and v is None and b is None else of_splits, None if s is None else TileSums(s, dz_sums, None, tiles, r, r)
                    partials += [(r, tasks, given)] if any(given) else []

            if by_row:
                constants = {"R": r, "CHUNKS": chunks(r), "ACTIVATION": activation, "BLOCK_T": row_tile.block_t, "BLOCK_D": row_tile.block_d, "EVEN": even % row_tile.block_d == 0}
                constants |= options(masks=any(problem.DX is not None for problem in by_row))
                launch(rows_kernel, (tiles, len(by_row)), x, tuple(by_row), len(by_row), t, d, tile=row_tile, **constants)
            if by_slab:
                constants = {"R": r, "PARTS": of_parts[0], "BLOCK_R": slab_tile.block_r, "BLOCK_T": slab_tile.block_t, "BLOCK_D": slab_tile.block_d}
                constants |= {"EVEN": even % slab_tile.block_d == 0, **options(masks=any(problem.Q is not None for problem in by_slab))}
                if routing is not None:  # loads at addresses that are loaded too: Triton shares the stages out among the two, and would leave half of them for the tiles
                    slab_tile = slab_tile._replace(stages=2 * slab_tile.stages - 1)
                launch(weights_kernel, (slabs, splits, sum(of_parts)), x, tuple(by_slab), len(by_slab), t, d, size, tile=slab_tile, **constants)
        partials += [] if sums is None else [(1, 1, (None, sums))]
        if partials:
            ranks, banks, of_partials = zip(*partials, strict=True)
            shape = _REDUCE_TILE
            slabs = cdiv(max(d, d_out), shape.block_d) if any(of_splits for of_splits, _ in of_partials) else 0
            blocks = max(cdiv(of_tiles.C, _REDUCE_COLUMNS) if of_tiles else 0 for _, of_tiles in of_partials)
            constants = {"RANKS": ranks, "BANKS": banks, "BLOCK_R": min(shape.block_r, max(16, power_of_two(max(ranks)))), "BLOCK_D": shape.block_d, "DTYPE": language_dtype(dtype)}
            constants |= {"BLOCK_N": shape.block_t, "BLOCK_C": _REDUCE_COLUMNS, **({} if projection is None else projection.options(masks=False))}
            constants |= {} if routing is None else routing.by_task(rows_per_split=size, rows_per_tile=row_tile.block_t)
            there = tuple((of_splits is not None, of_tiles is not None) for of_splits, of_tiles in of_partials)
            launch(reduce_kernel, (slabs + blocks, sum(banks)), x, of_partials, len(of_partials), there, slabs, d, tile=shape, **constants)
    for p, of_one in zip(problems, gradients, strict=True):
        if of_one[6] is not None and p.scale_tensor is not None:
            of_one[6] = of_one[6].sum().to(param_dtype).reshape(p.scale_tensor.shape)
    return [tuple(none(x) if gradient is None else gradient for gradient in of_one) for of_one in gradients]


def language_dtype(dtype: torch.dtype) -> Any:
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
