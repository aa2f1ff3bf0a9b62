"""The routed bottleneck on CUDA devices of compute capability 8.0 and newer: the kernels of the bottleneck over rows sorted by task.

A launch before them sorts the ids and finds where each task's rows begin, in forward and again in backward, where it costs less than what saving its T numbers would.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadapt.backend import Call
from fastadapt.ops import _triton
from fastadapt.ops._triton import Routing, cdiv, jit, power_of_two, tl
from fastadapt.ops.bottleneck import triton as bottleneck
from fastadapt.ops.routed_bottleneck.reference import tasks_of

__all__ = ["backward", "forward", "reasons"]

MAX_PIECES = 65_535
"""Of a grid along y: splits of the rows, of which each task may have one that is not full, or tasks and one more."""


def reasons(call: Call) -> list[str]:
    """Why these kernels cannot run a call."""
    out, tasks = _triton.reasons(call), call.option("tasks", 1)
    if call.rows and call.rank <= _triton.MAX_RANK:
        tile = _triton.tile("routed_weights", call.rank, call.width, call.dtype)
        _, size = _triton.token_splits(call.rows, cdiv(call.width, tile.block_d) * cdiv(call.rank, tile.block_r))
        if (pieces := cdiv(call.rows, size) + tasks) > MAX_PIECES:
            out.append(f"{tasks} tasks make up to {pieces} pieces of the rows, more than a grid has blocks ({MAX_PIECES})")
    return out


@jit
def keys(IDS, i, N, TASKS: tl.constexpr):
    """The ids, TASKS for what is none of 0 to TASKS - 1."""
    ids = tl.load(IDS + i, mask=i < N, other=TASKS)
    return tl.where((ids >= 0) & (ids < TASKS), ids, TASKS)


@jit
def sort_kernel(IDS, ORDER, STARTS, N, rows_per_id, TASKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """The rows sorted by task, within a task by number, each id being that of rows_per_id consecutive ones, and how many rows lower tasks have. One program a task: it counts the
    ids below its own, then writes its rows behind theirs."""
    task = tl.program_id(0)
    place = tl.full((), 0, tl.int64)
    for start in tl.range(0, N, BLOCK_N):
        place += tl.sum((keys(IDS, start + tl.arange(0, BLOCK_N), N, TASKS) < task).to(tl.int64), 0)
    tl.store(STARTS + task, place * rows_per_id)
    for start in tl.range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        own = (keys(IDS, i, N, TASKS) == task) & (i < N)
        at = (place + tl.cumsum(own.to(tl.int64), 0) - 1) * rows_per_id
        row = i.to(tl.int64) * rows_per_id
        for first in tl.range(0, rows_per_id, BLOCK_T):
            t = first + tl.arange(0, BLOCK_T)
            tl.store(ORDER + at[:, None] + t[None, :], row[:, None] + t[None, :], mask=own[:, None] & (t < rows_per_id)[None, :])
        place += tl.sum(own.to(tl.int64), 0)


def routing(x: Tensor, task_ids: Tensor, *parameters: Tensor | None) -> Routing:
    """The rows of x by task. A tile of 1024 rows a step: many ids of few rows, or few of many."""
    t, n, tasks = len(x), len(task_ids), tasks_of(*parameters)
    order, starts = (torch.empty(size, dtype=torch.int64, device=x.device) for size in (t, tasks + 1))
    if t:
        block = min(64, power_of_two(t // n))
        _triton.launch(sort_kernel, (tasks + 1,), x, task_ids, order, starts, n, t // n, TASKS=tasks, BLOCK_N=1024 // block, BLOCK_T=block)
    return Routing(order, starts, tasks, min(n, tasks + 1), tuple(1 if p is None else len(p) for p in parameters))


def forward(
    x: Tensor, task_ids: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None, residual: Tensor | None,
    scale: float, activation: int, add_input: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and z for backward, as ``reference.forward``: two launches, and one to round fp32 weights where `rounded` does."""
    by_task = routing(x, task_ids, w_down, b_down, w_up, b_up)
    return bottleneck.forward(x, w_down, b_down, w_up, b_up, None, None, residual, scale, activation, add_input, save, by_task)


def backward(
    dy: Tensor, x: Tensor, task_ids: Tensor, z: Tensor, w_down: Tensor, b_down: Tensor | None, w_up: Tensor, b_up: Tensor | None,
    scale: float, activation: int, add_input: bool, needs: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients that ``needs`` asks for, as ``reference.backward``: those of the bottleneck's launches, behind one that sorts the rows."""
    by_task = routing(x, task_ids, w_down, b_down, w_up, b_up)
    return bottleneck.backward(dy, x, z, w_down, w_up, b_up, None, None, scale, activation, add_input, [*needs, False, False], by_task)[:5]
