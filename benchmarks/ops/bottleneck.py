"""Bottleneck adapter: fastadapt against eager code as the authors write it and its torch.compile. ``python -m benchmarks.ops.bottleneck``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager


def tensors_of(args: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """x, the parameters in the order of `functional.bottleneck`, and dy."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    p = measure.DTYPES[args.param_dtype or dtype]
    torch.manual_seed(0)
    tensors = [torch.randn(t, d).to(a), *((torch.randn(s) * 0.05).to(p) for s in ((r, d), (d, r), (r,), (d,))), torch.randn(t, d).to(a)]
    return [t.to(args.device) for t in tensors]


ours = functional.bottleneck


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """x in, y out; x and dy in, dx out."""
    return measure.bottleneck_work(args, dtype)


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """VL-Adapter's site: gelu_new, biases, own residual, x needs a gradient."""
    *tensors, dy = tensors_of(args, dtype)
    return measure.compare("bottleneck", ours, eager.bottleneck, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype))


if __name__ == "__main__":
    measure.main(run)
