"""The kernels are those that `make test-full` last proved."""

import json

import pytest

from fastadapt.backend import _plans
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
    of = {family: set(proof.hashes(family)) for family in proof.FAMILIES}
    assert of["cpu"] >= {"csrc/cpu/tile.h", "csrc/cpu/bottleneck.cpp", "csrc/include/plan.h", "csrc/include/gated_bottleneck.h"}
    assert of["cuda"] >= {f"csrc/include/{name}.h" for name in ("cuda", "cuda_kernels", "cuda_plan", "bottleneck", "gated_bottleneck")}
    for group in proof.GROUPS:
        assert not any("cuda" in name or name.startswith("csrc/common") for name in of[f"cpu{group}"])
        assert not any(name.startswith("csrc/cpu") for name in of[f"cuda{group}"])
    for backend, folders in (("cpu", ("cpu",)), ("cuda", ("cuda", "common"))):
        together = set().union(*(of[f"{backend}{group}"] for group in proof.GROUPS))
        assert together >= {str(path.relative_to(proof.ROOT)) for folder in folders for path in (proof.ROOT / "csrc" / folder).rglob("*") if path.is_file()}
    assert {op for ops in proof.GROUPS.values() for op in ops} == set(_plans)
    for family in proof.FAMILIES:
        if table.path(family).exists():
            assert of[family] >= set(json.loads(table.path(family).read_text())["sources"])


def test_every_cpu_file_with_loops_has_mutants() -> None:
    files = [path for path in (proof.ROOT / "csrc" / "cpu").iterdir() if "for (" in path.read_text()]
    mutated = set().union(*(json.loads(table.path(f"cpu{group}").read_text())["sources"] for group in proof.GROUPS))
    assert {str(path.relative_to(proof.ROOT)) for path in files} <= mutated
