"""Dropout, residual and norm: fastadapt against the three operations of a host, and their torch.compile. ``python -m benchmarks.ops.dropout_add_norm``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager

EPS = 1e-6


def tensors_of(args: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """x, the residual, the weight and a layer norm's bias, and the output's cotangent."""
    a, p, t, d = measure.DTYPES[dtype], measure.DTYPES[args.param_dtype or dtype], args.rows, args.width
    torch.manual_seed(0)
    tensors = [torch.randn(t, d).to(a), torch.randn(t, d).to(a), *((torch.randn(d) * 0.3 + 1).to(p) for _ in range(1 if is_rms(args) else 2)), torch.randn(t, d).to(a)]
    return [t.to(args.device) for t in tensors]


def is_rms(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "rms", 0))


def ours(*tensors: torch.Tensor) -> torch.Tensor:
    return functional.dropout_add_norm(*tensors, eps=EPS)  # type: ignore[return-value]


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """x and the residual in, v (for backward) and y out; dy and v in, a gradient out, and x's by itself where elements are dropped."""
    wide = float(args.rows * args.width * measure.DTYPES[dtype].itemsize)
    return measure.Work([], [], 3 * wide, (5 if args.dropout else 4) * wide)


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """BART's layer norm, or T5's RMS norm with ``--rms 1``. ``--dropout`` is in percent; the rival's is torch's, and one mask judges both."""
    *tensors, dy = tensors_of(args, dtype)
    dropout, seed = args.dropout / 100, torch.tensor([0], device=args.device)
    options = {"norm": "rms" if is_rms(args) else "layer", "dropout": dropout, "eps": EPS}

    def dropping(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.dropout_add_norm(*tensors, **options)

    def rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.dropout_add_norm(*tensors, **options)

    def judged_ours(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.dropout_add_norm(*tensors, **options, seed=seed)

    def judged_rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.dropout_add_norm(*tensors, **options, seed=seed)

    name = f"dropout_add_{options['norm']}{f' p={dropout}' if dropout else ''}"
    return measure.compare(name, dropping, rival, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype), judged=(judged_ours, judged_rival))


OPTIONS = {"dropout": 0, "rms": 0}

if __name__ == "__main__":
    measure.main(run, **OPTIONS)
