"""Row offsets are 64-bit in every kernel, read from the intermediate code: rows x width can pass 2^31."""

from __future__ import annotations

import re

import pytest
import torch

from tests.triton.compiled import aot
from tests.triton.compiled.cases import Case, launches

ROW_AXIS = {"forward_kernel": "x", "rows_kernel": "x", "backward_kernel": "x", "gates_kernel": "x", "weights_kernel": "y"}
"""The grid axis along which rows are cut; for rows of several tasks the second one of the kernels that add partials is of tasks."""
CASES = [
    *(Case(kind, 24, torch.bfloat16, torch.float32, save_gate=s) for kind in (None, "routed", "shared", "large", "logits", "middleX", "middleY", "small") for s in (False, True)),
    *(Case(kind, 96, torch.float32, torch.float32, width=33, options=False) for kind in (None, "routed", "small")),
    *(Case("lora", 24, torch.bfloat16, torch.float32, width=w, dropout=p) for w, p in ((768, True), (33, False))),
    Case("phm", 24, torch.bfloat16, torch.float32),
    *(Case(kind, 0, torch.bfloat16, torch.float32, wide=wide) for kind in ("layer", "rms", "none") for wide in (False, True)),
    Case("layer", 0, torch.float32, torch.float32, width=33, options=False, dropout=False),
    Case("phm", 96, torch.float32, torch.float32, width=36, options=False),
]


def narrow_offsets(ttir: str, kernel: str) -> list[str]:
    """Lines in which a row stride or the program's place along the rows or tasks takes part in 32-bit arithmetic: rows x width and tasks x rank x width can pass 2^31, so these may
    only be widened."""
    wide = re.findall(r"%(?:[\w.]+\.)?stride_\w+(?=: i32)", ttir) + re.findall(rf"(%\w+) = tt.get_program_id {ROW_AXIS.get(kernel, 'y')} ", ttir)
    assert wide or kernel not in ROW_AXIS, "the intermediate code was not understood"
    if kernel in ("reduce_kernel", "sums_kernel") and not all(f"arith.extsi {columns} " in ttir for columns in re.findall(r"(%(?:[\w.]+\.)?C): i32", ttir)):
        return ["parts x columns"]
    if kernel == "sort_kernel":
        return [line.strip() for line in ttir.splitlines() if re.search(r"arith.muli .*i32", line)]
    uses = [line.strip() for line in ttir.splitlines() if not line.lstrip().startswith("tt.func") for name in wide if re.search(rf"= .*{name}\b", line)]
    return [line for line in uses if "arith.extsi" not in line]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_offsets_are_wide(case: Case) -> None:
    for launch in launches(case):
        name = launch.kernel.fn.__name__
        assert not (narrow := narrow_offsets(aot.intermediate_code(launch), name)), f"{name} of {case}: {narrow}"


def test_the_check_sees_narrow_offsets() -> None:
    (forward, *_) = launches(CASES[0])
    code = aot.intermediate_code(forward)
    assert "arith.extsi %stride_x" in code
    assert narrow_offsets(code.replace("arith.extsi %stride_x", "arith.trunci %stride_x"), "forward_kernel")
    program = re.search(r"(%\w+) = tt.get_program_id x ", code)[1]
    assert narrow_offsets(code.replace(f"arith.extsi {program}", f"arith.trunci {program}"), "forward_kernel")
