"""Builds the compiled parts; the metadata is in pyproject.toml.

The CPU kernels become one library per vector level (no linker can then merge code of different levels), loaded with torch.ops.load_library: no Python ABI, but the ABI of the torch
they were built with, recorded beside them. The CUDA kernels become one library over torch's stable ABI, for every torch from 2.10 on; the CUDA runtime is linked in. Build without
isolation, so that both see the installed torch. What cannot be built is left out and says why when it is asked for; without torch or a compiler a pure-Python package is built.

Environment: FASTADAPT_CPU_LEVELS names the vector levels to build ("avx2,avx512"; empty: none); FASTADAPT_CUDA=0 leaves the CUDA kernels out, =1 demands them (default: built where
nvcc is found); FASTADAPT_CUDA_ARCHS names their compute capabilities ("80;90;100;120"); CUDA_HOME leads to nvcc; CXX names the compiler; MAX_JOBS limits parallel compilation.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "").strip() or "g++"  # a command, which may have arguments
LEVELS = {"avx2": "-mavx2 -mfma -mf16c -mprfchw", "avx512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mf16c -mprfchw"}
WANTED = list(dict.fromkeys(re.findall("[^;, ]+", os.environ.get("FASTADAPT_CPU_LEVELS", ",".join(LEVELS)))))
REGISTERED = ("cpu_ops", "cpu_entrance")  # the files that register ops
KERNELS = ("bottleneck", "dropout_add_norm", "gated_bottleneck", "phm_bottleneck")
CUDA = os.environ.get("FASTADAPT_CUDA") or "auto"
# 8.0 also runs on 8.6 and 8.9.
ARCHS = sorted(re.findall("[^;, ]+", os.environ.get("FASTADAPT_CUDA_ARCHS", "80;90;100;120")), key=lambda arch: (len(arch), arch))
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for folder in ("csrc/cuda", "csrc/cuda/inst") for path in (ROOT / folder).glob("*.cu"))


def no_compiler() -> str | None:
    """What every compiled part needs and is not there, or None."""
    if sys.platform != "linux":
        return f"they are for Linux, this is {sys.platform}"
    if not shutil.which(shlex.split(CXX)[0]):
        return f"no C++ compiler: {CXX} not found; install one or set CXX, then reinstall"
    if not find_ninja():
        return "ninja is not installed in the build environment; pip install ninja, then reinstall"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment; install torch, then run: pip install --no-build-isolation --force-reinstall --no-deps ."
    return None


def no_cpu() -> str | None:
    """Why the CPU kernels cannot be built here, or None."""
    if not WANTED:
        return "FASTADAPT_CPU_LEVELS is empty"
    if unknown := set(WANTED) - set(LEVELS):
        raise ValueError(f"FASTADAPT_CPU_LEVELS: unknown level {', '.join(sorted(unknown))}; must be among {', '.join(LEVELS)}")
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"they are for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return no_compiler()


def no_cuda() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if CUDA not in ("0", "1", "auto"):
        raise ValueError(f"FASTADAPT_CUDA: {CUDA!r} is unknown; must be 0, 1 or auto")
    if not ARCHS or not all(re.fullmatch(r"[89]\d|1\d\d", arch) for arch in ARCHS):
        raise ValueError(f"FASTADAPT_CUDA_ARCHS: {';'.join(ARCHS)!r} must be compute capabilities from 8.0 on without their dot, such as '80;90'")
    reason = "FASTADAPT_CUDA=0 at build time" if CUDA == "0" else no_compiler() or no_nvcc() or (None if CUDA_SOURCES else "csrc/cuda holds no kernels")
    if reason and CUDA == "1":
        raise RuntimeError(f"FASTADAPT_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    return reason


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of pip's nvidia packages: the first that is new enough, or else the first."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [*homes, *os.get_exec_path(), *(Path(folder) / "nvidia" / "cu13" / "bin" for folder in sys.path)]
    found = [nvcc for folder in folders if (nvcc := shutil.which("nvcc", path=str(folder)))]
    return next((nvcc for nvcc in found if not too_old(nvcc)), next(iter(found), None))


def too_old(nvcc: str) -> str | None:
    """Why this nvcc cannot build the kernels, or None."""
    version = re.search(r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None:
        return f"{nvcc} --version names no release"
    if (int(version[1]), int(version[2])) < (12, 8):
        return f"{nvcc} is of CUDA {version[1]}.{version[2]}, 12.8 or newer is needed"
    return None


def no_nvcc() -> str | None:
    nvcc = find_nvcc()
    return too_old(nvcc) if nvcc else "no nvcc found at build time (PATH, CUDA_HOME, pip's nvidia packages)"


def find_ninja() -> str | None:
    """The ninja of the environment that builds, found without an activated environment, or that of PATH."""
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def word(text: object) -> str:
    """One word of a command in a file of ninja's."""
    return shlex.quote(str(text)).replace("$", "$$")


def file(path: object) -> str:
    """A path in a ``build`` line of such a file."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def cpu_rules() -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno " + " ".join(f"-isystem {word(p)}" for p in include_paths())
    link = " ".join(f"{word(f'-L{p}')} {word(f'-Wl,-rpath,{p}')}" for p in library_paths()) + " -lc10 -ltorch_cpu -lgomp"
    return [
        f"rule cc\n  command = {CXX} {flags} $extra -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule ld\n  command = {CXX} -shared -fopenmp $in -o $out {link}",
        *(f"build {name}.o: cc {file(ROOT / 'csrc' / name)}.cpp\n  extra = -O2" for name in REGISTERED),
    ]


def cpu_library(target: Path, level: str) -> list[str]:
    """The files that see torch are compiled once, each kernel file once per vector level."""
    extra = f"-O3 {LEVELS[level]} -DCPU_CAPABILITY={level.upper()} -DCPU_CAPABILITY_{level.upper()}"
    rules = [f"build {op}_{level}.o: cc {file(ROOT / 'csrc' / 'cpu' / op)}.cpp\n  extra = {extra}" for op in KERNELS]
    return [*rules, f"build {file(target)}: ld " + " ".join([*(f"{name}.o" for name in REGISTERED), *(f"{op}_{level}.o" for op in KERNELS)])]


def cuda_library(target: Path) -> list[str]:
    """The kernels never see torch; the registration file sees its stable ABI only. (torch's own CUDAExtension refuses to run under a torch without CUDA.)"""
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc = word(find_nvcc())
    compiler = next((part for part in reversed(shlex.split(CXX)) if shutil.which(part)), CXX)  # nvcc takes one program, no launcher before it
    host = f" -ccbin {word(compiler)}" if os.environ.get("CXX") else ""
    # The kernels use what the lowest architecture has: one PTX for all, from which ptxas makes each one's code, and a driver that of devices to come.
    codes = f"-gencode arch=compute_{ARCHS[0]},code=[{','.join(f'sm_{a}' for a in ARCHS)},compute_{ARCHS[0]}]"
    stable = f"-std=c++20 -O2 -fPIC -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020a000000000000ULL {word(f'-I{ROOT}/csrc')} " + " ".join(
        f"-isystem {word(p)}" for p in include_paths()
    )
    # pip's packages keep the static runtime in lib, where their nvcc does not look. --exclude-libs hides the runtime's symbols from other copies in the process.
    folders = " ".join(word(f"-L{p}") for p in (Path(str(find_nvcc())).parents[1] / "lib", *library_paths()))
    link = f"-shared -cudart static -arch=sm_{ARCHS[0]} -Xlinker --exclude-libs,ALL,--as-needed $in -o $out {folders} -ltorch_cpu"
    objects = {source: source.replace("/", "_") + ".o" for source in CUDA_SOURCES}
    # Compressed for size the code takes a third of the default's (one architecture: 15 MB by default).
    kernels = f"-std=c++17 -O3 --expt-relaxed-constexpr --compress-mode=size {codes} {word(f'-I{ROOT}/csrc')} -Xcompiler -fPIC,-fvisibility=hidden"
    return [
        f"rule cuda\n  command = {nvcc}{host} {kernels} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule cuda_cc\n  command = {CXX} {stable} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule cuda_ld\n  command = {nvcc}{host} {link}",
        f"build cuda_ops.o: cuda_cc {file(ROOT)}/csrc/cuda_ops.cpp",
        *(f"build {name}: cuda {file(ROOT / source)}" for source, name in objects.items()),
        f"build {file(target)}: cuda_ld cuda_ops.o {' '.join(objects.values())}",
    ]


class BuildExt(build_ext):
    """Compiles with ninja, from one file of rules."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        targets = {ext.name.rpartition(".")[2]: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        cpu, cuda = {name: path for name, path in targets.items() if name != "_cuda"}, targets.get("_cuda")
        for path in targets.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        rules = cpu_rules() if cpu else []
        for name, path in cpu.items():
            rules += cpu_library(path, name.removeprefix("_cpu_"))
        rules += cuda_library(cuda) if cuda else []
        (build / "build.ninja").write_text("\n".join(rules) + "\n")
        if cpu:
            import torch

            ninja(build, *cpu.values())
            self.record("cpu", {"torch": ".".join(torch.__version__.split(".")[:2]), "levels": [name.removeprefix("_cpu_") for name in cpu]})
        if cuda:
            self.record("cuda", self.build_cuda(build, cuda))

    def build_cuda(self, build: Path, target: Path) -> dict[str, object]:
        """Where nobody demanded the CUDA kernels, a toolkit that cannot compile them is no reason to have nothing."""
        print(f"fastadapt: compiling the CUDA kernels for {', '.join(ARCHS)} takes minutes; FASTADAPT_CUDA=0 leaves them out", file=sys.stderr)
        try:
            ninja(build, target)
        except subprocess.CalledProcessError:
            if CUDA == "1":
                raise
            self.extensions = [ext for ext in self.extensions if ext.name != "fastadapt._cuda"]
            return {"reason": f"{find_nvcc()} failed at build time (FASTADAPT_CUDA=1 stops there and shows why)"}
        return {"archs": ARCHS, "ptx": ARCHS[0]}

    def record(self, part: str, content: dict[str, object]) -> None:
        path = Path(self.build_lib).resolve() / "fastadapt" / f"_{part}_build.json"
        path.write_text(json.dumps(content) + "\n")
        self.records = [*getattr(self, "records", []), path]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for path in getattr(self, "records", []):
            shutil.copy(path, ROOT / "fastadapt")

    def get_outputs(self) -> list[str]:
        return super().get_outputs() + [str(path) for path in getattr(self, "records", [])]


def ninja(build: Path, *targets: Path) -> None:
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.run([str(find_ninja()), *jobs, *map(str, targets)], cwd=build, check=True)


class BuildPy(build_py):
    """Says what is not built, once while building and for the CUDA kernels in the package, and takes out what an earlier build in the same folder left of it."""

    def run(self) -> None:
        if NO_CPU:
            also = ", nor are the CUDA kernels" if NO_CUDA == NO_CPU else ""
            print(f"fastadapt: the CPU kernels are not built ({NO_CPU}){also}; CPU tensors run on the 'reference' backend", file=sys.stderr)
        if NO_CUDA and NO_CUDA != NO_CPU:
            print(f"fastadapt: the CUDA kernels are not built ({NO_CUDA}); CUDA tensors run on Triton", file=sys.stderr)
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "fastadapt"
        if not self.editable_mode:  # in a checkout they may be all that there is
            built = {f"{ext.name.rpartition('.')[2]}.so" for ext in EXTENSIONS} | ({"_cpu_build.json"} if not NO_CPU else set())
            for path in (*package.glob("_cpu_*"), package / "_cuda.so"):
                if path.name not in built:
                    path.unlink(missing_ok=True)
        if NO_CUDA:
            (package / "_cuda_build.json").write_text(json.dumps({"reason": NO_CUDA}) + "\n")


class Wheel(bdist_wheel):
    """The libraries hold no Python ABI: one wheel for every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, plat = super().get_tag()
        return (python, abi, plat) if self.root_is_pure else ("py3", "none", plat)


NO_CPU, NO_CUDA = no_cpu(), no_cuda()
EXTENSIONS = [] if NO_CPU else [Extension(f"fastadapt._cpu_{level}", [*(f"csrc/{name}.cpp" for name in REGISTERED), *(f"csrc/cpu/{op}.cpp" for op in KERNELS)]) for level in WANTED]
EXTENSIONS += [] if NO_CUDA else [Extension("fastadapt._cuda", ["csrc/cuda_ops.cpp", *CUDA_SOURCES])]
if __name__ == "__main__":
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": Wheel})
