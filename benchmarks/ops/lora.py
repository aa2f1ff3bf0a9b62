"""LoRA beside a projection: fastadapt against the layer as PEFT writes it, and its torch.compile. ``python -m benchmarks.ops.lora``"""

import argparse

import torch

from benchmarks import measure
from fastadapt import functional
from tests import eager

SCALE = 2.0


def tensors_of(args: argparse.Namespace, dtype: str) -> list[torch.Tensor]:
    """x, the projection's output y, the weights, and the output's cotangent."""
    a, t, d, r = measure.DTYPES[dtype], args.rows, args.width, args.rank
    p, out = measure.DTYPES[args.param_dtype or dtype], args.out_width or d
    torch.manual_seed(0)
    tensors = [torch.randn(t, d).to(a), torch.randn(t, out).to(a), *((torch.randn(s) * 0.05).to(p) for s in ((r, d), (out, r))), torch.randn(t, out).to(a)]
    return [t.to(args.device) for t in tensors]


def ours(*tensors: torch.Tensor) -> torch.Tensor:
    return functional.lora(*tensors, scale=SCALE)


def work(args: argparse.Namespace, dtype: str) -> measure.Work:
    """x and the projection's y in, the sum out; x and dy in, dx out: dy is the gradient of y as it is."""
    t, d, r, out = args.rows, args.width, args.rank, args.out_width or args.width
    a, p = measure.DTYPES[dtype].itemsize, measure.DTYPES[args.param_dtype or dtype].itemsize
    down, up = measure.Product(t, d, r), measure.Product(t, r, out)
    backward = [measure.Product(t, out, r), measure.Product(t, r, d), down._replace(across=True), measure.Product(t, out, r, across=True)]
    weights = (d + out) * r * p
    return measure.Work([down, up], backward, t * (d + 2 * out) * a + weights, t * (2 * d + out + 2 * r) * a + 2 * weights)


def run(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
    """The site without the frozen projection, which costs both the same; x and y need gradients. ``--dropout`` is in percent; the rival's is torch's, and one mask judges both."""
    *tensors, dy = tensors_of(args, dtype)
    p, seed = args.dropout / 100, torch.tensor([0], device=args.device)

    def dropping(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.lora(*tensors, scale=SCALE, dropout=p)

    def rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.lora(*tensors, scale=SCALE, dropout=p)

    def judged_ours(*tensors: torch.Tensor) -> torch.Tensor:
        return functional.lora(*tensors, scale=SCALE, dropout=p, seed=seed)

    def judged_rival(*tensors: torch.Tensor) -> torch.Tensor:
        return eager.lora(*tensors, scale=SCALE, dropout=p, seed=seed)

    judged = (judged_ours, judged_rival)
    name = "lora" + (f" p={p}" if p else "") + (f" to {args.out_width}" if args.out_width else "")
    return measure.compare(name, dropping, rival, tensors, 0, dy, work=work(args, dtype), **measure.options_of(args, dtype), judged=judged)


OPTIONS = {"out_width": 0, "dropout": 0}

if __name__ == "__main__":
    measure.main(run, **OPTIONS)
