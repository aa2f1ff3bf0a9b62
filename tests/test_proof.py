"""The kernels are those that `make test-full` last proved."""

import json

from tests import proof


def test_sources_are_the_proved_ones() -> None:
    proved, present = json.loads(proof.PROOF.read_text())["sources"], proof.hashes()
    changed = sorted(set(proved.items()) ^ set(present.items()))
    assert not changed, f"kernel sources changed since the last `make test-full`: {sorted({name for name, _ in changed})}"


def test_every_surviving_mutant_is_explained() -> None:
    for path in proof.MUTANTS.values():
        rows = json.loads(path.read_text())["mutants"]
        assert len(rows) >= 60
        assert [row for row in rows if row["killed_by"] is None and not row.get("explained")] == []
