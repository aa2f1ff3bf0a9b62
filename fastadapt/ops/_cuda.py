"""Loads the compiled CUDA kernels and says why they cannot run a call. For tests: the same kernels in an emulator, which take CPU tensors, as the backend ``emulated-cuda``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadapt.backend import Call
from fastadapt.ops._cpu import mask

_FOLDER = Path(__file__).parents[1]
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Type` of csrc/include/bottleneck.h
_REBUILD = (
    "to build them, in a checkout have nvcc 12.8 or newer (or pip install '.[cuda-build]'), then: FASTADAPT_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."
)
# The CUDA runtime is linked into the library, so its major version decides the least driver (version of CUDA, and its own), whatever runtime torch has. Code compressed for size
# needs 12.4.
_DRIVERS = {12: (12040, "550"), 13: (13000, "580")}


class Build(NamedTuple):
    """What setup.py recorded: the compute capabilities that the library has code for, the one that a driver can compile for newer devices from, and why there is no library."""

    archs: tuple[str, ...] = ()
    ptx: str = ""
    reason: str | None = None

    def covers(self, arch: int) -> bool:
        """Code for 8.0 runs on 8.6 and not on 9.0; PTX for 8.0 is compiled at load for anything newer."""
        exact = any(int(code) // 10 == arch // 10 and int(code) <= arch for code in self.archs)
        return exact or (bool(self.ptx) and int(self.ptx) <= arch)


@functools.cache
def build() -> Build:
    """What was built beside this package."""
    record = _FOLDER / "_cuda_build.json"
    try:
        known = Build(**json.loads(record.read_text())) if record.exists() else Build(reason="this installation did not try")
    except (OSError, ValueError, TypeError):
        return Build(reason=f"{record} is damaged")
    if known.reason is None and not (_FOLDER / "_cuda.so").exists():
        return Build(reason="the library that was built is gone")
    return known


@functools.cache
def library() -> str | None:
    """Loads the library, which every torch from 2.10 on can, with or without CUDA; why it could not be, or None. (Two threads at once are harmless: a file is loaded once.)"""
    if (reason := build().reason) is not None:
        return f"the cuda kernels were not built: {reason}; {_REBUILD}"
    try:
        torch.ops.load_library(str(_FOLDER / "_cuda.so"))
    except OSError as error:
        return f"the cuda kernels could not be loaded: {error}"
    return None


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot be used in this process, or None."""
    if why := library():
        return why
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    runtime, driver = (torch.ops.fastadapt_cuda.runtime_version(), torch.ops.fastadapt_cuda.driver_version())
    if driver == 0:
        return "there is no NVIDIA driver"
    least, name = _DRIVERS.get(runtime // 1000, (runtime, "of that version"))
    if driver < least:
        needed, found = (f"{version // 1000}.{version % 1000 // 10}" for version in (least, driver))
        return f"the cuda kernels need a driver for CUDA {needed} (driver {name} or newer), this one is for CUDA {found}"
    if torch.ops.fastadapt_cuda.device_count() == 0 or not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def reasons(call: Call) -> list[str]:
    """Why the CUDA kernels cannot run a call."""
    if call.device != "cuda":
        return [f"the cuda kernels run on CUDA tensors, not on {call.device}"]
    out = _unsupported(call, "fastadapt_cuda" if library() is None else None)
    if why := unavailable():
        out.append(why)
    elif call.arch and not build().covers(call.arch):
        out.append(f"the cuda kernels were built for sm_{', sm_'.join(build().archs)}, the device is sm_{call.arch}")
    return out


def _unsupported(call: Call, namespace: str | None) -> list[str]:
    """What the kernels do not take, whatever the device. The limits of shapes are the compiled code's own."""
    if call.op == "dropout_add_norm":
        return _unsupported_norm(call, namespace)
    if call.dtype not in (torch.bfloat16, torch.float16):
        return [f"the cuda kernels take bfloat16 and float16, not {call.dtype}"]
    if call.param_dtype not in (call.dtype, torch.float32):
        return [f"the cuda kernels take parameters in {call.dtype} and float32, not {call.param_dtype}"]
    if call.option("tasks", 0) and call.rows > 2**31 - 256:
        return [f"the cuda kernels route at most 2^31 - 256 rows, not {call.rows}"]
    if namespace is None:
        return []
    ops, types = getattr(torch.ops, namespace), (_TYPES[call.dtype], _TYPES[call.param_dtype])
    if call.op == "phm_bottleneck":
        why = ops.phm_why_not(*types, call.width, call.rank, call.option("division", 1), call.option("factor_rank", 1))
    else:
        widths = (call.width, call.option("out_width", call.width))
        why = next(filter(None, (ops.why_not(*types, width, call.rank, call.option("gate_rank", 0)) for width in widths)), "")
        if tasks := call.option("tasks", 0):
            why = why or ops.routed_why_not(call.rows, call.width, tasks)
    return [why] if why else []


def _unsupported_norm(call: Call, namespace: str | None) -> list[str]:
    if call.dtype not in _TYPES:
        return [f"the cuda kernels take bfloat16, float16 and float32, not {call.dtype}"]
    if namespace is None:
        return []
    sum_dtype = torch.float32 if call.option("wide", False) else call.dtype
    param_dtype = sum_dtype if call.param_dtype == call.dtype else call.param_dtype  # x's: there may be no parameters
    why = getattr(torch.ops, namespace).norm_why_not(_TYPES[call.dtype], _TYPES[sum_dtype], _TYPES.get(param_dtype, -1), call.width, call.rows)
    return [why] if why else []


_emulated: list[Path] = []


def load_emulated(path: Path) -> None:
    """Makes ``use("emulated-cuda")`` possible in this process with the library that tests/cuda/emulator.py builds."""
    if not _emulated:
        torch.ops.load_library(str(path))
        _emulated.append(path)


def emulated_reasons(call: Call) -> list[str]:
    """Why the emulated CUDA kernels cannot run a call."""
    if not _emulated:
        return ["the emulated cuda kernels are for tests, which build and load them (tests/cuda/emulator.py)"]
    out = [] if call.device == "cpu" else [f"the emulated cuda kernels run on CPU tensors, not on {call.device}"]
    return out + _unsupported(call, "fastadapt_cuda_emulated")


class Kernels:
    """Launchers of an op on the CUDA kernels, or on the emulated ones."""

    def __init__(self, op: str, *, emulated: bool = False) -> None:
        self.op, self.namespace = op, "fastadapt_cuda_emulated" if emulated else "fastadapt_cuda"
        self.reasons: Callable[[Call], list[str]] = emulated_reasons if emulated else reasons

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        return self._forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, ...]:
        *tensors_and_options, needs = args
        return self._backward(*tensors_and_options, mask(needs))

    # The raw ops exist once the library is loaded.
    @functools.cached_property
    def _forward(self) -> Any:
        return getattr(getattr(torch.ops, self.namespace), self.op).default

    @functools.cached_property
    def _backward(self) -> Any:
        return getattr(getattr(torch.ops, self.namespace), f"{self.op}_backward").default
