"""Mutants of the CUDA kernels and their launch sequences: `python -m tests.mutation.cuda` writes tests/data/cuda_mutants.json.

They run on the emulator, in bf16 over bf16 and fp32 parameters and in fp16, for a few ranks (csrc/cuda/launch.h), with races watched in shared and global memory, copies that
arrive at the last legal moment, and every launch held to the ranges of its arguments. Constants of csrc/include/cuda_plan.h are sizes that all of it is built from: they are not
mutated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastadapt.ops import _cuda
from tests.cuda import emulator
from tests.mutation import calls, cpp, schemata
from tests.ops import checks
from tests.ops.specs import ACTIVATIONS, BF16, DTYPES, GRANULARITIES, MIXED, Bottleneck, Gated, Spec

FP16, FP16_MIXED = DTYPES[3:]
SHARED = ("csrc/common/activations.cuh", "csrc/common/tiles.cuh")
FILES = (*SHARED, "csrc/cuda/bottleneck.cuh", "csrc/cuda/gated_bottleneck.cuh", "csrc/cuda/bottleneck.cu", "csrc/cuda/gated_bottleneck.cu", "csrc/cuda/sequence.h")
GATED_ONLY = ("csrc/cuda/gated_bottleneck.cuh", "csrc/cuda/gated_bottleneck.cu")
SOURCES = {
    "_cuda_ops": "csrc/cuda_ops.cpp",
    **{Path(name).stem: name for name in ("csrc/cuda/bottleneck.cu", "csrc/cuda/gated_bottleneck.cu")},
    **{f"{op}_{t}": f"csrc/cuda/inst/{op}_{t}.cu" for op in ("bottleneck", "gated_bottleneck") for t in ("bf16", "fp16")},
    "guard": "tests/mutation/guard.cpp",
}

MORE = "computes, loads or stores what nobody reads then: slower, the same results"
WORKSPACE = "falls into the workspace, which the emulator knows as one range, where nothing is read that a later launch does not write"
NO_ROW = "of a row that does not exist, whose results are not stored"
BEYOND = "one element more than a local array has: undefined in C++, and the host's compiler stops at the array's end"
# (kind, a part of "before -> after in line") -> why no test can see it.
EXPLAINED: dict[tuple[str, str], str] = {
    ("bound", "operator()(float z) const { return z > 0.f"): "at 0 both branches give 0",
    ("condition", "own < kTiles && at.valid(i) -> static_cast<bool>(at.valid(i)) in if (own < kTiles && at.valid(i) && c < columns) q = "): MORE,
    ("condition", "k < 4 && j + k < kTiles"): "what it writes too much the next group of fragments writes again",
    ("condition", "Tr::kDual && loads_second"): MORE,
    ("loop", "i <= 4 in for (int i = 0; i < 4; ++i)"): BEYOND,
    ("loop", "k <= 4 in for (int k = 0; k < 4; ++k) packed"): BEYOND,
    ("condition", "owns_p && problem.s -> static_cast<bool>(owns_p)"): MORE,
    ("condition", "i >= all || column >= copy.columns"): "reads on " + WORKSPACE + ", and the number is not stored",
    ("condition", "static_cast<bool>(threadIdx.x < 32) in if (threadIdx.x < 32 && first"): "zeros behind the fold, within the 256 bytes that its place is rounded up to",
    ("constant", "means[0] = means[1] = 0.f"): NO_ROW,
    ("constant", "float slopes[2] = {0.f, 0.f}"): NO_ROW,
    ("condition", "(p.d_logits && !g.add)"): MORE,
    ("condition", "sweeps_twice = by_row && !small"): MORE,
    ("condition", "expands_gate = Tr::kDual && !g.gate"): MORE,
    ("condition", "(by_row && !g.add && (sweeps_twice"): MORE,
    ("condition", "by_row && p.sums && !summing"): MORE,
    ("constant", "0.f -> 0.5f in float2 of_x{0.f, 0.f}"): "written before it is read, wherever it is read",
    ("constant", "0.f -> 0.5f in float2 total{0.f, 0.f}"): "written before it is read, wherever it is read",
    ("constant", "0.f -> 0.5f in Logistic gate_x"): "the rest of a gate a row or of a given one is not read, or written first",
    (
        "condition",
        "(lane() & 3) == 0 && at.valid(i) -> static_cast<bool>((lane() & 3) == 0) in if ((lane() & 3) == 0 && at.valid(i)) ptx::store_global(p.row_sums",
    ): "the sums of rows that do not exist: what is stored " + WORKSPACE,
    ("condition", "rank < 1 || rank > plan::kMaxRank"): "which shapes are refused is asked before any launch; tests/cuda/test_ops.py asks it",
    ("condition", "bracket && weights.b_up"): MORE,
    ("bound", "p.samples >= 0 in"): "there are no rows without samples",
}


def over(dtypes: tuple[torch.dtype, torch.dtype], kind: type[Spec] = Bottleneck, **options: Any) -> Spec:
    return kind(dtype=dtypes[0], param_dtype=dtypes[1], **options)


SCALES: dict[str, Any] = {"input_scale": 0.7, "adapter_scale": 1.3, "scale": 0.6}
# Cheap and telling ones first. Widths of part of a slab, ranks with and without padding, rows of part of a tile, of several tiles and of several splits.
SPECS: list[Spec] = [
    over(MIXED, lead=(37,), width=72, rank=7, residual="other", scale="tensor", gate=True),
    over(BF16, lead=(70,), width=136, rank=16),
    over(FP16, lead=(9,), width=40, rank=32, residual=None, gate=True, scale=0.7),
    over(FP16_MIXED, lead=(9,), width=40, rank=8, gate=True, scale="tensor"),
    *(over(d, lead=(20,), width=64, rank=16, activation=a, scale=0.7) for d, a in zip((BF16, FP16, MIXED, FP16, FP16), ACTIVATIONS, strict=True)),
    *(over(BF16, lead=(20,), width=40, rank=24, biases=b, residual=r) for b, r in (("none", "input"), ("up", "other"), ("down", None))),
    over(BF16, lead=(600,), width=64, rank=16, gate=True, scale="tensor"),
    over(MIXED, lead=(130,), width=72, rank=170, gate=True),
    over(BF16, lead=(70,), width=72, rank=256),
    *(
        over(d, Gated, lead=(2, 33), width=72, rank=r, gate_rank=q, granularity=g, combine=c, save_gate=s, **SCALES)
        for g in GRANULARITIES
        for d, r, q, c, s in ((BF16, 16, 24, "multiply", True), (MIXED, 7, 9, "add", False), (FP16, 32, 8, "multiply", False), (BF16, 8, 32, "add", True))
    ),
    *(over(BF16, Gated, lead=(3, 23), width=40, rank=8, gate_rank=8, granularity=g, biases="none", gate_bias=False) for g in GRANULARITIES),
    *(over(BF16, Gated, lead=(2, 70), width=72, rank=192, gate_rank=130, granularity=g, save_gate=False) for g in GRANULARITIES),
    *(over(BF16, Gated, lead=(2, 300), width=64, rank=8, gate_rank=8, granularity=g, save_gate=False) for g in ("large", "middleX", "middleY", "small")),
]
CALLS: list[Spec] = [
    over(MIXED, lead=(20,), width=40, rank=7, residual="other", scale="tensor", gate=True),
    *(
        over(d, Gated, lead=(2, 9), width=40, rank=8, gate_rank=7, granularity=g, combine=c, save_gate=s)
        for g in GRANULARITIES
        for d, c, s in ((BF16, "multiply", False), (MIXED, "add", True))
    ),
]
SCHEDULES = (("in_order", 0), ("priority", 1), ("random", 2))


def concerns(mutant: cpp.Mutant | None, op: str) -> bool:
    return mutant is None or mutant.file not in GATED_ONLY or op == "gated_bottleneck"


def commands(folder: Path) -> list[list[str]]:
    out = []
    for name, source in SOURCES.items():
        path = emulator.ROOT / source if name == "guard" else Path(source)
        language = "-std=c++20" if name == "guard" else emulator._language(emulator.ROOT / source)
        flags = f"{language} {emulator.FLAGS} -DFASTADAPT_MUTATION -Icsrc -O1" + (" " + " ".join(f"-isystem{p}" for p in _torch_includes()) if name == "guard" else "")
        out.append(["g++", *flags.split(), "-c", str(path), "-o", f"{name}.o"])
    return sorted(out, key=lambda command: "inst/gated" not in str(command))  # the longest first


def _torch_includes() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return include_paths()


def link(folder: Path) -> list[str]:
    return ["g++", "-shared", *(f"{name}.o" for name in SOURCES), "-o", "_cuda.so", str(emulator._emulator(emulator.CSRC, False)), *emulator._torch_link().split()]


def prepare() -> schemata.Check:
    import ctypes

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    emulator.Machine()  # builds and loads the emulator itself, which is not mutated, before the forks
    prepared = [calls.prepare(spec) for spec in SPECS]

    def check(folder: Path, mutant: cpp.Mutant | None) -> str:
        _cuda.load_emulated(folder / "_cuda.so")
        library = ctypes.CDLL(str(folder / "_cuda.so"))
        library.fastadapt_guard()
        if mutant is not None and not mutant.static:
            ctypes.c_int.in_dll(library, "fastadapt_mutant").value = mutant.number
        own = [p for p in prepared if concerns(mutant, p.spec.op)]
        concerned = [spec for spec in CALLS if concerns(mutant, spec.op)]

        def on(number: int, step: Callable[[], str]) -> Callable[[], str]:
            policy, seed = SCHEDULES[number]
            return partial(_on_device, policy, seed, step)

        few = own[:3] + [p for p in own if p.spec.op == "gated_bottleneck"][::4]
        steps = [
            on(1, partial(calls.first_wrong, own, "emulated-cuda")),
            on(1, partial(calls.first_failing, checks.assert_single_gradients, concerned, "emulated-cuda")),
            on(1, partial(calls.first_failing, checks.assert_no_grad_path, concerned, "emulated-cuda")),
            on(1, partial(calls.relu_at_zero, "emulated-cuda", torch.bfloat16)),
            on(0, partial(calls.first_wrong, few, "emulated-cuda")),
            on(2, partial(calls.first_wrong, few, "emulated-cuda")),
        ]
        return next(filter(None, (step() for step in steps)), "")

    return check


def _on_device(policy: str, seed: int, step: Callable[[], str]) -> str:
    """What is wrong with the results, or what the emulated device found, bank conflicts included."""
    with emulator.device(policy, seed, arch=120, global_races=True) as machine:
        if said := step():
            return said
        conflicts = [kernel for kernel, counters in machine.stats().items() if counters["ldmatrix_conflicts"]]
        return f"bank conflicts in {conflicts[0]}" if conflicts else ""


RULES = cpp.Rules(spelled=(*cpp.Rules().spelled, (r"FASTADAPT_SHARED\(arena\)", "char* arena")))  # a declaration, not a call that can be deleted
FAMILY = schemata.Family("cuda", FILES, commands, ("guard.o",), link, prepare, EXPLAINED, RULES)

if __name__ == "__main__":
    sys.exit(schemata.main(FAMILY))
