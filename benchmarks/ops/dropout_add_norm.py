"""Dropout, residual and norm: fastadapt against the three operations of a host, and their torch.compile. ``python -m benchmarks.ops.dropout_add_norm``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager


def tensors_of(args: argparse.Namespace, dtype: str, norm: str) -> list[torch.Tensor]:
    """x, the residual, the weight and a layer norm's bias, and the output's cotangent."""
    a, p, t, d = measure.DTYPES[dtype], measure.DTYPES[args.param_dtype or dtype], args.rows, args.width
    torch.manual_seed(0)
    tensors = [torch.randn(t, d).to(a), torch.randn(t, d).to(a), *((torch.randn(d) * 0.3 + 1).to(p) for _ in range(2 if norm == "layer" else 1)), torch.randn(t, d).to(a)]
    return [t.to(args.device) for t in tensors]


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """BART's layer norm and T5's RMS norm. ``--dropout`` is in percent; the rival's is torch's, and one mask judges both. ``--frozen 1``: weight and bias are not trained."""
    return [row for norm in ("layer", "rms") for row in of_norm(args, dtype, norm)]


def of_norm(args: argparse.Namespace, dtype: str, norm: str) -> list[measure.Row]:
    *tensors, dy = tensors_of(args, dtype, norm)
    dropout, seed = args.dropout / 100, torch.tensor([0], device=args.device)
    options = {"norm": norm, "dropout": dropout, "eps": 1e-6}

    def ours(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.dropout_add_norm(*tensors, **options)

    def rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.dropout_add_norm(*tensors, **options)

    def judged_ours(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.dropout_add_norm(*tensors, **options, seed=seed)

    def judged_rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.dropout_add_norm(*tensors, **options, seed=seed)

    if args.frozen:
        parameters = tensors[2:]
        tensors, (ours, rival, judged_ours, judged_rival) = tensors[:2], (lambda *t, f=f: f(*t, *parameters) for f in (ours, rival, judged_ours, judged_rival))  # type: ignore[assignment]
    judged = (judged_ours, judged_rival)
    name = f"dropout_add_{norm}{f' (dropout {dropout})' if dropout else ''}{' frozen' if args.frozen else ''}"
    return measure.compare(name, ours, rival, tensors, 0, dy, backend=args.backend, dtype=dtype, rank=0, rounds=args.rounds, judged=judged)


if __name__ == "__main__":
    measure.main(run, dropout=0, frozen=0)
