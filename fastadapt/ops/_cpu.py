"""Loads the compiled CPU kernels: one library per vector level, of which this process loads the one that torch itself chose."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.backend import Call
from fastadapt.ops._library import transformed

_FOLDER = Path(__file__).parents[1]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REBUILD = "to build it: pip install --no-build-isolation --force-reinstall --no-deps . (or `make build`) in a checkout"


@functools.cache
def unavailable() -> str | None:
    """Why the CPU kernels cannot be used in this process, or None once they are loaded."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the cpu kernels are for x86-64, this is {platform.machine()}"
    capability = torch.backends.cpu.get_cpu_capability()
    level = "avx512" if capability.startswith("AVX512") else capability.lower()
    if level not in ("avx2", "avx512"):
        return f"the cpu kernels need AVX2, torch runs at CPU capability {capability}"
    record, library = _FOLDER / "_cpu_build.json", _FOLDER / f"_cpu_{level}.so"
    if not record.exists():
        return f"the cpu kernels are not built; {_REBUILD}"
    try:
        known = json.loads(record.read_text())
        built_with, levels = str(known["torch"]), [str(name) for name in known["levels"]]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{record} is damaged; {_REBUILD}"
    if built_with != (running := ".".join(torch.__version__.split(".")[:2])):
        return f"the cpu kernels were built with torch {built_with}, this is torch {running}; {_REBUILD}"
    if level not in levels:
        return f"the cpu kernels were built for {' and '.join(levels)} alone (FASTADAPT_CPU_LEVELS), torch runs at {level} here; {_REBUILD}"
    if not library.exists():
        return f"{library} is gone; {_REBUILD}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the cpu kernels could not be loaded: {error}"
    return None


def reasons(call: Call) -> list[str]:
    """Why the CPU kernels cannot run a call."""
    out = []
    if call.device != "cpu":
        out.append(f"the cpu kernels run on cpu tensors, not on {call.device}")
    if call.dtype not in _DTYPES:
        out.append(f"the cpu kernels take float32, bfloat16 and float16, not {call.dtype}")
    if not out and (why := unavailable()):
        out.append(why)
    return out


def mask(needs: list[bool]) -> int:
    """The gradients asked for, as the bit set that the raw ops take."""
    return sum(1 << i for i, need in enumerate(needs) if need)


# Ops with a way in of their own, in the order in which csrc/cpu_entrance.cpp counts them.
_ENTRANCES = ("bottleneck", "dropout_add_norm", "gated_bottleneck", "lora")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_DEMANDS = (backend.AUTO, backend.index("cpu"))


@functools.cache
def _entrances() -> dict[str, Callable[..., Any]]:
    if unavailable():
        return {}
    backend.count_too(_entered)
    # `_op` is what the overload calls with the same arguments
    return {op: getattr(torch.ops.fastadapt_cpu, f"{op}_entrance").default._op for op in _ENTRANCES}


def _entered(reset: bool) -> dict[tuple[str, str, str], int]:
    counts = torch.ops.fastadapt_cpu.entered(reset)
    return {(op, direction, "cpu"): counts[2 * i + j] for i, op in enumerate(_ENTRANCES) for j, direction in enumerate(("forward", "backward"))}


def entrance(op: str, types: tuple[type, ...]) -> Callable[..., Any] | None:
    """The short way into an op, if a call on tensors of these types may take it: nobody traces, transforms or watches it, or demands another backend.

    It returns None, and has done nothing, where a call is not right at a glance on this backend.
    """
    if (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(types)
        or backend._demand.get() not in _DEMANDS
        or torch._C._len_torch_dispatch_stack()
        or transformed()
        or torch._C._get_tracing_state()
    ):
        return None
    return _entrances().get(op)
