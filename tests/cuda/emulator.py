"""Runs the CUDA sources on the host: builds them with the emulator of csrc/emulator, loads them, and says how the emulated device behaves.

    library = emulator.load(emulator.build([source]))        # C functions of .cu files, through ctypes
    with emulator.device("random", seed=3) as machine:       # an error of a kernel raises at the end
        library.launch_it(x.data_ptr(), ...)
    machine.stats()                                          # {kernel: {"mma": ..., "cp_async_bytes": ...}}

Sources that include torch register ops: ``torch.ops.load_library(build([...]))``. All libraries of a process share one emulator. Objects are kept under build/emulator by the
contents of all that went into them.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import math
import mmap
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "emulator"
CXX = os.environ.get("CXX", "g++")
POLICIES = ("in_order", "priority", "random")
# -fwrapv: a 32-bit offset that overflows does what it does on a GPU.
FLAGS = "-fPIC -fno-gnu-unique -fwrapv -ffp-contract=off -Wall -Wno-unknown-pragmas -DFASTADAPT_EMULATED=1"
# Fibers have stacks that AddressSanitizer does not know, so it watches the heap and globals only.
ASAN = "-fsanitize=address --param asan-stack=0 -fno-sanitize-address-use-after-scope"
UNDER_ASAN = "FASTADAPT_EMULATOR_ASAN"


class EmulatorError(RuntimeError):
    """What a kernel did wrong, with its line."""


# ---- Build


def build(sources: Sequence[str | Path], *, asan: bool | None = None, defines: Iterable[str] = (), flags: str = "", csrc: Path = CSRC) -> Path:
    """A library of .cu and .cpp files that runs on the emulator.

    ``asan`` instruments them with AddressSanitizer; None: as `under_asan` says, in whose processes alone such a library loads. ``csrc`` is the tree whose common headers and
    emulator are used, for sources that lie in a changed copy of it.
    """
    asan = UNDER_ASAN in os.environ if asan is None else asan
    csrc = csrc.resolve()
    flags = f"{flags} {' '.join(f'-D{d}' for d in defines)} -I{csrc} {f'-O1 -g1 {ASAN}' if asan else '-O2'}"
    link = f"-Wl,-z,{'lazy' if asan else 'defs'} {_emulator(csrc, asan)}"  # instrumented libraries take what they need from the process
    return _link({Path(source).resolve(): flags for source in sources}, link, asan)


def load(library: Path) -> ctypes.CDLL:
    """Its C functions."""
    return ctypes.CDLL(str(library))


def under_asan(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``arguments`` in a process in which every `build` is instrumented. An error ends it with a report and a status that is not 0."""
    preload = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    env = {**os.environ, UNDER_ASAN: "1", "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def _emulator(csrc: Path, asan: bool) -> Path:
    """The emulator is one library, which is also its Python module: the libraries of kernels link to it, so that there is one device."""
    import pybind11

    # The binding is all compile time (8 s at -O2) and no run time.
    python = f"-O0 -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
    return _link({csrc / "emulator" / "emulator.cpp": f"-O3 {ASAN if asan else ''}", csrc / "emulator" / "bind.cpp": python}, "", asan)


def _link(sources: dict[Path, str], link: str, asan: bool) -> Path:
    """Compiles sources, each with its flags, in so far as that has not been done."""
    commands = {source: f"{_language(source)} {FLAGS} {flags}" for source, flags in sources.items()}
    keys = {source: _key(source, command) for source, command in commands.items()}
    link = f"{ASAN if asan else ''} {link} {_torch_link() if any(map(_uses_torch, sources)) else ''}".strip()
    stem = next(iter(sources)).stem
    target = FOLDER / f"{stem}-{_hash(link, *keys.values())}.so"
    if target.exists():
        return target
    (FOLDER / "objects").mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock, tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever else wants the same library waits for it
        if target.exists():
            return target
        objects = {source: FOLDER / "objects" / f"{source.stem}-{key}.o" for source, key in keys.items()}
        part = f"$out.{os.getpid()}"  # moved into place when complete: what lies there is right
        rules = [
            f"rule cc\n  command = {CXX} $flags -c $in -o {part} && mv {part} $out",
            f"rule ld\n  command = {CXX} -shared $in {link} -o {part} && mv {part} $out",
            *(f"build {path}: cc {source}\n  flags = {commands[source]}" for source, path in objects.items() if not path.exists()),
            f"build {target}: ld {' '.join(map(str, objects.values()))}",
        ]
        (Path(folder) / "build.ninja").write_text("\n".join(rules) + "\n")
        beside = Path(sys.executable).parent / "ninja"
        done = subprocess.run([str(beside if beside.exists() else "ninja"), "-j2"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator's build of {', '.join(source.name for source in sources)} failed:\n{done.stdout}{done.stderr}")
    return target


def _language(source: Path) -> str:
    if _uses_torch(source):
        from torch.utils.cpp_extension import include_paths

        return "-x c++ -std=c++20 -DTORCH_TARGET_VERSION=0x020a000000000000ULL " + " ".join(f"-isystem {p}" for p in include_paths())
    return "-x c++ -std=c++17"


def _uses_torch(source: Path) -> bool:
    return bool(re.search(r"^\s*#include\s*<(torch|ATen|c10)/", source.read_text(), re.M))


def _torch_link() -> str:
    from torch.utils.cpp_extension import library_paths

    return " ".join(f"-L{p} -Wl,-rpath,{p}" for p in library_paths()) + " -lc10 -ltorch_cpu"


def _key(source: Path, flags: str) -> str:
    """Of a source, all that it includes in quotes, and how it is compiled."""
    folders = [Path(f) for f in re.findall(r"-I(\S+)", flags)]
    seen: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen[path] = text = path.read_text()
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.M):
                waiting += [found for folder in (path.parent, *folders) if (found := (folder / name).resolve()).exists()][:1]
    return _hash(_compiler(), torch.__version__, flags, *(part for path in sorted(seen) for part in (str(path), seen[path])))


@cache
def _compiler() -> str:
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# ---- The device


class Machine:
    """The emulated device that the libraries of ``csrc`` run on."""

    def __init__(self, csrc: Path = CSRC) -> None:
        path = _emulator(csrc.resolve(), UNDER_ASAN in os.environ)
        self._module = _module(path)

    def configure(
        self,
        policy: str = "priority",
        seed: int = 0,
        *,
        races: bool = True,
        defer: bool = True,
        global_races: bool = False,
        patterns: bool = False,
        arch: int = 80,
        approx_error: int | tuple[int, int] = 0,
    ) -> None:
        """How launches run from now on; the options of csrc/emulator/emulator.h. ``approx_error``: 1 or -1 adds the documented worst-case error of approximate instructions in that
        direction, a pair names exp2's and the reciprocal's (a sigmoid is worst where they differ)."""
        exp2, rcp = approx_error if isinstance(approx_error, tuple) else (approx_error, approx_error)
        self._module.configure(
            policy=POLICIES.index(policy),
            seed=seed,
            races=races,
            defer=defer,
            global_races=global_races,
            patterns=patterns,
            arch=arch,
            exp2_error=exp2,
            rcp_error=rcp,
        )

    def last_error(self) -> str:
        """Of the latest launch that failed since `configure`; empty if none did."""
        return self._module.last_error()

    def stats(self, reset: bool = True) -> dict[str, dict[str, int]]:
        """Counters of each kernel, over all launches since the last reset."""
        return self._module.stats(reset)

    def register(self, *tensors: torch.Tensor, writable: bool = True) -> None:
        """From the first call on, kernels may touch registered tensors only, and store to writable ones only. The gaps between the rows of a matrix do not belong to it."""
        for t in tensors:
            if t.numel():
                gaps = t.dim() == 2 and t.stride(1) == 1 and t.stride(0) > t.shape[1] and t.shape[0] > 1
                for part in t.unbind(0) if gaps else (t,):
                    extent = 1 + sum((n - 1) * s for n, s in zip(part.shape, part.stride(), strict=True))
                    self._module.register_range(part.data_ptr(), extent * part.element_size(), writable)

    def clear_ranges(self) -> None:
        """Every address is allowed again."""
        self._module.clear_ranges()


@cache
def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastadapt_emulator", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def device(policy: str = "priority", seed: int = 0, *, csrc: Path = CSRC, **options: Any) -> Iterator[Machine]:
    """A new device: counters at 0, no ranges, the options of `Machine.configure`. At the end, an error of any launch raises `EmulatorError`, whether or not its status was seen."""
    machine = Machine(csrc)
    machine.configure(policy, seed, **options)
    machine.clear_ranges()
    machine.stats(reset=True)
    try:
        yield machine
        if error := machine.last_error():
            raise EmulatorError(error)
    except BaseException as error:
        if (text := machine.last_error()) and not isinstance(error, EmulatorError):
            error.add_note(f"the emulator: {text}")
        raise
    finally:
        machine.clear_ranges()


def schedules(count: int = 3) -> list[tuple[str, int]]:
    """The fixed schedule and ``count`` seeds of each random one."""
    return [("in_order", 0), *((policy, seed) for policy in POLICIES[1:] for seed in range(count))]


def sparse(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix of zeros that takes memory only where it is written, for offsets past 2^31 elements."""
    bytes_ = rows * width * dtype.itemsize
    anonymous = mmap.mmap(-1, math.ceil(bytes_ / mmap.PAGESIZE) * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))
    return torch.frombuffer(anonymous, dtype=dtype, count=rows * width).view(rows, width)


def apart(t: torch.Tensor) -> torch.Tensor:
    """A copy, strides and all, with 64 KB on both sides that belong to nobody: an access outside it is not by chance one inside a neighbour."""
    margin = 2**16 // t.element_size()
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return torch.zeros(extent + 2 * margin, dtype=t.dtype)[margin : margin + extent].as_strided(t.shape, t.stride(), margin).copy_(t)
