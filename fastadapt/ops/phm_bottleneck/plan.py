"""Which backends can run Compacter's bottleneck, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck.plan import Plan

# The models are of a call with its own residual, both biases, gelu_new, z saved and every gradient asked for.


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them. For n > 1 einsum copies pairs, (T, n n k), to multiply them, the more where k > 1, and rows to sum over their parts."""
    s, n, k = _cost.sizes(call), call.option("division", 1), call.option("factor_rank", 1)
    pairs, thin, many, more = s.thin(n * n * k), s.thin(s.r), n > 1, k > 1
    factors = 2.0 * k * (s.d + s.r) + 2 * n**3
    numbers, unit = factors + s.d + s.r, "fma" if s.a == 4 else "library"

    def products(name: str, wide: int, narrow: int, mixes: int) -> list[Kernel]:
        moved = wide * s.wide + narrow * thin + (wide + narrow + 2 * mixes) * pairs
        return [Kernel(name, n * k * (wide * s.flops(1) + narrow * 2.0 * s.t * s.r), again=moved, launches=wide + narrow + mixes, unit=unit)]

    forward = [
        *products("products", 2, 2, 2),
        *([_cost.pointwise("copies", 6 if more else 2, (8 if more else 4) * pairs)] if many else []),
        _cost.pointwise("b and phi", 2, 4 * thin),
        _cost.pointwise("scale and residual", 3, 7 * s.wide),
    ]
    copies = (22 if more else 6, 4 * s.wide + 4 * thin + (28 if more else 4) * pairs) if many else (4 if more else 0, 0.0)
    backward = [
        *products("products", 5, 5, 6),
        *([_cost.pointwise("copies", *copies)] if copies[0] else []),
        _cost.pointwise("phi and phi'", 19, 45 * thin),
        _cost.pointwise("scale and residual", 2, 5 * s.wide),
        _cost.pointwise("bias sums", 2, s.wide + thin),
    ]
    if s.p != s.a:
        forward.append(_cost.pointwise("casts", 8, numbers * (s.p + s.a)))
        backward.append(_cost.pointwise("casts", 14, (factors + numbers) * (s.p + s.a)))
    return Model(forward, backward, 3 * s.wide, 4 * s.wide)


def triton(call: Call) -> Model:
    """The launches of triton.py: products of padded thin tiles; each factor is read again by every part of every tile, from L2."""
    from fastadapt.ops.phm_bottleneck import triton as kernels

    s, n, k = _cost.sizes(call), call.option("division", 1), call.option("factor_rank", 1)
    columns, pairs = kernels.thin_columns(n, k), kernels.power_of_two(n) * kernels.power_of_two(k)
    spread = columns if pairs < 16 else pairs  # the depth of a product with a thin tile
    numbers = 2.0 * k * (s.d + s.r) + 2 * n**3 + s.d + s.r
    unit, efficiency = _cost.triton_unit(s), _cost.UNALIGNED if s.d // n % 64 else 1.0
    z_flops = 2.0 * s.t * s.r

    def tiles_of(kernel: str, z_loops: int, x_loops: int) -> tuple[int, int]:
        tile = kernels.tile(kernel, n, k, s.d, s.r, call.dtype)
        return cdiv(s.t, tile.block_t), n * (z_loops * cdiv(s.r // n, tile.block_r or tile.block_d) + x_loops * cdiv(s.d // n, tile.block_d))

    tiles, steps = tiles_of("forward", 1, 2)
    factors = tiles * float(n * k) * (s.d + s.r) * s.p
    forward = Kernel(
        "forward", (columns + spread) * (s.flops(1) + z_flops), 2 * s.wide + s.thin(s.r), l2=s.wide + 2 * factors, blocks=tiles, steps=steps, unit=unit, efficiency=efficiency
    )
    tiles, steps = tiles_of("backward", 2, 3)
    factors = tiles * float(n * k) * (s.d + s.r) * s.p
    backward = Kernel(
        "backward", (2 * columns + 2 * pairs + spread) * (s.flops(1) + z_flops), 3 * s.wide + s.thin(s.r), l2=2 * s.wide + s.thin(s.r) + 4 * factors + 4.0 * tiles * numbers,
        blocks=tiles, steps=steps, unit=unit, efficiency=efficiency,
    )  # fmt: skip
    sums = Kernel("sums", 0.0, s.p * numbers, 0.0, 4.0 * tiles * numbers, cdiv(int(numbers), kernels.SUMS_C), cdiv(tiles, kernels.SUMS_N))
    return Model([forward], [backward, sums], 0.0, 0.0)


def cuda(call: Call) -> Model:
    """csrc/cuda/phm_bottleneck.cuh: what is not memory's is fp32 FMA, on pairs padded to 4. A row is read again, from L2, for the residual and by each outer product."""
    s, n, k = _cost.sizes(call), call.option("division", 1), call.option("factor_rank", 1)
    tokens, quads, groups = _cost.cuda_phm_tokens(call), cdiv(n * k, 4), cdiv(n * k, 8)
    tiles, splits = cdiv(s.t, tokens), _cost.cuda_phm_splits(s.t, tokens)
    factors = 2.0 * k * (s.d + s.r) + 2 * n**3
    numbers = factors + s.d + s.r  # of all gradients
    _, slots, _ = _cost.cuda_phm_owners(n, s.d // n, tokens)
    turns = cdiv(cdiv(s.d // n, 32), 2) + cdiv(tokens, 2 * slots)  # two steps of a product's loop wait together, and so do two rows of an expansion
    flops = s.flops(4 * quads)
    forward = Kernel("forward", flops, 2 * s.wide + s.thin(s.r), l2=groups * s.wide + tiles * factors * s.p, blocks=tiles, steps=turns, unit="fma")
    again = 2 * (groups - 1) + 2 * quads + 1
    rows = Kernel(
        "rows", 3 * flops, 3 * s.wide + s.thin(s.r), l2=again * s.wide + splits * factors * s.p + 4 * (2 * tiles - splits) * numbers, blocks=splits,
        steps=cdiv(tiles, splits) * 3 * turns, unit="fma",
    )  # fmt: skip
    reduce = Kernel("reduce", 0.0, s.p * numbers, 0.0, 4.0 * splits * numbers, steps=cdiv(splits, 8))
    return Model([forward], [rows, reduce], 0.0, 0.0)


PLAN = Plan("fastadapt.ops.phm_bottleneck", {"reference": reference, "triton": triton, "cuda": cuda}, ())
