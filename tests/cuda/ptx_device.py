"""Runs the launches of the CUDA ops in the PTX interpreter.

    with ptx_device.device() as launches, backend.use("emulated-cuda"):
        fastadapt.functional.bottleneck(...)                # CPU tensors
    launches["forward_kernel<RowTraits<bf16, 96, false>>"]  # how the kernel was launched

The ops' own host code (csrc/cuda_ops.cpp, csrc/cuda/*.cu) allocates, chooses kernels, fills their arguments and says what memory a launch may touch, as it does for the emulator.
What runs is the PTX that nvcc makes of the kernel's template.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import math
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastadapt.ops import _cuda
from tests.cuda import emulator, nvcc, ptx

CSRC = nvcc.ROOT / "csrc"
NAMESPACE = "fastadapt_cuda_ptx"
INSTANCES = sorted((CSRC / "cuda" / "inst").glob("*.cu"))


class Launch(NamedTuple):
    """Of one kernel, which is launched the same way whatever the shape; but the shared memory of the phm kernels follows their factors."""

    threads: int
    shared_bytes: int


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_uint64), ("bytes", ctypes.c_int64), ("writable", ctypes.c_int64)]


LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint * 3), ctypes.POINTER(ctypes.c_uint * 3), ctypes.c_size_t, ctypes.c_void_p)


@functools.cache
def library() -> Path:
    """The ops, registered under a namespace of their own, over the bridge."""
    ops = (CSRC / "cuda_ops.cpp").read_text()
    copy = nvcc.written(ops.replace("fastadapt_cuda_emulated", NAMESPACE), f"{NAMESPACE}.cpp")
    return emulator.build([copy, *sorted((CSRC / "cuda").glob("*.cu")), *INSTANCES, Path(__file__).parent / "kernels" / "bridge.cpp"])


@functools.cache
def _bridge() -> ctypes.CDLL:
    torch.ops.load_library(str(library()))
    bridge = ctypes.CDLL(str(library()))
    bridge.known_ranges.restype = ctypes.POINTER(Range)
    return bridge


def shipped() -> set[str]:
    """Short names of all kernels that the library can launch."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", library()], capture_output=True, text=True, check=True).stdout
    return {short(name) for name in re.findall(r"\bvoid (fastadapt::cuda::\w+_kernel<.*)", symbols)}


def short(name: str) -> str:
    """``forward_kernel<RowTraits<bf16, 96, false>>`` of a demangled name, nvcc's or g++'s."""
    name = re.sub(r"\bfastadapt::(cuda::)?", "", name.removeprefix("void ").rpartition("(")[0])
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace("> >", ">>")


@functools.cache
def kernel(demangled: str) -> ptx.Kernel:
    """The kernel of a name as g++ has it, compiled by itself: an instance file holds twenty."""
    includes = "".join(f'#include "cuda/{path.name}"\n' for path in sorted((CSRC / "cuda").glob("*.cuh")))
    name, _, parameter = demangled.rpartition("(")
    source = nvcc.written(f"{includes}template __global__ {name}(const __grid_constant__ {parameter};\n", f"instances/{re.sub(r'[^A-Za-z0-9]+', '_', short(demangled))}.cu")
    (found,) = ptx.load(nvcc.ptx(source)).kernels.values()
    return found


@contextlib.contextmanager
def device(perturb: ptx.Perturb = 0, *, run: bool = True) -> Iterator[dict[str, Launch]]:
    """Inside, what backend ``emulated-cuda`` launches runs in the interpreter, with approximations off by their bound as ``perturb`` says, or with ``run=False`` not at all. The
    dictionary tells what was launched."""
    bridge, launches, failures = _bridge(), {}, []

    def launch(name: bytes, grid: Any, block: Any, shared_bytes: int, arguments: int) -> int:
        try:
            how = Launch(math.prod(block.contents), shared_bytes)
            first = launches.setdefault(short(name.decode()), how)
            assert how == first or (name.startswith(b"void fastadapt::cuda::phm_") and how.threads == first.threads)
            if run:
                found = kernel(name.decode())
                found.launch(tuple(grid.contents), tuple(block.contents), shared_bytes, ctypes.string_at(arguments, found.param_bytes), _memory(bridge), perturb=perturb)
            return 0
        except Exception as error:  # through C++ it would be lost
            failures.append(error)
            return 1

    def raising(op: Any) -> Any:
        def call(*args: Any) -> Any:
            try:
                return op(*args)
            except RuntimeError as error:
                raise failures.pop() if failures else error from None

        return call

    launcher = LAUNCHER(launch)
    bridge.set_launcher(launcher)
    with contextlib.ExitStack() as stack:
        for path in (nvcc.ROOT / "fastadapt" / "ops").glob("*/cuda.py"):
            kernels: _cuda.Kernels = importlib.import_module(f"fastadapt.ops.{path.parent.name}.cuda").EMULATED
            ops = getattr(torch.ops, NAMESPACE)
            forward, backward = (raising(getattr(ops, name).default) for name in (kernels.op, f"{kernels.op}_backward"))
            reasons = functools.partial(_cuda._unsupported, namespace=NAMESPACE)
            stack.enter_context(mock.patch.dict(vars(kernels), {"_forward": forward, "_backward": backward, "reasons": reasons}))
        try:
            yield launches
        finally:
            bridge.set_launcher(LAUNCHER())


def _memory(bridge: ctypes.CDLL) -> ptx.Memory:
    memory, count = ptx.Memory(), ctypes.c_size_t()
    ranges = bridge.known_ranges(ctypes.byref(count))
    memory.add_ranges([(r.begin, r.bytes, bool(r.writable)) for r in ranges[: count.value]])
    return memory
