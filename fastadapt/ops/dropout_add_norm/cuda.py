"""Dropout, sum and norm on the compiled CUDA kernels (csrc/cuda/), and on the same kernels in the emulator of the tests."""

from __future__ import annotations

from fastadapt.ops._cuda import Kernels

CUDA = Kernels("dropout_add_norm")
EMULATED = Kernels("dropout_add_norm", emulated=True)
forward, backward, reasons = CUDA.forward, CUDA.backward, CUDA.reasons
