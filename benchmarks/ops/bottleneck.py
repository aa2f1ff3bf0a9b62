"""Bottleneck adapter: fastadapt against eager code as the authors write it and its torch.compile. ``python -m benchmarks.ops.bottleneck``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """VL-Adapter's site: gelu_new, biases, own residual, x needs a gradient; parameters in the activation dtype."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    torch.manual_seed(0)
    tensors = [torch.randn(t, d).to(a), *((torch.randn(s) * 0.05).to(a) for s in ((r, d), (d, r), (r,), (d,)))]
    dy = torch.randn(t, d).to(a)
    return measure.compare("bottleneck", functional.bottleneck, eager.bottleneck, tensors, 0, dy, backend=args.backend, dtype=dtype, rank=r, rounds=args.rounds)


if __name__ == "__main__":
    measure.main(run)
