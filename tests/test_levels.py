"""The CPU kernels under every vector level that this machine has, each in a process of its own: torch chooses a level once, at start."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fastadapt.ops import _cpu

PROGRAM = """
import json, sys, threading, warnings
import torch
import fastadapt
from fastadapt import backend, functional
from tests import eager, tolerance

torch.set_num_threads(2)
torch.backends.mkldnn.enabled = sys.argv[1] == "mkldnn"
worst = 0.0
def check(rows, dtype):
    global worst
    g = torch.Generator().manual_seed(rows)
    make = lambda *s: torch.randn(*s, generator=g)
    x, wd, wu, bd, bu = (t.to(dtype) for t in (make(rows, 72), make(20, 72) * 0.1, make(72, 20) * 0.1, make(20), make(72)))
    with backend.use("cpu"):
        y = functional.bottleneck(x, wd, wu, bd, bu)
    exact = eager.bottleneck(*(t.double() for t in (x, wd, wu, bd, bu)))
    limit = tolerance.limit_of(tolerance.relative_error(eager.bottleneck(x, wd, wu, bd, bu), exact), dtype, gradient=False)
    worst = max(worst, tolerance.relative_error(y, exact) / limit)
threads = [threading.Thread(target=check, args=(rows, dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16) for rows in (1, 7, 31, 33, 64, 65, 130)]
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "worst": worst, "ran": backend.ran().get(("bottleneck", "forward", "cpu"), 0)}))
"""


def run(level: str, mkldnn: str = "mkldnn") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, mkldnn], capture_output=True, text=True, env={**os.environ, "ATEN_CPU_CAPABILITY": level})


@pytest.mark.parametrize("mkldnn", ["mkldnn", "no mkldnn"])
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_right_at_every_level(level: str, mkldnn: str) -> None:
    """Ragged row counts in three dtypes, from 21 Python threads of two OpenMP threads each, with oneDNN on and off."""
    if level == "avx512" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this processor has no AVX-512")
    done = run(level, mkldnn)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["capability"].lower().startswith(level) and result["ran"] == 21
    assert result["worst"] <= 1.0


def test_below_avx2_is_refused_with_its_reason() -> None:
    done = run("default")
    assert done.returncode != 0 or "worst" in done.stdout
    assert "need AVX2" in done.stderr and "DEFAULT" in done.stderr


def test_another_torch_version_is_refused(tmp_path, monkeypatch) -> None:
    """The libraries use torch's C++ ABI, which changes from one minor version to the next."""
    assert _cpu.unavailable() is None, "this machine has the kernels"
    (tmp_path / "_cpu_build.json").write_text(json.dumps({"torch": "2.12", "levels": ["avx2"]}))
    for level in ("avx2", "avx512"):
        (tmp_path / f"_cpu_{level}.so").touch()
    monkeypatch.setattr(_cpu, "_FOLDER", tmp_path)
    reason = _cpu.unavailable.__wrapped__()
    assert "built with torch 2.12" in reason and "to build it" in reason


def test_thread_count_does_not_change_a_bit() -> None:
    """One partial per chunk of rows, added in order: 1,500 rows are three chunks."""
    g = torch.Generator().manual_seed(0)
    x, wd, wu, bd, bu, dy = (torch.randn(*s, generator=g) for s in ((1500, 96), (24, 96), (96, 24), (24,), (96,), (1500, 96)))
    x.requires_grad_(), wd.requires_grad_(), wu.requires_grad_(), bd.requires_grad_(), bu.requires_grad_()
    from fastadapt import backend, functional

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with backend.use("cpu"):
            y = functional.bottleneck(x, wd, wu, bd, bu)
        results.append((y.detach(), *torch.autograd.grad(y, (x, wd, wu, bd, bu), dy)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
