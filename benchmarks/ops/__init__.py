"""Every op against the authors' eager code and its torch.compile, over the shapes of the papers and of modern hosts. ``python -m benchmarks.ops [--quick] [--op lora]``

The calls are in the modules beside this one, which also run by themselves; which of them are timed is the table here, and nowhere else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from benchmarks import measure
from fastadapt.backend import BackendError

ROWS = (16, 64, 128, 512, 4096)
ALL = (*ROWS, 32768)
FILTERS = ("rows", "width", "rank", "dtype")


@dataclass(frozen=True)
class Case:
    """A site: its op and sizes, and the numbers of rows that are timed in the full and in the quick list. ``dtypes``: of the activations; parameters are fp32, as people train."""

    op: str
    width: int
    rank: int
    rows: tuple[int, ...] = ROWS
    quick: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    options: dict[str, Any] = field(default_factory=dict)


PAPERS = {"rows": ALL, "dtypes": ("fp32", "bf16", "fp16")}
CASES = [
    # VL-Adapter: BART-base, T5-base, and the widths of larger hosts.
    Case("bottleneck", 768, 96, quick=(128, 4096), **PAPERS),
    Case("bottleneck", 768, 192),
    Case("bottleneck", 1024, 128),
    Case("bottleneck", 4096, 128),
    # VL-PET-large likewise, gates of the adapter's rank.
    Case("gated_bottleneck", 768, 96, quick=(128, 4096), **PAPERS),
    Case("gated_bottleneck", 768, 192),
    Case("gated_bottleneck", 1024, 128),
    # LoRA beside square projections, and beside one up to a feed-forward's width; dropout in percent.
    Case("lora", 768, 16, rows=ALL, quick=(512, 4096)),
    Case("lora", 768, 16, quick=(4096,), options={"dropout": 10}),
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
    *(Case("dropout_add_norm", 768, 0, quick=(4096,), options={"dropout": p, "rms": rms}) for p in (0, 10) for rms in (0, 1)),
    Case("dropout_add_norm", 4096, 0, rows=(16, 512, 4096), options={"rms": 1}),
    # Four tasks in a batch.
    Case("routed_bottleneck", 768, 96, rows=ALL, quick=(4096,)),
    Case("routed_bottleneck", 1024, 128),
]


def selected(quick: bool, op: str | None = None, **only: Sequence[Any] | None) -> Iterator[tuple[Case, int, str]]:
    """Case, number of rows and dtype of every measurement of a list; ``only`` these ``rows``, ``width``, ``rank`` and ``dtype``."""
    for case in CASES:
        if op in (None, case.op):
            for dtype in ("fp32", "bf16") if quick else case.dtypes:
                for rows in case.quick if quick else case.rows:
                    of = {"rows": rows, "width": case.width, "rank": case.rank, "dtype": dtype}
                    if all(values is None or of[name] in values for name, values in only.items()):
                        yield case, rows, dtype


def run(args: argparse.Namespace) -> list[measure.Row]:
    """Times the list, printing as it goes: on a CPU with one thread and with one a core (the quick list with those alone)."""
    found: list[measure.Row] = []
    for _ in measure.threads_of(args):
        for case, rows, dtype in selected(args.quick, args.op, **{name: getattr(args, name, None) for name in FILTERS}):
            module = import_module(f"benchmarks.ops.{case.op}")
            for name in ("cpu",) if args.device == "cpu" else ("cuda", "triton"):
                sizes = {"rows": rows, "width": case.width, "rank": case.rank, "param_dtype": "fp32", **getattr(module, "OPTIONS", {}), **case.options}
                timing = {"device": args.device, "backend": name, "rounds": args.rounds, "seconds": args.seconds}
                try:
                    rows_of = module.run(argparse.Namespace(**sizes, **timing), dtype)
                except BackendError as error:  # such as fp32 on cuda
                    print(f"{case.op} {name} {dtype} T={rows}: not run: {error}")
                    continue
                print(*rows_of, sep="\n", flush=True)
                found += rows_of
    return found
