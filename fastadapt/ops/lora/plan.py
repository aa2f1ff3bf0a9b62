"""Which backends can run LoRA's update, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from math import gcd

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck import plan as bottleneck
from fastadapt.ops.bottleneck.plan import Plan

MASK = 80.0
"""FMA operations that take as long as one element of dropout's mask: 20 instructions (counted in the machine code of compute capability 9.0) at half the rate, 2 an FMA."""


MASK_EAGER = 171, 456
"""Operations of torch for one mask and what it leaves out, and the bytes they move an element (counted)."""


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them; dropout's mask is drawn once forward and twice backward."""
    s, out = _cost.sizes(call), call.option("out_width", call.width)
    of_y, weights = s._replace(d=out), (s.d + out) * float(s.r) + out
    dropout = call.option("dropout", False)

    def masks(n: int) -> list[Kernel]:
        return [_cost.pointwise("masks", n * MASK_EAGER[0], n * MASK_EAGER[1] * float(s.t) * s.d)] if dropout else []

    forward = [
        *([_cost.pointwise("casts", 3, weights * (s.p + s.a))] if s.p != s.a else []),
        *masks(1),
        _cost.gemm("z", s, s.r, s.d),
        *([_cost.pointwise("k", 1, 2 * s.thin(s.r))] if dropout else []),
        _cost.gemm("u", of_y, s.r, s.r),
        _cost.pointwise("scale and add", 2, 5 * of_y.wide),
    ]
    backward = [
        *([_cost.pointwise("casts", 5, 2 * weights * (s.p + s.a))] if s.p != s.a else []),
        _cost.gemm("dz", of_y, s.r, out),
        _cost.pointwise("scale", 1, 2 * s.thin(s.r)),
        _cost.gemm("dz Wd", s, s.r, s.r),
        *masks(2),
        _cost.gemm("dWd", s, s.r, s.t),
        _cost.pointwise("scale of dy", 1, 2 * of_y.wide),
        _cost.gemm("dWu", of_y, s.r, s.t),
        _cost.pointwise("sums of dy", 1, of_y.wide),
    ]
    return Model(forward, backward, 2 * of_y.wide, s.wide + of_y.wide)


def triton(call: Call) -> Model:
    """The bottleneck's kernels at a width between the two, which 64 divides where it divides both. The identity's a is z, and there are no column sums of dz."""
    out = call.option("out_width", call.width)
    mean = (call.width + out) // 2
    one = call._replace(width=mean | 1 if gcd(call.width, out) % 64 else 64 * cdiv(mean, 64))
    s, model, parts = _cost.sizes(call), bottleneck.triton(one, biases=False), cdiv(call.rank, _cost.triton_tile("weights", call.rank, one).block_r)
    beside = float(s.t) * out * s.a  # y, which the bottleneck has in x
    forward = [k._replace(hbm=k.hbm + beside) if k.name == "forward" else k for k in model.forward]
    backward = [k._replace(hbm=k.hbm - 2 * s.thin(s.r)) if k.name == "rows" else k for k in model.backward]
    if call.option("dropout", False):
        elements = float(s.t) * s.d
        forward.append(Kernel("masks", MASK * elements, unit="fma", launches=0))
        backward.append(Kernel("masks", MASK * elements * (1 + parts), unit="fma", launches=0))
    return Model(forward, backward, model.forward_shared, model.backward_shared)


def cuda(call: Call) -> Model:
    """The bottleneck's kernels with two widths. The identity's a is z, and nothing sums dz."""
    out = call.option("out_width", call.width)
    s, r = _cost.sizes(call), _cost.bucket(call.rank)
    of_y, both = s._replace(d=out), s._replace(d=s.d + out)
    pack = [_cost.pack(s._replace(d=both.d // 2), [s.r])] if _cost.cuda_needs_pack(s) else []
    tile = _cost.row_tile(r)
    tiles = cdiv(s.t, tile.rows)
    steps = cdiv(s.d, tile.depth) + cdiv(out, tile.columns)
    forward = Kernel("forward", both.flops(r), s.wide + 2 * of_y.wide + s.thin(s.r), l2=float(tiles) * both.d * r * s.a, blocks=tiles, steps=steps, unit="mma.sync")
    rows = _cost.cuda_rows(of_y, [s.r], again=False)
    widest = max(s.d, out)
    splits, each = _cost.slab_splits(s.t, widest)
    elements = both.d * s.r + out
    thin = (cdiv(s.d, _cost.SLAB) + cdiv(out, _cost.SLAB) - 2) * s.thin(s.r)
    slabs = Kernel(
        "slabs", s.flops(r) + both.flops(r), 2 * s.wide, of_y.wide + 2 * s.thin(s.r), thin + 4.0 * splits * elements,
        cdiv(widest, _cost.SLAB) * splits, cdiv(each, _cost.slab_tile(r)[0]), unit="mma.sync",
    )  # fmt: skip
    reduce = Kernel("reduce", 0.0, float(s.p * elements), 0.0, 4.0 * splits * elements, steps=splits)
    masks = [Kernel("masks", MASK * s.t * s.d, unit="fma", launches=0)] if call.option("dropout", False) else []
    backward = [*pack, rows._replace(hbm=rows.hbm - s.thin(s.r)), slabs, *masks, reduce]
    return Model([*pack, forward, *masks, *_cost.cuda_unpad(s, [s.r])], backward, 0.0, of_y.wide)


PLAN = Plan("fastadapt.ops.lora", {"reference": reference, "triton": triton, "cuda": cuda}, ("forward", "rows", "slabs"))
"""Which backends can run a LoRA."""
