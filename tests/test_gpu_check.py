"""``make gpu-check`` without a GPU: what it would run, and what it writes. The recorded input is invented and says so."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from fastadapt import backend
from fastadapt.ops import _cost
from fastadapt.ops.bottleneck.plan import Plan
from tests.cuda.test_gpu import FEW


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
    assert sum(line.startswith("would run: ") for line in rest) == 28
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
        "compared",
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
    assert steps["compared"].command[-7:] == ["--out", f"{tmp_path}/a folder", "--rounds", "3", "--rows", "64", "128"]
    assert "gpu" == gpu_check.steps(options("--full"))[0].command[4]


def test_quick_is_a_quarter_of_an_hour() -> None:
    """Whatever hangs; no step of it is missing among the others, where it has more time."""
    quick, others = gpu_check.steps(options("--quick")), {step.name: step for step in gpu_check.steps(options())}
    assert [step.name for step in quick] == ["tests", "memcheck", "compared", *(f"benchmark {op} cuda" for op in gpu_check.OPS)]
    assert sum(step.limit for step in quick) <= 15 * 60 and all(0 < step.limit < others[step.name].limit for step in quick)
    for step in quick[2:]:
        at = step.command.index("--rounds")
        assert step.command[at : at + 4] == ["--rounds", "5", "--rows", "4096"]
    assert set(gpu_check.QUICK_TESTS) < set(quick[0].command) and set(gpu_check.QUICK_SANITIZED) < set(quick[1].command)


def collected(*tests: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", "-m", "gpu and not full", *tests]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_quick_has_calls_of_every_op_on_both_backends() -> None:
    found = re.findall(r"::test_within_rule\[(\w+)-(cuda|triton)\]", "\n".join(collected(*gpu_check.QUICK_TESTS)))
    assert {(FEW[name].op, backend) for name, backend in found} == set(product(gpu_check.OPS, ("cuda", "triton")))
    assert collected(*gpu_check.QUICK_SANITIZED) == [*gpu_check.QUICK_SANITIZED]


@pytest.mark.parametrize("op", gpu_check.OPS)
def test_what_is_explained_is_a_call_of_the_op(op: str) -> None:
    for arch in ("sm_80", "sm_90"):
        told = gpu_check.explained(op, 4096, arch)
        assert told.reasons["cuda"] == told.reasons["triton"] == [] and told.call.width == 768 and told.call.rank == (0 if op == "dropout_add_norm" else 96)


def test_the_steps_of_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a device before anything runs; kernels that are not built have no benchmark, and say so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "_capability", lambda index: 90)
    monkeypatch.setattr(Plan, "reasons", lambda self, name, call: ["not built"] if (name, call.op) == ("cuda", "lora") else [])
    for extent in ((), ("--full",), ("--quick",)):
        steps = {step.name: step for step in gpu_check.steps(options(*extent))}
        assert len(steps) == (9 if extent == ("--quick",) else 28)
        assert {op: steps[f"benchmark {op} cuda"].missing for op in gpu_check.OPS} == {op: "not built" if op == "lora" else None for op in gpu_check.OPS}


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


def test_a_step_that_hangs_is_stopped_and_reported(tmp_path: Path) -> None:
    """Interrupted first, so that what can still report does, and then killed with its children; what an earlier run wrote is gone."""
    result, child = tmp_path / "result", tmp_path / "child"
    result.write_text("of an earlier run")
    # A background job of a shell without job control is started with the signal ignored.
    heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    sleeps = f"import subprocess, sys; {heeds}child = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w').write(str(child.pid)); "
    waits = "\ntry:\n    child.wait()\nexcept KeyboardInterrupt:\n    print('interrupted', file=open(sys.argv[1], 'w'))"
    done = gpu_check.run(gpu_check.Step("hangs", [sys.executable, "-c", sleeps + waits, str(result)], limit=3, writes=result))
    assert (done["status"], done["why"]) == ("timed out", "stopped at its limit of 3 s") and 3 <= done["seconds"] < 20 and result.read_text() == "interrupted\n"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    done = gpu_check.run(gpu_check.Step("hangs", [sys.executable, "-c", deaf], limit=1, writes=result), grace=0.5)
    assert done["status"] == "timed out" and done["exit"] == -9 and done["seconds"] < 20 and not result.exists()
    for _ in range(50):  # a killed child lives until it is reaped
        if not Path(f"/proc/{child.read_text()}").exists() or "(zombie)" in Path(f"/proc/{child.read_text()}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child runs on")


def test_the_run_goes_on_behind_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], record: dict[str, Any]) -> None:
    """What the others wrote is in the report, and the exit status is not 0."""
    python, out = [sys.executable, "-c"], tmp_path / "out"
    row = json.dumps(record["compared"][:1])
    steps = [
        gpu_check.Step("tests", [*python, "import time; time.sleep(60)"], limit=1, writes=out / "tests.xml"),
        gpu_check.Step("compared", [*python, f"open({str(out / 'compared.json')!r}, 'w').write({row!r})"], writes=out / "compared.json"),
        gpu_check.Step("benchmark lora cuda", [*python, "raise SystemExit(2)"], writes=out / "lora-cuda.json"),
    ]
    monkeypatch.setattr(gpu_check, "steps", lambda options: steps)
    monkeypatch.setattr(gpu_check, "environment", lambda: record["environment"])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gpu_check.check(options("--out", str(out), "--no-calibration")) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "gpu-check: failed: tests (timed out), benchmark lora cuda"
    written = json.loads((out / "report.json").read_text())
    assert [step["status"] for step in written["steps"]] == ["timed out", "passed", "failed"] and written["compared"] == record["compared"][:1] and not written["tests"]
    assert gpu_check.check(options("--out", str(out), "--only", "compared")) == 0
    assert [step["name"] for step in json.loads((out / "report.json").read_text())["steps"]] == ["compared"] and list((tmp_path / ".cache" / "fastadapt").iterdir())


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
        "| benchmark lora cuda | timed out | stopped at its limit of 1200 s |",
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


def test_what_is_measured_stands_beside_its_modelled_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every op on every backend, with what `auto` chooses; a calibration file is not asked."""
    told = gpu_check.explained
    monkeypatch.setattr(gpu_check, "explained", lambda op, rows: told(op, rows, "sm_90"))
    monkeypatch.setattr(
        gpu_check, "measured", lambda op, backends, rows, device, rounds: {name: dict.fromkeys(("forward", "backward"), (2.0, 1.0, float(rounds))) for name in backends}
    )
    monkeypatch.setenv("FASTADAPT_CALIBRATION", "a file")
    gpu_check.compare(options("--out", str(tmp_path), "--rows", "64", "16384", "--rounds", "3"))
    rows = json.loads((tmp_path / "compared.json").read_text())
    assert {(r["op"], r["backend"], r["direction"], r["rows"]) for r in rows} == set(product(gpu_check.OPS, gpu_check.BACKENDS, ("forward", "backward"), (64, 16384)))
    assert all(r["modelled_us"] > 0 and (r["measured_us"], r["low_us"], r["high_us"]) == (2.0, 1.0, 3.0) for r in rows)
    assert all(sum(r["chosen"] for r in rows if r["op"] == op) == 4 for op in gpu_check.OPS) and {r["rank"] for r in rows} == {0, 96}


@pytest.mark.parametrize("op", gpu_check.OPS)
def test_what_the_profiler_looks_at(op: str) -> None:
    backend.ran(reset=True)
    gpu_check.one_step(op, "reference", 8, "cpu")
    assert backend.ran() == {(op, "forward", "reference"): 1, (op, "backward", "reference"): 1}


def test_every_question_has_a_command() -> None:
    questions = dict(gpu_check.questions())
    assert set(questions) == set(gpu_check.QUESTIONS) and all(questions.values())
    assert {name.split()[0] for name in gpu_check.QUESTIONS.values()} == {step.name.split()[0] for step in gpu_check.steps(options())}
    step = next(step for step in gpu_check.steps(options()) if step.name == "counters lora triton")
    assert step.command[-3:] == ["--one-step", "lora", "triton"] and (step.missing or step.command[0].endswith("/ncu"))


def test_the_makefile_runs_it() -> None:
    text = (gpu_check.ROOT / "Makefile").read_text()
    assert re.search(r"^gpu-check: .*\n\t\$\(BIN\)/python -m benchmarks\.gpu_check \$\(QUICK\)$", text, re.M) and "gpu-check" in text.split(".PHONY:")[1].split("\n")[0]


@pytest.mark.parametrize("nvcc", ["on PATH", "in CUDA_HOME", "too old", "nowhere"])
def test_make_builds_the_kernels_where_there_is_a_gpu(nvcc: str, tmp_path: Path) -> None:
    """With nvcc from pip where there is none that is new enough; without a GPU nothing is built, and nothing noted that would keep them from being built later."""

    def commands(gpus: str) -> list[str]:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\necho '{gpus}'\n")
        tool.chmod(0o755)
        target = tmp_path / "nvcc" if nvcc == "on PATH" else tmp_path / "home" / "bin" / "nvcc"
        if nvcc != "nowhere":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {'12.4' if nvcc == 'too old' else '13.0'}, V1'\n")
            target.chmod(0o755)
        installed = ["-W", ".venv/.installed"]  # as if it were new
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_HOME": str(tmp_path / "home")}
        done = subprocess.run(["make", "--no-print-directory", "-n", *installed, "gpu-check", "QUICK=--quick"], cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (without,) = commands("NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.")
    assert without.endswith("-m benchmarks.gpu_check --quick")
    choose, build, stamp, check = commands("GPU 0: NVIDIA H200 (UUID: GPU-0)")
    assert build.startswith("FASTADAPT_CUDA=1 ") and stamp == "touch .venv/.cuda" and check == without
    script = re.sub(r"\S+/python -m pip .*", "echo fetched", choose).replace(".venv/bin/python", sys.executable)
    fetched = subprocess.run(["/bin/sh", "-c", script], cwd=gpu_check.ROOT, env={"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path / "home")}, capture_output=True, text=True)
    has_pips = any(Path(folder, "nvidia", "cu13", "bin", "nvcc").exists() for folder in sys.path)
    assert ("fetched" in fetched.stdout) == (nvcc in ("too old", "nowhere") and not has_pips), fetched.stderr
