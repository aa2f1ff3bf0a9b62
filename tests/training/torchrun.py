"""Two processes of this machine under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def in_two_processes(module: str, *arguments: str) -> None:
    """Runs ``python -m module arguments`` in each; a process that a signal ends says where its threads were."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONFAULTHANDLER": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
