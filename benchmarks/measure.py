"""Interleaved timing of rivals on the same inputs: median ratio with its spread, and no speed without correctness."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import fastadapt
from tests import tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One measurement. ratio = rival's time / fastadapt's time, so above 1 means that fastadapt is faster."""

    op: str
    backend: str
    rival: str
    dtype: str
    rows: int
    width: int
    rank: int
    direction: str
    threads: int
    ours_ms: float
    ratio_median: float
    ratio_low: float
    ratio_high: float
    correct: bool
    device: str = "cpu"
    param_dtype: str = ""

    def __str__(self) -> str:
        speed = (
            f"{self.ours_ms:8.2f} ms  x{self.ratio_median:.2f} [{self.ratio_low:.2f}, {self.ratio_high:.2f}]" if self.correct else "not shown: the result is outside the tolerance"
        )
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.op:18s} {self.backend:9s} {self.dtype} T={self.rows} d={self.width} r={self.rank} {self.direction:16s} {where}  vs {self.rival:8s} {speed}"


CALLS = 20  # between two events on a CUDA device: the first call's launch latency, some 10 us, is then below a microsecond of the mean


def timed(f: Callable[[], object], device: str) -> float:
    """Seconds of one call. On a CUDA device the mean of CALLS in a row between two events: the device's time, or the host's where the device waits for it."""
    if device == "cpu":
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(CALLS):
        f()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / CALLS


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each candidate, once per round after two warm-up rounds; the order alternates."""
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 2):
        for name in names if i % 2 else reversed(names):
            seconds = timed(candidates[name], device)
            if i >= 2:
                times[name].append(seconds)
    return times


def ratios(ours: Sequence[float], rival: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and its quartiles."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(ours, rival, strict=True)], n=4)
    return median, low, high


def compare(
    op: str,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    tensors: list[Tensor],
    frozen: int,
    dy: Tensor,
    *,
    backend: str,
    dtype: str,
    rank: int,
    rounds: int,
    judged: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None = None,
) -> list[Row]:
    """Times ours against the authors' eager code and its torch.compile, forward and forward + backward; the first `frozen` tensors get no gradient.

    Where both draw random numbers, ``judged`` are the same two with one mask, of which correctness is judged.
    """
    leaves = [t.detach().requires_grad_(i >= frozen) for i, t in enumerate(tensors)]
    device = tensors[0].device.type
    where = torch.cuda.get_device_name(tensors[0].device) if device == "cuda" else device
    param_dtype = next(name for name, d in DTYPES.items() if d == tensors[-1].dtype)
    rivals = {"ours": ours, "eager": eager, "compile": torch.compile(eager)}

    def forward(f: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> Tensor:
            with torch.no_grad(), fastadapt.backend.use(backend):
                return f(*leaves)

        return run

    def step(f: Callable[..., Tensor]) -> Callable[[], object]:
        def run() -> tuple[Tensor, ...]:
            with fastadapt.backend.use(backend):
                return torch.autograd.grad(f(*leaves), leaves[frozen:], dy)

        return run

    exact_leaves = [t.detach().double().requires_grad_(i >= frozen) for i, t in enumerate(tensors)]
    judged = judged or (ours, eager)
    out = judged[1](*exact_leaves)
    exact = (out.detach(), *torch.autograd.grad(out, exact_leaves[frozen:], dy.double()))
    errors = [[tolerance.relative_error(got, want) for got, want in zip((forward(f)(), *step(f)()), exact, strict=True)] for f in judged]  # type: ignore[misc, arg-type]
    correct = all(a <= tolerance.limit_of(b, DTYPES[dtype], gradient=i > 0) for i, (a, b) in enumerate(zip(*errors, strict=True)))
    rows = []
    for direction, make in (("forward", forward), ("forward+backward", step)):
        times = interleave({name: make(f) for name, f in rivals.items()}, rounds, device)
        for rival in ("eager", "compile"):
            numbers = ratios(times["ours"], times[rival])
            shape = (tensors[0].numel() // tensors[0].shape[-1], tensors[0].shape[-1], rank)
            rows.append(Row(op, backend, rival, dtype, *shape, direction, torch.get_num_threads(), statistics.median(times["ours"]) * 1e3, *numbers, correct, where, param_dtype))
    return rows


def main(run: Callable[[argparse.Namespace, str], list[Row]], **numbers: int) -> None:
    """The command line that every op's benchmark has; ``numbers`` are further options of one op, with their defaults."""
    parser = argparse.ArgumentParser(description=run.__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=96)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--param-dtype", choices=DTYPES, help="by default that of the activations")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device")
    rows = [row for dtype in args.dtype for n in args.rows for row in run(argparse.Namespace(**{**vars(args), "rows": n}), dtype)]
    print(*rows, sep="\n")
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
