"""Which backends can run a gated bottleneck, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck.plan import Plan

# Eager operations of reference.py beside those of its bottlenecks, forward and backward: launches, passes over (T, D), and casts of fp32 parameters. A test counts them again.
_EAGER = {
    "large": (6, 14, 8, 13, 32, 15),
    "logits": (6, 14, 4, 13, 32, 7),
    "middleX": (9, 15, 6, 25, 37, 11),
    "middleY": (6, 11, 5, 11, 22, 9),
    "small": (11, 17, 6, 31, 39, 11),
}

# The models are of a call that multiplies, with both biases, gelu_new, nothing but z and zg saved, and every gradient asked for.


def _kind(call: Call) -> str:
    kind = call.option("granularity", "large")
    return "logits" if kind == "large_full" else str(kind)  # whose projection is a product of the library's, outside the op


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them."""
    s, kind = _cost.sizes(call), _kind(call)
    launches, passes, casts, launches_back, passes_back, casts_back = _EAGER[kind]
    ranks = [s.r, s.rg] if kind == "large" else [s.r]
    cast = 2.0 * s.d * sum(ranks) * (s.p + s.a)
    up = [_cost.pointwise("phi", len(ranks), sum(2 * s.thin(r) for r in ranks)), *(_cost.gemm("u", s, r, r) for r in ranks)]
    forward = [*(_cost.gemm("z", s, r, s.d) for r in ranks), *up, _cost.pointwise("gate", launches, passes * s.wide)]
    again = [_cost.gemm("zg", s, s.rg, s.d), _cost.pointwise("phi(zg) again", 1, 2 * s.thin(s.rg))] if kind == "large" else []
    backward = [*up, *again, _cost.pointwise("gate", launches_back, passes_back * s.wide)]
    for r in ranks:
        backward += _cost.eager_bottleneck_backward(s, r)
    if s.p != s.a:
        forward.append(_cost.pointwise("casts", casts, cast))
        backward.append(_cost.pointwise("casts", casts_back, 2 * cast))
    return Model(forward, backward, 4 * s.wide, 6 * s.wide)


def _gates(kind: str, s: _cost.Sizes, name: str, blocks: int, steps: int, rank: int, gate_rank: int, unit: str, size: int, efficiency: float = 1.0) -> list[Kernel]:
    """The kernels that turn dy into dH' and the gradient of what the gate is made of. H' and the gate of large are computed again, for middleX and small twice. ``size``: bytes of
    an element of the weights."""
    weights = blocks * float(s.d) * (rank + gate_rank) * size
    thin = s.thin(s.r) + s.thin(s.rg)

    def kernel(flops: float, fresh: float, again: float, l2: float) -> Kernel:
        return Kernel(name, flops, fresh * s.wide + thin, again * s.wide, l2, blocks, steps, unit=unit, efficiency=efficiency)

    up = s.flops(rank) + s.flops(gate_rank)
    sums = 4.0 * blocks * s.d
    if kind == "large":  # dy, h; dH', dlogits
        return [kernel(up, 2, 2, weights)]
    if kind == "logits":  # dy, h, x, dx; dH'
        return [kernel(up, 4, 1, weights)]
    if kind == "middleY":  # dy, h; dH'
        return [kernel(up, 2, 1, weights + sums)]
    if kind == "middleX":  # dy, h, x, dx; dH'; dy and h once more
        return [kernel(2 * up, 4, 1, 2 * weights + 2 * s.wide + sums)._replace(steps=2 * steps)]
    return [kernel(up, 2, 0, weights), kernel(up, 2, 3, weights + 2 * sums)]  # dy, h; then x, dx; dy and h again, dH'


def triton(call: Call) -> Model:
    s, kind = _cost.sizes(call), _kind(call)
    large = kind == "large"
    rank, gate_rank = _cost.triton_rank(s.r), _cost.triton_rank(s.rg) if large else 0
    unit, efficiency = _cost.triton_unit(s), _cost.triton_efficiency(s)
    pack, dtype = _cost.triton_weights(s, call, [s.r, s.rg])
    tile = _cost.triton_tile("gated_forward", max(s.r, s.rg), call, dtype)
    tiles, loop = cdiv(s.t, tile.block_t), cdiv(s.d, tile.block_d)
    weights = tiles * float(s.d) * (rank + gate_rank) * dtype.itemsize  # one direction's
    thin = s.thin(s.r) + s.thin(s.rg)
    flops = s.flops(rank) + s.flops(gate_rank)

    def forward(flops: float, fresh: float, again: float, l2: float, loops: int) -> Kernel:
        return Kernel("forward", flops, fresh * s.wide + thin, again * s.wide, l2, tiles, loops * loop, unit=unit, efficiency=efficiency)

    if kind == "small":  # h, x, z, logits; then z and h again, y
        first = [forward(2 * flops, 2, 0, s.wide + 2 * weights, 2), forward(flops, 1, 1, weights, 1)]
    elif kind == "middleX":  # the logits take a pass of their own over Wu, h and x
        first = [forward(3 * flops, 3, 0, 2 * s.wide + 3 * weights, 3)]
    else:
        first = [forward(2 * flops, 2 if kind == "middleY" else 3, 0, s.wide + 2 * weights, 3 if large else 2)]
    tile = _cost.triton_tile("gates", max(s.r, s.rg), call, dtype)
    tiles = cdiv(s.t, tile.block_t)
    backward = [*pack, *_gates(kind, s, "gates", tiles, cdiv(s.d, tile.block_d), rank, gate_rank, unit, dtype.itemsize, efficiency)]
    of_gate = (tiles, s.d * (2 if kind == "small" else 1)) if kind in ("middleX", "middleY", "small") else (0, 0)
    backward += _cost.triton_bottleneck_backward(s, call, [s.r, s.rg] if large else [s.r], again=True, fresh=large, beside=of_gate)
    return Model([*pack, *first], backward, 3 * s.wide, (5 if large else 3) * s.wide)


def cuda(call: Call) -> Model:
    s, kind = _cost.sizes(call), _kind(call)
    large, rowwise = kind == "large", kind in ("middleX", "small")
    ranks = [s.r, s.rg] if large else [s.r]
    r = _cost.bucket(max(ranks), _cost.CUDA_GATED_RANKS)
    tile = _cost.row_tile(r, dual=large)
    blocks = cdiv(s.t, tile.rows)
    pack = [_cost.pack(s, ranks)] if _cost.cuda_needs_pack(s) else []
    weights = blocks * float(s.d) * r * len(ranks) * s.a
    thin = s.thin(s.r) + s.thin(s.rg)
    flops = len(ranks) * s.flops(r)
    passes = r // _cost.down_part(r, large)
    downs, ups = passes * len(ranks) * cdiv(s.d, tile.depth), cdiv(s.d, tile.columns)

    def forward(flops: float, fresh: float, again: float, l2: float, steps: int) -> Kernel:
        return Kernel("forward", flops, fresh * s.wide + thin, again * s.wide, l2, blocks, steps, unit="mma.sync")

    first: list[Kernel]
    if kind == "small":  # h, x, z, logits; then z and h again, y
        first = [forward(flops, 2, 0, s.wide + weights, downs), forward(flops, 1, 1, weights, ups)]
    else:
        again = s.wide + (passes - 1) * len(ranks) * s.wide
        first = [forward(2 * flops, 2 if kind == "middleY" else 3, 0, again + 2 * weights, downs + ups)]
    fold = [Kernel("pack", l2=float(s.d) * s.r * s.p)] if rowwise and not pack else []  # of Wu with the gate's weight: its own launch where there is nothing to pack
    gates = _gates(kind, s, "gates", blocks, ups, r, r if large else 0, "mma.sync", s.a)
    backward = [*pack, *gates, _cost.cuda_rows(s, ranks, again=True), _cost.cuda_slabs(s, ranks, len(ranks) - 1), _cost.cuda_reduce(s, ranks)]
    return Model([*pack, *fold, *first, *_cost.cuda_unpad(s, ranks)], backward, 3 * s.wide, (5 if large else 3) * s.wide)


PLAN = Plan("fastadapt.ops.gated_bottleneck", {"reference": reference, "triton": triton, "cuda": cuda}, ("forward dual", "gates dual", "rows", "slabs"))
