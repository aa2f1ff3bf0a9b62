"""Adapters of four tasks in one batch: fastadapt against a call a task, as it takes without a routed op, and its torch.compile. ``python -m benchmarks.ops.routed_bottleneck``"""

import argparse
import functools

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager

TASKS = 4


def tensors_of(args: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """x, the parameters in the order of `functional.routed_bottleneck`, and dy."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    p = measure.DTYPES[args.param_dtype or dtype]
    torch.manual_seed(0)
    shapes = ((TASKS, r, d), (TASKS, d, r), (TASKS, r), (TASKS, d))
    tensors = [torch.randn(t, d).to(a), *((torch.randn(s) * 0.05).to(p) for s in shapes), torch.randn(t, d).to(a)]
    return [tensor.to(args.device) for tensor in tensors]


@functools.cache
def ids_of(rows: int, device: torch.device) -> torch.Tensor:
    """Tasks that alternate over samples of 64 rows, or over rows where these do not divide."""
    return (torch.arange(rows // 64 if rows % 64 == 0 else rows) % TASKS).to(device)


def ours(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
    return functional.routed_bottleneck(x, ids_of(len(x), x.device), *parameters)


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """That of a bottleneck, whose rows and weights each task has apart."""
    a_task = measure.bottleneck_work(argparse.Namespace(**{**vars(args), "rows": -(-args.rows // TASKS)}), dtype)
    return measure.Work(a_task.forward * TASKS, a_task.backward * TASKS, a_task.forward_bytes * TASKS, a_task.backward_bytes * TASKS)


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """VL-Adapter's site with an adapter per task: gelu_new, biases, own residual, x needs a gradient; samples of 64 rows whose tasks alternate."""
    *tensors, dy = tensors_of(args, dtype)
    ids = ids_of(args.rows, tensors[0].device)

    def calls(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return eager.routed_bottleneck(x, ids, *parameters)

    return measure.compare("routed_bottleneck", ours, calls, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype))


if __name__ == "__main__":
    measure.main(run)
