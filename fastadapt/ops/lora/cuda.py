"""LoRA's update on the compiled CUDA kernels (csrc/cuda/), and on the same kernels in the emulator of the tests."""

from __future__ import annotations

from fastadapt.ops._cuda import Kernels

CUDA = Kernels("lora")
EMULATED = Kernels("lora", emulated=True)
forward, backward, reasons = CUDA.forward, CUDA.backward, CUDA.reasons
