"""Which backends can run dropout, sum and norm, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck.plan import Plan
from fastadapt.ops.lora.plan import MASK, MASK_EAGER

# The models are of a call with a residual and a weight, and a layer norm's bias, of which v is not used elsewhere; v and its statistics are saved, every gradient is asked for.


class _Bytes:
    """Of x and its gradient, of v and what else has its dtype, and of fp32 numbers."""

    def __init__(self, call: Call) -> None:
        s = _cost.sizes(call)
        self.x, self.wide, self.row = s.wide, 4.0 * s.t * s.d, 4.0 * s.t
        self.v = self.wide if call.option("wide", False) else s.wide


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them: in fp32, with a conversion of whatever is narrower."""
    b, norm, p = _Bytes(call), call.option("norm", "layer"), call.param_dtype.itemsize
    casts_x, casts_v, casts_p = int(b.x < b.wide), int(b.v < b.wide), int(p < 4)
    vector, parameters = 4.0 * call.width, {"none": 0, "layer": 2, "rms": 1}[norm]

    def masks(n: int) -> list[Kernel]:
        return [_cost.pointwise("masks", n * (MASK_EAGER[0] + 1), n * (MASK_EAGER[1] / 4 + 3) * b.wide)] if call.option("dropout", False) else []

    forward = [
        *masks(1),
        _cost.pointwise("sum", 1 + casts_x + 2 * casts_v, 3 * b.wide + casts_x * (b.wide + b.x) + 2 * casts_v * (b.wide + b.v)),
    ]
    own_x = bool(call.option("dropout", False) or call.option("wide", False))  # else x has the residual's gradient
    backward = [*masks(1), *([_cost.pointwise("dx", casts_x, casts_x * (b.wide + b.x))] if own_x and casts_x else [])]
    if norm == "none":
        return Model(forward, [_cost.pointwise("dv", casts_v, casts_v * (b.wide + b.v)), *backward] if own_x else [], 4 * b.wide, 3 * b.wide)
    layer = int(norm == "layer")
    forward += [
        _cost.pointwise("statistics", 4 + 2 * layer + casts_v, (3 + 3 * layer) * b.wide + 6 * b.row + casts_v * (b.wide + b.v)),
        _cost.pointwise("norm", 1 + parameters * (1 + casts_p) + casts_v, 2 * (1 + parameters) * b.wide + casts_v * (b.wide + b.v) + parameters * vector),
    ]
    backward += [
        _cost.pointwise("xhat", 1 + layer + 2 * casts_v, 2 * (1 + layer) * b.wide + 2 * casts_v * (b.wide + b.v)),
        _cost.pointwise("sums", 2 + layer + parameters * casts_p, (4 + layer) * b.wide),
        _cost.pointwise("dv", 6 + 2 * layer + casts_p + casts_v, (13 + 3 * layer) * b.wide + casts_v * (b.wide + b.v)),
    ]
    return Model(forward, backward, 4 * b.wide, 4 * b.wide)


def triton(call: Call) -> Model:
    """The launches of triton.py: each tensor read or written once; the partials of weight and bias stay in L2."""
    from fastadapt.ops.dropout_add_norm import triton as kernels

    b, t, d, norm = _Bytes(call), call.rows, call.width, call.option("norm", "layer")
    shape, efficiency = kernels.tile(d), _cost.UNALIGNED if d % 16 else 1.0
    tiles, parameters = cdiv(t, shape.block_t), {"none": 0, "layer": 2, "rms": 1}[norm]
    drops = bool(call.option("dropout", False))
    masks = [Kernel("masks", MASK * t * d, unit="fma", launches=0)] if drops else []
    statistics = b.row * parameters
    forward = Kernel("forward", 0.0, b.x + (3 if parameters else 2) * b.v + statistics, blocks=tiles, steps=2, efficiency=efficiency)
    own_x = b.x if drops or call.option("wide", False) else 0.0  # else x has the residual's gradient
    if not parameters:
        return Model([forward, *masks], [Kernel("backward", 0.0, b.v + own_x, blocks=tiles, steps=2, efficiency=efficiency), *masks] if own_x else [])
    size = kernels.part_rows(t, shape.block_t)
    parts = cdiv(t, size)
    partials = 4.0 * parts * d * parameters
    backward = Kernel("backward", 0.0, 3 * b.v + own_x + statistics, l2=partials, blocks=parts, steps=2 * size // shape.block_t, efficiency=efficiency)
    sums = Kernel("sums", 0.0, float(call.param_dtype.itemsize) * d * parameters, l2=partials, blocks=cdiv(d, kernels.SUMS_C), steps=parameters * cdiv(parts, kernels.SUMS_N))
    return Model([forward, *masks], [backward, *masks, sums])


def cuda(call: Call) -> Model:
    """csrc/cuda/dropout_add_norm.cuh: each tensor read or written once, weight and bias in L1; the partials of their gradients stay in L2."""
    b, t, d, parameters = _Bytes(call), call.rows, call.width, {"none": 0, "layer": 2, "rms": 1}[call.option("norm", "layer")]
    lanes, splits = _cost.cuda_norm_lanes(d), _cost.cuda_norm_splits(t, d)
    blocks, statistics = cdiv(t, 512 // lanes), b.row * parameters  # eight narrow blocks take the place of another kernel's
    drops = bool(call.option("dropout", False))
    masks = [Kernel("masks", MASK * t * d, unit="fma", launches=0)] if drops else []
    forward = Kernel("forward", 0.0, b.x + (3 if parameters else 2) * b.v + statistics, blocks=blocks, steps=2)
    own_x = b.x if drops or call.option("wide", False) else 0.0  # else x has the residual's gradient
    if not parameters:
        return Model([forward, *masks], [Kernel("rows", 0.0, b.v + own_x, blocks=blocks, steps=1), *masks] if own_x else [])
    turns, partials = cdiv(cdiv(t, splits), max(1, 256 // lanes)), 4.0 * splits * d * parameters
    rows = Kernel("rows", 0.0, 3 * b.v + own_x + statistics, l2=partials, blocks=splits, steps=2 * turns)
    reduce = Kernel("reduce", 0.0, float(call.param_dtype.itemsize) * d * parameters, l2=partials, steps=cdiv(splits, 8))
    return Model([forward, *masks], [rows, *masks, reduce])


PLAN = Plan("fastadapt.ops.dropout_add_norm", {"reference": reference, "triton": triton, "cuda": cuda}, ())
"""Which backends can run dropout, sum and norm."""
