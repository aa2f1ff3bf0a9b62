"""What `make test-full` proved: `python -m tests.proof --write` at its end; tests/test_proof.py compares."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROOF = ROOT / "tests" / "data" / "proof.json"
MUTANTS = {name: ROOT / "tests" / "data" / f"{name}_mutants.json" for name in ("cpu", "triton")}


def sources() -> list[Path]:
    """Every file that a kernel is compiled from."""
    return sorted([*(ROOT / "csrc").rglob("*.[ch]*"), ROOT / "fastadapt" / "ops" / "_triton.py", *(ROOT / "fastadapt" / "ops").glob("*/triton.py")])


def hashes() -> dict[str, str]:
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sources()}


def write() -> None:
    counts = {}
    for name, path in MUTANTS.items():
        rows = json.loads(path.read_text())["mutants"]
        counts[name] = {"run": len(rows), "killed": sum(row["killed_by"] is not None for row in rows)}
    PROOF.write_text(json.dumps({"sources": hashes(), "mutants": counts}, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write()
