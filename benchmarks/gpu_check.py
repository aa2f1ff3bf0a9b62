"""Everything that a machine with a GPU can say and this library's usual machines cannot, in one command: ``make gpu-check``.

Runs the tests that need a device, the kernels under compute-sanitizer, the benchmarks against eager code and torch.compile, and every backend of every op against its modelled
time. Writes report.md, report.json and the calibration that `fastadapt.backend` then chooses by. That takes hours, most of them in Triton's compiler; --quick takes a quarter of
one. Every step is a process with a time limit, so that one that hangs or breaks the device loses no other's result. Without a CUDA device (or with --dry-run) it says so and checks
itself as far as that goes: imports, collection, command lines, and the report of a recorded input.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
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
ROWS, ROUNDS = (1024, 4096, 16384), 15
QUICK_ROWS, QUICK_ROUNDS = (4096,), 5
OPS = tuple(op for op in sorted(fastadapt.backend._plans) if find_spec(f"fastadapt.ops.{op}.cuda"))
"""The ops that have kernels for GPUs."""
# Options of the calls that are compared: the papers'.
OPTIONS: dict[str, dict[str, Any]] = {
    "gated_bottleneck": {"granularity": "large", "gate_rank": 96},
    "phm_bottleneck": {"division": 4, "factor_rank": 1},
    "lora": {"dropout": False, "out_width": 768},
    "dropout_add_norm": {"dropout": False, "norm": "layer", "wide": False},
}
RANKS = {"dropout_add_norm": 0}  # of the others 96
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
# Of --quick: what only a device shows, with a few calls of every op and backend; three of those calls under the sanitizer, one of them Triton's, which takes long to compile.
QUICK_TESTS = ("tests/cuda/test_gpu.py",)
QUICK_SANITIZED = tuple(f"tests/cuda/test_gpu.py::test_within_rule[{call}]" for call in ("gated_bottleneck-cuda", "phm_bottleneck-cuda", "lora-triton"))
# What the report counts apart: patterns in the names of tests.
SUBJECTS = {"streams": "stream", "second device": "second_device|other_device|devices", "CUDA graphs": "captur|cuda_?graph", "bitwise determinism": "deterministic"}
BACKENDS = ("cuda", "triton", "reference")
# What emulators, interpreters and the cost model cannot answer, and the step that does.
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
    limit: int = 600
    """Seconds, after which it is stopped."""
    writes: Path | None = None
    """Its result, of which none from an earlier run is left."""

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
    """The commands, in order. The limits of --quick add up to a quarter of an hour; the others are several times what a step should take."""
    python, out, quick = sys.executable, options.out, options.quick
    rows, rounds = options.rows or (QUICK_ROWS if quick else ROWS), options.rounds or (QUICK_ROUNDS if quick else ROUNDS)
    sizes = ["--rounds", str(rounds), "--rows", *map(str, rows)]
    marks = "gpu" if options.full else "gpu and not full"
    # A test that takes minutes shows where it is.
    pytest = [python, "-m", "pytest", "-m", marks, "-o", "faulthandler_timeout=120"]
    found = [Step("tests", [*pytest, *(QUICK_TESTS if quick else TESTS), f"--junitxml={out}/tests.xml"], limit=420 if quick else 6 * 3600, writes=out / "tests.xml")]
    tool = sanitizer()
    for check in ("memcheck",) if quick else ("memcheck", "racecheck"):
        command = [tool or "compute-sanitizer", "--tool", check, "--error-exitcode", "9", "--target-processes", "all", *pytest, *(QUICK_SANITIZED if quick else SANITIZED)]
        missing = None if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit"
        # Without the environment a read past a tensor stays inside the allocator's block.
        found.append(Step(check, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing, limit=90 if quick else 3 * 3600))
    compare = [python, "-m", "benchmarks.gpu_check", "--compare", "--out", str(out), *sizes]
    found.append(Step("compared", compare, limit=90 if quick else 3600, writes=out / "compared.json"))
    here, profiler = torch.cuda.is_available(), tool_of("ncu")
    for op in OPS:
        for backend in BACKENDS[:1] if quick else BACKENDS[:2]:
            command = [python, "-m", f"benchmarks.ops.{op}", "--device", "cuda", "--backend", backend, "--dtype", "bf16", "--param-dtype", "fp32", *sizes]
            result = out / f"{op}-{backend}.json"
            missing = "; ".join(explained(op, rows[0]).reasons[backend]) or None if here else None
            found.append(Step(f"benchmark {op} {backend}", [*command, "--json", str(result)], missing=missing, limit=50 if quick else 1200, writes=result))
    for op in () if quick else OPS:
        for backend in BACKENDS[:2]:
            result = out / f"counters-{op}-{backend}.csv"
            command = [profiler or "ncu", "--csv", "--log-file", str(result), "--metrics", COUNTERS, python, "-m", "benchmarks.gpu_check", "--one-step", op, backend]
            missing = None if profiler else "ncu is neither on PATH nor in CUDA_HOME/bin; it is Nsight Compute, which comes with the CUDA toolkit"
            found.append(Step(f"counters {op} {backend}", command, missing=missing, writes=result))
    return found


def questions() -> list[tuple[str, str]]:
    """The questions, each with the first command that answers it; its like for other ops and backends are in ``--dry-run``."""
    commands = {step.name: str(step) for step in steps(parser().parse_args([]))}
    commands["compared at few rows"] = "python -m benchmarks.gpu_check --rows 16 64 256 --no-calibration  (the section of report.md on modelled and measured times)"
    return [(question, next(command for name, command in commands.items() if name == step or name.startswith(f"{step} "))) for question, step in QUESTIONS.items()]


def explained(op: str, rows: int, device: str = "cuda") -> fastadapt.backend.Explanation:
    """What the library says of the call that is compared here: the papers' sizes, and the dtypes that people train with."""
    shape = {"rows": rows, "width": 768, "rank": RANKS.get(op, 96)}
    return fastadapt.backend.explain(op, **shape, dtype=torch.bfloat16, param_dtype=torch.float32, device=device, **OPTIONS.get(op, {}))


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


def run(step: Step, grace: float = 20) -> dict[str, Any]:
    """Runs a step, its output going where this process's goes. At its limit it is interrupted, so that pytest writes its report, and after ``grace`` seconds killed."""
    about = {"name": step.name, "command": str(step)}
    if step.writes:
        step.writes.unlink(missing_ok=True)
    if step.missing:
        return {**about, "status": "missing", "why": step.missing}
    print(f"== {step.name}, at most {step.limit} s: {step}", flush=True)
    start, status = time.monotonic(), ""
    with subprocess.Popen(step.command, cwd=ROOT, env={**os.environ, **step.environment}, start_new_session=True) as process:
        try:
            process.wait(step.limit)
        except subprocess.TimeoutExpired:
            status = "timed out"
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with contextlib.suppress(ProcessLookupError):  # what its children hold of the device must be free for the next step
                os.killpg(process.pid, signal.SIGKILL)
    status = status or ("passed" if process.returncode == 0 else "failed")
    why = {"why": f"stopped at its limit of {step.limit} s"} if status == "timed out" else {}
    return {**about, "status": status, "exit": process.returncode, "seconds": round(time.monotonic() - start, 1), **why}


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


def compare(options: argparse.Namespace) -> None:
    """Modelled and measured time of each backend, op, direction and number of rows, into compared.json after every op; the model without any calibration."""
    os.environ["FASTADAPT_CALIBRATION"] = ""
    found: list[dict[str, Any]] = []
    for op in OPS:
        for t in options.rows or ROWS:
            told = explained(op, t)
            able = [name for name in BACKENDS if told.reasons.get(name) == []]
            for name, directions in measured(op, able, t, "cuda", options.rounds or ROUNDS).items():
                for direction, (median, low, high) in directions.items():
                    estimate = told.estimates.get(name)
                    modelled = getattr(estimate, direction).microseconds if estimate else None
                    found.append({
                        "op": op, "backend": name, "rows": t, "width": 768, "rank": told.call.rank, "dtype": "bf16", "param_dtype": "fp32", "direction": direction,
                        "modelled_us": modelled, "measured_us": median, "low_us": low, "high_us": high, "chosen": told.chosen == name,
                    })  # fmt: skip
        (options.out / "compared.json").write_text(json.dumps(found))


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
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu", *(QUICK_TESTS if options.quick else TESTS)]
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
    todo = [step for step in steps(options) if step.name.split()[0] in (options.only or step.name.split())]
    record: dict[str, Any] = {"environment": environment(), "steps": [run(step) for step in todo], "tests": {}, "benchmarks": [], "compared": []}
    for step in todo:
        if step.writes is None or not step.writes.exists():
            continue
        if step.name == "tests":
            record["tests"] = counts_of(step.writes)
        elif step.writes.suffix == ".json":
            record["compared" if step.name == "compared" else "benchmarks"] += json.loads(step.writes.read_text())
    paths = write(record, options.out)
    if options.calibrate and record["compared"]:
        target = Path.home() / ".cache" / "fastadapt" / paths[2].name
        _cost.write_calibration(target, calibration_of(record))
        paths.append(target)
    print(*(f"wrote {path}" for path in paths), sep="\n")
    wrong = [step["name"] + (" (timed out)" if step["status"] == "timed out" else "") for step in record["steps"] if step["status"] in ("failed", "timed out")]
    print(f"gpu-check: {'failed: ' + ', '.join(wrong) if wrong else 'passed'}")
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").split("\n")[0])
    top.add_argument("--out", type=Path, default=Path("out/gpu-check"), help="folder of the reports")
    top.add_argument("--dry-run", action="store_true", help="run nothing on the device, and say what would be run")
    extent = top.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="also the tests of `make test-full`")
    extent.add_argument("--quick", action="store_true", help="at most a quarter of an hour: a few calls of every op and backend, one number of rows, no calibration of `auto`")
    top.add_argument("--rows", type=int, nargs="+", help=f"by default {' '.join(map(str, ROWS))}, of --quick {' '.join(map(str, QUICK_ROWS))}")
    top.add_argument("--rounds", type=int, help=f"by default {ROUNDS}, of --quick {QUICK_ROUNDS}")
    top.add_argument("--only", nargs="+", metavar="STEP", choices=("tests", "memcheck", "racecheck", "compared", "benchmark", "counters"), help="these steps alone")
    top.add_argument("--compare", action="store_true", help="only measure every backend of every op beside its modelled time, into compared.json")
    top.add_argument("--one-step", nargs=2, metavar=("OP", "BACKEND"), help="only run this op once, forward and backward, for a profiler")
    top.add_argument("--no-calibration", dest="calibrate", action="store_false", help="leave ~/.cache/fastadapt, by which `auto` chooses, as it is")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.out, options.calibrate = options.out.resolve(), options.calibrate and not options.quick
    if not torch.cuda.is_available():
        print("gpu-check: there is no CUDA device here, so nothing is measured; the dry part follows")
        return dry(options)
    if options.one_step:
        one_step(*options.one_step)
        return 0
    if options.compare:
        compare(options)
        return 0
    return dry(options) if options.dry_run else check(options)


if __name__ == "__main__":
    sys.exit(main())
