"""Compiles CUDA sources to PTX or cubins without a GPU. Results are kept by the code of the source and of everything it includes, and the flags, so a second time is free."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "cuda"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]  # setup.py's


@functools.cache
def find() -> Path | None:
    """nvcc from PATH, CUDA_HOME or pip's nvidia-cuda-nvcc; None if there is none."""
    pip = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
    candidates = [shutil.which("nvcc"), os.environ.get("CUDA_HOME") and Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc", pip]
    return next((Path(path) for path in candidates if path and os.access(path, os.X_OK)), None)


def missing() -> str | None:
    """Why tests that compile are skipped, or None."""
    if os.environ.get("FASTADAPT_TEST_NO_COMPILER") == "1":
        return "needs nvcc and a C++ compiler (FASTADAPT_TEST_NO_COMPILER=1 says that there is none)"
    return None if find() else "needs nvcc: on PATH, in CUDA_HOME, or pip install '.[cuda-build]'"


@functools.cache
def version() -> str:
    """Release and build, such as 13.0.88."""
    return re.search(r"release [\d.]+, V([\d.]+)", subprocess.run([find(), "--version"], capture_output=True, text=True, check=True).stdout)[1]


def ptx(source: Path, flags: Iterable[str] = ()) -> str:
    """The PTX of a source for compute_80, with line numbers."""
    return _ptx(source, flags).read_text()


def cubin(source: Path, arch: int, flags: Iterable[str] = ()) -> Path:
    """The machine code of a source for one architecture (80, 90, 100, 120), made from its PTX for compute_80 as setup.py's is."""
    return _compiled(_ptx(source, flags), ["-cubin", f"-arch=sm_{arch}"])


def _ptx(source: Path, flags: Iterable[str]) -> Path:
    return _compiled(source, ["-ptx", "-arch=compute_80", "-lineinfo", *flags])


def written(code: str, name: str) -> Path:
    """Code of a test as a file, whose name may hold a folder."""
    path = CACHE / "sources" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != code:
        _replace(path, code.encode())
    return path


def _compiled(source: Path, flags: list[str]) -> Path:
    assembles = source.suffix == ".ptx"  # by ptxas alone, and it includes nothing
    command = [str(find()), *([] if assembles else FLAGS), *flags, str(source)]
    stem = CACHE / f"{source.stem}-{hashlib.sha256(json.dumps([version(), *command]).encode()).hexdigest()[:16]}"
    result, stamp = stem.with_suffix("." + flags[0].lstrip("-")), stem.with_suffix(".json")
    if result.exists() and stamp.exists():
        recorded = json.loads(stamp.read_text())
        if recorded["contents"] == _contents(recorded["files"]):
            return result
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        output, dependencies = Path(folder) / "output", Path(folder) / "files"
        done = subprocess.run([*command, "-o", output, *([] if assembles else ["-MD", "-MF", dependencies])], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc {' '.join(map(str, done.args[1:]))}\n{done.stdout}{done.stderr}")
        files = [str(source)] if assembles else re.sub(r"\\\n", " ", dependencies.read_text()).partition(":")[2].split()
        _replace(result, output.read_bytes())
        _replace(stamp, json.dumps({"files": files, "contents": _contents(files)}).encode())
    return result


def _contents(files: list[str]) -> str | None:
    """One hash over the files' contents, without lines that are comments (the gate writes its numbers there); None if a file is gone."""
    if not all(os.path.exists(name) for name in files):
        return None
    code = (re.sub(rb"(?m)^\s*//.*\n", b"", Path(name).read_bytes()) for name in files)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in code)).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Written in one step: processes that compile the same source at once do not see half of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
        f.write(content)
    os.replace(f.name, path)
