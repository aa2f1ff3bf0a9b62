"""The two ends of a host's sub-layer: the norm in front of it, and dropout, residual and norm behind it, as torch's operations or as one fused operation each.

A layer does the latter in training, where `fastadapt.patch` gave it the attribute `ENDS` (the words that the report has for it) and the fused operation gives the host's numbers up
to rounding: dropout and norm are the plain ones, and torch would promote no dtype in another way. With dropout the mask is another draw of the same distribution. Outside training
the host's own operations run, so that a patched model whose adapters do nothing gives the base's very bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional

ENDS = "_fastadapt_ends"

# Names of layer norms without mean and bias, in which the weight multiplies what is normed in float32: transformers' T5LayerNorm and its copies.
_RMS = ("T5LayerNorm", "MT5LayerNorm")


def begin(layer: Any, x: Tensor, norm: Any) -> Tensor:
    """``norm(x)``."""
    if _fused(layer) and type(norm).__name__ in _RMS and _plain(norm) and norm.weight.dtype == x.dtype != torch.float64:  # there it takes its statistics in float32
        return functional.dropout_add_norm(x, None, norm.weight, norm="rms", eps=norm.variance_epsilon)
    return norm(x)  # type: ignore[no-any-return]


def end(layer: Any, output: Tensor, residual: Tensor, dropout: float | nn.Dropout, norm: nn.LayerNorm | None = None) -> Tensor:
    """``norm(residual + dropout(output))``; without a norm, the sum. ``dropout`` is a module, or the probability in training."""
    module, p = (dropout, dropout.p) if isinstance(dropout, nn.Dropout) else (None, float(dropout))
    p = p if (layer if module is None else module).training else 0.0
    plain = (module is None or _plain(module)) and (norm is None or (type(norm) is nn.LayerNorm and _plain(norm)))
    if _fused(layer) and (p or (norm is not None and _gains_without_dropout(output))) and plain and _fits(output, residual):
        if norm is None:
            return functional.dropout_add_norm(output, residual, norm=None, dropout=p)
        return functional.dropout_add_norm(output, residual, norm.weight, norm.bias, eps=norm.eps, dropout=p)
    total = residual + (F.dropout(output, p) if module is None else module(output))
    return total if norm is None else norm(total)


def _gains_without_dropout(output: Tensor) -> bool:
    """A kernel launch less on a GPU; on a CPU torch's sum and layer norm take no longer than the fused operation (measured)."""
    return output.device.type != "cpu"


def _fused(layer: Any) -> bool:
    return layer.training and bool(getattr(layer, ENDS, ""))


def _plain(module: nn.Module) -> bool:
    """Whether calling a dropout or a norm is its formula and nothing else: no hooks, the forward of its class, weights over the last dimension."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    weight = module._parameters.get("weight")
    return not hooks and "forward" not in module.__dict__ and (isinstance(module, nn.Dropout) or (weight is not None and weight.dim() == 1))


def _fits(output: Tensor, residual: Tensor) -> bool:
    """Whether the sum has the residual's dtype, and torch would not run a norm of it in another: in half precision under autocast it would."""
    if output.shape != residual.shape or not (output.dtype == residual.dtype or (residual.dtype == torch.float32 and output.dtype in (torch.bfloat16, torch.float16))):
        return False
    return residual.dtype in (torch.float32, torch.float64) or not torch.is_autocast_enabled(residual.device.type)
