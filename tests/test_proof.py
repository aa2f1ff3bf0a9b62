"""The kernels are those that `make test-full` last proved."""

import json
from pathlib import Path

import pytest

from tests import proof


@pytest.mark.skipif(not proof.PROOF.exists(), reason="no `make test-full` has run to its end yet, so there is no record to compare with")
def test_sources_are_the_proved_ones() -> None:
    proved, present = json.loads(proof.PROOF.read_text())["sources"], proof.hashes()
    changed = sorted(set(proved.items()) ^ set(present.items()))
    assert not changed, f"kernel sources changed since the last `make test-full`: {sorted({name for name, _ in changed})}"


def test_every_surviving_mutant_is_explained() -> None:
    for path in filter(Path.exists, proof.MUTANTS.values()):
        rows = json.loads(path.read_text())["mutants"]
        assert [row for row in rows if row["killed_by"] is None and not row.get("explanation")] == []
