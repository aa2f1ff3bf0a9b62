"""The routed bottleneck in plain torch: every task's bottleneck over all rows, of which each row keeps its own task's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.ops._library import none
from fastadapt.ops.bottleneck import reference as bottleneck


def ids_of_rows(x: Tensor, task_ids: Tensor) -> Tensor:
    """(T, 1): each id is that of T / N consecutive rows."""
    return task_ids.repeat_interleave(x.shape[0] // max(len(task_ids), 1), output_size=x.shape[0])[:, None]


def tasks_of(*parameters: Tensor | None) -> int:
    """G: parameters of shape (1, ...) are shared by all tasks."""
    return max(len(p) for p in parameters if p is not None)


def _of_task(g, *parameters):
    return (None if p is None else p[g if len(p) > 1 else 0] for p in parameters)


def composed(x, task_ids, w_down, b_down, w_up, b_up, residual, scale, activation, add_input):
    """y_t = s (phi(x_t Wd[g]' + bd[g]) Wu[g]' + bu[g]) [+ x_t] [+ residual_t] with g the id of row t, and z; differentiable by autograd. Rows of no task have no first term."""
    ids = ids_of_rows(x, task_ids)
    y, z = torch.zeros_like(x), x.new_zeros(x.shape[0], w_down.shape[1])
    for g in range(tasks_of(w_down, b_down, w_up, b_up)):
        own, (wd, bd, wu, bu) = ids == g, _of_task(g, w_down, b_down, w_up, b_up)
        y_g, z_g = bottleneck.composed(torch.where(own, x, 0), wd, bd, wu, bu, None, None, None, scale, activation, False)
        y, z = torch.where(own, y_g, y), torch.where(own, z_g, z)
    y = y + x if add_input else y
    return (y if residual is None else y + residual), z


def forward(*args):
    *inputs, save = args
    y, z = composed(*inputs)
    return y, (z if save else none(y))


def backward(dy, x, task_ids, z, w_down, b_down, w_up, b_up, scale, activation, add_input, needs):
    """Each task's gradients from its own rows, all others set to zero; a shared parameter's is the sum over tasks, an absent task's is zero."""
    ids, parameters = ids_of_rows(x, task_ids), (w_down, b_down, w_up, b_up)
    dx = dy.clone() if add_input else torch.zeros_like(dy)
    sums = [None if p is None else torch.zeros_like(p) for p in parameters]
    for g in range(tasks_of(*parameters)):
        wd, _, wu, bu = _of_task(g, *parameters)
        own = ids == g
        rows = (torch.where(own, t, 0) for t in (dy, x, z))
        dx_g, *grads, _, _ = bottleneck.backward(*rows, wd, wu, bu, None, None, scale, activation, False, [*needs, False, False])
        if needs[0]:
            dx = torch.where(own, dx + dx_g, dx)
        absent = ~own.any()  # a task without rows, whose weights may be NaN
        for total, grad, need in zip(sums, grads, needs[1:], strict=True):
            if need:
                total[g if len(total) > 1 else 0] += grad.masked_fill(absent, 0)
    return tuple(t if need else none(dy) for t, need in zip((dx, *sums), needs, strict=True))
