"""Definition, fake implementation and autograd of ``fastadapt::routed_bottleneck``.

Saved for backward, whatever the backend: x, the ids, the parameters and z, the pre-activation in the activation dtype, (T, R), in the order of the rows; zero in rows of no task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none, rows
from fastadapt.ops.routed_bottleneck.plan import PLAN
from fastadapt.ops.routed_bottleneck.reference import tasks_of

backend.register("routed_bottleneck", PLAN)


def call_of(x: Tensor, *parameters: Tensor | None) -> backend.Call:
    w_down: Any = parameters[0]
    device = x.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    return backend.Call("routed_bottleneck", device.type, x.dtype, w_down.dtype, x.shape[0], x.shape[1], w_down.shape[1], (("tasks", tasks_of(*parameters)),), arch)


def _forward(x, task_ids, w_down, b_down, w_up, b_up, residual, scale, activation, add_input, save, backend):
    parameters = [contiguous(p) for p in (w_down, b_down, w_up, b_up)]
    args = (rows(x), task_ids.contiguous(), *parameters, None if residual is None else rows(residual), scale, activation, add_input, save)
    return _library.run("routed_bottleneck", "forward", call_of(x, *parameters), backend, args)


def _forward_fake(x, task_ids, w_down, b_down, w_up, b_up, residual, scale, activation, add_input, save, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], w_down.shape[1]) if save else none(x)


def _backward(dy, x, task_ids, z, w_down, b_down, w_up, b_up, scale, activation, add_input, needs, backend):
    parameters = [contiguous(p) for p in (w_down, b_down, w_up, b_up)]
    args = (rows(dy), rows(x), task_ids.contiguous(), z.contiguous(), *parameters, scale, activation, add_input, needs)
    return _library.run("routed_bottleneck", "backward", call_of(x, *parameters), backend, args)


def _backward_fake(dy, x, task_ids, z, w_down, b_down, w_up, b_up, scale, activation, add_input, needs, backend):
    return tuple(t.new_empty(t.shape) if need else none(x) for t, need in zip((x, w_down, b_down, w_up, b_up), needs, strict=True))


_PARAMETERS = "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up"
_library.define(
    "routed_bottleneck",
    f"(Tensor x, Tensor task_ids, {_PARAMETERS}, Tensor? residual, float scale, int activation, bool add_input, bool save, int backend) -> (Tensor y, Tensor z)",
    _forward,
    _forward_fake,
)
_library.define(
    "routed_bottleneck_backward",
    f"(Tensor dy, Tensor x, Tensor task_ids, Tensor z, {_PARAMETERS}, float scale, int activation, bool add_input, bool[] needs, int backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("routed_bottleneck")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, task_ids, *parameters, _, scale, activation, add_input, _, ctx.backend = inputs
    ctx.options = scale, activation, add_input
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, task_ids, output[1], *parameters)


def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 12
    need_x, _, *need_parameters, need_residual = ctx.needs_input_grad[:7]
    needs = [need_x, *need_parameters]
    run = torch.ops.fastadapt.routed_bottleneck_backward.default
    grads = _library.below_autograd(run, dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend) if any(needs) else (dy,) * 5
    dx, *d_parameters = (g if n else None for g, n in zip(grads, needs, strict=True))
    return dx, None, *d_parameters, (dy if need_residual else None), *(None,) * 5


torch.library.register_autograd("fastadapt::routed_bottleneck", backward, setup_context=setup_context, lib=_library.LIBRARY)
