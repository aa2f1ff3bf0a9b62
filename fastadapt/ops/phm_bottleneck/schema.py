"""Definition, fake implementation and autograd of ``fastadapt::phm_bottleneck``.

Saved for backward, whatever the backend: x, the factors and z, the pre-activation in the activation dtype, (T, R).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none, rows
from fastadapt.ops.phm_bottleneck.plan import PLAN

backend.register("phm_bottleneck", PLAN)


def call_of(x: Tensor, left_down: Tensor, right_down: Tensor) -> backend.Call:
    division, _, factor_rank = left_down.shape
    device = x.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    options = (("division", division), ("factor_rank", factor_rank))
    return backend.Call("phm_bottleneck", device.type, x.dtype, left_down.dtype, x.shape[0], x.shape[1], division * right_down.shape[2], options, arch)


def _forward(x, rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up, residual, scale, activation, add_input, save, backend):
    parameters = map(contiguous, (rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up))
    args = (rows(x), *parameters, None if residual is None else rows(residual), scale, activation, add_input, save)
    return _library.run("phm_bottleneck", "forward", call_of(x, left_down, right_down), backend, args)


def _rank(right_down: Tensor) -> int:
    return right_down.shape[0] * right_down.shape[2]


def _forward_fake(x, rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up, residual, scale, activation, add_input, save, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], _rank(right_down)) if save else none(x)


def _backward(dy, x, z, rule_down, left_down, right_down, rule_up, left_up, right_up, scale, activation, add_input, needs, backend):
    args = (rows(dy), rows(x), *map(contiguous, (z, rule_down, left_down, right_down, rule_up, left_up, right_up)), scale, activation, add_input, needs)
    return _library.run("phm_bottleneck", "backward", call_of(x, left_down, right_down), backend, args)


def _backward_fake(dy, x, z, rule_down, left_down, right_down, rule_up, left_up, right_up, scale, activation, add_input, needs, backend):
    shapes = (x.shape, rule_down.shape, left_down.shape, right_down.shape, (_rank(right_down),), rule_up.shape, left_up.shape, right_up.shape, (x.shape[1],))
    return tuple((x if i == 0 else rule_down).new_empty(shape) if need else none(x) for i, (shape, need) in enumerate(zip(shapes, needs, strict=True)))


_library.define(
    "phm_bottleneck",
    "(Tensor x, Tensor rule_down, Tensor left_down, Tensor right_down, Tensor? b_down, Tensor rule_up, Tensor left_up, Tensor right_up, Tensor? b_up, Tensor? residual,"
    " float scale, int activation, bool add_input, bool save, int backend) -> (Tensor y, Tensor z)",
    _forward,
    _forward_fake,
)
_library.define(
    "phm_bottleneck_backward",
    "(Tensor dy, Tensor x, Tensor z, Tensor rule_down, Tensor left_down, Tensor right_down, Tensor rule_up, Tensor left_up, Tensor right_up, float scale, int activation,"
    " bool add_input, bool[] needs, int backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("phm_bottleneck")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, rule_down, left_down, right_down, _, rule_up, left_up, right_up, _, _, *ctx.options, _, ctx.backend = inputs
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], rule_down, left_down, right_down, rule_up, left_up, right_up)


def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 15
    *needs, need_residual = ctx.needs_input_grad[:10]
    run = torch.ops.fastadapt.phm_bottleneck_backward.default
    grads = _library.below_autograd(run, dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend) if any(needs) else (dy,) * 9
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), (dy if need_residual else None), *(None,) * 5


torch.library.register_autograd("fastadapt::phm_bottleneck", backward, setup_context=setup_context, lib=_library.LIBRARY)
