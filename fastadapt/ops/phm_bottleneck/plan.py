"""Which backends can run Compacter's bottleneck, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv
from fastadapt.ops.bottleneck.plan import Plan


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


PLAN = Plan("fastadapt.ops.phm_bottleneck", {"cuda": cuda}, ())
