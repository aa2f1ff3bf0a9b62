"""Compacter's bottleneck on CUDA devices of compute capability 8.0 and newer.

A projection H = sum_i A_i (x) (L_i R_i) is three products with thin tiles (rows, M): inner = x L, mixed = inner A, y = mixed R. Column m = (a, i, q) of a thin tile belongs to part
a of the row, factor i and direction q; each of the three counts is padded to a power of two, and M to at least 16, the smallest depth of a matrix product: n = 4 and k = 1 fill 16
columns exactly. L and R are block diagonal in the parts: their tiles are spread from the factors, a few KiB in all, with zeros elsewhere, and rounded as they are loaded, so no
launch packs them. A, diagonal in (i, q), acts in registers.

Backward is one kernel over row tiles and one that adds its partials: a tile's share of all factors' gradients is about 2 k (D + R) + 2 n^3 numbers.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadapt.backend import Call
from fastadapt.ops import _triton
from fastadapt.ops._library import none
from fastadapt.ops._triton import Tile, activate, activation_slope, cdiv, jit, load_tile, load_vector, load_weight, power_of_two, store_tile, tile_rows, tl

__all__ = ["backward", "forward", "reasons"]


@jit
def pair_offsets(W, LEFT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, J: tl.constexpr):
    """Where each of the J pairs (i, q) begins in a left factor (n, W, k) or a right one (n, k, W); padding, of i by itself, behind its end."""
    j = tl.arange(0, J)
    return tl.where(j % K2 < K, j // K2 * (W * K) + j % K2 * (1 if LEFT else W), N * W * K)


@jit
def factor_down(F, part, p, W, LEFT: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, dtype: tl.constexpr):
    """A factor's tile (p, M), zero outside the part's columns: what a part of a row is multiplied with. Spread in registers, which saves many addresses."""
    f = load_weight(F, p, K if LEFT else 1, W, pair_offsets(W, LEFT, N, K, K2, N2 * K2), 1, N * W * K, EVEN, False).to(dtype)
    own = (tl.arange(0, M // (N2 * K2)) == part)[None, :, None]
    return tl.reshape(tl.where(own, f[:, None, :], 0.0).to(dtype), (p.shape[0], M))


@jit
def pick(thin, part, J: tl.constexpr):
    """A part's columns (rows, J) of a thin tile, in fp32."""
    parts = tl.reshape(thin.to(tl.float32), (thin.shape[0], thin.shape[1] // J, J))
    return tl.sum(tl.where((tl.arange(0, thin.shape[1] // J) == part)[None, :, None], parts, 0.0), 1)


@jit
def expand(
    thin, F, part, p, W, LEFT: tl.constexpr, EVEN: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr
):
    """A part's columns of a thin tile times a factor: the fp32 tile (rows, p). A part of fewer than 16 columns is no depth of a product: all parts then, against zeros."""
    J: tl.constexpr = N2 * K2
    f = load_weight(F, pair_offsets(W, LEFT, N, K, K2, J), 1, N * W * K, p, K if LEFT else 1, W, False, EVEN).to(thin.dtype)
    if J < 16:
        own = (tl.arange(0, M // J) == part)[:, None, None]
        f = tl.reshape(tl.where(own, f[None, :, :], 0.0).to(thin.dtype), (M, p.shape[0]))
    else:
        thin = pick(thin, part, J).to(thin.dtype)
    return tl.dot(thin, f, input_precision=PRECISION)


@jit
def contract(
    X, stride, rows, valid, W, F,
    N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, LEFT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """phi(X) L, or dy R' for a right factor: the fp32 tile (rows, M). X's parts are W wide."""
    thin = tl.zeros((rows.shape[0], M), tl.float32)
    blocks = tl.cdiv(W, BLOCK)
    for block in tl.range(0, N * blocks):
        part = block // blocks
        p = block % blocks * BLOCK + tl.arange(0, BLOCK)
        x = load_tile(X + part * W, stride, rows, valid, p, W, EVEN)
        if ACTIVATION > 0:
            x = activate(x.to(tl.float32), ACTIVATION).to(x.dtype)
        thin = tl.dot(x, factor_down(F, part, p, W, LEFT, EVEN, N, N2, K, K2, M, x.dtype), thin, input_precision=PRECISION)
    return thin


@jit
def mix(thin, RULE, parts, STEP: tl.constexpr, STEP_OUT: tl.constexpr, N: tl.constexpr, K2: tl.constexpr, J: tl.constexpr, dtype: tl.constexpr):
    """The parts of a thin tile mixed by the rule, rounded. The rule's index that is summed over lies STEP apart, the other STEP_OUT: in forward a and c, in backward c and a."""
    P: tl.constexpr = thin.shape[1] // J
    i, c = tl.arange(0, J) // K2, tl.arange(0, P)
    exists = (c < N)[:, None] & (i < N)[None, :]
    mixed = tl.zeros((thin.shape[0], P, J), tl.float32)
    for part in tl.range(0, parts):
        rule = tl.load(RULE + (part * STEP + c * STEP_OUT)[:, None] + (i * (N * N))[None, :], mask=exists, other=0.0).to(dtype).to(tl.float32)
        mixed += pick(thin, part, J)[:, None, :] * rule[None, :, :]
    return tl.reshape(mixed, (thin.shape[0], thin.shape[1])).to(dtype)


@jit
def store_rule_gradient(OUT, inner, d_mixed, parts, N: tl.constexpr, K2: tl.constexpr, J: tl.constexpr):
    """dA[i, a, c], the sum over rows and q of inner[a, i, q] d_mixed[c, i, q]."""
    P: tl.constexpr = inner.shape[1] // J
    i, c = tl.arange(0, J // K2), tl.arange(0, P)
    d_parts = tl.reshape(d_mixed, (inner.shape[0], P, J))
    for part in tl.range(0, parts):
        by_pair = tl.sum(pick(inner, part, J)[:, None, :] * d_parts, 0)
        gradient = tl.sum(tl.reshape(by_pair, (P, J // K2, K2)), 2)
        tl.store(OUT + part * N + c[:, None] + (i * (N * N))[None, :], gradient, mask=(c < N)[:, None] & (i < N)[None, :])


@jit
def store_factor_gradient(OUT, p, W, gradient, LEFT: tl.constexpr, N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr):
    """A factor's gradient, (pairs, p)."""
    pairs = pair_offsets(W, LEFT, N, K, K2, gradient.shape[0])
    tl.store(OUT + pairs[:, None] + p[None, :] * (K if LEFT else 1), gradient, mask=(pairs < N * W * K)[:, None] & (p < W)[None, :])


@jit
def forward_kernel(
    X, RULE_DOWN, LEFT_DOWN, RIGHT_DOWN, B_DOWN, RULE_UP, LEFT_UP, RIGHT_UP, B_UP, RESIDUAL, Y, Z, scale, T, parts, DN, RN, stride_x, stride_residual,
    N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_D: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of rows. DN and RN are the widths of x's and z's parts.

    Global memory a row in half precision: 4 D + 2 R bytes (x once, y, z), 2 D more for another residual; the second reading of x hits L2.
    """
    dtype: tl.constexpr = X.dtype.element_ty
    rows, valid = tile_rows(T, BLOCK_T)
    inner = contract(X, stride_x, rows, valid, DN, LEFT_DOWN, N, N2, K, K2, M, True, 0, BLOCK_D, EVEN_D, PRECISION)
    mixed = mix(inner, RULE_DOWN, parts, N, 1, N, K2, N2 * K2, dtype)
    inner = tl.zeros((BLOCK_T, M), tl.float32)
    blocks = tl.cdiv(RN, BLOCK_R)
    for block in tl.range(0, N * blocks):
        part = block // blocks
        p = block % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        z = expand(mixed, RIGHT_DOWN, part, p, RN, False, EVEN_R, N, N2, K, K2, M, PRECISION)
        if B_DOWN is not None:
            z += load_vector(B_DOWN + part * RN, p, RN, dtype)[None, :]
        z = z.to(dtype)
        if Z is not None:
            store_tile(Z + part * RN, N * RN, rows, valid, p, RN, z, EVEN_R)
        a = activate(z.to(tl.float32), ACTIVATION).to(dtype)
        inner = tl.dot(a, factor_down(LEFT_UP, part, p, RN, True, EVEN_R, N, N2, K, K2, M, dtype), inner, input_precision=PRECISION)
    mixed = mix(inner, RULE_UP, parts, N, 1, N, K2, N2 * K2, dtype)
    blocks = tl.cdiv(DN, BLOCK_D)
    for block in tl.range(0, N * blocks):
        part = block // blocks
        p = block % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
        y = expand(mixed, RIGHT_UP, part, p, DN, False, EVEN_D, N, N2, K, K2, M, PRECISION)
        if B_UP is not None:
            y += load_vector(B_UP + part * DN, p, DN, dtype)[None, :]
        y *= scale
        if ADD_INPUT:
            y += load_tile(X + part * DN, stride_x, rows, valid, p, DN, EVEN_D).to(tl.float32)
        if RESIDUAL is not None:
            y += load_tile(RESIDUAL + part * DN, stride_residual, rows, valid, p, DN, EVEN_D).to(tl.float32)
        store_tile(Y + part * DN, N * DN, rows, valid, p, DN, y, EVEN_D)


@jit
def backward_kernel(
    DY, X, Z, RULE_DOWN, LEFT_DOWN, RIGHT_DOWN, RULE_UP, LEFT_UP, RIGHT_UP, DX, D_RULE_DOWN, D_LEFT_DOWN, D_RIGHT_DOWN, D_B_DOWN, D_RULE_UP, D_LEFT_UP, D_RIGHT_UP, D_B_UP,
    scale, T, parts, DN, RN, C, stride_dy, stride_x,
    N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, M: tl.constexpr, ACTIVATION: tl.constexpr, ADD_INPUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_D: tl.constexpr, EVEN_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one tile of rows, and the tile's share of every other gradient, each in the layout of its parameter; the shares of two tiles lie C apart.
    ``parts`` is N, as a number that the assembler does not know: it would unroll the loops over parts and spill.

    Global memory a row in half precision: 6 D + 2 R bytes (dy, x, z once, dx), and 4 C / BLOCK_T of shares; second readings hit L2.
    """
    dtype: tl.constexpr = DY.dtype.element_ty
    DOWN: tl.constexpr = DX is not None or D_RULE_DOWN is not None or D_LEFT_DOWN is not None or D_RIGHT_DOWN is not None or D_B_DOWN is not None
    D_INNER_DOWN: tl.constexpr = DX is not None or D_LEFT_DOWN is not None
    rows, valid = tile_rows(T, BLOCK_T)
    share = tl.program_id(0).to(tl.int64) * C
    if DOWN or D_RULE_UP is not None or D_LEFT_UP is not None:
        d_mixed_up = scale * contract(DY, stride_dy, rows, valid, DN, RIGHT_UP, N, N2, K, K2, M, False, 0, BLOCK_D, EVEN_D, PRECISION)
        d_inner_up = mix(d_mixed_up, RULE_UP, parts, 1, N, N, K2, N2 * K2, dtype)
    if D_RULE_UP is not None or D_RIGHT_UP is not None:
        inner = contract(Z, N * RN, rows, valid, RN, LEFT_UP, N, N2, K, K2, M, True, ACTIVATION, BLOCK_R, EVEN_R, PRECISION)
        if D_RULE_UP is not None:
            store_rule_gradient(D_RULE_UP + share, inner, d_mixed_up, parts, N, K2, N2 * K2)
        if D_RIGHT_UP is not None:
            mixed_up = mix(inner, RULE_UP, parts, N, 1, N, K2, N2 * K2, dtype)
    if D_RULE_DOWN is not None or D_RIGHT_DOWN is not None:
        inner_down = contract(X, stride_x, rows, valid, DN, LEFT_DOWN, N, N2, K, K2, M, True, 0, BLOCK_D, EVEN_D, PRECISION)
        if D_RIGHT_DOWN is not None:
            mixed_down = mix(inner_down, RULE_DOWN, parts, N, 1, N, K2, N2 * K2, dtype)
    if DOWN or D_LEFT_UP is not None:
        d_mixed = tl.zeros((BLOCK_T, M), tl.float32)
        for start in tl.range(0, RN, BLOCK_R):
            p = start + tl.arange(0, BLOCK_R)
            d_left = tl.zeros((N2 * K2, BLOCK_R), tl.float32)
            d_right = tl.zeros((N2 * K2, BLOCK_R), tl.float32)
            for part in tl.range(0, parts):
                z = load_tile(Z + part * RN, N * RN, rows, valid, p, RN, EVEN_R).to(tl.float32)
                if D_LEFT_UP is not None:
                    d_left = tl.dot(tl.trans(pick(d_inner_up, part, N2 * K2).to(dtype)), activate(z, ACTIVATION).to(dtype), d_left, input_precision=PRECISION)
                if DOWN:
                    da = expand(d_inner_up, LEFT_UP, part, p, RN, True, EVEN_R, N, N2, K, K2, M, PRECISION)
                    exact = da * activation_slope(z, ACTIVATION)
                    if D_B_DOWN is not None:
                        tl.store(D_B_DOWN + share + part * RN + p, tl.sum(exact, 0), mask=p < RN)
                    dz = exact.to(dtype)
                    if D_RIGHT_DOWN is not None:
                        d_right = tl.dot(tl.trans(pick(mixed_down, part, N2 * K2).to(dtype)), dz, d_right, input_precision=PRECISION)
                    d_mixed = tl.dot(dz, factor_down(RIGHT_DOWN, part, p, RN, False, EVEN_R, N, N2, K, K2, M, dtype), d_mixed, input_precision=PRECISION)
            if D_LEFT_UP is not None:
                store_factor_gradient(D_LEFT_UP + share, p, RN, d_left, True, N, K, K2)
            if D_RIGHT_DOWN is not None:
                store_factor_gradient(D_RIGHT_DOWN + share, p, RN, d_right, False, N, K, K2)
        if D_RULE_DOWN is not None:
            store_rule_gradient(D_RULE_DOWN + share, inner_down, d_mixed, parts, N, K2, N2 * K2)
        if D_INNER_DOWN:
            d_inner = mix(d_mixed, RULE_DOWN, parts, 1, N, N, K2, N2 * K2, dtype)
    if D_INNER_DOWN or D_RIGHT_UP is not None or D_B_UP is not None:
        for start in tl.range(0, DN, BLOCK_D):
            p = start + tl.arange(0, BLOCK_D)
            d_left = tl.zeros((N2 * K2, BLOCK_D), tl.float32)
            d_right = tl.zeros((N2 * K2, BLOCK_D), tl.float32)
            for part in tl.range(0, parts):
                dy = load_tile(DY + part * DN, stride_dy, rows, valid, p, DN, EVEN_D)
                if D_B_UP is not None:
                    tl.store(D_B_UP + share + part * DN + p, scale * tl.sum(dy.to(tl.float32), 0), mask=p < DN)
                if D_RIGHT_UP is not None:
                    d_right = tl.dot(tl.trans(pick(mixed_up, part, N2 * K2).to(dtype)), dy, d_right, input_precision=PRECISION)
                if D_LEFT_DOWN is not None:
                    x = load_tile(X + part * DN, stride_x, rows, valid, p, DN, EVEN_D)
                    d_left = tl.dot(tl.trans(pick(d_inner, part, N2 * K2).to(dtype)), x, d_left, input_precision=PRECISION)
                if DX is not None:
                    dx = expand(d_inner, LEFT_DOWN, part, p, DN, True, EVEN_D, N, N2, K, K2, M, PRECISION)
                    if ADD_INPUT:
                        dx += dy.to(tl.float32)
                    store_tile(DX + part * DN, N * DN, rows, valid, p, DN, dx, EVEN_D)
            if D_LEFT_DOWN is not None:
                store_factor_gradient(D_LEFT_DOWN + share, p, DN, d_left, True, N, K, K2)
            if D_RIGHT_UP is not None:
                store_factor_gradient(D_RIGHT_UP + share, p, DN, scale * d_right, False, N, K, K2)


@jit
def store_section(OUT, columns, first, last, sums):
    if OUT is not None:
        tl.store(OUT + columns - first, sums.to(OUT.dtype.element_ty), mask=(columns >= first) & (columns < last))


@jit
def sums_kernel(
    PARTIALS, D_RULE_DOWN, D_LEFT_DOWN, D_RIGHT_DOWN, D_B_DOWN, D_RULE_UP, D_LEFT_UP, D_RIGHT_UP, D_B_UP, parts, C, end_0, end_1, end_2, end_3, end_4, end_5, end_6,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Column sums of fp32 partials (parts, C), added in order; each gradient owns the columns up to its end."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in tl.range(0, parts, BLOCK_N):
        part = start + tl.arange(0, BLOCK_N)
        total += tl.load(PARTIALS + part.to(tl.int64)[:, None] * C + columns[None, :], mask=(part < parts)[:, None] & (columns < C)[None, :], other=0.0)
    sums = tl.sum(total, 0)
    store_section(D_RULE_DOWN, columns, 0, end_0, sums)
    store_section(D_LEFT_DOWN, columns, end_0, end_1, sums)
    store_section(D_RIGHT_DOWN, columns, end_1, end_2, sums)
    store_section(D_B_DOWN, columns, end_2, end_3, sums)
    store_section(D_RULE_UP, columns, end_3, end_4, sums)
    store_section(D_LEFT_UP, columns, end_4, end_5, sums)
    store_section(D_RIGHT_UP, columns, end_5, end_6, sums)
    store_section(D_B_UP, columns, end_6, C, sums)


MAX_PAIRS, MAX_PAIRS_FP32 = 32, 16
"""Columns of a thin tile that belong to one part: division 4 with factor rank 8 has 32. They are the depth of fp32 products, whose operands lie in registers."""
MAX_COLUMNS = 256
"""Of a whole thin tile, half as many with more than 16 a part. Above these bounds the backward spills whatever the tile."""

# By the columns of a thin tile: (bound, half precision, fp32). tests/triton/compiled holds each entry to no spills. Parts of a row that 64 does not divide, or of z that 8 does
# not, need masks and narrow loads, and with them the registers of four times the columns.
_TILES = {
    "forward": (
        (16, Tile(64, 64, 4, 2, 0, 255), Tile(32, 32, 4, 2)),
        (64, Tile(32, 32, 4, 2, 0, 255), Tile(16, 32, 4, 2, 0, 255)),
        (256, Tile(16, 32, 4, 2, 0, 255), Tile(16, 32, 8, 2, 0, 255)),
        (1024, Tile(16, 16, 8, 2, 0, 255), Tile(16, 16, 8, 2, 0, 255)),
    ),
    "backward": (
        (16, Tile(32, 32, 4, 2, 16, 255), Tile(16, 32, 8, 2, 16, 255)),
        (64, Tile(16, 32, 4, 2, 16, 255), Tile(16, 16, 8, 2, 16, 255)),
        (1024, Tile(16, 16, 8, 2, 16, 255), Tile(16, 16, 8, 2, 16, 255)),
    ),
}
SUMS_N, SUMS_C = 64, 32


def thin_columns(division: int, factor_rank: int) -> int:
    """The columns of a thin tile: parts, factors and directions, padded."""
    return max(16, power_of_two(division) ** 2 * power_of_two(factor_rank))


def tile(kernel: str, division: int, factor_rank: int, width: int, rank: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel: a function of shape and dtype alone."""
    columns = thin_columns(division, factor_rank) * (4 if width // division % 64 or rank // division % 8 else 1)
    return next(fp32 if dtype == torch.float32 else half for bound, half, fp32 in _TILES[kernel] if columns <= bound)


def reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot run a call."""
    n, k = call.option("division", 1), call.option("factor_rank", 1)
    columns, pairs, out = thin_columns(n, k), power_of_two(n) * power_of_two(k), _triton.reasons(call)
    most = MAX_PAIRS_FP32 if call.dtype == torch.float32 else MAX_PAIRS
    if pairs > most:
        out.append(f"{call.dtype} with division {n} and factor rank {k} takes {pairs} columns a part of a row, more than {most}")
    elif columns > (most := MAX_COLUMNS if pairs <= 16 else MAX_COLUMNS // 2):
        out.append(f"division {n} with factor rank {k} takes {columns} columns a row, more than {most}")
    return out


def options_of(left_down: Tensor, right_down: Tensor, shape: Tile, activation: int, add_input: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What both kernels are compiled for."""
    (n, dn, k), rn = left_down.shape, right_down.shape[2]
    block_d, block_r = (min(most, max(16, power_of_two(part))) for most, part in ((shape.block_d, dn), (shape.block_r or shape.block_d, rn)))
    return {
        "N": n, "N2": power_of_two(n), "K": k, "K2": power_of_two(k), "M": thin_columns(n, k), "ACTIVATION": activation, "ADD_INPUT": add_input, "BLOCK_T": shape.block_t,
        "BLOCK_D": block_d, "BLOCK_R": block_r, "EVEN_D": dn % block_d == 0, "EVEN_R": rn % block_r == 0, "PRECISION": _triton.precision(dtype),
    }  # fmt: skip


def forward(
    x: Tensor, rule_down: Tensor, left_down: Tensor, right_down: Tensor, b_down: Tensor | None, rule_up: Tensor, left_up: Tensor, right_up: Tensor, b_up: Tensor | None,
    residual: Tensor | None, scale: float, activation: int, add_input: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and z for backward, as ``reference.forward``: one launch."""
    (t, d), (n, dn, k), rn = x.shape, left_down.shape, right_down.shape[2]
    y = torch.empty((t, d), dtype=x.dtype, device=x.device)
    z = torch.empty((t, n * rn), dtype=x.dtype, device=x.device) if save else None
    if t:
        shape = tile("forward", n, k, d, n * rn, x.dtype)
        args = (x, rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up, residual, y, z, scale, t, n, dn, rn, x.stride(0))
        constants = options_of(left_down, right_down, shape, activation, add_input, x.dtype)
        _triton.launch(forward_kernel, (cdiv(t, shape.block_t),), x, *args, 0 if residual is None else residual.stride(0), tile=shape, **constants)
    return y, none(x) if z is None else z


def backward(
    dy: Tensor, x: Tensor, z: Tensor, rule_down: Tensor, left_down: Tensor, right_down: Tensor, rule_up: Tensor, left_up: Tensor, right_up: Tensor,
    scale: float, activation: int, add_input: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that ``needs`` asks for, as ``reference.backward``: a launch over row tiles, and one to add their partials."""
    (t, d), (n, dn, k), rn = x.shape, left_down.shape, right_down.shape[2]
    dx = torch.empty((t, d), dtype=x.dtype, device=x.device) if needs[0] else None
    shapes = (rule_down.shape, left_down.shape, right_down.shape, (n * rn,), rule_up.shape, left_up.shape, right_up.shape, (d,))
    grads = [torch.empty(s, dtype=rule_down.dtype, device=x.device) if need else None for s, need in zip(shapes, needs[1:], strict=True)]
    if t == 0:
        for gradient in grads:
            if gradient is not None:
                gradient.zero_()
    else:
        shape = tile("backward", n, k, d, n * rn, x.dtype)
        tiles, ends = cdiv(t, shape.block_t), [0]
        for gradient in grads:
            ends.append(ends[-1] + (0 if gradient is None else gradient.numel()))
        columns = ends[-1]
        partials = torch.empty((tiles, columns), dtype=torch.float32, device=x.device)
        sections = [None if gradient is None else partials[:, first:last] for gradient, first, last in zip(grads, ends, ends[1:], strict=False)]
        args = (dy, x, z, rule_down, left_down, right_down, rule_up, left_up, right_up, dx, *sections, scale, t, n, dn, rn, columns, dy.stride(0), x.stride(0))
        _triton.launch(backward_kernel, (tiles,), x, *args, tile=shape, **options_of(left_down, right_down, shape, activation, add_input, x.dtype))
        if columns:
            _triton.launch(sums_kernel, (cdiv(columns, SUMS_C),), x, partials, *grads, tiles, columns, *ends[1:-1], BLOCK_N=SUMS_N, BLOCK_C=SUMS_C)
    return tuple(none(dy) if gradient is None else gradient for gradient in (dx, *grads))
