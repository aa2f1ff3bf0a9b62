"""Which backends can run a routed bottleneck, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck import plan as bottleneck
from fastadapt.ops.bottleneck.plan import Plan

# The models are of a call like the bottleneck's, in which all tasks have rows and share no parameter.


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them: a bottleneck over all rows for each task, of which each row keeps its own task's."""
    s, tasks = _cost.sizes(call), call.option("tasks", 1)
    one = bottleneck.reference(call)
    keep = [_cost.pointwise("own rows in and out", 5, 5 * s.wide + 3 * s.thin(s.r) + 12 * s.t)]
    forward = [*one.forward[:-1], *keep] * tasks + [_cost.pointwise("start from zeros", 3, 3 * s.wide + s.thin(s.r) + 16 * s.t), one.forward[-1]]
    gradients = 2 * tasks * s.d * s.r * s.p
    own, add = _cost.pointwise("own rows", 7, 4 * s.wide + 2 * s.thin(s.r)), _cost.pointwise("add to sums", 16, 6 * s.wide + 14 * s.d * s.r * s.p)
    backward = [own, *one.backward[:-2], one.backward[-1], add] * tasks + [_cost.pointwise("start from zeros", 6, 2 * s.wide + 2 * gradients)]
    return Model(forward, backward, 4 * s.wide, 5 * s.wide)


def triton(call: Call) -> Model:
    """The bottleneck's kernels with, at most, a tile and a split more for each task but one, behind one that sorts the rows."""
    s, tasks = _cost.sizes(call), call.option("tasks", 1)
    one = bottleneck.triton(call)
    sort = Kernel("sort", l2=8.0 * s.t, blocks=tasks + 1, steps=2.0)

    def spread(kernel: Kernel) -> Kernel:
        """The kernel of one task as that of several."""
        if kernel.name in ("pack", "reduce"):  # the reduce reads a split more of each
            return kernel._replace(hbm=tasks * kernel.hbm, l2=kernel.l2 + (tasks - 1) * (kernel.l2 if kernel.name == "pack" else partials), blocks=tasks * kernel.blocks)
        if kernel.name == "weights":
            return kernel._replace(l2=kernel.l2 + (tasks - 1) * partials, blocks=kernel.blocks + (tasks - 1) * slabs)
        more = (kernel.blocks + tasks - 1) / kernel.blocks
        return kernel._replace(l2=more * kernel.l2, blocks=kernel.blocks + tasks - 1)

    tile = _cost.triton_tile("weights", s.r, call)
    slabs, partials = cdiv(s.d, tile.block_d) * cdiv(s.r, tile.block_r), 4.0 * s.d * (2.0 * s.r + 1)
    forward, backward = ([sort, *map(spread, kernels)] for kernels in (one.forward, one.backward))
    return Model(forward, backward, one.forward_shared, one.backward_shared)


def cuda(call: Call) -> Model:
    """The bottleneck's kernels with at most a tile and a split more for each task but one, behind a prologue: the routing and, where they are packed, all tasks' weights."""
    s, tasks = _cost.sizes(call), call.option("tasks", 1)
    r, slabs = _cost.bucket(s.r, _cost.CUDA_GATED_RANKS), cdiv(s.d, _cost.SLAB)
    tile = _cost.row_tile(r)
    blocks = cdiv(s.t, tile.rows) + tasks - 1
    pack = _cost.pack(s, [s.r])._replace(steps=2 * (tasks + 1))
    copies = tasks if _cost.cuda_needs_pack(s) else 0
    prologue = pack._replace(hbm=copies * pack.hbm, l2=copies * pack.l2 + 4.0 * s.t)
    steps = cdiv(s.d, tile.depth) + cdiv(s.d, tile.columns)
    forward = Kernel("forward", 2 * s.flops(r), 2 * s.wide + s.thin(s.r), l2=s.wide + 2.0 * blocks * s.d * r * s.a, blocks=blocks, steps=steps, unit="mma.sync")
    rows, slab, reduce = _cost.cuda_rows(s, [s.r], again=False), _cost.cuda_slabs(s, [s.r], 1), _cost.cuda_reduce(s, [s.r])
    partials = 4.0 * (tasks - 1) * s.d * (2.0 * s.r + 1)
    backward = [
        prologue,
        rows._replace(flops=s.flops(r), l2=rows.l2 * blocks / max(rows.blocks, 1), blocks=blocks),
        slab._replace(flops=3 * s.flops(r), l2=slab.l2 + partials, blocks=slab.blocks + slabs * (tasks - 1)),
        reduce._replace(hbm=tasks * reduce.hbm, l2=reduce.l2 + partials),
    ]
    return Model([prologue, forward, *_cost.cuda_unpad(s, [s.r])], backward, 0.0, 2 * s.wide)


PLAN = Plan("fastadapt.ops.routed_bottleneck", {"reference": reference, "triton": triton, "cuda": cuda}, ("forward", "rows", "slabs"))
