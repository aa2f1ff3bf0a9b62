"""Everything that a machine with a GPU can say and this library's usual machines cannot, in one command: ``make gpu-check``.

Runs the tests that need a device, the kernels under compute-sanitizer, the benchmarks against eager code and torch.compile, and every backend of every op against its modelled
time. Writes report.md, report.json and the calibration that `fastadapt.backend` then chooses by. Without a CUDA device (or with --dry-run) it says so and checks itself as far as
that goes: imports, collection, command lines, and the report of a recorded input.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastadapt
from benchmarks import measure
from fastadapt.ops import _cost

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "data" / "gpu_check.json"
ROWS = (1024, 4096, 16384)
OPS = tuple(op for op in sorted(fastadapt.backend._plans) if find_spec(f"fastadapt.ops.{op}.cuda"))
"""The ops that have kernels for GPUs."""
# Options of the calls that are compared: the papers'.
OPTIONS: dict[str, dict[str, Any]] = {
    "gated_bottleneck": {"granularity": "large", "gate_rank": 96},
    "phm_bottleneck": {"division": 4, "factor_rank": 1},
    "lora": {"dropout": False, "out_width": 768},
    "dropout_add_norm": {"dropout": False, "norm": "layer", "wide": False},
}
# Triton's interpreter needs a process of its own, and no GPU.
TESTS = ("tests", "--ignore=tests/triton/interpret")
# Every kernel of cuda and triton over ragged rows and ranks, at sizes that a tool 50 times slower than the device can take.
SANITIZED = (
    "tests/cuda/test_ops.py",
    "tests/ops/test_bottleneck.py",
    "tests/ops/test_gated_bottleneck.py",
    "tests/ops/test_phm_bottleneck.py",
    "tests/ops/test_dropout_add_norm.py",
    "-k",
    "(test_within_rule and cuda) or (test_shapes and triton)",
)
# What the report counts apart: patterns in the names of tests.
SUBJECTS = {"streams": "stream", "second device": "second_device|other_device|devices", "CUDA graphs": "captur|cuda_?graph", "bitwise determinism": "deterministic"}
BACKENDS = ("cuda", "triton", "reference")
# What emulators, interpreters and the cost model cannot answer, and the step that does; "compared" is in this process, behind all steps.
QUESTIONS = {
    "Are all results right in the device's own arithmetic (rounding inside matrix units, ex2.approx, rcp.approx)?": "tests",
    "Are they bitwise the same from run to run, on another stream, on a second device, in a CUDA graph?": "tests",
    "Do the kernels keep within their arguments on hardware?": "memcheck",
    "Do asynchronous copies and barriers order shared memory as the emulator has them?": "racecheck",
    "Is each backend of an op faster than eager code and than torch.compile, at which rows, and how far is it from the limit (products and copy on that device)?": "benchmark",
    "How many blocks and warps are resident, how many bytes come from memory and from L2, how busy are the matrix units?": "counters",
    "How far are modelled times from measured ones, so: are launch gaps (2 us), pipeline steps (0.3 us), L2 rates and mma.sync's share of the peak as assumed?": "compared",
    "Does `auto` choose the faster backend, and where do cuda, triton and reference cross?": "compared",
    "What does a call of each backend take at few rows, where the host decides?": "compared at few rows",
}
# Nsight Compute's: time, bytes of memory and L2, resident warps of those possible, what bounds them, and the matrix pipe.
COUNTERS = (
    "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum,lts__t_bytes.sum,sm__warps_active.avg.pct_of_peak_sustained_active,"
    "launch__registers_per_thread,launch__occupancy_limit_registers,launch__occupancy_limit_shared_mem,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active"
)


@dataclass
class Step:
    """A command of the check, or why it cannot be run here."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None

    def __str__(self) -> str:
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


def tool_of(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or in CUDA_HOME (or CUDA_PATH, or /usr/local/cuda)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which(name) or next((found for home in homes if home and (found := shutil.which(name, path=f"{home}/bin"))), None)


def sanitizer() -> str | None:
    """compute-sanitizer."""
    return tool_of("compute-sanitizer")


def steps(options: argparse.Namespace) -> list[Step]:
    """The commands, in order. The comparison with modelled times is not among them: it is `compared`, in this process."""
    python, out = sys.executable, options.out
    marks = "gpu" if options.full else "gpu and not full"
    tests = [Step("tests", [python, "-m", "pytest", "-m", marks, *TESTS, f"--junitxml={out}/tests.xml"])]
    tool = sanitizer()
    for check in ("memcheck", "racecheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", "--target-processes", "all", python, "-m", "pytest", "-m", marks, *SANITIZED]
        missing = None if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit"
        tests.append(Step(check, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing))  # else a read past a tensor stays inside the allocator's block
    here = torch.cuda.is_available()
    benchmarks = [
        Step(
            f"benchmark {op} {backend}",
            [python, "-m", f"benchmarks.ops.{op}", "--device", "cuda", "--backend", backend, "--dtype", "bf16", "--param-dtype", "fp32",
             "--rounds", str(options.rounds), "--rows", *map(str, options.rows), "--json", f"{out}/{op}-{backend}.json"],
            missing="; ".join(explained(op, options.rows[0]).reasons[backend]) or None if here else None,
        )
        for op in OPS
        for backend in BACKENDS[:2]
    ]  # fmt: skip
    profiler = tool_of("ncu")
    counters = [
        Step(
            f"counters {op} {backend}",
            [profiler or "ncu", "--csv", "--log-file", f"{out}/counters-{op}-{backend}.csv", "--metrics", COUNTERS,
             python, "-m", "benchmarks.gpu_check", "--one-step", op, backend],
            missing=None if profiler else "ncu is neither on PATH nor in CUDA_HOME/bin; it is Nsight Compute, which comes with the CUDA toolkit",
        )
        for op in OPS
        for backend in BACKENDS[:2]
    ]  # fmt: skip
    return tests + benchmarks + counters


def questions() -> list[tuple[str, str]]:
    """The questions, each with the first command that answers it; its like for other ops and backends are in ``--dry-run``."""
    commands = {step.name: str(step) for step in steps(parser().parse_args([]))}
    commands["compared"] = "python -m benchmarks.gpu_check  (the section of report.md on modelled and measured times)"
    commands["compared at few rows"] = "python -m benchmarks.gpu_check --rows 16 64 256 --no-calibration  (the same section)"
    return [(question, next(command for name, command in commands.items() if name.startswith(step))) for question, step in QUESTIONS.items()]


def explained(op: str, rows: int) -> fastadapt.backend.Explanation:
    """What the library says of the call that is compared here: the papers' sizes, and the dtypes that people train with."""
    return fastadapt.backend.explain(op, rows=rows, width=768, rank=96, dtype=torch.bfloat16, param_dtype=torch.float32, device="cuda", **OPTIONS.get(op, {}))


def text_of(*command: str) -> str:
    """The output of a command, or nothing where it cannot be run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def environment() -> dict[str, Any]:
    """Which machine and which code."""
    here = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if here else (0, 0)
    try:
        triton = import_module("triton").__version__
    except ImportError:
        triton = "not installed"
    nvcc = re.search(r"release [\d.]+, V([\d.]+)", text_of("nvcc", "--version"))
    return {
        "device": torch.cuda.get_device_name() if here else "none",
        "arch": 10 * capability[0] + capability[1],
        "devices": torch.cuda.device_count(),
        "driver": text_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": triton,
        "nvcc": nvcc[1] if nvcc else "not found",
        "fastadapt": fastadapt.__version__,
        "commit": text_of("git", "rev-parse", "HEAD") + (" with changes" if text_of("git", "status", "--porcelain") else ""),
        "date": date.today().isoformat(),
    }


def counts_of(path: Path) -> dict[str, dict[str, int]]:
    """Tests passed, failed and skipped, all together and of each subject, from pytest's report."""
    counts = {name: collections.Counter[str]() for name in ("all", *SUBJECTS)}
    for case in xml.parse(path).iter("testcase"):
        outcome = "failed" if case.find("failure") is not None or case.find("error") is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts["all"][outcome] += 1
        for name, pattern in SUBJECTS.items():
            counts[name][outcome] += re.search(pattern, case.get("name", "")) is not None
    return {name: {outcome: count[outcome] for outcome in ("passed", "failed", "skipped")} for name, count in counts.items()}


def run(step: Step) -> dict[str, Any]:
    """Runs a step, its output going where this process's goes."""
    if step.missing:
        return {"name": step.name, "command": str(step), "status": "missing", "why": step.missing}
    print(f"== {step.name}: {step}", flush=True)
    start = time.monotonic()
    code = subprocess.run(step.command, cwd=ROOT, env={**os.environ, **step.environment}).returncode
    return {"name": step.name, "command": str(step), "status": "passed" if code == 0 else "failed", "exit": code, "seconds": round(time.monotonic() - start, 1)}


def call_of(op: str, rows: int, device: str, width: int = 768, rank: int = 96) -> tuple[Callable[..., Any], list[torch.Tensor], torch.Tensor]:
    """The op as its benchmark calls it, its arguments, and the output's cotangent: bf16 with fp32 parameters."""
    bench = import_module(f"benchmarks.ops.{op}")
    *tensors, dy = bench.tensors_of(argparse.Namespace(rows=rows, width=width, rank=rank, param_dtype="fp32", device=device, **OPTIONS.get(op, {})), "bf16")
    return bench.ours, [t.requires_grad_() for t in tensors], dy


def one_step(op: str, backend: str, rows: int = ROWS[1], device: str = "cuda") -> None:
    """Forward and backward once, for a profiler to look at."""
    ours, leaves, dy = call_of(op, rows, device)
    with fastadapt.backend.use(backend):
        torch.autograd.grad(ours(*leaves), leaves, dy)


def measured(op: str, backends: Sequence[str], rows: int, device: str, rounds: int, width: int = 768, rank: int = 96) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Microseconds of forward, as training runs it, and of backward, the rest of a step: median and quartiles by backend, bf16 with fp32 parameters; all backends in turn."""
    ours, leaves, dy = call_of(op, rows, device, width, rank)

    def forward(backend: str) -> Callable[[], object]:
        def call() -> object:
            with fastadapt.backend.use(backend):
                return ours(*leaves)

        return call

    def step(backend: str) -> Callable[[], object]:
        def call() -> object:
            with fastadapt.backend.use(backend):
                return torch.autograd.grad(ours(*leaves), leaves, dy)

        return call

    candidates = {(name, kind): make(name) for name in backends for kind, make in (("forward", forward), ("step", step))}
    times = measure.interleave({f"{name} {kind}": f for (name, kind), f in candidates.items()}, rounds, device)
    out: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in backends:
        fast, whole = times[f"{name} forward"], times[f"{name} step"]
        back = [max(b - a, 0.0) for a, b in zip(fast, whole, strict=True)]
        quartiles = {kind: statistics.quantiles([1e6 * s for s in seconds], n=4) for kind, seconds in (("forward", fast), ("backward", back))}
        out[name] = {kind: (q[1], q[0], q[2]) for kind, q in quartiles.items()}
    return out


def compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Modelled and measured time of each backend, op, direction and number of rows; the model without any calibration."""
    os.environ["FASTADAPT_CALIBRATION"] = ""
    _cost.calibration.cache_clear()
    fastadapt.backend._choice.cache_clear()
    rows: list[dict[str, Any]] = []
    for op in OPS:
        for t in options.rows:
            told = explained(op, t)
            able = [name for name in BACKENDS if told.reasons.get(name) == []]
            for name, directions in measured(op, able, t, "cuda", options.rounds).items():
                for direction, (median, low, high) in directions.items():
                    estimate = told.estimates.get(name)
                    modelled = getattr(estimate, direction).microseconds if estimate else None
                    rows.append({
                        "op": op, "backend": name, "rows": t, "width": 768, "rank": 96, "dtype": "bf16", "param_dtype": "fp32", "direction": direction,
                        "modelled_us": modelled, "measured_us": median, "low_us": low, "high_us": high, "chosen": told.chosen == name,
                    })  # fmt: skip
    return rows


def calibration_of(record: dict[str, Any]) -> _cost.Calibration:
    """Measured over modelled time: the median over the numbers of rows."""
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for row in record["compared"]:
        if row["modelled_us"] and row["measured_us"]:
            ratios.setdefault((row["backend"], row["op"], row["direction"]), []).append(row["measured_us"] / row["modelled_us"])
    factors: dict[str, dict[str, dict[str, float]]] = {}
    for (backend, op, direction), values in sorted(ratios.items()):
        factors.setdefault(backend, {}).setdefault(op, {})[direction] = round(min(max(statistics.median(values), 0.01), 100.0), 4)
    about = record["environment"]
    return _cost.Calibration(about["device"], about["arch"], about["date"], factors)


def markdown(record: dict[str, Any]) -> str:
    """The report that people read."""
    about = record["environment"]
    lines = [f"# fastadapt on {about['device']}", "", *([record["note"], ""] if record.get("note") else [])]
    lines += [f"* {name}: {value}" for name, value in about.items()]
    lines += ["", "## Checks", "", "| check | result | |", "|---|---|---|"]
    for step in record["steps"]:
        lines.append(f"| {step['name']} | {step['status']} | {step.get('why') or str(step['seconds']) + ' s'} |")
    if record.get("tests"):
        lines += ["", "| tests | passed | failed | skipped |", "|---|---|---|---|"]
        lines += [f"| {name} | {n['passed']} | {n['failed']} | {n['skipped']} |" for name, n in record["tests"].items()]
    lines += [
        "",
        "## Against eager code and torch.compile, measured",
        "",
        "bf16 with fp32 parameters, d = 768, r = 96; above 1 means that fastadapt is faster. Median and quartiles.",
        "",
    ]
    lines += ["| op | backend | rows | direction | ours, ms | against | ratio |", "|---|---|---|---|---|---|---|"]
    for row in record["benchmarks"]:
        ratio = f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]" if row["correct"] else "outside the tolerance: not shown"
        ours = "" if row["ours_ms"] is None else f"{row['ours_ms']:.3f}"
        lines.append(f"| {row['op']} | {row['backend']} | {row['rows']} | {row['direction']} | {ours} | {row['rival']} | {ratio} |")
    lines += ["", "## Modelled and measured", "", "Microseconds; `auto` chooses the backend in bold by the model alone.", ""]
    lines += ["| op | backend | rows | direction | modelled | measured | measured / modelled |", "|---|---|---|---|---|---|---|"]
    for row in record["compared"]:
        backend = f"**{row['backend']}**" if row["chosen"] else row["backend"]
        modelled, ratio = (f"{row['modelled_us']:.0f}", f"{row['measured_us'] / row['modelled_us']:.2f}") if row["modelled_us"] else ("no model", "")
        spread = f"{row['measured_us']:.0f} [{row['low_us']:.0f}, {row['high_us']:.0f}]"
        lines.append(f"| {row['op']} | {backend} | {row['rows']} | {row['direction']} | {modelled} | {spread} | {ratio} |")
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """report.md, report.json and the calibration."""
    out.mkdir(parents=True, exist_ok=True)
    found = calibration_of(record)
    paths = [out / "report.md", out / "report.json", out / f"calibration-sm_{found.arch}.json"]
    paths[0].write_text(markdown(record))
    paths[1].write_text(json.dumps(record, indent=1) + "\n")
    _cost.write_calibration(paths[2], found)
    return paths


def dry(options: argparse.Namespace) -> int:
    """What can be checked without a device; raises or returns 1 where something is wrong."""
    for op in OPS:
        import_module(f"benchmarks.ops.{op}")
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *TESTS]
    print(f"collects: {shlex.join(collect)}")
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True)
    summary = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, re.M)
    if done.returncode != 0 or summary is None:
        print(done.stdout[-2000:] + done.stderr[-2000:], file=sys.stderr)
        print("gpu-check: no test that needs a GPU could be collected", file=sys.stderr)
        return 1
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    print(f"  {summary[1]} tests need a GPU; of {', '.join(f'{subject}: {sum(re.search(pattern, name) is not None for name in names)}' for subject, pattern in SUBJECTS.items())}")
    for step in steps(options):
        words = [word for word in shlex.split(str(step)) if word.partition("=")[0] not in step.environment]
        if words != step.command:
            print(f"gpu-check: the command line of {step.name} does not parse back", file=sys.stderr)
            return 1
        print(f"would run: {step}" + (f"\n  missing: {step.missing}" if step.missing else ""))
    with tempfile.TemporaryDirectory() as folder:
        for path in write(json.loads(RECORDED.read_text()), Path(folder)):
            print(f"writes {path.name}: {path.stat().st_size} bytes from the recorded input, removed again")
        for path in Path(folder).glob("calibration-*.json"):
            _cost.read_calibration(path)
    return 0


def check(options: argparse.Namespace) -> int:
    """The real thing."""
    options.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"environment": environment(), "steps": [run(step) for step in steps(options)], "tests": {}, "benchmarks": []}
    if (junit := options.out / "tests.xml").exists():
        record["tests"] = counts_of(junit)
    for op in OPS:
        for backend in BACKENDS[:2]:
            if (path := options.out / f"{op}-{backend}.json").exists():
                record["benchmarks"] += json.loads(path.read_text())
    record["compared"] = compared(options)
    paths = write(record, options.out)
    if options.calibrate:
        target = Path.home() / ".cache" / "fastadapt" / paths[2].name
        _cost.write_calibration(target, calibration_of(record))
        paths.append(target)
    print(*(f"wrote {path}" for path in paths), sep="\n")
    failed = [step["name"] for step in record["steps"] if step["status"] == "failed"]
    print(f"gpu-check: {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n")[0])
    top.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder of the reports")
    top.add_argument("--dry-run", action="store_true", help="run nothing on the device, and say what would be run")
    top.add_argument("--full", action="store_true", help="also the tests of `make test-full`")
    top.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    top.add_argument("--rounds", type=int, default=15)
    top.add_argument("--one-step", nargs=2, metavar=("OP", "BACKEND"), help="only run this op once, forward and backward, for a profiler")
    top.add_argument("--no-calibration", dest="calibrate", action="store_false", help="leave ~/.cache/fastadapt, by which `auto` chooses, as it is")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.out = options.out.resolve()
    if not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here, so nothing is measured; the dry part follows")
        return dry(options)
    if options.one_step:
        one_step(*options.one_step)
        return 0
    return dry(options) if options.dry_run else check(options)


if __name__ == "__main__":
    sys.exit(main())
