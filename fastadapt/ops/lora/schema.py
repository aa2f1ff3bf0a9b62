"""Definition, fake implementation and autograd of ``fastadapt::lora``.

Saved for backward, whatever the backend: x, the weights, the dropout's seed (int64, one element) and z, the down-projection of the dropped x, (T, R) in the activation dtype.
The mask is drawn again from the seed (`fastadapt.ops.philox`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none, rows
from fastadapt.ops.lora.plan import PLAN

backend.register("lora", PLAN)


def call_of(x: Tensor, w_down: Tensor, w_up: Tensor, dropout: float) -> backend.Call:
    device = x.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    options = (("dropout", dropout > 0.0), ("out_width", w_up.shape[0]))
    return backend.Call("lora", device.type, x.dtype, w_down.dtype, x.shape[0], x.shape[1], w_down.shape[0], options, arch)


def _forward(x, y, w_down, w_up, b_up, seed, scale, dropout, save, backend):
    args = (rows(x), rows(y), *map(contiguous, (w_down, w_up, b_up)), seed, scale, dropout, save)
    return _library.run("lora", "forward", call_of(x, w_down, w_up, dropout), backend, args)


def _forward_fake(x, y, w_down, w_up, b_up, seed, scale, dropout, save, backend):
    return y.new_empty(y.shape), x.new_empty(x.shape[0], w_down.shape[0]) if save else none(x)


def _backward(dy, x, z, w_down, w_up, seed, scale, dropout, needs, backend):
    args = (rows(dy), rows(x), *map(contiguous, (z, w_down, w_up)), seed, scale, dropout, needs)
    return _library.run("lora", "backward", call_of(x, w_down, w_up, dropout), backend, args)


def _backward_fake(dy, x, z, w_down, w_up, seed, scale, dropout, needs, backend):
    like = (x, w_down, w_up, w_up[:, 0])
    return tuple(t.new_empty(t.shape) if need else none(x) for t, need in zip(like, needs, strict=True))


_library.define(
    "lora",
    "(Tensor x, Tensor y, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? seed, float scale, float dropout, bool save, int backend) -> (Tensor out, Tensor z)",
    _forward,
    _forward_fake,
)
_library.define(
    "lora_backward",
    "(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? seed, float scale, float dropout, bool[] needs, int backend)"
    " -> (Tensor dx, Tensor dw_down, Tensor dw_up, Tensor db_up)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("lora")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, w_down, w_up, _, seed, scale, dropout, _, ctx.backend = inputs
    ctx.options = scale, dropout
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], w_down, w_up, seed)


def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 10
    need_x, need_y, *need_parameters = ctx.needs_input_grad[:5]
    needs = [need_x, *need_parameters]
    run = torch.ops.fastadapt.lora_backward.default
    grads = _library.below_autograd(run, dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend) if any(needs) else (dy,) * 4
    dx, *d_parameters = (g if n else None for g, n in zip(grads, needs, strict=True))
    return dx, (dy if need_y else None), *d_parameters, *(None,) * 5


torch.library.register_autograd("fastadapt::lora", backward, setup_context=setup_context, lib=_library.LIBRARY)
