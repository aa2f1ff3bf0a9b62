"""What each shipped GPU kernel should take on an A100, H100 and B200, beside its limit: modelled, not run. ``python -m benchmarks.roofline [--quick]``

The times are those of `fastadapt.ops._cost`, by which backends are chosen; no GPU has confirmed them. The limit of a direction is of the plain algorithm
(`benchmarks.measure.Work`): the larger of its bytes at the memory's achievable bandwidth and its FLOPs at the rate that the library reaches in such products. The limit of a kernel
is of its own bytes and FLOPs. Registers, shared memory and resident blocks are the compiler's, as the tests record them. What only a GPU can answer is listed at the end, with the
command that answers it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_check
from fastadapt import backend
from fastadapt.backend import Call
from fastadapt.ops import _cost

ARCHS = (80, 90, 100)
OPTIONS = {**gpu_check.OPTIONS, "routed_bottleneck": {"tasks": 4}}
RANKS = {"lora": 16}  # elsewhere 96
DATA = Path(__file__).parents[1] / "tests" / "data"
# What the model calls a CUDA kernel, and what its source does.
SOURCES = {"pack": "prologue_kernel", "forward": "forward_kernel", "gates": "gates_kernel", "rows": "rows_kernel", "slabs": "slab_kernel", "reduce": "reduce_kernel"}
THREADS = 2048  # of a multiprocessor, on the three architectures
BASIS = "modelled, not run"


@dataclass(frozen=True)
class Row:
    """A kernel, or with ``kernel`` "all" a direction of a call. Microseconds are of the device; ``host_us``: what the host needs to launch them all."""

    op: str
    backend: str
    device: str
    dtype: str
    param_dtype: str
    rows: int
    width: int
    rank: int
    direction: str
    kernel: str
    flops: float
    bytes: float
    limit_us: float
    modelled_us: float
    limit_fraction: float
    bound_by: str
    tile: str = ""
    registers: int | None = None
    shared_bytes: int | None = None
    blocks_per_sm: int | None = None
    occupancy: float | None = None
    host_us: float | None = None
    basis: str = BASIS

    def __str__(self) -> str:
        head = f"{self.op:18s} {self.backend:7s} {self.device:16s} T={self.rows}" if self.kernel == "all" else ""
        parts = [
            f"{self.flops / 1e9:8.2f} GFLOP {self.bytes / 1e6:8.2f} MB: limit {self.limit_us:7.1f} us, modelled {self.modelled_us:7.1f} us ({100 * self.limit_fraction:3.0f} %)"
        ]
        parts += [f"mostly {self.bound_by}", *([self.tile] if self.tile else [])]
        if self.blocks_per_sm is not None:
            parts.append(f"{self.registers} registers, {self.shared_bytes} B shared, {self.blocks_per_sm} blocks an SM, occupancy {self.occupancy:.2f}")
        parts += [f"host {self.host_us:.0f} us"] if self.host_us is not None else []
        return f"{head:55s} {self.direction:9s}{'' if self.kernel == 'all' else self.kernel:10s} {', '.join(parts)}"


def resources(call: Call, backend: str, kernel: str) -> dict[str, Any]:
    """What the compiler made of a kernel of a call, without dropout and in bf16, with fp32 parameters; nothing where it is not recorded."""
    recorded = json.loads((DATA / f"{backend}_resources.json").read_text())["kernels"]
    found = (of_triton if backend == "triton" else of_cuda)(recorded, call, kernel) if call.dtype == torch.bfloat16 else None
    if found is None:
        return {}
    occupancy = found["blocks"] * found["threads"] / THREADS
    return {"registers": found["registers"], "shared_bytes": found["shared"], "blocks_per_sm": found["blocks"], "occupancy": occupancy}


def of_triton(recorded: dict[str, Any], call: Call, kernel: str) -> dict[str, Any] | None:
    """The record of the papers' sites."""
    if (call.width, call.rank) != (768, RANKS.get(call.op, 96)):
        return None
    return recorded.get(f"{call.op} {kernel}_kernel sm_{call.arch}")


def of_cuda(recorded: dict[str, Any], call: Call, kernel: str) -> dict[str, Any] | None:
    """The record of the shipped instance that the call takes."""
    if kernel not in SOURCES:
        return None
    gated = call.op in ("gated_bottleneck", "routed_bottleneck")
    rank = _cost.bucket(max(call.rank, call.option("gate_rank", 0)), _cost.CUDA_GATED_RANKS if gated else _cost.CUDA_RANKS)
    for prefix in (f"{call.op.split('_')[0]}_", ""):  # an op's own kernel, or the bottleneck's
        for flag in ("true", "false") if kernel in ("forward", "gates") and call.option("gate_rank", 0) else ("false",):
            pattern = rf"{prefix}{SOURCES[kernel]}<(?:\w+<)?bf16(?:, {rank})?(?:, {flag})?>+ sm_{call.arch}"
            if found := next((entry for name, entry in recorded.items() if re.fullmatch(pattern, name)), None):
                return found
    return None


def tile_of(call: Call, name: str, kernel: str) -> str:
    """The tile that a kernel takes, where the plan knows it by this name."""
    rank, dual = max(call.rank, call.option("gate_rank", 0)), bool(call.option("gate_rank", 0))
    if call.op == "phm_bottleneck":
        return f"{_cost.cuda_phm_tokens(call)} rows" if name == "cuda" and kernel in ("forward", "rows") else ""
    if name == "cuda":
        r = _cost.bucket(rank, _cost.CUDA_GATED_RANKS if call.op in ("gated_bottleneck", "routed_bottleneck") else _cost.CUDA_RANKS)
        if kernel in ("forward", "gates", "rows"):
            tile = _cost.row_tile(r, dual and kernel != "rows")
            return f"{tile.rows} rows x {tile.depth} down, {tile.columns} up, {tile.stages} stages"
        return f"{_cost.slab_tile(r)[0]} rows x {_cost.SLAB} columns" if kernel == "slabs" else ""
    known = {"forward": "gated_forward" if dual else "forward", "gates": "gates", "rows": "rows", "weights": "weights"}
    prefix = "routed_" if call.op == "routed_bottleneck" else ""
    if kernel not in known:
        return ""
    tile = _cost.triton_tile(prefix + known[kernel], rank, call)
    return ", ".join(f"{field} {value}" for field, value in tile._asdict().items() if value)


def rows_of(op: str, name: str, arch: int, t: int, width: int = 768, rank: int = 96, dtype: str = "bf16") -> Iterator[Row]:
    """Both directions of a call and their kernels."""
    bench = import_module(f"benchmarks.ops.{op}")
    device = _cost.device_of(arch)
    assert device is not None
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    call = Call(op, "cuda", dtypes[dtype], torch.float32, t, width, rank, tuple(sorted(OPTIONS.get(op, {}).items())), arch)
    plan: Any = backend._plans[op]
    if plan.limits(name, call):
        return
    model = plan.models[name](call)
    work = bench.work(argparse.Namespace(rows=t, width=width, rank=rank, param_dtype="fp32", **getattr(bench, "OPTIONS", {})), dtype)
    library = device.rate("fma" if dtype == "fp32" else "library") * 1e12
    both = {"forward": (work.forward, work.forward_bytes), "backward": (work.backward, work.backward_bytes)}
    head = (op, name, device.name, dtype, "fp32", t, width, rank)

    def limit(flops: float, moved: float) -> float:
        return 1e6 * max(flops / library, moved / (device.hbm * _cost.HBM * 1e12))

    for direction, (products, moved) in both.items():
        kernels, shared = getattr(model, direction), getattr(model, f"{direction}_shared")
        told = _cost.direction_of(direction, name, kernels, shared, device)
        flops, longest = sum(product.flops for product in products), max(told.terms, key=lambda term: term.microseconds)
        least = limit(flops, moved)
        yield Row(*head, direction, "all", flops, moved, least, told.gpu, least / told.gpu, f"{longest.dominant} of {longest.kernel}", host_us=told.host)
        for kernel, term in zip(kernels, told.terms, strict=True):
            own = limit(kernel.flops, kernel.hbm)
            about = resources(call, name, kernel.name)
            yield Row(
                *head, direction, kernel.name, kernel.flops, kernel.hbm, own, term.microseconds, own / term.microseconds, term.dominant,
                tile_of(call, name, kernel.name), **about,
            )  # fmt: skip


def calls(quick: bool) -> Iterator[tuple[str, str, int, int]]:
    """Op, backend, architecture and rows of every call."""
    return product(gpu_check.OPS, ("cuda", "triton"), ARCHS, (4096,) if quick else (512, 4096, 32768))


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every call."""
    return (f"{op} {name} sm_{arch} T={t}" for op, name, arch, t in calls(args.quick))


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Every kernel of every call; the quick list prints the directions alone."""
    print(f"{BASIS}: rates of data sheets, tiles and launches of the code; bf16 with fp32 parameters, d = 768, r = 96 (LoRA 16)")
    for op, name, arch, t in calls(args.quick):
        found = list(rows_of(op, name, arch, t, rank=RANKS.get(op, 96)))
        print(*(row for row in found if row.kernel == "all" or not args.quick), sep="\n")
        yield found
    print("\nWhat only a GPU can answer, and the command of `make gpu-check` that does:")
    print(*(f"* {question}\n    {command}" for question, command in gpu_check.questions()), sep="\n")


if __name__ == "__main__":
    from benchmarks.suites import main

    sys.exit(main("roofline"))
