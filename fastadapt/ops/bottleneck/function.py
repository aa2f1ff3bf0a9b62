"""The autograd entrance of the bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.ops.bottleneck import schema


class Bottleneck(torch.autograd.Function):
    """One op forward, one op backward, in eager mode and when traced alike."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.fastadapt.bottleneck(*args)

    setup_context = staticmethod(schema.setup_context)
    backward = staticmethod(schema.backward)


def bottleneck(*tensors_and_options: Any, demand: int) -> Tensor:
    """Runs the op on rows; skips autograd, and what it would save, when no gradient can be asked for."""
    tensors = tensors_and_options[:8]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return Bottleneck.apply(*tensors_and_options, True, demand)[0]
    return torch.ops.fastadapt.bottleneck(*tensors_and_options, False, demand)[0]
