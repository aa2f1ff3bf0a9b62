"""Compacter: fastadapt against eager code as the authors write it and its torch.compile. ``python -m benchmarks.ops.phm_bottleneck``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager


def tensors_of(args: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """x, the parameters in the order of `functional.phm_bottleneck`, and dy."""
    a, t, d, r, n, k = measure.DTYPES[dtype], args.rows, args.width, args.rank, args.division, args.factor_rank
    p = measure.DTYPES[args.param_dtype or dtype]
    torch.manual_seed(0)
    shapes = ((n, n, n), (n, d // n, k), (n, k, r // n), (n, n, n), (n, r // n, k), (n, k, d // n), (r,), (d,))
    tensors = [torch.randn(t, d).to(a), *((torch.randn(s) * 0.3).to(p) for s in shapes), torch.randn(t, d).to(a)]
    return [t.to(args.device) for t in tensors]


ours = functional.phm_bottleneck


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """Compacter's site: gelu_new, biases, own residual, x needs a gradient."""
    *tensors, dy = tensors_of(args, dtype)
    return measure.compare("phm_bottleneck", ours, eager.phm_bottleneck, tensors, 0, dy, backend=args.backend, dtype=dtype, rank=args.rank, rounds=args.rounds)


if __name__ == "__main__":
    measure.main(run, division=4, factor_rank=1)
