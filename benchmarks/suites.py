"""All benchmarks behind one command: ``fastadapt bench``, or ``python -m benchmarks.<suite>`` for one of them.

Every suite is a module with ``run(options)``, which prints as it goes and yields rows, some at a time, and ``listed(options)``, which yields a line for each such batch. ``ops``
and ``models`` give `measure.Row`; the rows of the others are of kinds of their own and carry the suite's name. Everything needs the checkout, since the rivals are the tests'
references.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import fastadapt
from benchmarks.measure import Row, machine
from fastadapt import cli

HISTORY = Path(__file__).parent / "data" / "history.csv"
COLUMNS = ("date", "commit", "fastadapt", "torch", *(field.name for field in fields(Row)))


def record(suite: str, row: Any) -> dict[str, Any]:
    """A row for JSON. Timings have their own fields and no others; the rest say which suite they are of."""
    return asdict(row) if isinstance(row, Row) else {"suite": suite, **asdict(row)}


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, timeout=60).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if git("status", "--porcelain") else "")


def check_history(path: Path) -> None:
    """Raises ValueError where the CSV has other columns, OSError where it cannot be appended to."""
    if path.exists():
        with open(path, "r+", newline="") as file:
            if (found := next(csv.reader(file), [])) != list(COLUMNS):
                raise ValueError(f"{path}: its columns are {', '.join(found)}, not {', '.join(COLUMNS)}")


def append_history(rows: Sequence[Row], path: Path) -> None:
    """Appends timings to the CSV, which is made where there is none. Raises as `check_history`."""
    check_history(path)
    new = not path.exists()
    about = {"date": date.today().isoformat(), "commit": commit(), "fastadapt": fastadapt.__version__, "torch": torch.__version__}
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows({**about, **asdict(row)} for row in rows)


def write_json(rows: Sequence[tuple[str, Any]], path: Path) -> None:
    """Writes the rows, each with its suite, in the place of what is there."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps([record(name, row) for name, row in rows], indent=1, allow_nan=False) + "\n")
    part.replace(path)


def run(names: Sequence[str], options: argparse.Namespace) -> int:
    """Runs the suites, writes what the options ask for, and says what was slower or wrong. Returns 1 where a result was wrong.

    The JSON is written after every batch of rows, so that a run that is cut short keeps what it has measured.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        print("fastadapt bench: --device cuda: torch sees no CUDA device", file=sys.stderr)
        return 2
    plots = import_module("benchmarks.plots") if options.plots else None  # without matplotlib this fails before anything is measured
    given = {name: value for name, value in vars(options).items() if name != "seconds" or value is not None}
    settings = argparse.Namespace(**{"rounds": 7 if options.quick else 21, "seconds": 2.0 if options.quick else 6.0, **given})
    if options.list:
        for name in names:
            lines = list(import_module(f"benchmarks.{name}").listed(settings))
            print(f"== {name}: {len(lines)}", *lines, sep="\n")
        return 0
    if options.history:
        try:
            check_history(HISTORY)
        except (OSError, ValueError) as error:
            print(f"fastadapt bench: --history: {error}", file=sys.stderr)
            return 1
    print(f"{machine(options.device)}; torch {torch.__version__}, fastadapt {fastadapt.__version__}, commit {commit()}")
    rows: list[tuple[str, Any]] = []
    for name in names:
        started = time.perf_counter()
        print(f"\n== {name}", flush=True)
        for batch in import_module(f"benchmarks.{name}").run(settings):
            rows += [(name, row) for row in batch]
            if options.json:
                write_json(rows, options.json)
        print(f"-- {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if not rows:
        print("fastadapt bench: nothing was measured; --list, with the same options, shows what they ask for", file=sys.stderr)
        return 2
    timings = [row for _, row in rows if isinstance(row, Row)]
    wrong, slower = [row for row in timings if not row.correct], [row for row in timings if row.slower]
    if timings:
        print(f"\n{len(timings)} comparisons: {len(wrong)} wrong and not timed, {len(slower)} slower" + ("".join(f"\n  {row}" for row in [*wrong, *slower])))
    if options.history:
        append_history(timings, HISTORY)
    if plots:
        print(*(f"wrote {path}" for path in plots.draw([record(name, row) for name, row in rows], options.plots)), sep="\n")
    return 1 if wrong else 0


def main(suite: str) -> int:
    """The command line of one suite: ``fastadapt bench`` with its name."""
    return cli.main(["bench", "--suite", suite, *sys.argv[1:]])
