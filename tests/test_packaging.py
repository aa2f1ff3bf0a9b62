"""What a user installs: the source archive and the wheel, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from tests.cuda.test_binding import assert_is_the_library, needs_nvcc

ROOT = Path(__file__).parents[1]
LEVEL = "avx512" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "avx2"


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source archive, so that nothing of the checkout is within reach."""
    folder = tmp_path_factory.mktemp("source archive")  # compilers and ninja see a path with a space
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(folder), str(ROOT), cwd=folder)
    (archive,) = folder.glob("fastadapt-*.tar.gz")
    run("tar", "xzf", archive.name, cwd=folder)
    source = next(path for path in folder.iterdir() if path.is_dir())
    assert not {"tests", "benchmarks", "Makefile"} & {path.name for path in source.iterdir()}
    return source


def wheel(source: Path, out: Path, **env: str) -> tuple[Path, str]:
    env = {"FASTADAPT_CUDA": "0", **env}  # its kernels take minutes to compile
    log = run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(source), cwd=out, **env)
    (path,) = out.glob("*.whl")
    return path, log


def environment(folder: Path, wheel_path: Path) -> Path:
    """A fresh virtual environment that holds the wheel and sees this environment's dependencies (but not its editable fastadapt)."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel_path), cwd=folder)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def test_wheel_runs_a_fused_op_outside_the_checkout(sdist: Path, tmp_path: Path) -> None:
    earlier = sdist / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fastadapt"
    earlier.mkdir(parents=True)
    for name in ("_cpu_other.so", "_cuda.so"):  # of an earlier build with other options
        (earlier / name).touch()
    path, _ = wheel(sdist, tmp_path, FASTADAPT_CPU_LEVELS=LEVEL)
    assert path.name.startswith("fastadapt-") and "-py3-none-linux" in path.name
    names = zipfile.ZipFile(path).namelist()
    assert {"fastadapt/_cpu_build.json", "fastadapt/py.typed"} <= set(names) and [name for name in names if name.endswith(".so")] == [f"fastadapt/_cpu_{LEVEL}.so"]
    assert json.loads(zipfile.ZipFile(path).read("fastadapt/_cuda_build.json")) == {"reason": "FASTADAPT_CUDA=0 at build time"}
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    python = environment(tmp_path / "env", path)
    program = (
        "import json, torch, fastadapt; from fastadapt import backend, functional as F\n"
        "x = torch.randn(70, 48, requires_grad=True); wd, wu = torch.randn(8, 48), torch.randn(48, 8)\n"
        "with backend.use('cpu'): F.bottleneck(x, wd, wu).sum().backward()\n"
        "print(json.dumps([fastadapt.__file__, fastadapt.__version__, sorted(backend.ran())]))"
    )
    file, version, ran = json.loads(run(str(python), "-c", program, cwd=tmp_path).splitlines()[-1])
    assert Path(file).is_relative_to(tmp_path / "env") and version in path.name
    assert ran == [["bottleneck", "backward", "cpu"], ["bottleneck", "forward", "cpu"]]


@pytest.mark.full
@needs_nvcc
def test_wheel_with_the_cuda_library(sdist: Path, tmp_path: Path) -> None:
    """From the source archive, for one architecture: four minutes of a processor."""
    path, _ = wheel(sdist, tmp_path, FASTADAPT_CPU_LEVELS="", FASTADAPT_CUDA="1", FASTADAPT_CUDA_ARCHS="80")
    assert "-py3-none-linux" in path.name
    zipfile.ZipFile(path).extractall(tmp_path / "site")
    assert_is_the_library(tmp_path / "site")
    assert json.loads((tmp_path / "site" / "fastadapt" / "_cuda_build.json").read_text()) == {"archs": ["80"], "ptx": "80"}


def test_without_a_compiler_a_pure_package_is_built_that_says_why(sdist: Path, tmp_path: Path) -> None:
    record = sdist / "fastadapt" / "_cpu_build.json"  # of an earlier build in place
    record.write_text("{}")
    path, log = wheel(sdist, tmp_path, CXX="no-such-compiler -O1")
    record.unlink()
    assert path.name.endswith("-py3-none-any.whl") and "fastadapt/_cpu_build.json" not in zipfile.ZipFile(path).namelist()
    assert log.count("the CPU kernels are not built (no C++ compiler: no-such-compiler -O1 not found") == 1
    python = environment(tmp_path / "env", path)
    program = (
        "import warnings, torch; from fastadapt import backend, functional as F\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3): F.bottleneck(torch.randn(7, 48), torch.randn(8, 48), torch.randn(48, 8))\n"
        "print([str(w.message) for w in caught], dict(backend.ran()))"
    )
    out = run(str(python), "-c", program, cwd=tmp_path)
    assert out.count("runs on 'reference' instead of 'cpu': the cpu kernels are not built; to build it: pip install") == 1
    assert "('bottleneck', 'forward', 'reference'): 3" in out


def test_without_ninja_a_pure_package_is_built_that_says_how(sdist: Path, tmp_path: Path) -> None:
    python = tmp_path / "env" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), cwd=tmp_path)
    compiler = shutil.which("g++")
    assert compiler is not None
    (python.parent / "g++").symlink_to(compiler)
    site = tmp_path / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    log = run(str(python), "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path), cwd=sdist, PATH=str(python.parent), CXX="g++ -O1", FASTADAPT_CUDA="")
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]
    assert log.count("ninja is not installed in the build environment; pip install ninja") == 1


def test_what_is_declared_is_enough(tmp_path: Path) -> None:
    """To patch, train, save and load: no module of a package that the requirements do not bring, by themselves or theirs."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    program = (
        f"DECLARED = {declared}"
        + """
import importlib.abc, importlib.metadata as metadata, re, sys
def name(text):
    return re.sub("[-_.]+", "-", re.match("[A-Za-z0-9._-]+", text)[0]).lower()
needed, found = ["fastadapt", *map(name, DECLARED)], set()
while needed:
    if (one := needed.pop()) not in found:
        found.add(one)
        try:
            needed += [name(text) for text in metadata.requires(one) or () if "extra ==" not in text and one != "fastadapt"]
        except metadata.PackageNotFoundError:
            pass
others = {module for module, packages in metadata.packages_distributions().items() if not found & {name(package) for package in packages}}
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] in others:
            raise ModuleNotFoundError(f"{fullname} is not declared", name=fullname)
sys.meta_path.insert(0, Blocked())
assert {"transformers", "triton", "peft"} <= others
import fastadapt, torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
handle = fastadapt.patch(model, "vl_adapter", tasks=["a"], sites={"encoder.feed_forward": "0"})
model(torch.randn(3, 8)).sum().backward()
handle.save("saved"), handle.load("saved")
"""
    )
    run(sys.executable, "-c", program, cwd=tmp_path)


def test_without_torch_a_pure_package_is_built_that_says_how(sdist: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'bdist_wheel', '--dist-dir', {str(tmp_path)!r}]\n"
        "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    log = run(sys.executable, "-c", program, cwd=sdist)
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]
    assert log.count("torch is not installed in the build environment; install torch, then run: pip install --no-build-isolation") == 1
