"""The kernels are those that `make test-full` last proved."""

import json

import pytest

from tests import proof
from tests.mutation import table

families = pytest.mark.parametrize("family", proof.FAMILIES)


@families
def test_sources_are_the_proved_ones(family: str) -> None:
    if family not in proof.proved():
        pytest.skip(f"no `make test-full` has proved the {family} kernels yet, so there is no record to compare with")
    before, present = proof.proved()[family]["sources"], proof.hashes(family)
    changed = sorted({name for name, _ in set(before.items()) ^ set(present.items())})
    assert not changed, f"sources of the {family} kernels changed since the last `make test-full`: {changed}"


@families
def test_every_surviving_mutant_is_explained(family: str) -> None:
    if family not in proof.proved() and not table.path(family).exists():
        pytest.skip(f"the mutants of the {family} kernels have never been tried")
    counts = json.loads(table.path(family).read_text())
    assert [row for row in counts["mutants"] if row["killed_by"] is None and not row["explanation"]] == []
    if family in proof.proved():
        assert proof.proved()[family]["mutants"] == {key: counts[key] for key in ("tried", "killed", "survived")}


def test_a_familys_sources_are_what_its_kernels_are_made_of() -> None:
    cpu = set(proof.hashes("cpu"))
    assert cpu >= {"csrc/cpu_ops.cpp", "csrc/cpu/tile.h", "csrc/cpu/bottleneck.cpp", "csrc/include/plan.h", "csrc/include/gated_bottleneck.h"}
    assert not any("cuda" in name or name.startswith("csrc/common") for name in cpu)
    assert set(proof.hashes("triton")) == {f"fastadapt/ops/{name}" for name in ("_triton.py", "bottleneck/triton.py", "gated_bottleneck/triton.py")}
