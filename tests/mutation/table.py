"""The record of a family's mutants: a JSON file in tests/data, and the exit status."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]


class Row(NamedTuple):
    """One mutant's fate, with the text of its line."""

    place: str
    kind: str
    before: str
    after: str
    killed_by: str | None
    line_text: str


def path(family: str) -> Path:
    return ROOT / "tests" / "data" / f"{family}_mutants.json"


def text_of(lines: Sequence[str], number: int) -> str:
    """A line, and behind a short one, which has many like it, the next."""
    text = lines[number - 1].strip()
    return text if len(text) > 20 or number == len(lines) else f"{text} {lines[number].strip()}"


def write(family: str, sources: Mapping[str, str], generated: int, rows: Iterable[Row], explained: Mapping[tuple[str, str], str]) -> int:
    """Writes the table, with hashes of the mutated ``sources`` (file -> text), and names the survivors that have no explanation; 1 if there are any.

    Args:
        explained: (kind, a part of "before -> after in line") -> why no test can see it.
    """
    out = []
    for row in rows:
        why = (
            None
            if row.killed_by
            else next((reason for (kind, part), reason in explained.items() if kind == row.kind and part in f"{row.before} -> {row.after} in {row.line_text}"), None)
        )
        out.append({"place": row.place, "kind": row.kind, "before": row.before[:200], "after": row.after[:200], "killed_by": row.killed_by, "explanation": why})
    survivors = [r for r in out if r["killed_by"] is None]
    unexplained = [r for r in survivors if r["explanation"] is None]
    counts = {"generated": generated, "tried": len(out), "killed": len(out) - len(survivors), "survived": len(survivors), "unexplained": len(unexplained)}
    kinds = dict(sorted(Counter(row["kind"] for row in out).items()))
    digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in sources.items()}
    head = json.dumps({"sources": digests, **counts, "kinds": kinds}, indent=1).removesuffix("\n}")
    path(family).write_text(head + ',\n "mutants": [\n' + ",\n".join(map(json.dumps, out)) + "\n]}\n")
    for row in unexplained:
        print(f"unexplained: {row['place']} {row['kind']}: {row['before']!r} -> {row['after']!r}")
    print(f"{family}: {', '.join(f'{n} {what}' for what, n in counts.items())}: {path(family).relative_to(ROOT)}")
    return int(bool(unexplained))


def last(family: str, sources: Mapping[str, str]) -> Any:
    """The table, which must be of these very sources."""
    old = json.loads(path(family).read_text())
    assert old["sources"] == {file: hashlib.sha256(text.encode()).hexdigest() for file, text in sources.items()}, f"{path(family).name} is of other sources"
    return old


def fates(family: str, sources: Mapping[str, str], rows: Sequence[Row]) -> list[str | None]:
    """What killed each of ``rows``, which are all mutants of these very sources, in the last run."""
    old = last(family, sources)["mutants"]
    assert [(row["place"], row["kind"], row["before"], row["after"]) for row in old] == [(row.place, row.kind, row.before[:200], row.after[:200]) for row in rows]
    return [row["killed_by"] for row in old]


def explain_again(family: str, sources: Mapping[str, str], explained: Mapping[tuple[str, str], str]) -> int:
    """Writes the table of these very sources again, with other explanations."""
    old = last(family, sources)
    rows = []
    for row in old["mutants"]:
        file, line = row["place"].split(":")
        rows.append(Row(row["place"], row["kind"], row["before"], row["after"], row["killed_by"], text_of(sources[file].splitlines(), int(line))))
    return write(family, sources, old["generated"], rows, explained)
