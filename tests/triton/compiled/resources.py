"""What Triton's compiler made of the kernels at the papers' sites, per architecture: registers, stack, shared memory, and blocks a multiprocessor.

python -m tests.triton.compiled.resources --write    # tests/data/triton_resources.json, which test_resources.py compares with
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton 3.9, which otherwise warns about the one of 3.10

import torch
import triton

from tests.cuda.gate import blocks_per_multiprocessor
from tests.triton.compiled import aot
from tests.triton.compiled.cases import Case, launches

ARCHS = (80, 90, 100)
TENSOR_MEMORY = 512  # columns of an sm_100 multiprocessor, where its matrix products are summed
RECORD = Path(__file__).parents[2] / "data" / "triton_resources.json"
_SITE = {"dtype": torch.bfloat16, "param_dtype": torch.float32, "published": True}
SITES = (
    *(Case(kind, 96, **_SITE) for kind in (None, "large", "phm", "routed")),
    Case("lora", 16, **_SITE, out=768, dropout=False),
    Case("layer", 0, **_SITE, dropout=False),
)
"""Those of `benchmarks.roofline`: bf16 with fp32 parameters, width 768; biases, and the call's own residual."""


def measured(archs: Iterable[int] = ARCHS) -> dict[str, dict[str, int]]:
    """``{"bottleneck rows_kernel sm_80": {"registers": ..., ...}}``; of a kernel that a call launches twice, as VL-PET's for adapter and gate, the one with fewer blocks."""
    found: dict[str, dict[str, int]] = {}
    for arch in archs:
        for case in SITES:
            for launch in launches(case):
                compiled = aot.compile_launch(launch, arch)
                code, threads = aot.inspect(compiled), 32 * compiled.metadata.num_warps
                blocks = blocks_per_multiprocessor(arch, threads, code.registers, code.shared)
                if columns := getattr(compiled.metadata, "tmem_size", None):
                    blocks = min(blocks, TENSOR_MEMORY // columns)
                row = {"registers": code.registers, "stack": code.stack, "threads": threads, "shared": code.shared, "blocks": blocks}
                key = f"{case.op} {launch.kernel.__name__} sm_{arch}"
                found[key] = min(found.get(key, row), row, key=lambda each: each["blocks"])
    return found


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write() -> None:
    """The record, one line a kernel and architecture."""
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in measured().items())
    RECORD.write_text(f'{{\n "triton": "{triton.__version__}",\n "kernels": {{\n{rows}\n }}\n}}\n')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    write()
