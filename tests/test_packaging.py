"""What a user installs: the source archive and the wheel, away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
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
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(folder), str(ROOT), cwd=folder)
    (archive,) = folder.glob("fastadapt-*.tar.gz")
    run("tar", "xzf", archive.name, cwd=folder)
    return next(path for path in folder.iterdir() if path.is_dir())


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
    path, _ = wheel(sdist, tmp_path, FASTADAPT_CPU_LEVELS=LEVEL)
    assert path.name.startswith("fastadapt-") and "-py3-none-linux" in path.name
    names = zipfile.ZipFile(path).namelist()
    assert {f"fastadapt/_cpu_{LEVEL}.so", "fastadapt/_cpu_build.json", "fastadapt/py.typed"} <= set(names) and "fastadapt/_cuda.so" not in names
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
    path, log = wheel(sdist, tmp_path, CXX="no-such-compiler")
    assert path.name.endswith("-py3-none-any.whl")
    assert log.count("the CPU kernels are not built (no C++ compiler: no-such-compiler not found") == 1
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


def test_without_torch_a_pure_package_is_built_that_says_how(sdist: Path, tmp_path: Path) -> None:
    program = (
        f"import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'bdist_wheel', '--dist-dir', {str(tmp_path)!r}]\n"
        "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    log = run(sys.executable, "-c", program, cwd=sdist)
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]
    assert log.count("torch is not installed in the build environment; install torch, then run: pip install --no-build-isolation") == 1
