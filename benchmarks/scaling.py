"""How time and memory of a training step grow with rows, width, rank, tasks and layers. ``python -m benchmarks.scaling [--quick]``

The exponent of a size is the slope of a straight line through the logarithms: 1 is linear, 0 does not grow. Rows must be linear, which is a flat cost per row; width and rank at
most linear, the work of their products; tasks of a batch of a given size next to nothing; layers linear, over the whole model. Nothing may be quadratic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import fastadapt
from benchmarks import measure, memory, models
from fastadapt import functional
from tests.ops.specs import PHM, Bottleneck, Gated, Lora, Routed, Spec

MOST = {"rows": 1.0, "width": 1.0, "rank": 1.0, "tasks": 0.25, "layers": 1.0}
SLACK = 0.15  # of an exponent: caches end somewhere between the smallest and the largest size


@dataclass(frozen=True)
class Row:
    """One op or model against one size; times and bytes are of forward + backward, lists over ``sizes``."""

    what: str
    against: str
    dtype: str
    threads: int
    sizes: list[int]
    milliseconds: list[float]
    peak_bytes: list[int]
    time_exponent: float
    memory_exponent: float
    device: str

    @property
    def grows(self) -> bool:
        """Whether time or memory grows faster than it may."""
        return max(self.time_exponent, self.memory_exponent) > MOST[self.against] + SLACK

    def __str__(self) -> str:
        points = ", ".join(f"{n}: {ms:.2f} ms {size / 2**20:.1f} MB" for n, ms, size in zip(self.sizes, self.milliseconds, self.peak_bytes, strict=True))
        verdict = f"{'more' if self.grows else 'no more'} than {MOST[self.against]:g} + {SLACK:g}"
        return f"{self.what:18s} against {self.against:6s} time ^{self.time_exponent:.2f} memory ^{self.memory_exponent:.2f}: {verdict}   ({points})"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line through log(size), log(value) that least squares give."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def site(op: str, **sizes: int) -> Spec:
    """The paper's site, fp32; sizes beyond rows, width and rank are the op's own."""
    rows, width, rank = sizes.pop("rows", 2048), sizes.pop("width", 768), sizes.pop("rank", 96)
    common: dict[str, Any] = {"lead": (rows // 64, 64), "width": width, "rank": rank, **sizes}
    own: dict[str, Any] = {"gated_bottleneck": {"gate_rank": rank}, "lora": {"out": width, "scale": 2.0}, "routed_bottleneck": {"tasks": 4}}
    kinds = {kind.op: kind for kind in (Bottleneck, Gated, PHM, Lora, Routed)}
    return kinds[op](**{**own.get(op, {}), **common})


def step_of(spec: Spec, device: str) -> Callable[[], object]:
    """Forward and backward with all gradients."""
    leaves = {name: t.to(device).requires_grad_() for name, t in spec.draw(0).items()}
    dy = spec.cotangent(0).to(device)
    return lambda: torch.autograd.grad(spec.call(functional, leaves), list(leaves.values()), dy)


def model_step(layers: int, device: str, s: models.Sizes) -> Callable[[], object]:
    """A step of VL-BART with VL-PET-large, optimiser aside."""
    host, s = models.HOSTS["VL-BART"], s._replace(layers=layers)
    model, inputs = models.adapted(host, "vlpet", s)["ours"].to(device).train(), models.to_device(host.batch(s), device)

    def step() -> None:
        model.zero_grad()
        models.training_step(model, inputs, None)

    return step


def row(what: str, against: str, sizes: Sequence[int], make: Callable[[int], Callable[[], object]], args: argparse.Namespace) -> Row:
    """Times all sizes in turn."""
    steps = {str(n): make(n) for n in sizes}
    times = measure.interleave(steps, args.rounds, args.device, 2 * args.seconds)
    ms = [statistics.median(times[str(n)]) * 1e3 for n in sizes]
    peaks = [memory.peak(step, args.device) for step in steps.values()]
    return Row(what, against, "fp32", torch.get_num_threads(), list(sizes), ms, peaks, exponent(sizes, ms), exponent(sizes, peaks), measure.machine(args.device))


def curves(quick: bool) -> list[tuple[str, str, list[int]]]:
    """Op, size and its values; "VL-BART vlpet" is a model."""
    rows = [512, 1024, 2048, 4096] if quick else [512, 1024, 2048, 4096, 8192, 16384, 32768]
    ops = ("bottleneck", "gated_bottleneck") if quick else ("bottleneck", "gated_bottleneck", "phm_bottleneck", "lora", "routed_bottleneck")
    found = [(op, "rows", rows) for op in ops]
    found += [(op, "width", [384, 768, 1536] if quick else [384, 768, 1536, 3072]) for op in ops]
    found += [(op, "rank", [24, 48, 96, 192]) for op in ops]
    return [*found, ("routed_bottleneck", "tasks", [1, 2, 4, 8]), ("VL-BART vlpet", "layers", [1, 2, 3] if quick else [1, 2, 4, 6])]


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every curve."""
    return (f"{what} against {against}: {', '.join(map(str, sizes))}" for what, against, sizes in curves(args.quick))


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measures every curve, with one thread a core, printing as it goes."""
    with fastadapt.backend.use("cpu" if args.device == "cpu" else "auto"):
        for _ in measure.threads_of(argparse.Namespace(device=args.device, quick=True)):
            for what, against, sizes in curves(args.quick):

                def make(n: int, what: str = what, against: str = against) -> Callable[[], object]:
                    return model_step(n, args.device, models.SMALL) if against == "layers" else step_of(site(what, **{against: n}), args.device)

                found = row(what, against, sizes, make, args)
                print(found, flush=True)
                yield [found]


if __name__ == "__main__":
    from benchmarks.suites import main

    sys.exit(main("scaling"))
