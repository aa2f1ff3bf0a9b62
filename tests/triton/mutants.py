"""Mutation test of the Triton kernels: `python -m tests.triton.mutants` breaks one place of one kernel at a time and lists which test saw it.

Mutants are every place of the listed kinds in the source of every kernel, found in the syntax tree: nothing is picked by hand. Each is tried in a fork of a process that has
the library loaded, on a mutated copy of the source file in a temporary directory: the tree is not touched. First the interpreter runs calls of tests/triton/interpret, then, in
a process without TRITON_INTERPRET, the survivors meet the 64-bit check of tests/triton/compiled. The table goes to tests/data/triton_mutants.json; a survivor needs an entry in
`EXPLAINED`, or the exit status is 1.

Options: --sample N tries N mutants, evenly spread, --minutes M as many as M minutes allow (the table says how many); default all, half an hour on two idle cores.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FILES = ("fastadapt/ops/_triton.py", "fastadapt/ops/bottleneck/triton.py", "fastadapt/ops/gated_bottleneck/triton.py")
SOURCES = {file: (ROOT / file).read_text() for file in FILES}
"""Read once: an edit during the run changes nothing."""
TABLE = ROOT / "tests/data/triton_mutants.json"

# (kind, a part of the mutated line) -> why no test can see it.
EXPLAINED: dict[tuple[str, str], str] = {
    ("constant", "other=0.0"): "what fills the padding is masked at the store, or meets a factor that is zero there",
    ("rounding", ".to(dtype)"): "without the rounding of a parameter to the activations' dtype the result is nearer to the exact one",
    ("mask", "<= R"): "chooses a masked load where an unmasked one would do: the same numbers",
    ("rounding", "SCALE).to(DTYPE)"): "without the rounding of a parameter to the activations' dtype the result is nearer to the exact one",
    ("rounding", "x.to(tl.float32) * w_x"): "the product with an fp32 vector is fp32 either way",
    ("rounding", "load_tile(RESIDUAL"): "the sum with an fp32 tile is fp32 either way",
    ("rounding", "sums.to(OUT.dtype.element_ty)"): "a store converts to what its pointer points to",
    ("constant", "tl.where(z > 0.0, 1.0"): "this run's relu call is in bf16, where eager's own error is 5 %; the fp32 relu call of tests/triton/interpret fails on it",
    ("constant", "-80.0"): "any bound below 88 keeps exp in range, and above 17 its result exact",
    ("mask", "tl.sum(d_logit[:, None]"): "the place behind the width gets the sum of dl, or the next sums, right afterwards",
    ("mask", "i < end"): "the function was called from nowhere, and is gone",
    ("mask", "z > 0.0"): "the slope of relu at exactly 0, which no drawn pre-activation hits",
}


class Mutant(NamedTuple):
    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: str) -> str:
        return source[: self.start] + self.after + source[self.end :]


def kind_of_arithmetic(text: str, line: str) -> str:
    """The kind of an addition, subtraction or product, from what it is about."""
    for kind, words in (
        ("bias", ("load_vector(B", "load_vector(GUB", "tl.load(GB)", "BU")),
        ("scale", ("scale", "full")),
        ("gate", ("gate", "load_vector(G")),
        ("offset", ("stride", "arange", "columns", "CHUNKS", "step_", "split", "rows", "program_id", "start", "sample", "part", " + at", "LOGITS", "SUMS")),
    ):
        if any(w in text for w in words):
            return kind
    return "sign" if " - " in text or " + " in text else "product"


def mutants_of(file: str) -> Iterator[Mutant]:
    source = SOURCES[file]
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text))
    assert source.isascii(), "offsets of the syntax tree count bytes"

    def place(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text_of(node: ast.AST) -> str:
        start, end = place(node)
        return source[start:end]

    def mutant(node: ast.AST, kind: str, after: str) -> Mutant:
        start, end = place(node)
        return Mutant(file, node.lineno, kind, source[start:end], after, start, end)

    kernels = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and any(isinstance(d, ast.Name) and d.id == "jit" for d in n.decorator_list)]
    assert kernels, file
    for node in (n for kernel in kernels for statement in kernel.body for n in ast.walk(statement)):
        text = text_of(node) if hasattr(node, "lineno") else ""
        if isinstance(node, ast.BinOp):
            left, right = text_of(node.left), text_of(node.right)
            if isinstance(node.op, ast.BitAnd):
                yield mutant(node, "mask", f"({left})")
                yield mutant(node, "mask", f"({right})")
            elif isinstance(node.op, (ast.Add, ast.Sub)) and not isinstance(node.right, ast.Tuple):
                sign = "-" if isinstance(node.op, ast.Add) else "+"
                yield mutant(node, kind_of_arithmetic(text, left), f"({left} {sign} {right})")
            elif isinstance(node.op, ast.Mult):
                yield mutant(node, kind_of_arithmetic(text, left), f"({left})")
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Lt, ast.LtE, ast.Gt)):
            swapped = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">="}[type(node.ops[0])]
            yield mutant(node, "mask", f"({text_of(node.left)} {swapped} {text_of(node.comparators[0])})")
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.IsNot):
            yield mutant(node, "absent tensor", "False")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            target = text_of(node.args[0])
            kind = "64-bit" if target == "tl.int64" else "rounding"
            yield mutant(node, kind, text_of(node.func.value))
        elif isinstance(node, ast.Call) and text.startswith("tl.range(") and len(node.args) >= 2:
            first, last, *step = map(text_of, node.args)
            yield mutant(node, "loop", f"tl.range({', '.join([first, f'{last} - {step[0] if step else 1}', *step])})")
        elif isinstance(node, ast.keyword) and node.arg == "mask":
            yield mutant(node, "mask", f"mask=({text_of(node.value)}) | True")
        elif isinstance(node, ast.Constant) and isinstance(node.value, float):
            yield mutant(node, "constant", repr(node.value * 1.1 if node.value else 0.5))
        elif isinstance(node, ast.AugAssign):
            target, value = text_of(node.target), text_of(node.value)
            kind = "accumulation" if isinstance(node.op, ast.Add) else kind_of_arithmetic(text, target)
            yield mutant(node, kind, f"{target} = {value}" if isinstance(node.op, ast.Add) else f"{target} = {target}")


def install(mutant: Mutant | None, directory: str) -> None:
    """Loads the kernels' modules again, in place, from copies of their files of which one is mutated."""
    for file in FILES:
        source = SOURCES[file]
        if mutant is not None and mutant.file == file:
            source = mutant.apply(source)
        copy = Path(directory) / file.replace("/", "_")
        copy.write_text(source)
        module = import_module(file.removesuffix(".py").replace("/", "."))
        exec(compile(source, str(copy), "exec"), module.__dict__)


def in_fork(task: Callable[[], str], seconds: int) -> str:
    """What ``task`` returned in a forked process of at most ``seconds`` of CPU time: "" is survival; an exception and a crash have their own texts."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            text = task()
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__} in {last.name}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else ''}"
        os.write(write, text.encode()[:60000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return text if os.WIFEXITED(status) else f"the process died of signal {os.WTERMSIG(status)}"


def concerns(mutant: Mutant | None, op: str) -> bool:
    return mutant is None or mutant.file == FILES[0] or f"/{op}/" in mutant.file


def interpreted(mutants: list[Mutant | None], report: Callable[[int, str], None]) -> None:
    """Runs calls of the interpreter tests on each mutant, one seed, until one fails. Tensors of fewer than 64 elements have 5 times the limit: one seed says little of them."""
    import torch

    from tests.ops import checks
    from tests.tolerance import SMALL, limit_of, relative_error
    from tests.triton.interpret import bf16, bounds, test_ops

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    bf16.install()
    bounds.install()
    specs = [test_ops.CALLS[0], *test_ops.OPTIONS, *test_ops.GATED_SMALL, *test_ops.GATED, *test_ops.WIDTHS, *test_ops.LONG, *test_ops.SPLITS]
    prepared = []
    for spec in specs:
        tensors, dy = spec.draw(0), spec.cotangent(0)
        prepared.append((spec, tensors, dy, checks.exact(spec, tensors, dy), checks.in_eager(spec, tensors, dy)))
    with tempfile.TemporaryDirectory() as directory:

        def attempt(mutant: Mutant | None) -> str:
            install(mutant, directory)
            for spec, tensors, dy, exact, same in prepared:
                if not concerns(mutant, spec.op):
                    continue
                try:
                    got = checks.fused(spec, "triton", tensors, dy)
                    for name in got:
                        limit = limit_of(relative_error(same[name], exact[name]), spec.dtype, gradient=name.startswith("d ")) * (1 if exact[name].numel() >= SMALL else 5)
                        error = relative_error(got[name], exact[name])
                        if not error <= limit:
                            return f"{name} of {spec.op}[{spec}]: error {error:.2g} > {limit:.2g}"
                except Exception as error:
                    return f"{spec.op}[{spec}]: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160] if str(error).strip() else ''}"
            try:
                for spec in (s for s in test_ops.CALLS if mutant is None or (mutant.kind == "absent tensor" and concerns(mutant, s.op))):
                    checks.assert_single_gradients(spec, "triton", "cpu")
            except Exception as error:
                return f"single gradients of {spec.op}[{spec}]: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}"
            return ""

        for i, mutant in enumerate(mutants):
            report(i, in_fork(lambda mutant=mutant: attempt(mutant), 200))


def static(mutants: list[Mutant | None], report: Callable[[int, str], None]) -> None:
    """The 64-bit check on each mutant."""
    from tests.triton.compiled import aot
    from tests.triton.compiled.cases import launches
    from tests.triton.compiled.test_offsets import CASES, narrow_offsets

    with tempfile.TemporaryDirectory() as directory:

        def attempt(mutant: Mutant | None) -> str:
            install(mutant, directory)
            for case in CASES:
                if concerns(mutant, "bottleneck" if case.kind is None else "gated_bottleneck"):
                    for launch in launches(case):
                        name = launch.kernel.fn.__name__
                        if narrow := narrow_offsets(aot.intermediate_code(launch), name):
                            return f"row offsets of {name} of {case}: {narrow[0][:120]}"
            return ""

        for i, mutant in enumerate(mutants):
            report(i, in_fork(lambda mutant=mutant: attempt(mutant), 200))


def child(stage: str, mutants: list[Mutant | None], jobs: int, deadline: float) -> list[str | None]:
    """Runs a stage in processes of their own, since interpreting and compiling exclude each other. None: not tried before the deadline."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1" if stage == "interpreted" else "0"}
    verdicts: dict[int, str] = {}

    def follow(numbers: range, directory: str) -> None:
        work = Path(directory) / f"{numbers.start}.json"
        work.write_text(json.dumps([None if mutants[i] is None else mutants[i]._asdict() for i in numbers]))  # type: ignore[union-attr]
        command = [sys.executable, "-m", "tests.triton.mutants", "--stage", stage, "--work", str(work)]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:  # type: ignore[union-attr]
                place, verdict = json.loads(line)
                m, verdicts[numbers[place]] = mutants[numbers[place]], verdict
                name = "unmutated" if m is None else f"{m.file}:{m.line} {m.kind}: {m.before[:60]!r} -> {m.after[:60]!r}"
                print(f"{stage} {len(verdicts)}/{len(mutants)} {name}: {verdict or 'SURVIVES'}", flush=True)
                if time.time() > deadline:
                    process.terminate()

    with tempfile.TemporaryDirectory() as directory:
        threads = [threading.Thread(target=follow, args=(range(first, len(mutants), jobs), directory)) for first in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(verdicts) < len(mutants) and time.time() < deadline:
        raise SystemExit(f"the {stage} stage failed")
    return [verdicts.get(i) for i in range(len(mutants))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, help="try this many mutants, evenly spread")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this time; the table then holds what was tried")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default 2)")
    parser.add_argument("--stage", choices=("interpreted", "static"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        mutants = [None if m is None else Mutant(**m) for m in json.loads(options.work.read_text())]
        {"interpreted": interpreted, "static": static}[options.stage](mutants, lambda i, verdict: print(json.dumps([i, verdict]), flush=True))
        return 0
    every = sorted({m for file in FILES for m in mutants_of(file)}, key=lambda m: (FILES.index(m.file), m.start, m.end, m.after))
    chosen = every if options.sample is None else every[:: max(1, len(every) // options.sample)]
    Random(0).shuffle(chosen)
    began = time.time()
    unmutated, *seen = child("interpreted", [None, *chosen], options.jobs, began + 60 * options.minutes)
    assert unmutated == "", f"the unmutated kernels fail: {unmutated}"
    tried = sorted(((m, verdict) for m, verdict in zip(chosen, seen) if verdict is not None), key=lambda row: every.index(row[0]))
    return write_table(every, tried, options.jobs)


def write_table(every: list[Mutant], tried: list[tuple[Mutant, str]], jobs: int) -> int:
    """Runs the 64-bit check on the survivors, writes the table, and returns the exit status."""
    left = [m for m, verdict in tried if not verdict]
    offsets = dict(zip(left, child("static", [None, *left], jobs, float("inf"))[1:])) if left else {}
    rows: list[dict[str, Any]] = []
    for m, verdict in tried:
        killed = f"interpreter: {verdict}" if verdict else f"64-bit check: {offsets[m]}" if offsets[m] else None
        line = SOURCES[m.file].splitlines()[m.line - 1].strip()
        why = None if killed else next((text for (kind, part), text in EXPLAINED.items() if kind == m.kind and part in f"{m.before} {line}"), None)
        rows.append({"place": f"{m.file}:{m.line}", "kind": m.kind, "before": m.before, "after": m.after, "killed_by": killed, "explanation": why})
    survivors = [r for r in rows if r["killed_by"] is None]
    unexplained = [r for r in survivors if r["explanation"] is None]
    table = {
        "generated": len(every), "tried": len(tried), "killed": len(rows) - len(survivors), "survived": len(survivors), "unexplained": len(unexplained),
        "kinds": dict(sorted(Counter(r["kind"] for r in rows).items())), "mutants": rows,
    }  # fmt: skip
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    counts = f"{len(every)} mutants, {len(tried)} tried, {table['killed']} killed, {len(survivors)} survived, {len(unexplained)} of them unexplained"
    print(f"{counts}: {TABLE.relative_to(ROOT)}")
    for r in unexplained:
        print(f"unexplained: {r['place']} {r['kind']}: {r['before']!r} -> {r['after']!r}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
