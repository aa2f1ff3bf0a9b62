"""What `make test-full` proved, by family of kernels: `python -m tests.proof --write` at its end; tests/test_proof.py compares.

A family's sources are all the files that its kernels are made of, so that a change elsewhere (another backend's kernels, say, or the binding, which every test runs) leaves its
proof valid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.mutation import table

ROOT = Path(__file__).parents[1]
PROOF = ROOT / "tests" / "data" / "proof.json"


def with_includes(paths: list[Path]) -> set[Path]:
    """Files of the repository and what they include of it, by name."""
    found: set[Path] = set()
    while paths:
        path = paths.pop().resolve()
        if path not in found:
            found.add(path)
            names = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
            paths += [file for name in names for folder in (path.parent, ROOT / "csrc") if (file := folder / name).exists()]
    return found


GROUPS = {"": ("bottleneck", "gated_bottleneck", "lora", "routed_bottleneck"), "_phm": ("phm_bottleneck",), "_norm": ("dropout_add_norm",)}
"""End of a family's name -> the ops whose kernels it has, so that a change of one group's own files leaves the others proved."""


def cpu(ops: Sequence[str]) -> set[Path]:
    return with_includes([path for op in ops if (path := ROOT / "csrc" / "cpu" / f"{op}.cpp").exists()])  # an op may run on another's kernels


def triton(ops: Sequence[str]) -> set[Path]:
    return {ROOT / "fastadapt" / "ops" / "_triton.py", *(ROOT / "fastadapt" / "ops" / op / "triton.py" for op in ops)}


def cuda(ops: Sequence[str]) -> set[Path]:
    folder = ROOT / "csrc" / "cuda"
    return with_includes([path for op in ops for path in (folder / f"{op}.cu", *sorted((folder / "inst").glob(f"{op}_*.cu")))])


FAMILIES = {f"{make.__name__}{group}": partial(make, ops) for group, ops in GROUPS.items() for make in (cpu, triton, cuda)}


def hashes(family: str) -> dict[str, str]:
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(FAMILIES[family]())}


def proved() -> dict[str, Any]:
    return json.loads(PROOF.read_text()) if PROOF.exists() else {}


def mutants(family: str) -> dict[str, Any]:
    """The family's table of mutants. It names the sources that it is about: a proof from another state's table would be none."""
    found = json.loads(table.path(family).read_text())
    present = hashes(family)
    stale = [file for file, digest in found["sources"].items() if present.get(file) != digest]
    assert not stale, f"{table.path(family).name} is of another state of {', '.join(stale)}"
    assert found["tried"] == found["generated"], f"{table.path(family).name} holds {found['tried']} of {found['generated']} mutants"
    return found


def write() -> None:
    record = {}
    for family in FAMILIES:
        counts = mutants(family)
        record[family] = {"sources": hashes(family), "mutants": {key: counts[key] for key in ("tried", "killed", "survived")}}
    PROOF.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write()
