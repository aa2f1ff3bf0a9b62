"""Memory of each site and of whole models: what autograd keeps for backward, and the most that a step allocates. ``python -m benchmarks.memory [--quick]``

Kept: bytes of storages that saved tensors lie in, beyond the arguments of the call (of a model: parameters and batch). Peak: what torch's allocator hands out during forward and
backward, at its highest, above what was there before; gradients are part of it. The same dtypes and batch for everyone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastadapt
from benchmarks import launches, models
from fastadapt import functional
from tests.ops.specs import Spec


@dataclass(frozen=True)
class Row:
    """One site or model, as one of its rivals computes it."""

    what: str
    who: str
    dtype: str
    rows: int
    width: int
    rank: int
    kept_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        bytes_ = f"kept {self.kept_bytes / 2**20:8.2f} MB, peak {self.peak_bytes / 2**20:8.2f} MB"
        return f"{self.what:38s} {self.who:10s} {self.dtype} T={self.rows} d={self.width} r={self.rank}: {bytes_}"


def kept(f: Callable[[], Any], own: Iterable[Tensor]) -> int:
    """Bytes that ``f``, a forward, saves for backward in other storages than those of ``own``."""
    known, saved = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(t: Tensor) -> Tensor:
        if (storage := t.untyped_storage()).data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _ = f()  # the graph holds what it saved, so that no storage takes the place of another
    return sum(saved.values())


def peak(f: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that ``f`` holds at a time, above what there was before; the second call of two, so that nothing made once counts.

    What the CPU kernels work in counts for each call, although a thread keeps it for the next: they keep nothing where torch fills new memory.
    """
    if device == "cuda":
        f()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        f()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            f()
    finally:
        torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])
    events = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(recorded.profiler.kineto_results.events()) if e.name() == "[memory]")  # type: ignore[union-attr]
    return max(accumulate((size for _, _, size in events), initial=0))


def of_site(site: str, spec: Spec, device: str) -> list[Row]:
    """The authors' code and ours."""
    leaves = {name: t.to(device).requires_grad_() for name, t in spec.draw(0).items()}
    dy = spec.cotangent(0).to(device)
    rows = []
    for who, forward in (("eager", lambda: launches.published(spec, leaves)), ("fastadapt", lambda: spec.call(functional, leaves))):

        def step(forward: Callable[[], Tensor] = forward) -> object:
            return torch.autograd.grad(forward(), list(leaves.values()), dy)

        rows.append(Row(site, who, "bf16", torch.Size(spec.lead).numel(), spec.width, spec.rank, kept(forward, leaves.values()), peak(step, device)))
    return rows


def of_model(name: str, method: str, s: models.Sizes, device: str) -> list[Row]:
    """The frozen base, the authors' code (for LoRA PEFT's) and ours."""
    host, rows = models.HOSTS[name], []
    inputs = models.to_device(host.batch(s), device)
    every = {"base": models.frozen_base(host, s), **models.adapted(host, method, s)}
    for who, model in every.items():
        model.to(device).train()
        own = [*model.parameters(), *model.buffers(), *(t for t in torch.utils._pytree.tree_leaves(inputs) if isinstance(t, Tensor))]

        def forward(model: Any = model) -> Tensor:
            return model(**inputs).loss

        def step(model: Any = model) -> None:
            model.zero_grad()
            models.training_step(model, inputs, None)

        with models.authors() if who == "eager" else fastadapt.backend.use("auto"):
            numbers = kept(forward, own), peak(step, device)
        rows.append(Row(f"{name} {method}, {s.name}", "fastadapt" if who == "ours" else who, "fp32", s.rows, s.width, host.methods[method](s)["rank"], *numbers))
    return rows


def selected(quick: bool) -> tuple[dict[str, Spec], list[tuple[str, str, models.Sizes]]]:
    """Every site of `benchmarks.launches`, and the models of `benchmarks.models`; in the quick list two of them."""
    return launches.sites(512 if quick else 4096), [("VL-BART", "vlpet", models.ONE), ("LLaVA", "lora", models.ONE)] if quick else models.selected(False)


def listed(args: argparse.Namespace) -> Iterator[str]:
    """A line for every site and model."""
    sites, hosts = selected(args.quick)
    yield from sites
    yield from (f"{name} {method}, {s.name}" for name, method, s in hosts)


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measures the list, printing as it goes."""
    sites, hosts = selected(args.quick)
    for rows in chain((of_site(site, spec, args.device) for site, spec in sites.items()), (of_model(*each, args.device) for each in hosts)):
        print(*rows, sep="\n", flush=True)
        yield rows


if __name__ == "__main__":
    from benchmarks.suites import main

    sys.exit(main("memory"))
