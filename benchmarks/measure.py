"""Interleaved timing of rivals on the same inputs: median ratio with its spread, distance to what the machine can do, and no speed without correctness."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastadapt
from tests import tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Row:
    """One measurement. ratio = rival's time / fastadapt's time, so above 1 means that fastadapt is faster; None where the result is wrong: there is no speed then.

    limit_fraction = time of the limit (`Limit`) / fastadapt's time, None where no limit was measured.
    """

    op: str
    backend: str
    rival: str
    dtype: str
    rows: int
    width: int
    rank: int
    direction: str
    threads: int
    ours_ms: float | None
    ratio_median: float | None
    ratio_low: float | None
    ratio_high: float | None
    correct: bool
    device: str = "cpu"
    param_dtype: str = ""
    limit_fraction: float | None = None

    @property
    def slower(self) -> bool:
        """Whether fastadapt is slower than the rival, beyond the spread. A base without adapters is no rival but the floor."""
        return self.rival != "base" and self.ratio_high is not None and self.ratio_high < 1

    def __str__(self) -> str:
        speed = "not shown: the result is outside the tolerance"
        if self.correct and self.ratio_median is not None:
            limit = "" if self.limit_fraction is None else f"  {100 * self.limit_fraction:3.0f} % of the limit"
            speed = f"{self.ours_ms:8.2f} ms  x{self.ratio_median:.2f} [{self.ratio_low:.2f}, {self.ratio_high:.2f}]{limit}{'  slower' if self.slower else ''}"
        where = f"{self.threads} threads" if self.device.startswith("cpu") else self.device
        return f"{self.op:28s} {self.backend:6s} {self.dtype} T={self.rows} d={self.width} r={self.rank} {self.direction:16s} {where}  vs {self.rival:8s} {speed}"


def machine(device: str | torch.device = "cpu") -> str:
    """The name of a device: a GPU's own, or the processor's with what of it torch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        about = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M))
    except OSError:
        about = {}
    name = f"{about.get('model name', 'unknown')} (family {about.get('cpu family', '?')}, model {about.get('model', '?')})"
    return f"cpu: {name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


CALLS = 20  # between two events on a CUDA device: the first call's launch latency, some 10 us, is then below a microsecond of the mean
SETTLED = 0.02  # of a median ratio: quartiles no wider apart, after at least nine rounds, need no more of them
SAMPLE = 2e-3  # seconds that a sample on a CPU takes at least, in up to CALLS calls: the clock is then below a percent


def timed(f: Callable[[], object], device: str, calls: int = 1) -> float:
    """Seconds of one call, the mean of ``calls`` in a row; on a CUDA device of CALLS between two events: the device's time, or the host's where the device waits for it.

    On a CPU one more goes before them, untimed, which finds memory and caches as its rivals left them.
    """
    if device == "cpu":
        f()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        return (time.perf_counter() - start) / calls
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(CALLS):
        f()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3 / CALLS


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", seconds: float = math.inf) -> dict[str, list[float]]:
    """Seconds of each candidate, once per round after two warm-up rounds; the order alternates.

    Stops after ``seconds``, but not before five rounds, and where the ratios of all candidates to the first are `SETTLED`.
    """
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = dict.fromkeys(names, 1)
    for i in range(rounds + 2):
        if i == 2:
            started = time.perf_counter()
        if (i >= 7 and time.perf_counter() - started > seconds) or (i >= 11 and settled(list(times.values()))):
            break
        for name in names if i % 2 else reversed(names):
            took = timed(candidates[name], device, calls[name])
            if i >= 2:
                times[name].append(took)
            elif i == 1:
                calls[name] = max(1, min(CALLS, math.ceil(SAMPLE / max(took, 1e-9))))
    return times


def ratios(ours: Sequence[float], rival: Sequence[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and its quartiles."""
    low, median, high = statistics.quantiles([b / a for a, b in zip(ours, rival, strict=True)], n=4)
    return median, low, high


def settled(times: Sequence[Sequence[float]]) -> bool:
    """Whether all paired ratios to the first candidate are known well enough."""
    numbers = [ratios(times[0], other) for other in times[1:]]
    return bool(numbers) and all(high - low <= SETTLED * median for median, low, high in numbers)


class Product(NamedTuple):
    """A product of matrices that an op cannot do without: rows (t, m) by weights (m, n), or with ``across`` the gradient of weights, rows (t, m) transposed by rows (t, n)."""

    t: int
    m: int
    n: int
    across: bool = False

    @property
    def flops(self) -> float:
        """Both kinds have the same."""
        return 2.0 * self.t * self.m * self.n


class Work(NamedTuple):
    """What the plain algorithm of a call must do, without recomputation: its products, and the bytes that it reads and writes if it touches each tensor once."""

    forward: list[Product]
    backward: list[Product]
    forward_bytes: float
    backward_bytes: float
    rated: tuple[list[Product], list[Product]] | None = None
    """Forward and backward products whose rate stands for that of the op's own, where these are too thin for the library to come near what the machine can do."""

    def part(self, both: bool) -> tuple[float, list[Product], float]:
        """FLOPs, products whose rate is measured, and bytes of forward, or of forward and backward."""
        own, rated = ((of[0] + of[1] if both else of[0]) for of in ((self.forward, self.backward), self.rated or (self.forward, self.backward)))
        return sum(product.flops for product in own), rated, self.forward_bytes + (self.backward_bytes if both else 0.0)


def bottleneck_work(args: argparse.Namespace, dtype: str, *, bottlenecks: int = 1, passes: tuple[int, int] = (2, 3)) -> Work:
    """The work of ``bottlenecks`` over the same rows: 12 T d r operations each, forward and backward. ``passes``: tensors (T, d) read or written, forward and backward."""
    t, d, r = args.rows, args.width, args.rank
    a, p = DTYPES[dtype].itemsize, DTYPES[args.param_dtype or dtype].itemsize
    down, up = Product(t, d, r), Product(t, r, d)
    # The products of dy and dz with the weights have the shapes of those forward.
    backward = [down, up, down._replace(across=True), up._replace(across=True)]
    wide, thin, weights = float(t * d * a), float(t * r * a * bottlenecks), float((2 * d * r + d + r) * p * bottlenecks)
    return Work([down, up] * bottlenecks, backward * bottlenecks, passes[0] * wide + weights, passes[1] * wide + 2 * thin + 2 * weights)


class Limit(NamedTuple):
    """No algorithm that multiplies by the library's products and touches each tensor once takes less time than this."""

    flops: float
    bytes: float
    rate: float  # FLOP/s of the library's best calls over the op's own products
    bandwidth: float  # bytes/s of a copy, read and written

    @property
    def seconds(self) -> float:
        """The larger of both times."""
        return max(self.flops / self.rate, self.bytes / self.bandwidth)


COPIED = 2**29  # bytes that the copy reads and writes at most: far beyond any cache


def onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and multiplies such matrices on this processor."""
    if not torch.backends.mkldnn.is_available() or dtype == torch.float32:
        return torch.backends.mkldnn.is_available()
    half = torch.ops.mkldnn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else torch.ops.mkldnn._is_mkldnn_fp16_supported
    return bool(half())


def library_calls(product: Product, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """The library's ways to one product. Weights may lie as they like, rows are as they are."""
    a, b = torch.randn(product.t, product.m).to(device, dtype), torch.randn(product.t if product.across else product.m, product.n).to(device, dtype)
    if product.across:
        left, right, out = a.t(), b, torch.empty(product.m, product.n, dtype=dtype, device=device)
        turned = torch.empty(product.n, product.m, dtype=dtype, device=device)
        calls = {"mm": lambda: torch.mm(left, right, out=out), "mm turned": lambda: torch.mm(right.t(), a, out=turned)}
    else:
        left, right, out = a, b, torch.empty(product.t, product.n, dtype=dtype, device=device)
        weight = right.t().contiguous()
        calls = {"mm": lambda: torch.mm(left, right, out=out), "linear": lambda: F.linear(left, weight)}
    if device.type == "cpu" and onednn_has(dtype):  # which torch itself asks for half precision only, and inductor for all
        weight = right.t().contiguous()
        calls["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")
    return calls


@functools.cache
def best_library_call(product: Product, dtype: torch.dtype, device: torch.device, threads: int) -> str:
    """The name of the fastest call for a product under so many threads, by three tries each; tried once a process."""
    times = interleave(library_calls(product, dtype, device), 3, device.type)
    return min(times, key=lambda name: min(times[name]))


def best_library_calls(products: Sequence[Product], dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    """The fastest call for each product."""
    best = {product: library_calls(product, dtype, device)[best_library_call(product, dtype, device, torch.get_num_threads())] for product in set(products)}
    return [best[product] for product in products]


def limit_candidates(products: Sequence[Product], moved: float, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed beside an op to know its limit: "products" and "copy" of as many bytes as it moves."""
    calls = best_library_calls(products, dtype, device)
    source = torch.zeros(max(1, int(min(moved, COPIED)) // 2), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def multiply() -> None:
        for call in calls:
            call()

    return {"products": multiply, "copy": lambda: target.copy_(source)}


def limit(flops: float, products: Sequence[Product], moved: float, times: Mapping[str, Sequence[float]]) -> Limit:
    """The limit by the median times of `limit_candidates`."""
    products_s, copy_s = statistics.median(times["products"]), statistics.median(times["copy"])
    rate = sum(product.flops for product in products) / products_s if products else math.inf
    return Limit(flops, moved, rate, 2 * max(1, int(min(moved, COPIED)) // 2) / copy_s)


Layer = Callable[..., Tensor]


def results(layer: Layer, tensors: Sequence[Tensor], frozen: int, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    leaves = [t.detach().requires_grad_(i >= frozen) for i, t in enumerate(tensors)]
    y = layer(*leaves)
    gradients = torch.autograd.grad(y, leaves[frozen:], dy)
    return {"y": y.detach(), **{f"gradient {i}": g for i, g in enumerate(gradients, frozen)}}


def wrong(ours: Layer, eager: Layer, tensors: Sequence[Tensor], frozen: int, dy: Tensor) -> str:
    """What the tests' rule (`tests.tolerance`) has against the outputs and gradients of ours on these tensors, or nothing."""

    def run(seed: int) -> dict[str, tolerance.Compared]:
        drawn = [*tensors, dy]
        if seed:  # of the same size as those given
            torch.manual_seed(seed)
            drawn = [torch.randn_like(t) * t.float().square().mean().sqrt().to(t.dtype) for t in drawn]
        *arguments, cotangent = drawn
        exact = results(eager, [t.double() for t in arguments], frozen, cotangent.double())
        got, same = (results(layer, arguments, frozen, cotangent) for layer in (ours, eager))
        return {name: tolerance.Compared(got[name], exact[name], same[name], name != "y") for name in exact}

    try:
        tolerance.assert_rule(run, dy.dtype)
    except AssertionError as error:
        return str(error)
    return ""


def compare(
    op: str,
    ours: Layer,
    eager: Layer,
    tensors: list[Tensor],
    frozen: int,
    dy: Tensor,
    *,
    backend: str,
    dtype: str,
    rank: int,
    rounds: int,
    judged: tuple[Layer, Layer] | None = None,
    work: Work | None = None,
    seconds: float = math.inf,
) -> list[Row]:
    """Times ours against the authors' eager code and its torch.compile, forward and forward + backward; the first `frozen` tensors get no gradient.

    All run interleaved under the same threads, dtypes and inference mode (no_grad for forward alone). Where both draw random numbers, ``judged`` are the same two with one mask, of
    which correctness is judged. With ``work``, the limit is measured in the same rounds. ``seconds``: of all rounds of one direction. Without ``rounds`` eager is only compiled, so
    that another process finds the files.
    """
    leaves = [t.detach().requires_grad_(i >= frozen) for i, t in enumerate(tensors)]
    device = tensors[0].device
    param_dtype = next(name for name, d in DTYPES.items() if d == tensors[-1].dtype)
    shape = (tensors[0].numel() // tensors[0].shape[-1], tensors[0].shape[-1], rank)
    where = (torch.get_num_threads(), machine(device))

    def row(rival: str, direction: str, milliseconds: float | None, numbers: Sequence[float | None], correct: bool, fraction: float | None = None) -> Row:
        return Row(op, backend, rival, dtype, *shape, direction, where[0], milliseconds, *numbers, correct, where[1], param_dtype, fraction)

    def forward(f: Layer) -> object:
        return f(*leaves)

    def step(f: Layer) -> object:
        return torch.autograd.grad(f(*leaves), leaves[frozen:], dy)

    # Else a second shape is compiled for any shape, and after the eighth nothing is compiled any more.
    torch.compiler.reset()
    compiled = torch.compile(eager, dynamic=False)
    if rounds == 0:
        with torch.no_grad():
            forward(compiled)
        step(compiled)
        return []
    with fastadapt.backend.use(backend):
        if reason := wrong(*(judged or (ours, eager)), tensors, frozen, dy):
            print(f"{op}, {dtype}, {shape}: no speed is shown. {reason}", file=sys.stderr)
            return [row(rival, direction, None, (None, None, None), False) for direction in ("forward", "forward+backward") for rival in ("eager", "compile")]
        rivals = {"ours": ours, "eager": eager, "compile": compiled}
        rows = []
        for direction, run in (("forward", forward), ("forward+backward", step)):
            candidates: dict[str, Callable[[], object]] = {name: functools.partial(run, f) for name, f in rivals.items()}
            both = direction != "forward"
            if work:
                flops, products, moved = work.part(both)
                candidates |= limit_candidates(products, moved, dy.dtype, device)
            with torch.set_grad_enabled(both):
                times = interleave(candidates, rounds, device.type, seconds)
            median = statistics.median(times["ours"])
            fraction = limit(flops, products, moved, times).seconds / median if work else None
            rows += [row(rival, direction, median * 1e3, ratios(times["ours"], times[rival]), True, fraction) for rival in ("eager", "compile")]
    return rows


def options_of(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What every op's `run` hands on to `compare`."""
    return {"backend": args.backend, "dtype": dtype, "rank": args.rank, "rounds": args.rounds, "seconds": args.seconds}


def threads_of(args: argparse.Namespace) -> Iterator[int]:
    """Sets torch to one thread a core and then to one, and back; the quick lists have one a core alone, and a GPU's host needs one."""
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    try:
        for threads in [1] if args.device != "cpu" else [cores] if args.quick else sorted({1, cores}, reverse=True):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)


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
    parser.set_defaults(seconds=math.inf)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device")
    rows = [row for dtype in args.dtype for n in args.rows for row in run(argparse.Namespace(**{**vars(args), "rows": n}), dtype)]
    print(*rows, sep="\n")
    if args.json:
        with open(args.json, "w") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)
    sys.exit(0 if all(row.correct for row in rows) else 1)
