"""Mutation test of the Triton kernels: `python -m tests.triton.mutants` breaks one place of one kernel at a time and lists which test saw it;
with `phm` or `norm`, the kernels of Compacter's op or of dropout, sum and norm, which are families of their own.

Mutants are every place of the listed kinds in the source of every kernel, found in the syntax tree: nothing is picked by hand. Each is tried in a fork of a process that has
the library loaded, on a mutated copy of the source file in a temporary directory: the tree is not touched. First the interpreter runs calls of tests/triton/interpret, then, in
a process without TRITON_INTERPRET, the survivors meet the 64-bit check of tests/triton/compiled. The table goes to tests/data/triton_mutants.json, triton_phm_mutants.json or
triton_norm_mutants.json; a survivor needs an entry in `EXPLAINED`, or the exit status is 1.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tests.mutation import forks, table
from tests.ops.specs import Spec

ROOT = Path(__file__).parents[2]
FILES = ("fastadapt/ops/_triton.py", *(f"fastadapt/ops/{op}/triton.py" for op in ("bottleneck", "gated_bottleneck", "routed_bottleneck")))  # lora has no kernels of its own
PHM_FILES = ("fastadapt/ops/phm_bottleneck/triton.py",)
NORM_FILES = ("fastadapt/ops/dropout_add_norm/triton.py",)
SOURCES = {file: (ROOT / file).read_text() for file in (*FILES, *PHM_FILES, *NORM_FILES)}
"""Read once: an edit during the run changes nothing."""

# (kind, a part of "before -> after in line") -> why no test can see it.
EXPLAINED: dict[tuple[str, str], str] = {
    ("constant", "other=0.0"): "what fills the padding is masked at the store, or meets a factor that is zero there",
    ("mask", "<= R"): "chooses a masked load where an unmasked one would do: the same numbers",
    ("rounding", "in tl.store("): "a store converts to what its pointer points to",
    ("rounding", "tl.where(condition, z[i], 0.0).to(z[i].dtype) -> "): "a tensor's dtype outweighs a number's",
    ("64-bit", "tl.program_id(0).to(tl.int64) -> tl.program_id(0) in task, first, last = piece("): "a tile's number is below 2^31, and what it meets is of 64 bits",
    ("64-bit", "tl.arange(0, BLOCK_N), N, TASKS) < task).to(tl.int64) -> "): "a block's flags are summed in 32 bits at least, and join a number of 64",
    ("64-bit", "own.to(tl.int64) -> own in "): "a block's flags are summed in 32 bits at least, and join a number of 64",
    ("mask", "ids < TASKS -> (ids <= TASKS) in "): "TASKS stands for no task as well",
    ("rounding", ".to(tl.float32) ->"): "what it is added to or multiplied with is fp32, and so is the result either way",
    ("rounding", "x.to(tl.float32)"): "the product with an fp32 vector is fp32 either way",
    ("mask", "z < 0.0 -> (z <= 0.0)"): "at 0 both give 0",
    ("rounding", "exact.to(dtype) -> exact in "): "the product with the weights would be one of fp32, slower and nearer to the exact one; what is saved is rounded by the store",
    ("rounding", "tl.load(WU + at, mask=mask, other=0.0).to(DTYPE) -> "): "the rounding of fp32 weights in these sums is less than the rule allows",
    ("mask", "v < -80.0"): "at the bound sigma is exp(-80) or 0, which is nothing beside a tensor's other numbers",
    ("constant", "-80.0"): "any bound below 88 keeps exp in range, and above 17 its result exact",
    ("mask", "tl.sum(d_logit[:, None]"): "the place behind the width gets the sum of dl, or the next sums, right afterwards",
}
PHM_EXPLAINED: dict[tuple[str, str], str] = {
    ("rounding", "load_weight(F, p, K if LEFT"): "the tile is rounded where it is spread, behind this",
    ("rounding", "tl.where(own, f["): "f is rounded already, and its zeros are exact",
    ("rounding", "z.to(dtype) -> z in"): "without the rounding of the pre-activation the result is nearer to the exact one; what is saved is rounded by the store",
    ("mask", "J < 16 -> (J <= 16)"): "parts of 16 columns can be multiplied among zeros as well: slower, the same sums",
    ("mask", "ACTIVATION > 0 -> (ACTIVATION >= 0)"): "the identity, and the rounding of what is rounded",
}
NORM_EXPLAINED: dict[tuple[str, str], str] = {}


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
    for file in FILES if mutant is None or mutant.file in FILES else (mutant.file,):
        source = SOURCES[file]
        if mutant is not None and mutant.file == file:
            source = mutant.apply(source)
        copy = Path(directory) / file.replace("/", "_")
        copy.write_text(source)
        module = import_module(file.removesuffix(".py").replace("/", "."))
        exec(compile(source, str(copy), "exec"), module.__dict__)


def concerns(mutant: Mutant | None, op: str) -> bool:
    plain = op in ("routed_bottleneck", "lora") and mutant is not None and mutant.file == FILES[1]  # whose kernels these run
    return mutant is None or (mutant.file == FILES[0] and op not in ("phm_bottleneck", "dropout_add_norm")) or plain or f"/{op}/" in mutant.file


@contextmanager
def executed_lines() -> Iterator[set[tuple[str, int]]]:
    """The lines of kernels, (file, number), that the interpreter executes in the block: a call that does not execute a line cannot see a change of it."""
    executed: set[tuple[str, int]] = set()
    names = {str(ROOT / file): file for file in SOURCES}

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        file = names.get(frame.f_code.co_filename)
        if file is None:
            return None

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            executed.add((file, frame.f_lineno))
            return on_line

        return on_line(frame, event, argument)

    sys.settrace(on_call)
    try:
        yield executed
    finally:
        sys.settrace(None)


@cache
def statements(file: str) -> list[range]:
    """The lines of every statement; of compound ones, of their heads."""
    found = []
    for node in ast.walk(ast.parse(SOURCES[file])):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            found.append(range(node.lineno, max(node.lineno + 1, body[0].lineno) if body else (node.end_lineno or node.lineno) + 1))
    return found


def statement(mutant: Mutant) -> set[tuple[str, int]]:
    """The lines of the statement that a mutant changes."""
    return {(mutant.file, line) for lines in statements(mutant.file) if mutant.line in lines for line in lines}


Attempt = Callable[[Mutant | None], str]


def interpreted(family: str) -> Attempt:
    """Runs calls of the interpreter tests on a mutant, one seed, until one fails: the cheapest first, by their cost on the unmutated kernels."""
    import torch

    from tests.mutation import calls
    from tests.ops import checks
    from tests.triton.interpret import bf16, bounds, test_ops

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    bf16.install()
    bounds.install()
    own = {"phm": "phm_bottleneck", "norm": "dropout_add_norm"}.get(family)

    def of_family(specs: Sequence[Spec]) -> list[Spec]:
        return [s for s in specs if (s.op == own if own else s.op not in ("phm_bottleneck", "dropout_add_norm"))]

    specs = (
        [*test_ops.PHM_CALLS, *test_ops.PHM_SHAPES, *test_ops.PHM_OPTIONS, *test_ops.PHM_REAL, *test_ops.PHM_LONG]
        if family == "phm"
        else [*test_ops.NORM_CALLS, *test_ops.NORM, *test_ops.NORM_SMALL, *test_ops.NORM_REAL, *test_ops.NORM_LONG]
        if family == "norm"
        else [*test_ops.CALLS, *test_ops.OPTIONS, *test_ops.GATED_SMALL, *test_ops.GATED, *test_ops.WIDTHS, *test_ops.LONG, *test_ops.SPLITS, *test_ops.ROUTED, *test_ops.STRETCHES]
        + [*test_ops.LORA, *test_ops.LORA_SMALL, *test_ops.LORA_SPLITS]
    )
    prepared = []
    for spec in specs:
        call = calls.prepare(spec)
        began = time.process_time()
        assert (wrong := calls.first_wrong([call], "triton")) == "", f"the unmutated kernels fail: {wrong}"
        seconds = time.process_time() - began
        with executed_lines() as executed:
            calls.first_wrong([call], "triton")
        prepared.append((seconds, call, executed))
    prepared.sort(key=lambda row: row[0])

    def attempt(mutant: Mutant | None) -> str:
        with tempfile.TemporaryDirectory() as directory:
            install(mutant, directory)
            wrong = calls.first_wrong([call for _, call, executed in prepared if mutant is None or executed & statement(mutant)], "triton")
            if not wrong and (mutant is None or mutant.kind == "rounding"):
                wrong = calls.first_failing(
                    checks.assert_rounds_parameters,
                    [s for s in of_family([*test_ops.ROUNDED, *test_ops.PHM_ROUNDED]) if concerns(mutant, s.op)],
                    "triton",
                )
            if not wrong and family != "norm" and (mutant is None or mutant.kind == "mask"):
                wrong = calls.relu_at_zero("triton")
            if not wrong and not own and (mutant is None or mutant.kind == "constant"):
                wrong = calls.extreme_pre_activations("triton", (torch.float32, torch.bfloat16))
            if not wrong and (mutant is None or mutant.kind == "absent tensor" or (own and mutant.kind == "mask")):  # alone, a gradient has no other's section behind its own
                wrong = calls.first_failing(
                    checks.assert_single_gradients, [s for s in of_family([*test_ops.CALLS, *test_ops.PHM_CALLS, *test_ops.NORM_CALLS]) if concerns(mutant, s.op)], "triton"
                )
            if not wrong and family == "norm" and (mutant is None or mutant.kind == "rounding"):
                wrong = calls.statistics_of_the_exact_sum("triton")
            if not wrong and not own and concerns(mutant, "routed_bottleneck"):
                try:
                    test_ops.test_rows_of_no_task_see_no_weights()
                except Exception as error:
                    wrong = f"rows of no task: {type(error).__name__}: {forks.last_line(error)}"
            return wrong

    return attempt


def static(family: str) -> Attempt:
    """The 64-bit check on a mutant."""
    from tests.triton.compiled import aot
    from tests.triton.compiled.cases import launches
    from tests.triton.compiled.test_offsets import CASES, narrow_offsets

    def attempt(mutant: Mutant | None) -> str:
        with tempfile.TemporaryDirectory() as directory:
            install(mutant, directory)
            for case in CASES:
                if {"phm_bottleneck": "phm", "dropout_add_norm": "norm"}.get(case.op, "") == family and concerns(mutant, case.op):
                    for launch in launches(case):
                        name = launch.kernel.fn.__name__
                        if narrow := narrow_offsets(aot.intermediate_code(launch), name):
                            return f"row offsets of {name} of {case}: {narrow[0][:120]}"
        return ""

    return attempt


FAMILIES = {"": ("triton", FILES, EXPLAINED), "phm": ("triton_phm", PHM_FILES, EXPLAINED | PHM_EXPLAINED), "norm": ("triton_norm", NORM_FILES, EXPLAINED | NORM_EXPLAINED)}
STAGES = {"interpreted": interpreted, "static": static}


def stage(name: str, family: str, mutants: list[Mutant | None], jobs: int) -> list[str]:
    """What killed each mutant, or "", in a process of its own, since interpreting and compiling exclude each other."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1" if name == "interpreted" else "0"}
    said: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "work.json"
        work.write_text(json.dumps([m and m._asdict() for m in mutants]))
        command = [sys.executable, "-m", "tests.triton.mutants", *([family] if family else []), "--stage", name, "--work", str(work), "--jobs", str(jobs)]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:  # type: ignore[union-attr]
                i, verdict = json.loads(line)
                m, said[i] = mutants[i], verdict
                what = "unmutated" if m is None else f"{m.file}:{m.line} {m.kind}: {m.before[:60]!r} -> {m.after[:60]!r}"
                print(f"{name} {len(said)}/{len(mutants)} {what}: {verdict or 'SURVIVES'}", flush=True)
    if len(said) < len(mutants):
        raise SystemExit(f"the {name} stage failed")
    assert said[0] == "", f"the unmutated kernels fail: {said[0]}"
    return [said[i] for i in range(1, len(mutants))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", nargs="?", choices=tuple(FAMILIES), default="", help="the kernels of Compacter's op, or of dropout, sum and norm; by default those of the others")
    parser.add_argument("--sample", type=int, help="try this many mutants, evenly spread")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default 2)")
    parser.add_argument("--again", action="store_true", help="of these very sources: tries only what survived the last run; the rest keep their fate")
    parser.add_argument("--explain", action="store_true", help="try nothing; give the survivors of the last run the present explanations")
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        mutants = [m and Mutant(**m) for m in json.loads(options.work.read_text())]
        attempt = STAGES[options.stage](options.family)
        for row in forks.verdicts([partial(attempt, m) for m in mutants], options.jobs, 200):
            print(json.dumps(row), flush=True)
        return 0
    name, files, explained = FAMILIES[options.family]
    sources = {file: SOURCES[file] for file in files}
    if options.explain:
        return table.explain_again(name, sources, explained)
    every = sorted({m for file in files for m in mutants_of(file)}, key=lambda m: (files.index(m.file), m.start, m.end, m.after))
    chosen = every if options.sample is None else every[:: max(1, len(every) // options.sample)]
    began = time.time()
    rows = [table.Row(f"{m.file}:{m.line}", m.kind, m.before, m.after, None, table.text_of(SOURCES[m.file].splitlines(), m.line)) for m in chosen]
    fate = {m: verdict for m, verdict in zip(chosen, table.fates(name, sources, rows), strict=True) if verdict} if options.again else {}
    left = [m for m in chosen if m not in fate]
    fate |= {m: f"interpreter: {verdict}" for m, verdict in zip(left, stage("interpreted", options.family, [None, *left], options.jobs)) if verdict}
    left = [m for m in chosen if m not in fate]
    fate |= {m: f"64-bit check: {verdict}" for m, verdict in zip(left, stage("static", options.family, [None, *left], options.jobs)) if verdict}
    print(f"{time.time() - began:.0f} s, {forks.children_time():.0f} s of CPU time")
    return table.write(name, sources, len(every), [row._replace(killed_by=fate.get(m)) for m, row in zip(chosen, rows, strict=True)], explained)


if __name__ == "__main__":
    sys.exit(main())
