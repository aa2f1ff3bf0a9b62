"""Definition, fake implementation and autograd of ``fastadapt::bottleneck``.

What is saved for backward belongs to the op, not to the backend: x, the parameters and z, the pre-activation in the activation dtype, (T, R). Any backend's backward takes what
any backend's forward saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none, rows
from fastadapt.ops.bottleneck.plan import PLAN

backend.register("bottleneck", PLAN)


def call_of(x: Tensor, w_down: Tensor) -> backend.Call:
    device = x.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    return backend.Call("bottleneck", device.type, x.dtype, w_down.dtype, x.shape[0], x.shape[1], w_down.shape[0], (), arch)


def _forward(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input, save, backend):
    parameters = map(contiguous, (w_down, b_down, w_up, b_up, gate, scale_tensor))
    args = (rows(x), *parameters, None if residual is None else rows(residual), scale, activation, add_input, save)
    return _library.run("bottleneck", "forward", call_of(x, w_down), backend, args)


def _forward_fake(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input, save, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], w_down.shape[0]) if save else none(x)


def _backward(dy, x, z, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input, needs, backend):
    args = (rows(dy), rows(x), *map(contiguous, (z, w_down, w_up, b_up, gate, scale_tensor)), scale, activation, add_input, needs)
    return _library.run("bottleneck", "backward", call_of(x, w_down), backend, args)


def _backward_fake(dy, x, z, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input, needs, backend):
    width, rank = x.shape[1], w_down.shape[0]
    shapes = (x.shape, (rank, width), (rank,), (width, rank), (width,), (width,), () if scale_tensor is None else scale_tensor.shape)
    return tuple((x if i == 0 else w_down).new_empty(shape) if need else none(x) for i, (shape, need) in enumerate(zip(shapes, needs, strict=True)))


_library.define(
    "bottleneck",
    "(Tensor x, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, Tensor? residual,"
    " float scale, int activation, bool add_input, bool save, int backend) -> (Tensor y, Tensor z)",
    _forward,
    _forward_fake,
)
_library.define(
    "bottleneck_backward",
    "(Tensor dy, Tensor x, Tensor z, Tensor w_down, Tensor w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, float scale, int activation, bool add_input,"
    " bool[] needs, int backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("bottleneck")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_down, _, w_up, b_up, gate, scale_tensor, _, *ctx.options, _, ctx.backend = inputs
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], w_down, w_up, b_up, gate, scale_tensor)


def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    x, z, w_down, w_up, b_up, gate, scale_tensor = ctx.saved_tensors
    need = ctx.needs_input_grad
    needs = [need[0], need[1], need[2], need[3], need[4], need[5], need[6]]
    grads = (
        _library.below_autograd(torch.ops.fastadapt.bottleneck_backward.default, dy, x, z, w_down, w_up, b_up, gate, scale_tensor, *ctx.options, needs, ctx.backend)
        if any(needs)
        else (dy,) * 7
    )
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), (dy if need[7] else None), None, None, None, None, None


torch.library.register_autograd("fastadapt::bottleneck", backward, setup_context=setup_context, lib=_library.LIBRARY)
