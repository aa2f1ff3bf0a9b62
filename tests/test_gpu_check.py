"""``make gpu-check`` without a GPU: what it would run, and what it writes. The recorded input is invented and says so."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from fastadapt import backend
from fastadapt.ops import _cost


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTADAPT_CALIBRATION", "")
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()
    with backend.use("auto"):
        yield
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()


@pytest.fixture
def record() -> dict[str, Any]:
    return json.loads(gpu_check.RECORDED.read_text())


def options(*args: str) -> Any:
    return gpu_check.parser().parse_args(args)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so_and_checks_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "TESTS", ("tests/test_entrance.py",))  # the whole suite takes half a minute to collect
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "gpu-check: there is no CUDA device here, so nothing is measured; the dry part follows"
    assert any(int(found[1]) > 10 for line in rest if (found := re.search(r"(\d+) tests need a GPU", line)))
    assert sum(line.startswith("would run: ") for line in rest) == 27
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_collection_that_finds_nothing_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("tests/test_errors.py", "tests/no_such_file.py"):
        monkeypatch.setattr(gpu_check, "TESTS", (nothing,))
        assert gpu_check.main(["--dry-run"]) == 1
        assert "no test that needs a GPU could be collected" in capsys.readouterr().err


def test_what_the_sanitizer_runs_is_there() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-m", "gpu and not full", *gpu_check.SANITIZED], cwd=gpu_check.ROOT, capture_output=True, text=True)
    found = re.search(r"^(\d+)/\d+ tests collected", done.stdout, re.M)
    assert done.returncode == 0 and found and 20 <= int(found[1]) <= 200 * len(gpu_check.OPS)


def test_command_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps = {step.name: step for step in gpu_check.steps(options("--rows", "64", "128", "--rounds", "3", "--out", str(tmp_path / "a folder")))}
    assert list(steps) == [
        "tests",
        "memcheck",
        "racecheck",
        *(f"benchmark {op} {name}" for op in gpu_check.OPS for name in ("cuda", "triton")),
        *(f"counters {op} {name}" for op in gpu_check.OPS for name in ("cuda", "triton")),
    ]
    assert gpu_check.OPS == ("bottleneck", "dropout_add_norm", "gated_bottleneck", "lora", "phm_bottleneck", "routed_bottleneck")
    for step in steps.values():
        assert shlex.split(str(step)) == [*(f"{k}={v}" for k, v in step.environment.items()), *step.command]
    assert steps["tests"].command[3:5] == ["-m", "gpu and not full"] and steps["tests"].command[-1] == f"--junitxml={tmp_path}/a folder/tests.xml"
    assert steps["memcheck"].command[1:5] == ["--tool", "memcheck", "--error-exitcode", "9"] and steps["memcheck"].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    benchmark = steps["benchmark gated_bottleneck cuda"].command
    assert benchmark[1:3] == ["-m", "benchmarks.ops.gated_bottleneck"] and benchmark[benchmark.index("--rows") + 1 : benchmark.index("--json")] == ["64", "128"]
    assert "gpu" == gpu_check.steps(options("--full"))[0].command[4]


def test_the_sanitizer_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    tool = tmp_path / "home" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        missing = gpu_check.steps(options())[1]
        assert missing.missing and gpu_check.run(missing)["status"] == "missing"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert gpu_check.sanitizer() == str(tool) and gpu_check.steps(options())[1].missing is None
    monkeypatch.setenv("PATH", str(tool.parent))
    assert gpu_check.sanitizer() == str(tool)


@pytest.mark.parametrize("op", ["bottleneck", "gated_bottleneck"])
def test_benchmarks_refuse_a_device_that_is_not_here(op: str) -> None:
    """The benchmark's own command line, in full, up to the device."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    (step,) = (s for s in gpu_check.steps(options()) if s.name == f"benchmark {op} cuda")
    done = subprocess.run(step.command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--device cuda: torch sees no CUDA device" in done.stderr


def test_a_step_that_fails_is_reported() -> None:
    done = gpu_check.run(gpu_check.Step("ends badly", [sys.executable, "-c", "import os, sys; sys.exit(int(os.environ['CODE']))"], {"CODE": "3"}))
    assert (done["status"], done["exit"]) == ("failed", 3) and done["command"].startswith("CODE=3 ")


def test_subjects_are_counted(tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_text(
        '<testsuites><testsuite><testcase name="test_streams[a]"/><testcase name="test_graph_is_captured"><failure/></testcase>'
        '<testcase name="test_second_device"><skipped/></testcase><testcase name="test_deterministic[b]"/><testcase name="test_x"><error/></testcase></testsuite></testsuites>'
    )
    counts = gpu_check.counts_of(tmp_path / "t.xml")
    assert counts["all"] == {"passed": 2, "failed": 2, "skipped": 1} and counts["streams"] == {"passed": 1, "failed": 0, "skipped": 0}
    assert counts["CUDA graphs"]["failed"] == counts["second device"]["skipped"] == counts["bitwise determinism"]["passed"] == 1


def test_the_report(record: dict[str, Any], tmp_path: Path) -> None:
    report, raw, calibration = gpu_check.write(record, tmp_path)
    assert json.loads(raw.read_text()) == record and calibration.name == "calibration-sm_90.json"
    text = report.read_text()
    assert text.startswith("# fastadapt on invented device\n\nInvented numbers, to test the report writer: no device was measured.\n")
    for line in (
        "* driver: 580.00", "* commit: 0000000", "| tests | passed | 61.5 s |", "| second device | 0 | 0 | 2 |",
        "| memcheck | missing | compute-sanitizer is neither on PATH nor in CUDA_HOME/bin; it comes with the CUDA toolkit |", "| benchmark bottleneck cuda | failed | 3.0 s |",
        "| bottleneck | cuda | 1024 | forward | 0.106 | eager | 1.50 [1.35, 1.65] |",
        "| bottleneck | cuda | 1024 | forward+backward | 0.300 | compile | outside the tolerance: not shown |",
        "| bottleneck | **cuda** | 1024 | backward | 182 | 546 [519, 601] | 3.00 |", "| bottleneck | triton | 1024 | forward | 140 | 70 [66, 77] | 0.50 |",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    record["compared"][0]["modelled_us"] = None
    assert "| no model |" in gpu_check.markdown(record)


def test_its_calibration_changes_the_choice(record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {"rows": 16384, "width": 768, "rank": 96, "dtype": torch.bfloat16, "param_dtype": torch.float32, "device": "sm_90"}
    assert backend.explain("bottleneck", **shape).chosen == "cuda"
    path = gpu_check.write(record, tmp_path)[2]
    assert json.loads(path.read_text())["factors"]["cuda"]["bottleneck"] == {"backward": 3.0, "forward": 2.0}
    monkeypatch.setenv("FASTADAPT_CALIBRATION", str(path))
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()
    told = backend.explain("bottleneck", **shape)
    assert told.chosen == "triton" and "calibrated on invented device, 2000-01-01" in str(told)
    assert backend.explain("gated_bottleneck", granularity="large", gate_rank=96, **shape).chosen == "cuda"


@pytest.mark.parametrize("op", gpu_check.OPS)
def test_measuring(op: str) -> None:
    """What is timed on a device, run on the CPU."""
    found = gpu_check.measured(op, ["reference"], 8, "cpu", 3, 16, 4)
    assert set(found) == {"reference"} and set(found["reference"]) == {"forward", "backward"}
    assert all(0 <= low <= median <= high for median, low, high in found["reference"].values())


@pytest.mark.parametrize("op", gpu_check.OPS)
def test_what_the_profiler_looks_at(op: str) -> None:
    backend.ran(reset=True)
    gpu_check.one_step(op, "reference", 8, "cpu")
    assert backend.ran() == {(op, "forward", "reference"): 1, (op, "backward", "reference"): 1}


def test_every_question_has_a_command() -> None:
    questions = dict(gpu_check.questions())
    assert set(questions) == set(gpu_check.QUESTIONS) and all(questions.values())
    assert {name.split()[0] for name in gpu_check.QUESTIONS.values()} == {step.name.split()[0] for step in gpu_check.steps(options())} | {"compared"}
    step = next(step for step in gpu_check.steps(options()) if step.name == "counters lora triton")
    assert step.command[-3:] == ["--one-step", "lora", "triton"] and (step.missing or step.command[0].endswith("/ncu"))


def test_the_makefile_runs_it() -> None:
    text = (gpu_check.ROOT / "Makefile").read_text()
    assert re.search(r"^gpu-check: .*\n\t\$\(BIN\)/python -m benchmarks\.gpu_check$", text, re.M) and "gpu-check" in text.split(".PHONY:")[1].split("\n")[0]
