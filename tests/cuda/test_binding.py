"""The CUDA library as setup.py builds it: what it needs, what it registers, what a process without a CUDA device is told.

The kernels take minutes to compile, and a stub stands in for them; tests/test_packaging.py has the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastadapt.backend import Call
from fastadapt.ops import _cuda
from tests.cuda import nvcc

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(nvcc.find() is None, reason="no nvcc")
OPS = tuple(f"{op}{suffix}" for op in ("bottleneck", "dropout_add_norm", "gated_bottleneck", "lora", "phm_bottleneck", "routed_bottleneck") for suffix in ("", "_backward"))


def run(*command: str, cwd: Path, fails: bool = False, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(cwd), **env}, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def tree(folder: Path) -> Path:
    """What the source archive holds, with the stub for kernels."""
    for name in ("csrc", "fastadapt"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    shutil.rmtree(folder / "csrc" / "cuda")
    (folder / "csrc" / "cuda").mkdir()
    shutil.copy(ROOT / "tests" / "cuda" / "stub.cu", folder / "csrc" / "cuda")
    return folder


def build(folder: Path, fails: bool = False, **env: str) -> str:
    return run(
        sys.executable, "setup.py", "build_ext", "--inplace", cwd=folder, fails=fails, FASTADAPT_CPU_LEVELS="", **{"FASTADAPT_CUDA": "1", "FASTADAPT_CUDA_ARCHS": "80", **env}
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tree(tmp_path_factory.mktemp("built"))
    build(folder)
    return folder


def assert_is_the_library(folder: Path) -> None:
    """It needs nothing of CUDA and of torch's C++ ABI, gives away no symbol of the runtime inside it, and loads in this torch."""
    library = folder / "fastadapt" / "_cuda.so"
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", str(library), cwd=folder))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.match(r"libcuda|libcudart|libtorch_cuda|libc10|libtorch\.|libtorch_python|libpython", name)], needed
    undefined = re.findall(r" [Uw] (\S+)", run("nm", "-D", "--undefined-only", str(library), cwd=folder))
    assert not [name for name in undefined if re.match(r"cuda|cu[A-Z]|__cuda|Py|_Py|_ZN?K?(2at|3c10|5torch)", name)]
    shims = {name for name in undefined if "torch" in name}
    assert shims and all(re.fullmatch(r"(aoti_)?torch_\w+", name) for name in shims)
    defined = re.findall(r" [TDBR] (\S+)", run("nm", "-D", "--defined-only", str(library), cwd=folder))
    assert not [name for name in defined if "cuda" in name.lower()]
    program = (
        "import json, torch, fastadapt; from fastadapt.ops import _cuda; why = _cuda.library(); ops = torch.ops.fastadapt_cuda\n"
        f"keys = {{op: [k for k in ('CPU', 'CUDA', 'Meta') if torch._C._dispatch_has_kernel_for_dispatch_key('fastadapt_cuda::' + op, k)] for op in {OPS!r}}}\n"
        "print(json.dumps([fastadapt.__file__, why, _cuda.unavailable(), keys, ops.device_count(), ops.driver_version(), ops.runtime_version(), ops.why_not(1, 0, 768, 96, 0),"
        " ops.why_not(1, 0, 772, 96, 0), ops.phm_why_not(1, 0, 768, 96, 17, 1), ops.norm_why_not(0, 0, 0, 8193)]))"
    )
    file, why, unavailable, keys, devices, driver, runtime, fits, ragged, division, wide = json.loads(run(sys.executable, "-c", program, cwd=folder).splitlines()[-1])
    assert Path(file).is_relative_to(folder) and why is None
    assert keys == {op: ["CUDA"] for op in OPS}
    assert runtime >= 12080 and (fits, "multiple of 8" in ragged, "from 1 to 16" in division, "from 1 to 8192" in wide) == ("", True, True, True)
    if torch.version.cuda is None:
        assert unavailable == f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        assert devices == 0 and unavailable and driver >= 0


@needs_nvcc
def test_one_library_for_every_torch(built: Path) -> None:
    assert_is_the_library(built)
    assert json.loads((built / "fastadapt" / "_cuda_build.json").read_text()) == {"archs": ["80"], "ptx": "80"}


@needs_nvcc
def test_cpu_tensors_never_reach_the_library(built: Path) -> None:
    program = "import torch, fastadapt\nfrom fastadapt.ops import _cuda; _cuda.library()\nx, w = torch.zeros(8, 8, dtype=torch.half), torch.zeros(8, 8, dtype=torch.half)\n"
    program += "torch.ops.fastadapt_cuda.bottleneck(x, w, None, w, None, None, None, None, 1.0, 3, True, True)"
    assert "Could not run 'fastadapt_cuda::bottleneck' with arguments from the 'CPU' backend" in run(sys.executable, "-c", program, cwd=built, fails=True)


@needs_nvcc
@pytest.mark.full
def test_the_architectures_are_those_asked_for(tmp_path: Path) -> None:
    log = build(tree(tmp_path), FASTADAPT_CUDA_ARCHS="90, 120;80")
    assert "for 80, 90, 120" in log
    assert json.loads((tmp_path / "fastadapt" / "_cuda_build.json").read_text()) == {"archs": ["80", "90", "120"], "ptx": "80"}
    rules = next((tmp_path / "build").rglob("build.ninja")).read_text()
    assert set(re.findall(r"-gencode (\S+)", rules)) == {"arch=compute_80,code=[sm_80,sm_90,sm_120,compute_80]"}
    assert "must be compute capabilities" in build(tmp_path, fails=True, FASTADAPT_CUDA_ARCHS="75")
    assert "FASTADAPT_CUDA: 'yes' is unknown" in build(tmp_path, fails=True, FASTADAPT_CUDA="yes")


@needs_nvcc
@pytest.mark.full
def test_a_compiler_that_fails_stops_those_who_demanded_and_nobody_else(tmp_path: Path) -> None:
    (tree(tmp_path) / "csrc" / "cuda" / "stub.cu").write_text("#error broken\n")
    assert "broken" in build(tmp_path, fails=True)
    build(tmp_path, FASTADAPT_CUDA="auto")
    assert not (tmp_path / "fastadapt" / "_cuda.so").exists()
    program = "from fastadapt.ops import _cuda; print(_cuda.unavailable())"
    assert re.search(r"the cuda kernels were not built: \S+nvcc failed at build time .*; to build them", run(sys.executable, "-c", program, cwd=tmp_path))


def find(tmp_path: Path, program: str, *, home: bool = False, pip: bool = False, on_path: bool = False) -> list[str]:
    """What setup.py finds on a machine where nvcc is in these places and nowhere else."""
    for wanted, place in ((home, "home/bin"), (pip, "site/nvidia/cu13/bin"), (on_path, "path")):
        (tmp_path / place).mkdir(parents=True)
        if wanted:
            old = program == "old" or (program == "old but pip's" and place != "site/nvidia/cu13/bin")
            script = f"#!/bin/sh\necho 'Cuda compilation tools, release {'12.4' if old else '13.0'}, V13.0.88'\n"
            (tmp_path / place / "nvcc").write_text(script)
            (tmp_path / place / "nvcc").chmod(0o755)
    code = "import setup; print(setup.find_nvcc(), setup.no_nvcc(), sep='\\n')"
    env = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    env |= {"PATH": str(tmp_path / "path"), "PYTHONPATH": str(tmp_path / "site"), "FASTADAPT_CUDA": "auto", **({"CUDA_HOME": str(tmp_path / "home")} if home else {})}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace(str(tmp_path) + "/", "").splitlines()


@pytest.mark.parametrize(
    ("places", "found"),
    [
        ({"home": True, "on_path": True, "pip": True}, "home/bin/nvcc"),
        ({"on_path": True, "pip": True}, "path/nvcc"),
        ({"pip": True}, "site/nvidia/cu13/bin/nvcc"),
    ],
    ids=["CUDA_HOME", "PATH", "pip"],
)
def test_where_nvcc_is_looked_for(places: dict[str, bool], found: str, tmp_path: Path) -> None:
    assert find(tmp_path, "new", **places) == [found, "None"]


def test_the_first_nvcc_that_is_new_enough_is_taken(tmp_path: Path) -> None:
    assert find(tmp_path, "old but pip's", home=True, on_path=True, pip=True) == ["site/nvidia/cu13/bin/nvcc", "None"]


def test_without_nvcc_the_reason_is_recorded(tmp_path: Path) -> None:
    if (Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "bin" / "nvcc").exists():
        pytest.skip("this environment holds pip's nvcc")
    assert find(tmp_path, "none") == ["None", "no nvcc found at build time (PATH, CUDA_HOME, pip's nvidia packages)"]


def test_an_old_nvcc_is_refused(tmp_path: Path) -> None:
    assert find(tmp_path, "old", on_path=True)[1] == "path/nvcc is of CUDA 12.4, 12.8 or newer is needed"


CALL = Call("bottleneck", "cuda", torch.bfloat16, torch.bfloat16, 64, 64, 16, arch=80)


class Ops:
    """The library on some machine."""

    def __init__(self, driver: int = 13000, devices: int = 1) -> None:
        self.runtime_version, self.driver_version, self.device_count = lambda: 13000, lambda: driver, lambda: devices
        self.why_not = self.routed_why_not = lambda *shape: ""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the library were built for sm_80 and sm_90 and torch had CUDA."""
    for name in ("build", "library", "unavailable"):
        monkeypatch.setattr(_cuda, name, getattr(_cuda, name).__wrapped__)
    (tmp_path / "_cuda_build.json").write_text('{"archs": ["80", "90"], "ptx": "90"}')
    (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(_cuda, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "fastadapt_cuda", Ops(), raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("elsewhere")
class TestReasons:
    """What a user is told, on machines that are not here."""

    def test_none(self) -> None:
        assert _cuda.reasons(CALL) == [] and _cuda.reasons(CALL._replace(param_dtype=torch.float32)) == []

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"device": "cpu"}, "run on CUDA tensors, not on cpu"),
            ({"dtype": torch.float32}, "take bfloat16 and float16, not torch.float32"),
            ({"param_dtype": torch.float16}, "take parameters in torch.bfloat16 and float32, not torch.float16"),
        ],
        ids=["device", "dtype", "parameters"],
    )
    def test_of_the_call(self, change: dict[str, object], reason: str) -> None:
        (why,) = _cuda.reasons(CALL._replace(**change))
        assert why.endswith(reason)

    def test_of_a_mixed_batch(self) -> None:
        """Positions of rows, with those that a last tile has beyond, are 32-bit numbers; offsets are not."""
        call = CALL._replace(op="routed_bottleneck", options=(("tasks", 4),))
        assert _cuda.reasons(call._replace(rows=2**31 - 256)) == []
        assert _cuda.reasons(call._replace(rows=2**31 - 255)) == ["the cuda kernels route at most 2^31 - 256 rows, not 2147483393"]
        torch.ops.fastadapt_cuda.routed_why_not = lambda *shape: f"not {shape}"
        assert _cuda.reasons(call) == ["not (64, 64, 4)"]

    def test_limits_of_the_compiled_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(torch.ops.fastadapt_cuda, "why_not", lambda *shape: asked.append(shape) or "no such shape")
        assert _cuda.reasons(CALL._replace(param_dtype=torch.float32, options=(("gate_rank", 7),))) == ["no such shape"]
        assert asked == [(1, 0, 64, 16, 7)]
        monkeypatch.setattr(torch.ops.fastadapt_cuda, "why_not", lambda *shape: "" if shape[2] == 64 else f"width {shape[2]}")
        assert _cuda.reasons(CALL._replace(op="lora", options=(("out_width", 64),))) == []
        assert _cuda.reasons(CALL._replace(op="lora", options=(("out_width", 68),))) == ["width 68"]
        monkeypatch.setattr(torch.ops.fastadapt_cuda, "phm_why_not", lambda *shape: asked.append(shape) or "no such factors", raising=False)
        assert _cuda.reasons(CALL._replace(op="phm_bottleneck", options=(("division", 4), ("factor_rank", 2)))) == ["no such factors"]
        assert asked[1:] == [(1, 1, 64, 16, 4, 2)]
        asked.clear()
        monkeypatch.setattr(torch.ops.fastadapt_cuda, "norm_why_not", lambda *shape: asked.append(shape) or "no such norm", raising=False)
        for dtype, param_dtype, wide in ((torch.float32, torch.float32, False), (torch.half, torch.half, True), (torch.half, torch.float32, False)):
            assert _cuda.reasons(CALL._replace(op="dropout_add_norm", dtype=dtype, param_dtype=param_dtype, options=(("wide", wide),))) == ["no such norm"]
        assert asked == [(0, 0, 0, 64, 64), (2, 0, 0, 64, 64), (2, 2, 0, 64, 64)]

    @pytest.mark.parametrize(("arch", "runs"), [(80, True), (86, True), (89, True), (90, True), (100, True), (75, False)])
    def test_architectures(self, arch: int, runs: bool) -> None:
        """Code for 8.0 and 9.0, and PTX for what comes after 9.0."""
        assert _cuda.reasons(CALL._replace(arch=arch)) == ([] if runs else [f"the cuda kernels were built for sm_80, sm_90, the device is sm_{arch}"])

    @pytest.mark.parametrize(
        ("ops", "reason"),
        [
            (Ops(driver=0), "there is no NVIDIA driver"),
            (Ops(driver=12080), "the cuda kernels need a driver for CUDA 13.0 (driver 580 or newer), this one is for CUDA 12.8"),
            (Ops(devices=0), "there is no CUDA device"),
        ],
        ids=["no driver", "old driver", "no device"],
    )
    def test_of_the_driver(self, ops: Ops, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.ops, "fastadapt_cuda", ops)
        assert _cuda.unavailable() == reason

    def test_of_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert _cuda.reasons(CALL) == [f"torch {torch.__version__} is a build without CUDA"]

    def test_of_the_build(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        record = tmp_path / "_cuda_build.json"
        (tmp_path / "_cuda.so").unlink()
        assert "not built: the library that was built is gone; to build them" in _cuda.unavailable()
        record.write_text('{"reason": "no nvcc found at build time (PATH, CUDA_HOME, pip\'s nvidia packages)"}')
        (why,) = _cuda.reasons(CALL)
        assert why.startswith("the cuda kernels were not built: no nvcc found at build time (PATH, CUDA_HOME, pip's nvidia packages); to build them, in a checkout have nvcc 12.8")
        record.unlink()
        assert "not built: this installation did not try" in _cuda.unavailable()

    def test_of_a_library_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: str) -> None:
            raise OSError(f"{path}: undefined symbol: torch_library_impl")

        monkeypatch.setattr(torch.ops, "load_library", fail)
        assert re.fullmatch(r"the cuda kernels could not be loaded: .*_cuda.so: undefined symbol: torch_library_impl", _cuda.unavailable())
