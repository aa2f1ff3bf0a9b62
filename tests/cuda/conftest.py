"""The emulated device: the CUDA kernels, compiled for the host, behind the library's own ops."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest

from fastadapt.ops import _cuda
from tests.cuda import emulator

SOURCES = [emulator.CSRC / "cuda_ops.cpp", *sorted((emulator.CSRC / "cuda").glob("*.cu")), *sorted((emulator.CSRC / "cuda" / "inst").glob("*.cu"))]


@pytest.fixture(scope="session")
def emulated() -> None:
    """Builds and loads the backend ``emulated-cuda``; the build is kept under build/emulator."""
    if os.environ.get("FASTADAPT_TEST_NO_COMPILER") == "1":
        pytest.skip("the emulator needs a compiler (FASTADAPT_TEST_NO_COMPILER=1 says there is none)")
    _cuda.load_emulated(emulator.build(SOURCES))


@pytest.fixture
def machine(emulated: None, request: pytest.FixtureRequest) -> Iterator[emulator.Machine]:
    """The device of one test, on a schedule that its name chooses and with the least shared memory of the supported architectures. No launch may fail, and no ldmatrix conflict."""
    number = zlib.crc32(request.node.nodeid.encode())
    with emulator.device(emulator.POLICIES[number % 3], number, arch=120, global_races=True) as machine:
        yield machine
        conflicts = {kernel: counters["ldmatrix_conflicts"] for kernel, counters in machine.stats().items() if counters["ldmatrix_conflicts"]}
        assert not conflicts, f"bank conflicts in ldmatrix: {conflicts}"
