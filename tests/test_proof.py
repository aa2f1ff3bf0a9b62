"""The kernels are those that `make test-full` last proved."""

import json

import pytest

from tests import proof
from tests.mutation import cpu as cpu_mutants
from tests.mutation import cuda as cuda_mutants
from tests.mutation import table
from tests.triton import mutants as triton_mutants

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
    cuda = set(proof.hashes("cuda"))
    assert cuda >= {
        "csrc/cuda_ops.cpp",
        "csrc/include/bottleneck.h",
        "csrc/include/gated_bottleneck.h",
        *(f"csrc/include/{name}.h" for name in ("cuda", "cuda_kernels", "cuda_plan")),
    }
    assert cuda >= {str(path.relative_to(proof.ROOT)) for folder in ("cuda", "common") for path in (proof.ROOT / "csrc" / folder).rglob("*") if path.is_file()}
    assert not any(name.startswith("csrc/cpu") for name in cuda)
    assert cpu >= set(cpu_mutants.FILES) and cuda >= set(cuda_mutants.FILES)
    assert set(proof.hashes("triton")) == set(triton_mutants.FILES) == {f"fastadapt/ops/{name}" for name in ("_triton.py", "bottleneck/triton.py", "gated_bottleneck/triton.py")}
