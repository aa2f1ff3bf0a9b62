"""What Triton's compiler makes of the kernels at the papers' sites is what tests/data/triton_resources.json records.

After a change of the kernels or their tiles: python -m tests.triton.compiled.resources --write.
"""

from __future__ import annotations

import pytest
import triton

from tests.triton.compiled import resources


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.full) for arch in (90, 100))])
def test_compiled_kernels_are_those_recorded(arch: int) -> None:
    found, record = resources.measured([arch]), resources.recorded()
    expected = {key: row for key, row in record["kernels"].items() if key.endswith(f" sm_{arch}")}
    assert set(found) == set(expected) and {key.split()[0] for key in found} == {case.op for case in resources.SITES}
    for key, row in found.items():
        assert row["blocks"] >= 1, f"{key} does not fit a multiprocessor: {row}"
        if triton.__version__ == record["triton"]:
            assert row == expected[key], f"{key}: {row} instead of {expected[key]}; if that is meant: python -m tests.triton.compiled.resources --write"
        else:  # another compiler may count otherwise, but not lose blocks
            assert row["blocks"] >= expected[key]["blocks"], key
