"""Definition, fake implementation and autograd of ``fastadapt::dropout_add_norm``.

The norm is a number: 0 none, 1 layer, 2 rms. Without one the result is v and y is the empty placeholder. A bias comes with a weight.

Saved for backward, whatever the backend: of a norm v (T, D) in its own dtype, or x where v is x itself (no residual, no dropout; v is then the empty placeholder), its mean (layer
alone) and rstd = 1 / deviation, (T,) in fp32, and the weight; and the dropout's seed (int64, one element). The mask is drawn again from the seed (`fastadapt.ops.philox`).

Backward gets dy with a norm only, whose gradients it asks for; without dy it is a call of norm 0, whose dv is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none
from fastadapt.ops.dropout_add_norm.plan import PLAN

backend.register("dropout_add_norm", PLAN)

NORMS = ("none", "layer", "rms")


def call_of(like: Tensor, dtype: torch.dtype, weight: Tensor | None, norm: int, dropout: float) -> backend.Call:
    """``like``: v, or a tensor of its shape and dtype; ``dtype``: of x."""
    device = like.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    options = (("dropout", dropout > 0.0), ("norm", NORMS[norm]), ("wide", like.dtype != dtype))
    return backend.Call("dropout_add_norm", device.type, dtype, dtype if weight is None else weight.dtype, like.shape[0], like.shape[1], 0, options, arch)


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else _library.rows(t)


def _forward(x, residual, weight, bias, seed, norm, eps, dropout, save, backend):
    args = (*map(_rows, (x, residual)), *map(contiguous, (weight, bias)), seed, norm, eps, dropout, save)
    return _library.run("dropout_add_norm", "forward", call_of(x if residual is None else residual, x.dtype, weight, norm, dropout), backend, args)


def _forward_fake(x, residual, weight, bias, seed, norm, eps, dropout, save, backend):
    like, of_row = x if residual is None else residual, torch.float64 if x.dtype == torch.float64 else torch.float32
    y = like.new_empty(like.shape) if norm else none(like)
    v = like.new_empty(like.shape) if norm == 0 or (save and not (residual is None and not dropout)) else none(like)
    mean, rstd = (like.new_empty(like.shape[0] if save and kept else 0, dtype=of_row) for kept in (norm == 1, norm))
    return y, v, mean, rstd


def _backward(dy, dv, v, mean, rstd, weight, seed, norm, dropout, dtype, needs, backend):
    args = (*map(_rows, (dy, dv, v)), *map(contiguous, (mean, rstd, weight)), seed, norm, dropout, dtype, needs)
    return _library.run("dropout_add_norm", "backward", call_of(dv if dy is None else dy, dtype, weight, norm, dropout), backend, args)


def _backward_fake(dy, dv, v, mean, rstd, weight, seed, norm, dropout, dtype, needs, backend):
    like = dv if dy is None else dy
    need_x, need_residual, need_weight, need_bias = needs
    vectors = (weight.new_empty(weight.shape) if need else none(like) for need in (need_weight, need_bias))
    return like.new_empty(like.shape, dtype=dtype) if need_x else none(like), like.new_empty(like.shape) if need_residual else none(like), *vectors


_library.define(
    "dropout_add_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, float eps, float dropout, bool save, int backend)"
    " -> (Tensor y, Tensor v, Tensor mean, Tensor rstd)",
    _forward,
    _forward_fake,
)
_library.define(
    "dropout_add_norm_backward",
    "(Tensor? dy, Tensor? dv, Tensor? v, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? seed, int norm, float dropout, ScalarType dtype, bool[] needs, int backend)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("dropout_add_norm")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, seed, norm, _, dropout, _, ctx.backend = inputs
    y, v, mean, rstd = output
    is_x = norm and residual is None and not dropout
    ctx.options = norm, dropout, x.dtype
    ctx.same = not dropout and (residual is None or residual.dtype == x.dtype)  # dx and the residual's gradient
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(mean, rstd, *((v,) if is_x else () if norm else (y,)))
    ctx.set_materialize_grads(False)
    of_norm = (x if is_x else v, mean if norm == 1 else None, rstd, weight) if norm else (None,) * 4
    ctx.save_for_backward(*of_norm, seed)


def backward(ctx: Any, dy: Tensor | None, dv: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    (norm, dropout, dtype), (*of_norm, seed) = ctx.options, ctx.saved_tensors
    dy = dy if norm else None
    if dy is None and dv is None:
        return (None,) * 10
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if dy is None:  # the sum's gradient is the residual's
        norm, of_norm, need_weight, need_bias = 0, (None,) * 4, False, False
    needs = [need_x and not (ctx.same and (dy is None or need_residual)), need_residual and dy is not None, need_weight, need_bias]
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(needs):
        run = torch.ops.fastadapt.dropout_add_norm_backward.default
        grads = _library.below_autograd(run, dy, dv, *of_norm, seed, norm, dropout, dtype, needs, ctx.backend)
    dx, dresidual, dweight, dbias = (g if n else None for g, n in zip(grads, needs, strict=True))
    dresidual = dv if dy is None else dresidual
    return dx if needs[0] or not need_x else dresidual, dresidual if need_residual else None, dweight, dbias, *(None,) * 6


torch.library.register_autograd("fastadapt::dropout_add_norm", backward, setup_context=setup_context, lib=_library.LIBRARY)
