"""VL-PET-large: fastadapt against eager code as the authors write it and its torch.compile. ``python -m benchmarks.ops.gated_bottleneck``"""

import argparse

import torch
from torch import Tensor

from benchmarks import measure
from fastadapt import functional
from tests import eager


def tensors_of(args: argparse.Namespace, dtype: str) -> list[Tensor]:
    """h, x, the parameters in the order of `ours`, and dy."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    p = measure.DTYPES[args.param_dtype or dtype]
    torch.manual_seed(0)
    shapes = ((r, d), (d, r), (r,), (d,), (r, d), (d, r), (r,), (d,))
    tensors = [torch.randn(t, d).to(a), torch.randn(t, d).to(a), *((torch.randn(s) * 0.05).to(p) for s in shapes), torch.randn(t, d).to(a)]
    return [t.to(args.device) for t in tensors]


def ours(h: Tensor, x: Tensor, wd: Tensor, wu: Tensor, bd: Tensor, bu: Tensor, g1: Tensor, g2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
    return functional.gated_bottleneck(h, x, wd, wu, bd, bu, granularity="large", gate_weight=g1, gate_bias=b1, gate_up_weight=g2, gate_up_bias=b2)


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """The adapter and the gate, two bottlenecks: h and x in, y out; h, x and dy in, dh and dx out."""
    return measure.bottleneck_work(args, dtype, bottlenecks=2, passes=(3, 5))


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """VL-PET-large's encoder site: four heads down, gate rank = rank, gelu_new, h and x need gradients."""
    *tensors, dy = tensors_of(args, dtype)

    def authors(h: Tensor, x: Tensor, wd: Tensor, wu: Tensor, bd: Tensor, bu: Tensor, g1: Tensor, g2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return eager.gated_bottleneck(h, x, wd.chunk(4), wu, bd.chunk(4), bu, granularity="large", gate_weight=g1, gate_bias=b1, gate_up_weight=g2, gate_up_bias=b2)

    return measure.compare("gated_bottleneck", ours, authors, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype))


if __name__ == "__main__":
    measure.main(run)
