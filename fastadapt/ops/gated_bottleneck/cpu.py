"""VL-PET's gated bottleneck on the compiled CPU kernels (csrc/cpu/gated_bottleneck.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.ops._cpu import mask, reasons

__all__ = ["backward", "forward", "reasons"]


def forward(*args: Any) -> tuple[Tensor, ...]:
    return torch.ops.fastadapt_cpu.gated_bottleneck.default(*args)


def backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors_and_options, needs = args
    return torch.ops.fastadapt_cpu.gated_bottleneck_backward.default(*tensors_and_options, mask(needs))
