"""`benchmarks.launches` counts what the documentation says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import launches
from tests.ops import checks

pytestmark = pytest.mark.skipif(checks._NO_CPU, reason="the cpu backend needs x86-64 with AVX2 and a compiler")


@pytest.fixture(scope="module")
def rows() -> dict[str, launches.Row]:
    return {site: launches.row(site, spec) for site, spec in launches.sites(512, 128).items()}


def test_one_site_of_vl_pet_is_79_operations() -> None:
    spec = replace(launches.sites(512, 128)["VL-PET, large"], param_dtype=torch.bfloat16)
    assert sum(launches.row("", spec).eager_operations) == 79


def test_one_operation_each_way(rows: dict[str, launches.Row]) -> None:
    for site, row in rows.items():
        # First, ids of samples become ids of rows, and a seed is drawn.
        assert row.operations == (2 if row.op in ("routed_bottleneck", "lora", "dropout_add_norm") else 1, 1), site


def test_pre_activations_are_all_that_is_saved(rows: dict[str, launches.Row]) -> None:
    """R numbers of the activations' dtype a row; VL-PET's large gate adds its own pre-activations and, on a CPU, its logits and what it multiplies; a norm v and two numbers."""
    assert all(int(row.saved) == 2 * row.rank for site, row in rows.items() if not site.startswith(("VL-PET", "post-norm")))  # ids of tasks and a seed are below a byte a row
    assert int(rows["post-norm, dropout"].saved) == 2 * 128 + 2 * 4
    assert rows["VL-PET, large"].saved == 2 * (96 + 96 + 2 * 128)
    assert all(row.saved < row.eager_saved for row in rows.values())


def test_few_kernels(rows: dict[str, launches.Row]) -> None:
    """One kernel forward and at most four backward and, for gates that are known late, one more; in Triton rows of several tasks are sorted first, in CUDA C++ fp32 weights
    rounded."""
    for site, row in rows.items():
        late, sorts = row.op == "gated_bottleneck" and site.endswith("small"), row.op == "routed_bottleneck"
        assert row.cuda_kernels[0] <= 2 + late and row.cuda_kernels[1] <= 5 + late, site
        assert row.triton_kernels[0] <= 1 + sorts + late and row.triton_kernels[1] <= 4 + late, site
