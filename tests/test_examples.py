"""The examples run as their first lines say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(*command: str, cwd: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} - {
        "every_example_is_run_here"
    }


def test_hosts(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/hosts.py"), cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in out] == ["bart", "t5", "llava", "siglip"]
    for line in out:
        first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", line).groups())  # type: ignore[union-attr]
        assert last < first, line


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_distributed(mode: str, tmp_path: Path) -> None:
    out = run(*TORCHRUN, str(ROOT / "examples/distributed.py"), mode, cwd=tmp_path)
    first, last = map(float, re.findall(rf"{mode}, 2 processes: step \d, loss ([\d.]+)", out))
    assert last < first and "saved ['adapter_config.json', 'adapter_model.safetensors']" in out


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")
def test_trainer(tmp_path: Path) -> None:
    assert re.search(r"20 steps, loss [\d.]+; loaded again: 10 sites", run(str(ROOT / "examples/trainer.py"), str(tmp_path / "out"), cwd=tmp_path))
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= {path.name for path in (tmp_path / "out" / "checkpoint-20").iterdir()}
    assert not (tmp_path / "out" / "checkpoint-20" / "model.safetensors").exists()


def test_fuse_peft(tmp_path: Path) -> None:
    out = run(str(ROOT / "examples/fuse_peft.py"), cwd=tmp_path)
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups())  # type: ignore[union-attr]
    assert last < first and out.startswith("20 layers fused, 0 left alone") and "read back as 20 sites" in out
