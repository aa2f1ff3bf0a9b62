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


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """Each projection as two thin products over rows of a division each, with L and with R, so that no weight is ever multiplied out; rated as the products with whole weights."""
    t, d, r, n, k = args.rows, args.width, args.rank, args.division, args.factor_rank
    a, p = measure.DTYPES[dtype].itemsize, measure.DTYPES[args.param_dtype or dtype].itemsize
    sides = [measure.Product(t * n, each, n * k) for each in (d // n, r // n)]
    forward = [side for one in sides for side in (one, one._replace(m=one.n, n=one.m))]
    weights = (2 * n**3 + (2 * k + 1) * (d + r)) * p
    backward = forward + [one._replace(across=True) for one in forward]
    whole = measure.bottleneck_work(args, dtype)
    return measure.Work(forward, backward, 2 * t * d * a + weights, t * (3 * d + 2 * r) * a + 2 * weights, (whole.forward, whole.backward))


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """Compacter's site: gelu_new, biases, own residual, x needs a gradient."""
    *tensors, dy = tensors_of(args, dtype)
    return measure.compare("phm_bottleneck", ours, eager.phm_bottleneck, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype))


OPTIONS = {"division": 4, "factor_rank": 1}

if __name__ == "__main__":
    measure.main(run, **OPTIONS)
