"""Builds the compiled parts; the metadata is in pyproject.toml.

The CPU kernels become one library per vector level (no linker can then merge code of different levels), loaded with torch.ops.load_library: no Python ABI, but the ABI of the torch
they were built with, recorded beside them. Build without isolation, so that they see the installed torch. Without torch, a compiler or x86-64 a pure-Python package is built.

Environment: FASTADAPT_CPU_LEVELS names the vector levels to build ("avx2,avx512"; empty: none); CXX names the compiler; MAX_JOBS limits parallel compilation.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
LEVELS = {"avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c"}
WANTED = [level for level in os.environ.get("FASTADAPT_CPU_LEVELS", ",".join(LEVELS)).split(",") if level]
KERNELS = ("bottleneck", "gated_bottleneck")
SOURCES = ["csrc/cpu_ops.cpp", *(f"csrc/cpu/{op}.cpp" for op in KERNELS)]


def why_not() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if not WANTED:
        return "FASTADAPT_CPU_LEVELS is empty"
    if unknown := set(WANTED) - set(LEVELS):
        raise ValueError(f"FASTADAPT_CPU_LEVELS: unknown level {', '.join(sorted(unknown))}; must be among {', '.join(LEVELS)}")
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return f"they are for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if not shutil.which(os.environ.get("CXX", "g++")):
        return f"no C++ compiler: {os.environ.get('CXX', 'g++')} not found; install one or set CXX, then reinstall"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment; install torch, then run: pip install --no-build-isolation --force-reinstall --no-deps fastadapt"
    return None


class BuildExt(build_ext):
    """Compiles with ninja: the registration file once, each kernel file once per vector level."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "g++")
        flags = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno " + " ".join(f"-isystem {p}" for p in include_paths())
        link = " ".join(f"-L{p} -Wl,-rpath,{p}" for p in library_paths()) + " -lc10 -ltorch_cpu -lgomp"
        rules = [
            f"rule cc\n  command = {cxx} {flags} $extra -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
            f"rule ld\n  command = {cxx} -shared -fopenmp $in -o $out {link}",
            f"build ops.o: cc {ROOT.resolve()}/csrc/cpu_ops.cpp\n  extra = -O2",
        ]
        targets = []
        for ext in self.extensions:
            level = ext.name.rpartition("_")[2]
            for op in KERNELS:
                rules.append(
                    f"build {op}_{level}.o: cc {ROOT.resolve()}/csrc/cpu/{op}.cpp\n  extra = -O3 {LEVELS[level]} -DCPU_CAPABILITY={level.upper()} -DCPU_CAPABILITY_{level.upper()}"
                )
            targets.append(Path(self.get_ext_fullpath(ext.name)).resolve())
            targets[-1].parent.mkdir(parents=True, exist_ok=True)
            rules.append(f"build {targets[-1]}: ld ops.o " + " ".join(f"{op}_{level}.o" for op in KERNELS))
        (build / "build.ninja").write_text("\n".join(rules) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([*ninja(), *jobs], cwd=build, check=True)
        record = {"torch": ".".join(torch.__version__.split(".")[:2]), "levels": [t.stem.rpartition("_")[2] for t in targets]}
        (targets[0].parent / "_cpu_build.json").write_text(json.dumps(record) + "\n")

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        if self.extensions:
            shutil.copy(Path(self.build_lib) / "fastadapt" / "_cpu_build.json", ROOT / "fastadapt")

    def get_outputs(self) -> list[str]:
        outputs = super().get_outputs()
        return outputs + ([str(Path(outputs[0]).parent / "_cpu_build.json")] if outputs else [])


def ninja() -> list[str]:
    """The ninja of the environment that builds, found without an activated environment."""
    beside = Path(sys.executable).parent / "ninja"
    return [str(beside)] if beside.exists() else [shutil.which("ninja") or "ninja"]


class BuildPy(build_py):
    """Says once, while building, what is not built."""

    def run(self) -> None:
        if REASON:
            print(f"fastadapt: the CPU kernels are not built ({REASON}); everything runs on the 'reference' backend", file=sys.stderr)
        super().run()


class Wheel(bdist_wheel):
    """The libraries hold no Python ABI: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return (python, abi, plat) if self.root_is_pure else ("py3", "none", plat)


REASON = why_not()
EXTENSIONS = [] if REASON else [Extension(f"fastadapt._cpu_{level}", SOURCES) for level in WANTED]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel})
