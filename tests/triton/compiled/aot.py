"""Compiles the kernels that a call would launch, for any architecture and without a GPU, and reads the machine code back.

The launches are recorded from the library's own launchers, so what is compiled here is what runs: the same tile tables, flags and argument specialisation.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastadapt.ops import _triton

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory that one block may use, CUDA C++ programming guide, table of compute capabilities."""


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside the block the launchers' launches, on CPU tensors, are recorded instead of made."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, tile: Any = None, **constants: Any) -> None:
        launches.append(Launch(kernel, grid, args, constants, _triton.launch_options(tile)))

    with mock.patch.object(_triton, "launch", record):
        yield launches


def prepared(launch: Launch, arch: int) -> tuple[ASTSource, GPUTarget, Any, Any]:
    """Source, target, backend and options of a launch, by the JIT's own specialisation of its arguments: constants for None and 1, marks where 16 divides."""
    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32))
    with mock.patch.object(triton.runtime.driver, "_active", device):
        _, _, target, backend, binder = launch.kernel.create_binder()
    bound, specialization, options = binder(*launch.arguments, **launch.constants, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(backend, launch.options, bound, specialization, options)
    return ASTSource(launch.kernel, signature, constants, attributes), target, backend, options


def compile_launch(launch: Launch, arch: int) -> Any:
    source, target, _, options = prepared(launch, arch)
    return triton.compile(source, target=target, options=options.__dict__)


def leaves(name: str, kind: Any, value: Any) -> Iterator[str]:
    """Names of what a kernel gets of an argument at run time: PROBLEMS.0.stride_dy, say."""
    if isinstance(kind, tuple):
        for key, each, of in zip(getattr(value, "_fields", range(len(kind))), kind, value, strict=True):
            yield from leaves(f"{name}.{key}", each, of)
    elif kind != "constexpr":
        yield name


def intermediate_code(launch: Launch, arch: int = 80) -> str:
    """The optimised TTIR of a launch, the first stage of its compilation, in a fraction of the time; arguments by their names, also those that Triton before 3.9 numbers."""
    source, target, backend, options = prepared(launch, arch)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    code = str(backend.make_ttir(module, {}, options, arch))
    given = {**dict(zip(launch.kernel.arg_names, launch.arguments)), **launch.constants}
    names = [leaf for name, kind in source.signature.items() for leaf in leaves(name, kind, given.get(name))]
    printed = re.findall(r"%([\w.]+): (?=[!if])", code[code.index("tt.func") : code.index(" attributes ")])
    new = dict(zip(printed, names, strict=True))
    return re.sub(r"%([\w.]+)", lambda found: f"%{new.get(found[1], found[1])}", code)


_inspected: dict[str, Code] = {}


class Code(NamedTuple):
    """The machine code of a kernel, counted."""

    registers: int
    stack: int
    shared: int
    local_instructions: int
    matrix_instructions: int
    instructions: int


def inspect(compiled: Any) -> Code:
    if compiled.hash in _inspected:
        return _inspected[compiled.hash]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage, sass = (
            subprocess.run([BIN / "cuobjdump", option, f.name], capture_output=True, text=True, check=True, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    names = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE))
    count = lambda *prefixes: sum(n for name, n in names.items() if name.startswith(prefixes))
    assert count("EXIT") and sum(names.values()) > 20, "the disassembly was not understood"
    matrix = sum(n for name, n in names.items() if name in ("HMMA", "HGMMA") or (name.startswith("UTC") and name.endswith("MMA")))
    code = _inspected[compiled.hash] = Code(registers, stack, compiled.metadata.shared, count("LDL", "STL"), matrix, sum(names.values()))
    return code
