"""The bottleneck on the compiled CPU kernels (csrc/cpu/bottleneck.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.ops._cpu import mask, reasons

__all__ = ["backward", "forward", "reasons"]


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.fastadapt_cpu.bottleneck.default(*args)


def backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors_and_options, needs = args
    return torch.ops.fastadapt_cpu.bottleneck_backward.default(*tensors_and_options, mask(needs))
