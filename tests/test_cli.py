"""``fastadapt explain``: what it prints, in which words, and with which exit codes; what is wrong with a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt import backend, cli
from fastadapt.ops import _cost

SHAPE = ("--rows", "8192", "--width", "768", "--rank", "96")


@pytest.fixture(autouse=True)
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTADAPT_CALIBRATION", "")
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()
    with backend.use("auto"):
        yield
    _cost.calibration.cache_clear()
    backend._choice.cache_clear()


def explain(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["explain", *args]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120"])
@pytest.mark.parametrize("op", ["bottleneck", "gated_bottleneck"])
def test_any_architecture_without_a_gpu(capsys: pytest.CaptureFixture[str], op: str, arch: str) -> None:
    first, *rest = explain(capsys, op, *SHAPE, "--dtype", "bf16", "--param-dtype", "fp32", "--device", arch).splitlines()
    assert first == f"{op}: rows=8192 width=768 rank=96 torch.bfloat16 (parameters torch.float32) on {arch.rstrip('a')}: cuda"
    for name, line in zip(("cuda", "triton", "reference"), rest, strict=False):
        assert line.startswith(f"  {name}: can run it, ") and " us modelled: forward " in line and " backward " in line and "launches, mostly " in line
    assert rest[3].startswith("  times modelled for ") and rest[3].endswith(f", which stands for {arch.rstrip('a')}, not measured")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_what_this_machine_lacks_is_said_apart(capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, "bottleneck", *SHAPE, "--device", "sm_90")
    here = [line for line in out.splitlines() if line.startswith("  on this machine: ")]
    assert [line.split(": ")[1] for line in here] == ["cuda", "triton"] and out.splitlines()[0].endswith("on sm_90: cuda")
    out = explain(capsys, "bottleneck", *SHAPE, "--dtype", "fp32", "--device", "sm_90")
    assert out.splitlines()[0].endswith("on sm_90: triton") and "  cuda: the cuda kernels take bfloat16 and float16, not torch.float32" in out
    assert [line.split(": ")[1] for line in out.splitlines() if "on this machine" in line] == ["triton"]


def test_devices_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    out = explain(capsys, "bottleneck", *SHAPE, "--device", "cpu", "--dtype", "fp64")
    assert out.splitlines()[0].endswith("torch.float64 (parameters torch.float64) on cpu: reference") and "  cpu: the cpu kernels take" in out and " us " not in out
    if not torch.cuda.is_available():
        out = explain(capsys, "bottleneck", *SHAPE, "--device", "cuda")
        assert out.splitlines()[0].endswith("on cuda: reference") and "  triton: " in out and "  cuda: " in out
        assert "on cpu: " in explain(capsys, "bottleneck", *SHAPE)


def test_options_reach_the_call(capsys: pytest.CaptureFixture[str]) -> None:
    def call(*args: str) -> dict[str, Any]:
        return json.loads(explain(capsys, *args, "--json", "--device", "sm_80"))

    told = call("gated_bottleneck", *SHAPE, "--gate-rank", "48", "--dtype", "fp16", "--param-dtype", "fp16")
    assert told["call"]["options"] == {"gate_rank": 48, "granularity": "large"} and told["call"]["dtype"] == told["call"]["param_dtype"] == "torch.float16"
    assert call("gated_bottleneck", *SHAPE)["call"]["options"]["gate_rank"] == 96
    assert call("phm_bottleneck", *SHAPE, "--division", "8")["call"]["options"] == {"division": 8, "factor_rank": 1}
    assert call("routed_bottleneck", *SHAPE)["call"]["options"] == {"tasks": 4}
    assert call("gated_bottleneck", *SHAPE, "--granularity", "small")["call"]["options"] == {"gate_rank": 0, "granularity": "small"}
    assert call("gated_bottleneck", *SHAPE, "--granularity", "large_full")["call"]["options"] == {"gate_rank": 0, "granularity": "logits"}
    assert call("lora", *SHAPE)["call"]["options"] == {"dropout": False, "out_width": 768}
    assert call("lora", *SHAPE, "--out-width", "3072", "--dropout")["call"]["options"] == {"dropout": True, "out_width": 3072}
    told = call("dropout_add_norm", "--rows", "8", "--width", "64", "--norm", "rms", "--dropout")
    assert told["call"]["options"] == {"dropout": True, "norm": "rms", "wide": False} and told["call"]["rank"] == 0
    assert call("bottleneck", *SHAPE)["call"] == {
        "op": "bottleneck", "device": "cuda", "dtype": "torch.bfloat16", "param_dtype": "torch.float32", "rows": 8192, "width": 768, "rank": 96, "options": {}, "arch": 80
    }  # fmt: skip


def test_json_has_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(explain(capsys, "bottleneck", *SHAPE, "--device", "sm_90", "--json"))
    assert told["chosen"] == "cuda" and set(told["backends"]) == {"cuda", "triton", "reference"}
    assert told["basis"] == "times modelled for H100-SXM5, which stands for sm_90, not measured"
    backward = told["backends"]["cuda"]["estimate"]["backward"]
    assert [term[0] for term in backward["terms"]] == ["pack", "rows", "slabs", "reduce"]
    assert sum(term[1] for term in backward["terms"]) == pytest.approx(backward["gpu"]) and all(
        term[2] in ("flops", "hbm", "l2", "latency", "launch") for term in backward["terms"]
    )
    assert backward["microseconds"] == max(backward["gpu"], backward["host"])


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("bottle", *SHAPE), "argument op: unknown op 'bottle': must be one of bottleneck, dropout_add_norm, gated_bottleneck, lora, phm_bottleneck, routed_bottleneck"),
        (("bottleneck", *SHAPE, "--device", "gpu"), "argument --device: unknown device 'gpu': must be cpu, cuda or an architecture such as sm_90"),
        (("bottleneck", *SHAPE, "--device", "sm_999"), "argument --device: unknown architecture 'sm_999': must be one of sm_50, "),
        (("bottleneck", *SHAPE, "--device", "sm_90z"), "argument --device: unknown device 'sm_90z': must be cpu, cuda or an architecture such as sm_90"),
        (("bottleneck", *SHAPE, "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("bottleneck", "--rows", "0", "--width", "8", "--rank", "2"), "argument --rows: must be at least 1, not 0"),
        (("bottleneck", "--rows", "x", "--width", "8", "--rank", "2"), "argument --rows: must be a whole number, not 'x'"),
        (("bottleneck", "--rows", "4"), "the following arguments are required: --width"),
        (("gated_bottleneck", *SHAPE, "--granularity", "huge"), "argument --granularity: invalid choice: 'huge'"),
    ],
)
def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], why: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["explain", *args])
    assert exit.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("demo", "--steps", "x"), "argument --steps: must be a whole number, not 'x'"),
        (("demo", "--seed", "-1"), "argument --seed: must be from 0 to 2^32 - 1, not -1"),
        (("demo", "--threads", "2000"), "argument --threads: must be at most 1024, not 2000"),
        (("demo", "--seed", "1.5"), "argument --seed: must be a whole number, not '1.5'"),
        (("bench", "--width", "0"), "argument --width: must be at least 1, not 0"),
        (("bench", "--seconds", "nan"), "argument --seconds: must be a positive number, not 'nan'"),
        (("convert", "a", "b", "--host", "bart", "--option", "host=1"), "argument --option: 'host' is no option of a method but an argument of the command"),
        (("convert", "a", "b", "--host", "bart", "--option", "rank"), "argument --option: must be name=value, not 'rank'"),
    ],
)
def test_what_is_wrong_with_other_commands(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], why: str) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(args)
    assert exit.value.code == 2 and why in capsys.readouterr().err


def test_values_of_options() -> None:
    given = {"True": True, "false": False, "0.5": 0.5, ".5": 0.5, "1e-3": 1e-3, "+4": 4, "[0, 1]": [0, 1], "null": None, "small": "small", "none": "none", '"true"': "true"}
    for text, value in given.items():
        found = cli._option(f"name={text}")
        assert found == ("name", value) and type(found[1]) is type(value), text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"fastadapt {fastadapt.__version__}\n"


def test_a_reader_that_has_read_enough() -> None:
    process = subprocess.Popen([sys.executable, "-m", "fastadapt.cli", "explain", "bottleneck", *SHAPE, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(120) == 1


def test_convert_without_transformers(tmp_path: Path) -> None:
    torch.save({"encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": torch.zeros(2, 8)}, tmp_path / "a.pth")
    arguments = ["convert", str(tmp_path / "a.pth"), "b", "--host", "t5", "--method", "lora"]
    code = f"import sys; sys.modules['transformers'] = None; from fastadapt import cli; sys.exit(cli.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "fastadapt convert: transformers is not installed; pip install 'fastadapt[hosts]'\n")


def test_a_demo_that_cannot_be_written_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "demo")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"fastadapt demo: --out {tmp_path / 'file' / 'demo'}: cannot be written (") and said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("bottleneck", *SHAPE, "--gate-rank", "8"), "--granularity and --gate-rank are options of gated_bottleneck, not of bottleneck"),
        (("bottleneck", *SHAPE, "--granularity", "small"), "--granularity and --gate-rank are options of gated_bottleneck, not of bottleneck"),
        (("bottleneck", *SHAPE, "--division", "8"), "--division and --factor-rank are options of phm_bottleneck, not of bottleneck"),
        (("bottleneck", "--rows", "8", "--width", "64"), "bottleneck needs --rank"),
        (("dropout_add_norm", *SHAPE), "dropout_add_norm has no --rank"),
        (("lora", *SHAPE, "--wide"), "--dropout and --norm and --wide are options of dropout_add_norm, not of lora"),
        (("bottleneck", *SHAPE, "--dropout"), "--out-width and --dropout are options of lora, not of bottleneck"),
        (("phm_bottleneck", *SHAPE, "--tasks", "8"), "--tasks is an option of routed_bottleneck, not of phm_bottleneck"),
        (("bottleneck", *SHAPE, "--dtype", "bf16", "--param-dtype", "fp16"), "--param-dtype must be bf16 or fp32, not fp16"),
        (("gated_bottleneck", *SHAPE, "--granularity", "small", "--gate-rank", "8"), "--gate-rank is an option of granularity large, not of small"),
        (("phm_bottleneck", "--rows", "8", "--width", "770", "--rank", "96"), "division: must divide the width 770 and the rank 96, not 4"),
        (("phm_bottleneck", "--rows", "8", "--width", "768", "--rank", "97"), "division: must divide the width 768 and the rank 97, not 4"),
        (("dropout_add_norm", "--rows", "8", "--width", "64", "--wide", "--dtype", "fp32"), "wide: a float32 residual stands beside half-precision activations"),
    ],
)
def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], why: str) -> None:
    assert cli.main(["explain", *args, "--device", "sm_80"]) == 2
    assert why in capsys.readouterr().err


def test_a_demand_that_cannot_be_met() -> None:
    command = [sys.executable, "-m", "fastadapt.cli", "explain", "bottleneck", *SHAPE, "--dtype", "fp32", "--device", "sm_90"]
    done = subprocess.run(command, env={**os.environ, "FASTADAPT_BACKEND": "cuda"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        "fastadapt explain: backend 'cuda' was demanded but cannot run bottleneck with torch.float32, width 768, rank 96 on sm_90: "
        "the cuda kernels take bfloat16 and float16, not torch.float32\n"
    )
