"""Tries every mutant of a family of C++ kernels: `main` is the command line of the family's module."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tests.mutation import cpp, forks, table

Check = Callable[[Path, cpp.Mutant | None], str]
"""Runs in a forked process: loads the library in the folder, sets the mutant's number (unless it is compiled in), and returns what is wrong, or ""."""


class Family(NamedTuple):
    """What is particular to one family of kernels."""

    name: str
    files: tuple[str, ...]
    """Mutated sources, relative to the repository."""
    commands: Callable[[Path], list[list[str]]]
    """Compiler calls for the copy of csrc in a folder, which may run side by side; the last word of each is the object."""
    fixed: tuple[str, ...]
    """Objects of which no mutated file is a part."""
    link: Callable[[Path], list[str]]
    prepare: Callable[[], Check]
    explained: Mapping[tuple[str, str], str]
    rules: cpp.Rules = cpp.Rules()


def build(family: Family, folder: Path, files: Mapping[str, str], jobs: int, base: Path | None = None) -> str:
    """Compiles a copy of csrc with ``files`` replaced, but for the fixed objects that ``base`` holds; the compiler's errors."""
    for name in family.fixed:
        if base is not None and (base / name).exists():
            (folder / name).hardlink_to(base / name)
    subprocess.run(["cp", "-r", str(table.ROOT / "csrc"), str(folder)], check=True)
    for name, text in files.items():
        (folder / name).write_text(text)

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return done.stderr if done.returncode else ""

    with ThreadPoolExecutor(jobs) as pool:
        return "".join(pool.map(run, [command for command in family.commands(folder) if not (folder / command[-1]).exists()])) or run(family.link(folder))


def instrumented(family: Family, sources: dict[str, str], jobs: int) -> tuple[list[cpp.Mutant], frozenset[int], Path]:
    """Builds the library that holds all mutants, or finds it as it was built from the same sources; those that are no C++ are found by the compiler, and left out."""
    everything = [torch.__version__, *cpp.instrument(sources, family.rules)[0].values(), *map(str, family.commands(Path()))]
    everything += [path.read_text() for place in ("csrc", "tests/mutation") for path in sorted((table.ROOT / place).rglob("*.[ch]*")) if path.is_file()]
    folder = table.ROOT / "build" / "mutation" / hashlib.sha256("\0".join(everything).encode()).hexdigest()[:16]
    record = folder / "broken.json"
    broken = frozenset(json.loads(record.read_text()) if record.exists() else [])
    if record.exists():
        return cpp.instrument(sources, family.rules, broken)[1], broken, folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for _ in range(8):
        files, mutants = cpp.instrument(sources, family.rules, broken)
        errors = build(family, folder, files, jobs)
        if not errors:
            record.write_text(json.dumps(sorted(broken)))
            return mutants, broken, folder
        found = cpp.blamed(errors, files, family.files) - broken
        assert found, f"the instrumented sources do not compile:\n{errors[:4000]}"
        broken |= found
    raise AssertionError("the compiler finds more broken mutants every time")


def main(family: Family) -> int:
    parser = argparse.ArgumentParser(description=f"Mutants of the {family.name} kernels; writes {table.path(family.name).relative_to(table.ROOT)}.")
    parser.add_argument("--sample", type=int, help="try this many mutants, evenly spread")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (default 2)")
    parser.add_argument("--only", default="", help="only mutants whose place and line have this in them; prints, and writes nothing")
    parser.add_argument(
        "--again", action="store_true", help="of these very sources: tries only what survived the last run, or of that what --only chooses; the rest keep their fate"
    )
    parser.add_argument("--explain", action="store_true", help="try nothing; give the survivors of the last run the present explanations")
    options = parser.parse_args()
    began = time.time()
    sources = {file: (table.ROOT / file).read_text() for file in family.files}
    """Read once: an edit during the run changes nothing."""
    if options.explain:
        return table.explain_again(family.name, sources, family.explained)
    lines = {file: text.splitlines() for file, text in sources.items()}

    def row_of(m: cpp.Mutant) -> table.Row:
        return table.Row(f"{m.file}:{m.line}", m.kind, m.before, m.after, None, table.text_of(lines[m.file], m.line))

    with tempfile.TemporaryDirectory() as name:
        every, broken, base = instrumented(family, sources, options.jobs)
        print(f"{len(every)} mutants compiled in {time.time() - began:.0f} s; {len(broken)} of them are no C++", flush=True)
        check = family.prepare()
        spent = forks.children_time()
        ((_, healthy),) = forks.verdicts([partial(check, base, None)], 1, 600)
        assert healthy == "", f"the unmutated kernels fail: {healthy}"
        spent = forks.children_time() - spent
        limit = max(20, round(4 * spent))
        print(f"the unmutated kernels pass, in {spent:.1f} s; a mutant has {limit} s", flush=True)
        chosen = [m for m in every if options.only in f"{m.file}:{m.line} {m.kind} {lines[m.file][m.line - 1]}"]
        chosen = chosen if options.sample is None else chosen[:: max(1, len(chosen) // options.sample)]
        fate = {m: "compiler" for m in chosen if m.number in broken}
        if options.again:
            before = dict(zip(every, table.fates(family.name, sources, list(map(row_of, every))), strict=True))
            survivors = {m for m in chosen if before[m] is None}
            fate, chosen = {m: verdict or "" for m, verdict in before.items() if m not in survivors}, every
        running = [m for m in chosen if m not in fate and not m.static]
        tasks: list[Callable[[], str]] = [partial(check, base, m) for m in running]
        for i, m in enumerate(m for m in chosen if m not in fate and m.static):  # each is a library of its own
            folder = Path(name) / str(i)
            folder.mkdir()
            if build(family, folder, {m.file: m.apply(sources[m.file])}, options.jobs, base):
                fate[m] = "compiler"
            else:
                running.append(m)
                tasks.append(partial(check, folder, m))
        for done, (i, verdict) in enumerate(forks.verdicts(tasks, options.jobs, limit), 1):
            fate[running[i]] = verdict
            m = running[i]
            print(f"{done}/{len(tasks)} {m.file}:{m.line} {m.kind}: {m.before[:60]!r} -> {m.after[:60]!r}: {verdict or 'SURVIVES'}", flush=True)
    print(f"{time.time() - began:.0f} s, {time.process_time() + forks.children_time():.0f} s of CPU time")
    rows = [row_of(m)._replace(killed_by=fate[m] or None) for m in chosen]
    return 0 if options.only and not options.again else table.write(family.name, sources, len(every), rows, family.explained)
