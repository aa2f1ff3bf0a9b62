"""Definition, fake implementation and autograd of ``fastadapt::gated_bottleneck``.

Saved for backward, whatever the backend: h, x, the parameters, z (T, R) and zg (T, Rg) in the activation dtype, the row logits of middleX and small (T,) in the accumulation dtype,
and, where ``save_gate`` asks for it, the pre-gate sum H' (T, D) and (large) the gate (T, D) in the activation dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _library
from fastadapt.ops._library import contiguous, none, rows
from fastadapt.ops.gated_bottleneck.plan import PLAN
from fastadapt.ops.gated_bottleneck.reference import KINDS

__all__ = ["KINDS"]

backend.register("gated_bottleneck", PLAN)


def call_of(h: Tensor, w_down: Tensor, gate_weight: Tensor | None, kind: int) -> backend.Call:
    gate_rank = gate_weight.shape[0] if gate_weight is not None and KINDS[kind] == "large" else 0
    device = h.device
    arch = backend.architecture(device) if device.type == "cuda" else 0
    options = (("gate_rank", gate_rank), ("granularity", KINDS[kind]))
    return backend.Call("gated_bottleneck", device.type, h.dtype, w_down.dtype, h.shape[0], h.shape[1], w_down.shape[0], options, arch)


def _keeps_gate(save: bool, save_gate: int, device: str) -> bool:
    """Reading a saved gate is cheaper than recomputing it on a CPU (measured: 2.5 against 10 ms for 4096 rows of 768), dearer on a GPU at the papers' ranks (modelled)."""
    return save and (save_gate == 1 or (save_gate == -1 and device == "cpu"))


def _forward(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, save_gate, save, backend):
    args = (
        rows(h), None if x is None else rows(x), *map(contiguous, (w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias)),
        input_scale, adapter_scale, scale, activation, kind, add, samples, int(_keeps_gate(save, save_gate, h.device.type)), save,
    )  # fmt: skip
    return _library.run("gated_bottleneck", "forward", call_of(h, w_down, g, kind), backend, args)


def _forward_fake(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, save_gate, save, backend):
    name, keep, t = KINDS[kind], _keeps_gate(save, save_gate, h.device.type), h.shape[0]
    wide = torch.promote_types(h.dtype, torch.float32)
    return (
        h.new_empty(h.shape),
        h.new_empty(t, w_down.shape[0]) if save else none(h),
        h.new_empty(t, g.shape[0]) if save and name == "large" else none(h),
        h.new_empty(t if save and name in ("middleX", "small") else 0, dtype=wide),
        h.new_empty(h.shape) if keep else none(h),
        h.new_empty(h.shape) if keep and name == "large" else none(h),
    )


def _backward(
    dy, h, x, z, zg, logits, total, gate, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, needs, backend
):
    args = (
        rows(dy), rows(h), None if x is None else rows(x), *map(contiguous, (z, zg, logits, total, gate, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias)),
        input_scale, adapter_scale, scale, activation, kind, add, samples, needs,
    )  # fmt: skip
    return _library.run("gated_bottleneck", "backward", call_of(h, w_down, g, kind), backend, args)


def _backward_fake(
    dy, h, x, z, zg, logits, total, gate, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, needs, backend
):
    like = (h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias)
    return tuple(t.new_empty(t.shape) if need else none(h) for t, need in zip(like, needs, strict=True))


_PARAMETERS = (
    "Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_up_weight, Tensor? gate_up_bias,"
    " float input_scale, float adapter_scale, float scale, int activation, int kind, bool add, SymInt samples"
)
_library.define(
    "gated_bottleneck",
    f"(Tensor h, Tensor? x, {_PARAMETERS}, int save_gate, bool save, int backend) -> (Tensor y, Tensor z, Tensor zg, Tensor logits, Tensor total, Tensor gate)",
    _forward,
    _forward_fake,
)
_library.define(
    "gated_bottleneck_backward",
    f"(Tensor dy, Tensor h, Tensor? x, Tensor z, Tensor zg, Tensor logits, Tensor total, Tensor gate, {_PARAMETERS}, bool[] needs, int backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_library.refuse_double_backward("gated_bottleneck")


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    h, x, *parameters = tensors[:10]
    ctx.options = tensors[10:17]
    if hasattr(ctx, "mark_non_differentiable"):  # a Function's context; that of a registered op has no such method
        ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h, x, *output[1:], *parameters)


def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:10])
    if dy is None or not any(needs):
        return (None,) * 20
    grads = _library.below_autograd(torch.ops.fastadapt.gated_bottleneck_backward.default, dy, *ctx.saved_tensors, *ctx.options, needs, ctx.backend)
    return *(g if n else None for g, n in zip(grads, needs, strict=True)), *(None,) * 10


torch.library.register_autograd("fastadapt::gated_bottleneck", backward, setup_context=setup_context, lib=_library.LIBRARY)
