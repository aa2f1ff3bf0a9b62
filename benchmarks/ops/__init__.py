"""Every op against the authors' eager code and its torch.compile, over the shapes of the papers and of modern hosts. ``python -m benchmarks.ops [--quick] [--op lora]``

The calls are in the modules beside this one, which also run by themselves; which of them are timed is the table here, and nowhere else. The papers' shapes have every number of
rows, other widths and ranks a few and many, fp16 two, since few processors have a product for it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from benchmarks import measure
from fastadapt.backend import BackendError

ROWS = (16, 64, 128, 512, 4096)
ALL = (*ROWS, 32768)
FEW = (16, 4096)
FILTERS = ("rows", "width", "rank", "dtype")


@dataclass(frozen=True)
class Case:
    """A site: its op and sizes, and the numbers of rows that the full and the quick list time in fp32 and bf16; ``half``: in fp16. Parameters are fp32, as people train."""

    op: str
    width: int
    rank: int
    rows: tuple[int, ...] = FEW
    quick: tuple[int, ...] = ()
    half: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


CASES = [
    # VL-Adapter: BART-base, T5-base, and the widths of larger hosts.
    Case("bottleneck", 768, 96, rows=ALL, quick=(128, 4096), half=(16, 512)),
    Case("bottleneck", 768, 192),
    Case("bottleneck", 1024, 128),
    Case("bottleneck", 4096, 128),
    # VL-PET-large likewise, gates of the adapter's rank.
    Case("gated_bottleneck", 768, 96, rows=ALL, quick=(128, 4096), half=(16, 512)),
    Case("gated_bottleneck", 768, 192),
    Case("gated_bottleneck", 1024, 128),
    # LoRA beside square projections, and beside one up to a feed-forward's width; dropout in percent.
    Case("lora", 768, 16, rows=ALL, quick=(512, 4096)),
    Case("lora", 768, 16, rows=ROWS, quick=(4096,), options={"dropout": 10}),
    Case("lora", 768, 64),
    Case("lora", 768, 128),
    Case("lora", 1024, 16),
    Case("lora", 4096, 16),
    Case("lora", 4096, 64),
    Case("lora", 1024, 16, rows=(512, 4096), options={"out_width": 4096}),
    # Compacter on BART-base and T5-base.
    Case("phm_bottleneck", 768, 96, rows=ALL, quick=(4096,)),
    Case("phm_bottleneck", 768, 192),
    # What stands behind a sub-layer: BART's, T5's; dropout in percent.
    *(Case("dropout_add_norm", 768, 0, rows=(16, 512, 4096), quick=(4096,), options={"dropout": p, "rms": rms}) for p in (0, 10) for rms in (0, 1)),
    Case("dropout_add_norm", 4096, 0, options={"rms": 1}),
    # Four tasks in a batch.
    Case("routed_bottleneck", 768, 96, rows=ALL, quick=(4096,)),
    Case("routed_bottleneck", 1024, 128),
]


def selected(quick: bool, op: str | None = None, **only: Sequence[Any] | None) -> Iterator[tuple[Case, int, str]]:
    """Case, number of rows and dtype of every measurement of a list; ``only`` these ``rows``, ``width``, ``rank`` and ``dtype``."""
    for case in CASES:
        if op in (None, case.op):
            listed = case.quick if quick else case.rows
            for dtype, every in (("fp32", listed), ("bf16", listed), ("fp16", () if quick else case.half)):
                for rows in every:
                    of = {"rows": rows, "width": case.width, "rank": case.rank, "dtype": dtype}
                    if all(values is None or of[name] in values for name, values in only.items()):
                        yield case, rows, dtype


def asked(args: argparse.Namespace) -> Iterator[tuple[Case, int, str]]:
    """The part of a list that the options ask for."""
    return selected(args.quick, args.op, **{name: getattr(args, name, None) for name in FILTERS})


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every measurement, which is of both directions against both rivals."""
    for threads in measure.threads_of(args):
        for case, rows, dtype in asked(args):
            options = "".join(f" {name}={value}" for name, value in case.options.items())
            yield f"{case.op} {dtype} T={rows} d={case.width} r={case.rank}{options}, {threads} threads"


def call(case: Case, rows: int, dtype: str, **timing: Any) -> list[measure.Row]:
    """Runs one call of the list."""
    module = import_module(f"benchmarks.ops.{case.op}")
    sizes = {"rows": rows, "width": case.width, "rank": case.rank, "param_dtype": "fp32", **getattr(module, "OPTIONS", {}), **case.options}
    return module.run(argparse.Namespace(**sizes, **timing), dtype)


def compile_ahead(args: argparse.Namespace) -> None:
    """Compiles the rivals of a CPU's list in a process a core; in one it takes half of a run's time. The run finds Inductor's files: their keys have the graph, the shapes, the
    number of threads and the processor's level."""
    calls = [(threads, *each) for threads in measure.threads_of(args) for each in asked(args)]
    if args.device != "cpu" or len(calls) < AHEAD:
        return
    started, cores = time.perf_counter(), os.cpu_count() or 1
    print(f"compiling the rivals of {len(calls)} calls", flush=True)
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, calls))
    print(f"-- compiled in {time.perf_counter() - started:.0f} s", flush=True)


AHEAD = 16  # calls of a list that is worth a start of further processes


def compile_one(of: tuple[int, Case, int, str]) -> None:
    """In a process of its own."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else each process starts a pool too
    threads, case, rows, dtype = of
    torch.set_num_threads(threads)
    call(case, rows, dtype, device="cpu", backend="reference", rounds=0, seconds=0.0)


def run(args: argparse.Namespace) -> Iterator[list[measure.Row]]:
    """Times the list, printing as it goes: on a CPU with one thread a core and with one (the quick list with the former alone)."""
    compile_ahead(args)
    for _ in measure.threads_of(args):
        for case, rows, dtype in asked(args):
            for name in ("cpu",) if args.device == "cpu" else ("cuda", "triton"):
                try:
                    rows_of = call(case, rows, dtype, device=args.device, backend=name, rounds=args.rounds, seconds=args.seconds)
                except BackendError as error:  # such as fp32 on cuda
                    print(f"{case.op} {name} {dtype} T={rows}: not run: {error}")
                    continue
                print(*rows_of, sep="\n", flush=True)
                yield rows_of
