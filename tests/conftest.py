"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for under `poisoned_empty` on a CUDA device

import pytest
import torch

torch.set_num_threads(1)  # the tensors are small: on two busy cores a second thread makes the suite several times slower. Tests of threading set their own number.


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Uninitialised memory holds NaN: torch fills whatever ``at::empty`` returns, to Python and to C++ callers alike, so an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        assert torch.empty(1).isnan().all()
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
