"""VL-PET's gated bottleneck on CUDA devices of compute capability 8.0 and newer.

Forward is one launch; ``small``, whose gate needs the whole sequence, takes two: logits, then the gated sum. Backward turns dy into dH' and the gradient before the gate's
sigmoid, each (T, D) in the activations' dtype, with one kernel, which ``small`` launches for its row sums first, and the rest is the backward of a plain bottleneck for each of the
projections, in launches that equal ranks share.
Keeping these two tensors costs 8 of about 24 D bytes a row in half precision (eager: 97 D counted) and keeps every program to one pair of rank-wide tiles: nothing spills at ranks
where one program for all would.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.ops import _triton
from fastadapt.ops._library import none
from fastadapt.ops._triton import (
    Bottleneck,
    TileSums,
    activate_chunks,
    add_bias,
    cdiv,
    chunks,
    contiguous,
    expand,
    jit,
    load_chunks,
    load_tile,
    load_vector,
    project,
    reasons,
    rounded,
    store_chunks,
    store_tile,
    tile_rows,
    tl,
)  # fmt: skip
from fastadapt.ops.gated_bottleneck.reference import KINDS

__all__ = ["backward", "forward", "reasons"]


@jit
def sum_before_gate(
    a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr
):
    """H' = c h + sa (a Wu' + bu), an fp32 tile."""
    h = load_tile(H, stride_h, rows, valid, columns, D, EVEN)
    u = expand(a, WU, columns, R, 1, D, R, CHUNKS, EVEN, PRECISION)
    if BU is not None:
        u += load_vector(BU, columns, D, h.dtype)[None, :]
    return input_scale * h.to(tl.float32) + adapter_scale * u


@jit
def wide_gate(a, GU, GUB, columns, D, R: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr):
    """sigma(a W2' + b2), an fp32 tile."""
    logits = expand(a, GU, columns, R, 1, D, R, CHUNKS, EVEN, PRECISION)
    if GUB is not None:
        logits += load_vector(GUB, columns, D, a[0].dtype)[None, :]
    return tl.sigmoid(logits)


@jit
def row_logits(
    a, H, stride_h, X, stride_x, rows, valid, D, WU, BU, G, GB, input_scale, adapter_scale,
    R: tl.constexpr, CHUNKS: tl.constexpr, SMALL: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(x + H') w + b, or [x; H'] w + b for ``small``: one number a row. A second pass over Wu (D R products a row) instead of a launch that folds Wu' w."""
    logits = tl.zeros(rows.shape, tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        total = sum_before_gate(a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R, CHUNKS, EVEN, PRECISION)
        x = load_tile(X, stride_x, rows, valid, columns, D, EVEN)
        w_x = load_vector(G, columns, D, x.dtype)
        w_h = load_vector(G + D, columns, D, x.dtype) if SMALL else w_x
        logits += tl.sum(x.to(tl.float32) * w_x[None, :] + total * w_h[None, :], 1)
    if GB is not None:
        logits += tl.load(GB).to(H.dtype.element_ty).to(tl.float32)
    return logits


@jit
def sample_means(V, rows, valid, length, SIGMOID: tl.constexpr, SAMPLES: tl.constexpr = 8, BLOCK_L: tl.constexpr = 64):
    """Of each row the mean of V, or of sigma(V), over the rows of its sample. A tile adds every sample that it has rows of once, in the same order as all tiles do: the rows of a
    sample have one mean."""
    own = rows // length
    last = tl.max(tl.where(valid, own, 0), 0)
    means = tl.zeros(rows.shape, tl.float32)
    for first in tl.range(tl.min(own, 0), last + 1, SAMPLES):
        samples = first + tl.arange(0, SAMPLES)
        total = tl.zeros((SAMPLES, BLOCK_L), tl.float32)
        for start in tl.range(0, length, BLOCK_L):
            row = start + tl.arange(0, BLOCK_L)
            exists = (samples <= last)[:, None] & (row < length)[None, :]
            v = tl.load(V + samples[:, None] * length + row[None, :], mask=exists, other=0.0)
            total += tl.where(exists, tl.sigmoid(v), 0.0) if SIGMOID else v
        mean = tl.sum(total, 1) / length
        means += tl.sum(tl.where(own[:, None] == samples[None, :], mean[None, :], 0.0), 1)
    return means


@jit
def forward_kernel(
    H, X, WD, BD, WU, BU, G, GB, GU, GUB, Y, Z, ZG, LOGITS, TOTAL, GATE, input_scale, adapter_scale, scale, T, D, length, stride_h, stride_x,
    R: tl.constexpr, CHUNKS: tl.constexpr, RG: tl.constexpr, GATE_CHUNKS: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows. ``small``: z and the logits in a first launch, y from them in a SECOND, with the gate of each sample.

    Global memory a row in half precision: 6 D + 2 R (+ 2 Rg) bytes: h, x, y, z, zg; middleY 4 D + 2 R. Second readings of h hit L2.
    """
    dtype: tl.constexpr = H.dtype.element_ty
    rows, valid = tile_rows(T, BLOCK_T)
    if SECOND:
        z = load_chunks(Z, rows, valid, R, CHUNKS)
    else:
        z = add_bias(project(H, stride_h, rows, valid, D, None, WD, D, 1, R, CHUNKS, BLOCK_D, EVEN, PRECISION), BD, R, CHUNKS, dtype)
        if Z is not None:
            store_chunks(Z, rows, valid, z, R, CHUNKS)
    a = activate_chunks(z, ACTIVATION, CHUNKS)
    if KIND == "large":
        zg = add_bias(project(X, stride_x, rows, valid, D, None, G, D, 1, RG, GATE_CHUNKS, BLOCK_D, EVEN, PRECISION), GB, RG, GATE_CHUNKS, dtype)
        if ZG is not None:
            store_chunks(ZG, rows, valid, zg, RG, GATE_CHUNKS)
        ag = activate_chunks(zg, ACTIVATION, GATE_CHUNKS)
    if KIND == "middleX" or (KIND == "small" and not SECOND):
        logits = row_logits(a, H, stride_h, X, stride_x, rows, valid, D, WU, BU, G, GB, input_scale, adapter_scale, R, CHUNKS, KIND == "small", BLOCK_D, EVEN, PRECISION)
        if LOGITS is not None:
            tl.store(LOGITS + rows, logits, mask=valid)
        row_gate = tl.sigmoid(logits)
    if SECOND:
        row_gate = sample_means(LOGITS, rows, valid, length, True)
    if KIND != "small" or SECOND:
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            total = sum_before_gate(a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R, CHUNKS, EVEN, PRECISION)
            if KIND == "large":
                gate = wide_gate(ag, GU, GUB, columns, D, RG, GATE_CHUNKS, EVEN, PRECISION)
                if GATE is not None:
                    store_tile(GATE, D, rows, valid, columns, D, gate, EVEN)
            elif KIND == "logits":
                gate = tl.sigmoid(load_tile(X, stride_x, rows, valid, columns, D, EVEN).to(tl.float32))
            elif KIND == "middleY":
                gate = 1.0 + load_vector(G, columns, D, dtype)[None, :]
            else:
                gate = row_gate[:, None]
            if TOTAL is not None:
                store_tile(TOTAL, D, rows, valid, columns, D, total, EVEN)
            store_tile(Y, D, rows, valid, columns, D, scale * (total + gate if ADD else total * gate), EVEN)


@jit
def gates_kernel(
    DY, H, X, Z, ZG, LOGITS, TOTAL, GATE, WU, BU, G, GU, GUB, ROW_SUMS, DTOTAL, DLOGITS, DX, SUMS,
    input_scale, adapter_scale, scale, T, D, length, stride_dy, stride_h, stride_x,
    R: tl.constexpr, CHUNKS: tl.constexpr, RG: tl.constexpr, GATE_CHUNKS: tl.constexpr, ACTIVATION: tl.constexpr, KIND: tl.constexpr, ADD: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From e = s dy: dH' = e (.) G, or e where the gate is added, and dG = e (.) H', or e; then dG to what the gate is made of.

    large, logits: DLOGITS = dG (.) G (1 - G). middleY: SUMS = column sums of dG per row tile. middleX, small: the row's logit gets dl = rowsum(dG) G (1 - G) (small: the mean of
    the row sums over the sample, in a SECOND launch; the first only fills ROW_SUMS), dH' gets dl w_h, DX = dl w_x, and SUMS the tile's sums of dl (x + H') or of [dl x; dl H'],
    and of dl.
    H' is TOTAL where it was saved, else computed again from z.
    """
    dtype: tl.constexpr = DY.dtype.element_ty
    ROWWISE: tl.constexpr = KIND == "middleX" or KIND == "small"
    FIRST: tl.constexpr = KIND == "small" and not SECOND
    NEEDS_TOTAL: tl.constexpr = (SUMS is not None and ROWWISE and not FIRST) or (not ADD and (SUMS is not None or DLOGITS is not None or (ROWWISE and not SECOND)))
    rows, valid = tile_rows(T, BLOCK_T)
    a = ()
    if NEEDS_TOTAL and TOTAL is None:
        a = activate_chunks(load_chunks(Z, rows, valid, R, CHUNKS), ACTIVATION, CHUNKS)
    ag = ()
    if KIND == "large" and GATE is None:
        ag = activate_chunks(load_chunks(ZG, rows, valid, RG, GATE_CHUNKS), ACTIVATION, GATE_CHUNKS)
    if SECOND:
        row_gate = sample_means(LOGITS, rows, valid, length, True)
        row_sums = sample_means(ROW_SUMS, rows, valid, length, False)
    elif ROWWISE:
        row_sums = tl.zeros(rows.shape, tl.float32)
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            d_gate = scale * load_tile(DY, stride_dy, rows, valid, columns, D, EVEN).to(tl.float32)
            if not ADD:
                d_gate *= saved_or_again(TOTAL, a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R, CHUNKS, EVEN, PRECISION)
            row_sums += tl.sum(d_gate, 1)
    if FIRST:
        tl.store(ROW_SUMS + rows, row_sums, mask=valid)
    else:
        if ROWWISE:
            own_gate = tl.sigmoid(tl.load(LOGITS + rows, mask=valid, other=0.0))
            if not SECOND:
                row_gate = own_gate
            d_logit = tl.where(valid, row_sums * own_gate * (1.0 - own_gate), 0.0)
        WIDTH: tl.constexpr = 2 if KIND == "small" else 1
        sums = SUMS
        if SUMS is not None:
            sums = SUMS + tl.program_id(0).to(tl.int64) * (WIDTH * D + (1 if ROWWISE else 0))
        for start in tl.range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            e = scale * load_tile(DY, stride_dy, rows, valid, columns, D, EVEN).to(tl.float32)
            if NEEDS_TOTAL:
                total = saved_or_again(TOTAL, a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R, CHUNKS, EVEN, PRECISION)
            if KIND == "large":
                if GATE is None:
                    gate = wide_gate(ag, GU, GUB, columns, D, RG, GATE_CHUNKS, EVEN, PRECISION)
                else:
                    gate = load_tile(GATE, D, rows, valid, columns, D, EVEN).to(tl.float32)
            elif KIND == "logits":
                gate = tl.sigmoid(load_tile(X, stride_x, rows, valid, columns, D, EVEN).to(tl.float32))
            elif KIND == "middleY":
                gate = 1.0 + load_vector(G, columns, D, dtype)[None, :]
            else:
                gate = row_gate[:, None]
            d_total = e if ADD else e * gate
            if ROWWISE:
                w_x = load_vector(G, columns, D, dtype)
                w_h = load_vector(G + D, columns, D, dtype) if KIND == "small" else w_x
                d_total += d_logit[:, None] * w_h[None, :]
                if DX is not None:
                    store_tile(DX, D, rows, valid, columns, D, d_logit[:, None] * w_x[None, :], EVEN)
                if SUMS is not None:
                    x = load_tile(X, stride_x, rows, valid, columns, D, EVEN).to(tl.float32)
                    if KIND == "small":
                        tl.store(sums + columns, tl.sum(d_logit[:, None] * x, 0), mask=columns < D)
                        tl.store(sums + D + columns, tl.sum(d_logit[:, None] * total, 0), mask=columns < D)
                    else:
                        tl.store(sums + columns, tl.sum(d_logit[:, None] * (x + total), 0), mask=columns < D)
            elif SUMS is not None:
                tl.store(sums + columns, tl.sum(e if ADD else e * total, 0), mask=columns < D)
            if DTOTAL is not None:
                store_tile(DTOTAL, D, rows, valid, columns, D, d_total, EVEN)
            if DLOGITS is not None:
                store_tile(DLOGITS, D, rows, valid, columns, D, (e if ADD else e * total) * gate * (1.0 - gate), EVEN)
        if ROWWISE and SUMS is not None:
            tl.store(sums + WIDTH * D, tl.sum(d_logit, 0))


@jit
def saved_or_again(
    TOTAL, a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr
):
    if TOTAL is not None:
        return load_tile(TOTAL, D, rows, valid, columns, D, EVEN).to(tl.float32)
    else:
        return sum_before_gate(a, H, stride_h, rows, valid, columns, D, WU, BU, input_scale, adapter_scale, R, CHUNKS, EVEN, PRECISION)


def forward(
    h: Tensor, x: Tensor | None, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None,
    g: Tensor | None, g_bias: Tensor | None, g_up: Tensor | None, g_up_bias: Tensor | None,
    input_scale: float, adapter_scale: float, scale: float, activation: int, kind: int, add: bool, samples: int, save_gate: int, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """y and what backward needs, as ``reference.forward``."""
    name, (t, d), r = KINDS[kind], h.shape, w_down.shape[0]
    large, rowwise, small, keep = name == "large", name in ("middleX", "small"), name == "small", save and save_gate == 1
    rg = g.shape[0] if large and g is not None else 0

    def new(wanted: bool, *shape: int, dtype: torch.dtype = h.dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device=h.device) if wanted else None

    y, z, zg, logits = new(True, t, d), new(save or small, t, r), new(save and large, t, rg), new((save and rowwise) or small, t, dtype=torch.float32)
    total, gate = new(keep, t, d), new(keep and large, t, d)
    if t:
        vectors = contiguous(b_down, b_up, g_bias, g_up_bias, None if large else g)
        w_down, w_up, w_gate, g_up = rounded(h, d, max(r, rg), w_down, w_up, g if large else None, g_up)
        tile = _triton.tile("gated_forward", max(r, rg), d, h.dtype, w_up.dtype)
        b_down, b_up, g_bias, g_up_bias, g = *vectors[:4], w_gate if large else vectors[4]
        constants = {
            "R": r, "CHUNKS": chunks(r), "RG": rg, "GATE_CHUNKS": chunks(rg) if rg else (), "ACTIVATION": activation, "KIND": name, "ADD": add,
            "BLOCK_T": tile.block_t, "BLOCK_D": tile.block_d, "EVEN": d % tile.block_d == 0, "PRECISION": _triton.precision(h.dtype),
        }  # fmt: skip
        args = (h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, y, z, zg, logits, total, gate)
        numbers = (input_scale, adapter_scale, scale, t, d, t // max(samples, 1), h.stride(0), 0 if x is None else x.stride(0))
        for second in (False, True) if small else (False,):
            _triton.launch(forward_kernel, (cdiv(t, tile.block_t),), h, *args, *numbers, tile=tile, SECOND=second, **constants)
    if not save:
        z = logits = None
    absent = torch.empty(0, dtype=torch.float32, device=h.device)
    return y, *(none(h) if s is None else s for s in (z, zg)), absent if logits is None else logits, *(none(h) if s is None else s for s in (total, gate))


def backward(
    dy: Tensor, h: Tensor, x: Tensor | None, z: Tensor, zg: Tensor, logits: Tensor, total: Tensor, gate: Tensor,
    w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None, g: Tensor | None, g_bias: Tensor | None, g_up: Tensor | None, g_up_bias: Tensor | None,
    input_scale: float, adapter_scale: float, scale: float, activation: int, kind: int, add: bool, samples: int, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that ``needs`` asks for, as ``reference.backward``."""
    name, (t, d), r, p_dtype = KINDS[kind], h.shape, w_down.shape[0], w_down.dtype
    need_h, need_x, need_wd, need_bd, need_wu, need_bu, need_g, need_gb, need_gu, need_gub = needs
    large, rowwise, small = name == "large", name in ("middleX", "small"), name == "small"
    rg = g.shape[0] if large and g is not None else 0
    vectors = contiguous(b_down, b_up, g_bias, g_up_bias, None if large else g)
    w_down, w_up, w_gate, g_up = rounded(h, d, max(r, rg), w_down, w_up, g if large else None, g_up)
    b_down, b_up, g_bias, g_up_bias, g = *vectors[:4], w_gate if large else vectors[4]

    def new(wanted: bool, *shape: int, dtype: torch.dtype = h.dtype) -> Any:
        return torch.empty(shape, dtype=dtype, device=h.device) if wanted else None

    inner, outer = (need_h, need_wd, need_bd, need_wu, need_bu), (need_x, need_g, need_gb, need_gu, need_gub)
    d_total, d_logits = new(any(inner), t, d), new((large and any(outer)) or (name == "logits" and need_x), t, d)
    dx, of_gate = new(rowwise and need_x, t, d), None
    dg, dgb = new(not large and need_g, *(() if g is None else g.shape), dtype=p_dtype), new(rowwise and need_gb, 1, dtype=p_dtype)
    if t:
        tile = _triton.tile("gates", max(r, rg), d, h.dtype, w_up.dtype)
        tiles = cdiv(t, tile.block_t)
        sums = new(dg is not None or dgb is not None, tiles, (2 * d if small else d) + rowwise, dtype=torch.float32)
        constants = {
            "R": r, "CHUNKS": chunks(r), "RG": rg, "GATE_CHUNKS": chunks(rg) if rg else (), "ACTIVATION": activation, "KIND": name, "ADD": add,
            "BLOCK_T": tile.block_t, "BLOCK_D": tile.block_d, "EVEN": d % tile.block_d == 0, "PRECISION": _triton.precision(h.dtype),
        }  # fmt: skip
        saved = (z, *(s if s.numel() else None for s in (zg, logits, total, gate)))
        row_sums = new(small, t, dtype=torch.float32)
        args = (dy, h, x, *saved, w_up, b_up, g, g_up, g_up_bias, row_sums, d_total, d_logits, dx, sums)
        numbers = (input_scale, adapter_scale, scale, t, d, t // max(samples, 1), dy.stride(0), h.stride(0), 0 if x is None else x.stride(0))
        for second in (False, True) if small else (False,):
            _triton.launch(gates_kernel, (tiles,), h, *args, *numbers, tile=tile, SECOND=second, **constants)
        if sums is not None:
            of_gate = TileSums(sums, dg, dgb, tiles, sums.shape[1], sums.shape[1] - rowwise)
    else:
        for gradient in (dg, dgb):
            if gradient is not None:
                gradient.zero_()
    problems = [Bottleneck(d_total, h, z, w_down, w_up, b_up, None, None, adapter_scale, input_scale, (*inner, False, False))]
    if large and x is not None:
        problems.append(Bottleneck(d_logits, x, zg, w_gate, g_up, g_up_bias, None, None, 1.0, None, (*outer, False, False)))
    (dh, dwd, dbd, dwu, dbu, *_), *of_outer = _triton.bottleneck_backward(problems, activation, p_dtype, sums=of_gate)
    dx, dg, dgb, dgu, dgub = of_outer[0][:5] if of_outer else (d_logits if name == "logits" else dx, dg, dgb, None, None)
    return tuple(none(dy) if gradient is None else gradient for gradient in (dh, dx, dwd, dbd, dwu, dbu, dg, dgb, dgu, dgub))
