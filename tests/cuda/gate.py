"""What the compiler made of every shipped CUDA kernel, per architecture: registers, stack, spills, shared memory, matrix and copy instructions, and blocks a multiprocessor.

    python -m tests.cuda.gate --write              # tests/data/cuda_resources.json, which test_gate.py compares with
    python -m tests.cuda.gate --table [forward]    # a table of the recorded numbers, of kernels whose name has a word in it

The code is read back from fastadapt/_cuda.so where that is newer than the sources, and compiled for the purpose where it is not.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastadapt.ops import _cuda
from tests.cuda import nvcc, ptx_device

ARCHS = (80, 90, 100, 120)
RECORD = nvcc.ROOT / "tests" / "data" / "cuda_resources.json"
LIBRARY = nvcc.ROOT / "fastadapt" / "_cuda.so"
BIN = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"
"""Triton's copy of cuobjdump, the newest at hand: it reads what older compilers wrote."""


class Multiprocessor(NamedTuple):
    """CUDA C++ programming guide, "Technical Specifications per Compute Capability". Shared memory in KB: of the multiprocessor, and what one block may have."""

    threads: int
    blocks: int
    shared: int
    block_shared: int


LIMITS = {80: Multiprocessor(2048, 32, 164, 163), 90: Multiprocessor(2048, 32, 228, 227), 100: Multiprocessor(2048, 32, 228, 227), 120: Multiprocessor(1536, 24, 100, 99)}


def blocks_per_multiprocessor(arch: int, threads: int, registers: int, shared_bytes: int) -> int:
    """How many blocks of a kernel are resident at once.

    64K registers in four parts, one for each of the schedulers that warps are dealt to; a warp gets its registers in units of 256. Shared memory goes in units of 128 bytes, and
    the system takes 1 KB a block.
    """
    limits, warps = LIMITS[arch], -(-threads // 32)
    if shared_bytes > limits.block_shared * 1024:
        return 0
    warp_registers = -(-registers * 32 // 256) * 256
    by_registers = 4 * (16384 // warp_registers) // warps
    by_shared = limits.shared * 1024 // (-(-shared_bytes // 128) * 128 + 1024)
    return min(limits.blocks, limits.threads // (32 * warps), by_registers, by_shared)


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int  # LDL and STL
    threads: int
    shared: int  # static and dynamic
    blocks: int
    matrix: int  # HMMA
    copies: int  # LDGSTS of 16 bytes
    narrow_copies: int
    instructions: int


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")


def inspect(files: Iterable[Path], arch: int, launches: dict[str, ptx_device.Launch]) -> dict[str, Resources]:
    """The kernels of cubins or libraries by their short names."""
    kernels = {}
    for file in files:
        usage = {name: tuple(map(int, numbers)) for name, *numbers in _USAGE.findall(_cuobjdump(file, arch, "--dump-resource-usage"))}
        code = _cuobjdump(file, arch, "-sass")
        sections = {name.strip(): body for name, body in (part.split("\n", 1) for part in code.split("Function : ")[1:])}
        assert usage.keys() == sections.keys(), f"{file}: the disassembly was not understood"
        for mangled, name in zip(usage, _demangled(usage)):
            counts = collections.Counter(_INSTRUCTION.findall(sections[mangled]))
            assert counts["EXIT"] and sum(counts.values()) > 20, f"{name}: the disassembly was not understood"
            kernels[name] = _resources(counts, usage[mangled], launches[name], arch)
    return kernels


def _resources(counts: collections.Counter[str], usage: tuple[int, int, int], launch: ptx_device.Launch, arch: int) -> Resources:
    of = lambda *names: sum(n for opcode, n in counts.items() if opcode.split(".")[0] in names)
    wide = sum(n for opcode, n in counts.items() if opcode.startswith("LDGSTS.") and opcode.endswith(".128"))
    registers, stack, static = usage
    # From sm_90 on the compiler's number has the system's 1 KB in it, of kernels that use shared memory at all.
    shared = max(0, static - (1024 if arch >= 90 else 0)) + launch.shared_bytes
    blocks = blocks_per_multiprocessor(arch, launch.threads, registers, shared)
    return Resources(registers, stack, of("LDL", "STL"), launch.threads, shared, blocks, of("HMMA"), wide, of("LDGSTS") - wide, sum(counts.values()))


def _cuobjdump(file: Path, arch: int, option: str) -> str:
    select = ["-arch", f"sm_{arch}"] if file.suffix == ".so" else []
    path = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}  # it calls nvdisasm
    return subprocess.run([BIN / "cuobjdump", *select, option, file], capture_output=True, text=True, check=True, env=path).stdout


def _demangled(names: Iterable[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [ptx_device.short(line) for line in text.splitlines()]


def compiled(arch: int, types: Iterable[str]) -> list[Path]:
    """Files with the shipped kernels' machine code; from the library, of all types."""
    sources = [p for folder in ("common", "cuda", "include") for p in (ptx_device.CSRC / folder).rglob("*") if p.is_file()]
    fresh = LIBRARY.exists() and LIBRARY.stat().st_mtime > max(p.stat().st_mtime for p in sources)
    if fresh and str(arch) in _cuda.build().archs:
        return [LIBRARY]
    return [nvcc.cubin(source, arch) for source in ptx_device.INSTANCES if source.stem.endswith(tuple(types))]


@functools.cache
def launches() -> dict[str, ptx_device.Launch]:
    """How the library launches each of its kernels: its host code runs, the kernels do not."""
    from tests.cuda.test_ptx_ops import ALL_CASES, CASES  # the calls that launch them all
    from tests.ops import checks
    from tests.ops.specs import PHM

    # First the sizes by which the phm kernels' shared memory is judged.
    papers = [PHM(lead=(32,), width=width, rank=96, dtype=dtype) for width in (768, 772) for dtype in (torch.bfloat16, torch.float16)]
    with ptx_device.device(run=False) as found:
        for spec in [*papers, *CASES, *ALL_CASES]:
            checks.fused(spec, "emulated-cuda", spec.draw(0), spec.cotangent(0))
    return found


TYPES = ("bf16", "fp16", "fp32")


def measured(archs: Iterable[int] = ARCHS, types: Iterable[str] = TYPES) -> dict[str, dict[str, int]]:
    """``{"forward_kernel<...> sm_80": {"registers": ..., ...}}``."""
    return {f"{name} sm_{arch}": r._asdict() for arch in archs for name, r in inspect(compiled(arch, types), arch, launches()).items() if of_types(name, types)}


def of_types(name: str, types: Iterable[str]) -> bool:
    return ("bf16" if "bf16" in name else "fp16" if "half" in name else "fp32") in types


def recorded() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def write() -> None:
    """The record, one line a kernel and architecture, and the tables in the sources."""
    found = measured()
    for path, text in headers(found).items():
        if path.read_text() != text:  # a touched source is compiled again
            path.write_text(text)
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(found.items(), key=lambda item: _order(item[0])))
    RECORD.write_text(f'{{\n "nvcc": "{nvcc.version()}",\n "kernels": {{\n{rows}\n }}\n}}\n')


_ABOVE = re.compile(r"(// (\w+)'s resources[^\n]*\n)(?://   [^\n]*\n)*")


def headers(kernels: dict[str, dict[str, int]]) -> dict[Path, str]:
    """The kernels' sources with the table above each kernel as it should be: bf16's numbers, which are fp16's too but for a register or two, and fp32's."""
    texts = {}
    for path in sorted((ptx_device.CSRC / "cuda").glob("*.cuh")):
        texts[path] = _ABOVE.sub(lambda m: m[1] + _above(m[2], kernels), path.read_text())
    return texts


def _above(kernel: str, kernels: dict[str, dict[str, int]]) -> str:
    keys = sorted({key.rsplit(" sm_", 1)[0] for key in kernels if key.startswith(f"{kernel}<") and ("bf16" in key or "<float, " in key)}, key=_order)
    names = {key: _name(key) for key in keys}
    width = max(10, *map(len, names.values()))
    lines = [f"//   {'x, v, threads of a row' if width > 10 else 'rank':{width}}{'threads':>9}{'shared':>9}   {'registers':22}blocks"]
    for key, name in names.items():
        rows = [kernels[f"{key} sm_{arch}"] for arch in ARCHS]
        registers, blocks = (" / ".join(str(row[column]) for row in rows) for column in ("registers", "blocks"))
        lines.append(f"//   {name:{width}}{rows[0]['threads']:9}{rows[0]['shared']:9}   {registers:22}{blocks}")
    return "\n".join(lines) + "\n"


def _name(key: str) -> str:
    """Of an instance, in the table of its template."""
    if norm := re.search(r"NormTraits<(\w+), (\w+), (\d+), (\w+), (\w+)>", key):
        *types, lanes, whole, sums = norm.groups()
        return ", ".join([*(t.replace("float", "fp32") for t in types), lanes, *["whole"] * (whole == "true"), *["sums"] * (sums == "true")])
    if "PhmTraits" in key:
        return "whole" if "true" in key else "not whole"
    rank = re.search(r", (\d+)(?:, (true|false))?>", key)
    flag = ", drops" if "Lora" in key else ", dual"
    return "any" if rank is None else rank[1] + (flag if rank[2] == "true" else "")


def _order(key: str) -> list[Any]:
    """Numbers in a name as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def table(word: str = "") -> str:
    """A row a kernel; registers, blocks a multiprocessor and instructions for each architecture."""
    kernels: dict[str, dict[str, dict[str, int]]] = collections.defaultdict(dict)
    for key, row in recorded()["kernels"].items():
        name, arch = key.rsplit(" sm_", 1)
        if word in name:
            kernels[name][arch] = row
    heads = [f"{what} {' / '.join(map(str, ARCHS))}" for what in ("registers", "blocks", "instructions")]
    lines = ["| " + " | ".join(["kernel", "threads", "shared", "HMMA", "LDGSTS", *heads]) + " |", "|---" * (5 + len(heads)) + "|"]
    for name, rows in kernels.items():
        first = next(iter(rows.values()))
        per_arch = [" / ".join(str(rows[str(arch)][column]) for arch in ARCHS) for column in ("registers", "blocks", "instructions")]
        lines.append("| " + " | ".join([f"`{name}`", *(str(first[c]) for c in ("threads", "shared", "matrix", "copies")), *per_arch]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", nargs="?", const="", metavar="WORD")
    arguments = parser.parse_args()
    if not arguments.write and arguments.table is None:
        parser.print_help(sys.stderr)
    if arguments.write:
        write()
    if arguments.table is not None:
        print(table(arguments.table))
