"""The autograd entrance of LoRA's update, and the seed of its dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.ops._library import apart
from fastadapt.ops._library import below_autograd as run
from fastadapt.ops.lora import schema


class LoRA(torch.autograd.Function):
    """One op forward, one op backward, in eager mode and when traced alike."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:  # with a setup_context beside it torch binds the arguments anew each time: 10 us a call (measured)
        outputs = run(torch.ops.fastadapt.lora.default, *args)
        schema.setup_context(ctx, args, outputs)
        return outputs

    backward = staticmethod(schema.backward)


def draw_seed(x: Tensor) -> Tensor:
    """A dropout seed from torch's generator of x's device."""
    return torch.randint(2**63 - 1, (1,), device=x.device)


def lora(*tensors_and_options: Any, demand: int) -> Tensor:
    """Runs the op on rows; skips autograd, and what it would save, when no gradient can be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors_and_options[:5]):
        return LoRA.apply(*apart(*tensors_and_options, True, demand))[0]
    return run(torch.ops.fastadapt.lora.default, *tensors_and_options, False, demand)[0]
