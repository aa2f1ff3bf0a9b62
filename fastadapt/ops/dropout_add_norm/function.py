"""The autograd entrance of dropout, sum and norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt.ops._library import apart
from fastadapt.ops._library import below_autograd as run
from fastadapt.ops.dropout_add_norm import schema


class DropoutAddNorm(torch.autograd.Function):
    """One op forward, one op backward, in eager mode and when traced alike. The last argument says whether v is used: when traced, the gradient of an unused one is zeros."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:  # with a setup_context beside it torch binds the arguments anew each time: 10 us a call (measured)
        outputs = run(torch.ops.fastadapt.dropout_add_norm.default, *args[:-1])
        schema.setup_context(ctx, args[:-1], outputs)
        ctx.used = args[-1]
        return outputs

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dv: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        return (*schema.backward(ctx, dy, dv if ctx.used else None), None)


def dropout_add_norm(x: Tensor, *tensors_and_options: Any, return_sum: bool, demand: int) -> tuple[Tensor, Tensor]:
    """Runs the op on rows: y and v. Skips autograd, and what it would save, when no gradient can be asked for."""
    residual, _, _, _, norm, _, dropout = tensors_and_options
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors_and_options[:3])):
        y, v = DropoutAddNorm.apply(*apart(x, *tensors_and_options, True, demand, return_sum or not norm))[:2]
    else:
        y, v = run(torch.ops.fastadapt.dropout_add_norm.default, x, *tensors_and_options, return_sum, demand)[:2]
    return y if norm else v, x if norm and residual is None and not dropout else v
