"""The CPU kernels under every vector level that this machine has, each in a process of its own: torch chooses a level once, at start."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastadapt import backend, functional
from fastadapt.ops import _cpu
from tests.ops import checks
from tests.ops.specs import BF16, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, specs

PROGRAM = """
import json, sys, threading, warnings
import torch
import fastadapt
from fastadapt import backend, functional
from tests import eager, tolerance

ARGUMENTS = {"bottleneck": ((130, 72), (72, 130), (130,), (72,)), "phm_bottleneck": ((4, 4, 4), (4, 18, 1), (4, 1, 5), (4, 4, 4), (4, 5, 1), (4, 1, 18), (20,), (72,)),
    "dropout_add_norm": ((None, 72), (72,), (72,))}
torch.set_num_threads(2)
torch.backends.mkldnn.enabled = sys.argv[1] == "mkldnn"
op, worst = sys.argv[2], 0.0
ours, theirs = getattr(functional, op), getattr(eager, op)
def check(rows, dtype):
    global worst
    g = torch.Generator().manual_seed(rows)
    tensors = [t.to(dtype) for t in (torch.randn(rows, 72, generator=g), *(0.3 * torch.randn(s, generator=g) for s in (tuple(n or rows for n in s) for s in ARGUMENTS[op])))]
    dy = torch.randn(rows, 72, generator=g).to(dtype)
    def run(f, tensors, dy):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    with backend.use("cpu"):
        got = run(ours, tensors, dy)
    exact, same = run(theirs, [t.double() for t in tensors], dy.double()), run(theirs, tensors, dy)
    for i, (a, b, c) in enumerate(zip(got, exact, same, strict=True)):
        if b.numel() >= tolerance.SMALL:
            worst = max(worst, tolerance.relative_error(a, b) / tolerance.limit_of(tolerance.relative_error(c, b), dtype, gradient=i > 0))
threads = [threading.Thread(target=check, args=(rows, dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float16) for rows in (1, 2, 4, 7, 31, 33, 64, 65, 130)]
[t.start() for t in threads]; [t.join() for t in threads]
ran = backend.ran()
print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "worst": worst, "ran": [ran.get((op, way, "cpu"), 0) for way in ("forward", "backward")]}))
"""


def run(level: str, mkldnn: str = "mkldnn", op: str = "bottleneck", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, mkldnn, op], capture_output=True, text=True, env={**os.environ, "ATEN_CPU_CAPABILITY": level, **environment})


# bf16 is multiplied in bf16 where the processor can, else in fp32: the second way is that of every processor while oneDNN is off.
WITHOUT_BF16_GEMMS: list[Spec] = [
    *(kind(lead=(70,), width=72, rank=20, dtype=a, param_dtype=p) for kind in (Bottleneck, Routed, Lora) for a, p in (BF16, MIXED)),
    Bottleneck(lead=(130,), width=33, rank=7, dtype=MIXED[0], param_dtype=MIXED[1], residual="other", scale="tensor", gate=True),
    Lora(lead=(130,), width=40, out=72, rank=33, dtype=MIXED[0], param_dtype=MIXED[1], biases="up", dropout=0.3),
    *(
        Gated(lead=(2, 35), width=72, rank=20, gate_rank=7, dtype=MIXED[0], param_dtype=MIXED[1], granularity=g, combine=c, save_gate=s)
        for g in GRANULARITIES
        for c, s in (("multiply", False), ("add", True))
    ),
]


@pytest.fixture
def no_onednn() -> Iterator[None]:
    torch.backends.mkldnn.enabled = False
    yield
    torch.backends.mkldnn.enabled = True


@specs(WITHOUT_BF16_GEMMS)
def test_right_without_bf16_gemms(spec: Spec, no_onednn: None) -> None:
    checks.assert_within_rule(spec, "cpu", "cpu")
    if spec.param_dtype != spec.dtype:
        checks.assert_rounds_parameters(spec, "cpu", "cpu")


@pytest.mark.parametrize("level", ["AVX2", "AVX512_CORE"])
def test_right_where_onednn_is_held_below_the_processor(level: str) -> None:
    """There its GEMM of bf16 throws, or takes longer."""
    done = run("avx2", ONEDNN_MAX_CPU_ISA=level)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["worst"] <= 1.0


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX512-BF16")
def test_bf16_has_gemms_of_its_own() -> None:
    """Their factors are rounded, so the gradients of the weights differ: the tests above are of two things."""
    spec = Bottleneck(lead=(512,), width=768, rank=32, dtype=BF16[0], param_dtype=BF16[1])
    tensors, dy = spec.draw(0), spec.cotangent(0)
    own = checks.fused(spec, "cpu", tensors, dy)
    torch.backends.mkldnn.enabled = False
    try:
        other = checks.fused(spec, "cpu", tensors, dy)
    finally:
        torch.backends.mkldnn.enabled = True
    assert not any(torch.equal(own[name], other[name]) for name in ("d w_down", "d w_up"))


@pytest.mark.parametrize(("op", "mkldnn"), [("bottleneck", "mkldnn"), ("bottleneck", "no mkldnn"), ("phm_bottleneck", "no mkldnn"), ("dropout_add_norm", "no mkldnn")])
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_right_at_every_level(level: str, op: str, mkldnn: str) -> None:
    """Ragged row counts in three dtypes, from 27 Python threads of two OpenMP threads each, with oneDNN on and off."""
    if level == "avx512" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this processor has no AVX-512")
    done = run(level, mkldnn, op)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["capability"].lower().startswith(level) and result["ran"] == [27, 27]
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


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("", "_cpu_build.json is damaged; to build it"),
        ("{}", "_cpu_build.json is damaged; to build it"),
        ('{"torch": "TORCH"}', "_cpu_build.json is damaged; to build it"),
        ('{"torch": "TORCH", "levels": ["sse"]}', r"were built for sse alone \(FASTADAPT_CPU_LEVELS\), torch runs at avx\d+ here; to build it"),
        ('{"torch": "TORCH", "levels": ["avx2", "avx512"]}', r"_cpu_avx\d+.so is gone; to build it"),
    ],
)
def test_what_the_record_of_a_build_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: str, why: str) -> None:
    (tmp_path / "_cpu_build.json").write_text(record.replace("TORCH", ".".join(torch.__version__.split(".")[:2])))
    if "sse" in record:  # of an earlier build
        for level in ("avx2", "avx512"):
            shutil.copy(_cpu._FOLDER / f"_cpu_{level}.so", tmp_path)
    monkeypatch.setattr(_cpu, "_FOLDER", tmp_path)
    assert re.search(why, str(_cpu.unavailable.__wrapped__()))


# Few rows and few tiles, whose columns threads share.
SHARED: list[Spec] = [
    Bottleneck(lead=(3,), width=600, rank=288),
    Bottleneck(lead=(40,), width=200, rank=100, scale="tensor", gate=True),
    Bottleneck(lead=(150,), width=200, rank=100, dtype=MIXED[0], param_dtype=MIXED[1], scale="tensor", gate=True),
    Lora(lead=(70,), width=200, out=160, rank=70, dropout=0.3, biases="up"),
    *(Gated(lead=(2, t), width=300, rank=40, gate_rank=70, granularity=g) for t in (20, 60) for g in GRANULARITIES),
]


@specs([*(kind(lead=(1500,), width=96, rank=24) for kind in (Bottleneck, PHM)), Norm(lead=(1500,), width=96, dropout=0.1), *SHARED])
def test_thread_count_does_not_change_a_bit(spec: Spec) -> None:
    """One partial per chunk of rows, added in order: 1,500 rows are three chunks."""
    tensors, dy = spec.draw(0), spec.cotangent(0)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(checks.fused(spec, "cpu", tensors, dy))
    torch.set_num_threads(before)
    for other in results[1:]:
        checks.assert_same_bits(results[0], other)


KEPT: list[Spec] = [
    *(kind(lead=(70,), width=40, rank=12) for kind in (Bottleneck, Routed, Lora, PHM, Norm)),
    Bottleneck(lead=(2,), width=40, rank=33),
    Bottleneck(lead=(70,), width=40, rank=40),
    Lora(lead=(70,), width=40, rank=40, dropout=0.3),
    Bottleneck(lead=(70,), width=40, rank=12, dtype=MIXED[0], param_dtype=MIXED[1], scale="tensor", gate=True),
    *(Gated(lead=(2, t), width=40, rank=12, gate_rank=7, dtype=BF16[0], param_dtype=BF16[1], granularity=g) for t in (35, 75) for g in GRANULARITIES),
]


@specs(KEPT)
def test_what_is_left_in_working_memory_changes_no_bit(spec: Spec, request: pytest.FixtureRequest) -> None:
    """A thread keeps it from call to call: here a larger call of NaN alone leaves it to this one; where torch fills new memory, each call has its own."""
    tensors, dy, got = spec.draw(0), spec.cotangent(0), {}
    larger = dataclasses.replace(spec, lead=(*spec.lead[:-1], 700), width=104)

    def run() -> None:
        checks.fused(larger, "cpu", {n: torch.full_like(t, math.nan) if t.is_floating_point() else t for n, t in larger.draw(0).items()}, larger.cotangent(0))
        got.update(checks.fused(spec, "cpu", tensors, dy))

    thread = threading.Thread(target=run)  # a new one has nothing of earlier calls
    thread.start(), thread.join()
    request.getfixturevalue("poisoned_empty")
    checks.assert_same_bits(got, checks.fused(spec, "cpu", tensors, dy))


def test_calls_share_their_working_memory() -> None:
    """The second call of a thread allocates what it returns, and nothing else."""
    spec = Bottleneck(lead=(64,), width=768, rank=96)
    tensors = spec.draw(0)
    with backend.use("cpu"), torch.no_grad():
        spec.call(functional, tensors)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            y = spec.call(functional, tensors)
    allocated = [e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    assert sum(allocated) == y.nbytes
