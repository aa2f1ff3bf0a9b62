"""Adapters of four tasks in one batch: fastadapt against a call a task, as it takes without a routed op, and its torch.compile. ``python -m benchmarks.ops.routed_bottleneck``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager

TASKS = 4


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """VL-Adapter's site with an adapter per task: gelu_new, biases, own residual, x needs a gradient; samples of 64 rows whose tasks alternate."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    p = measure.DTYPES[args.param_dtype or dtype]
    torch.manual_seed(0)
    shapes = ((TASKS, r, d), (TASKS, d, r), (TASKS, r), (TASKS, d))
    tensors = [torch.randn(t, d).to(a), *((torch.randn(s) * 0.05).to(p) for s in shapes), torch.randn(t, d).to(a)]
    *tensors, dy = [tensor.to(args.device) for tensor in tensors]
    samples = t // 64 if t % 64 == 0 else t
    ids = (torch.arange(samples) % TASKS).to(args.device)

    def ours(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional.routed_bottleneck(x, ids, *parameters)

    def calls(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return eager.routed_bottleneck(x, ids, *parameters)

    return measure.compare("routed_bottleneck", ours, calls, tensors, 0, dy, backend=args.backend, dtype=dtype, rank=args.rank, rounds=args.rounds)


if __name__ == "__main__":
    measure.main(run)
