"""One adapter per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.projections import share

Call = tuple[Tensor, dict[str, Any]]
"""The input and the other arguments of a `fastadapt.functional.bottleneck`."""
_BANKS = ("w_down", "w_up", "b_down", "b_up")


class PerTask(nn.Module):
    """Adapters of several tasks at one place; the selected task's one runs, and only its parameters get gradients (VL-Adapter, section 3.3: multiple and half-shared adapters).

    In a batch that mixes tasks (`set_route`) each sample gets its own task's adapter: one `fastadapt.functional.routed_bottleneck` where every adapter is one plain bottleneck;
    otherwise every adapter runs over the whole batch, and each sample keeps its own task's result.

    Parameters are under ``adapters.<task>``. What several tasks share is one Parameter that all of them hold.

    Args:
        adapters: a module per task.
        shared: dotted names of the parameters that all tasks share, those of the first task ("up_sampler.weight").

    Raises:
        ValueError: no task, a name that a module cannot have, or a parameter that cannot be shared.
    """

    # transformers' ``save_pretrained`` writes a shared tensor once, under a name that is not declared like this; here any name may be another's.
    _tied_weights_keys = {"": ""}

    def __init__(self, adapters: Mapping[str, nn.Module], shared: Sequence[str] = ()) -> None:
        super().__init__()
        if not adapters:
            raise ValueError("tasks: an adapter per task needs at least one task")
        for task in adapters:
            if "." in task or hasattr(nn.ModuleDict, task):
                raise ValueError(f"tasks: {task!r} cannot name a module; it must hold no dot and be no attribute of nn.ModuleDict")
        self.adapters = nn.ModuleDict(dict(adapters))
        self.task: str | None = None
        self.task_ids: Tensor | None = None
        first, *others = self.adapters.values()
        for other in others:
            share(first, other, *shared)

    def set_task(self, task: str | None) -> None:
        """Selects the task whose adapter runs; None: none, then `forward` raises.

        Raises:
            ValueError: the task has no adapter here.
        """
        if task is not None and task not in self.adapters:
            raise ValueError(f"task: {task!r} has no adapter here; must be one of {', '.join(self.adapters)}")
        self.task = task

    def set_route(self, task_ids: Tensor | None) -> None:
        """Gives each sample of the batches to come its task, by its place among ``adapters``, int64, (batch,); None: all samples are of the selected task again."""
        self.task_ids = task_ids

    def reset_parameters(self) -> None:
        """Draws the starting values of all tasks again."""
        for adapter in self.adapters.values():
            adapter.reset_parameters()  # type: ignore[operator]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the selected task's adapter gives, or each sample's.

        Raises:
            ValueError: the ids of a mixed batch do not divide it.
            RuntimeError: no task is selected. A checkpointed layer runs again in backward, so keep the task selected until then.
        """
        return self.selected()(*inputs) if self.task_ids is None else self._routed(self.task_ids, *inputs)

    def selected(self) -> nn.Module:
        """The selected task's adapter.

        Raises:
            RuntimeError: no task is selected.
        """
        if self.task is None:
            raise RuntimeError(f"no task is selected: use `handle.set_task(...)` or `with handle.task(...)`; tasks: {', '.join(self.adapters)}")
        return self.adapters[self.task]

    def _routed(self, task_ids: Tensor, *inputs: Tensor) -> Tensor:
        adapters: list[Any] = list(self.adapters.values())
        if not inputs:
            return torch.stack([adapter() for adapter in adapters])[task_ids]
        calls = [_bottleneck_call(adapter, inputs) for adapter in adapters]
        return select(task_ids, [adapter(*inputs) for adapter in adapters]) if any(call is None for call in calls) else routed(task_ids, calls)  # type: ignore[arg-type]

    def call(self) -> dict[str, Any] | None:
        """The call of one task's adapter, see `Bottleneck.call`; None where that is plain torch."""
        call = getattr(next(iter(self.adapters.values())), "call", None)
        return None if call is None else call()


def _bottleneck_call(adapter: Any, inputs: tuple[Tensor, ...]) -> Call | None:
    return adapter.bottleneck_call(*inputs) if hasattr(adapter, "bottleneck_call") else None


def routed(task_ids: Tensor, calls: Sequence[Call]) -> Tensor:
    """One bottleneck a task over the samples of that task: one op where no call has layer norms, a gate or blocks."""
    (x, first), *_ = calls
    if not all(_plain(call) and call["scale"] == first["scale"] for _, call in calls):
        return select(task_ids, [functional.bottleneck(x, **call) for x, call in calls])
    banks = {name: _bank([call[name] for _, call in calls]) for name in _BANKS}
    return functional.routed_bottleneck(x, check_ids(task_ids, x), **banks, activation=first["activation"], residual=first["residual"], scale=first["scale"])  # type: ignore[arg-type]


def _plain(call: dict[str, Any]) -> bool:
    return call["norm_before"] is None and call["norm_after"] is None and call["heads"] == 1 and not isinstance(call["scale"], Tensor)


def _bank(of_tasks: list[Any]) -> Tensor | None:
    """Tasks' parameters as one tensor; what they share as a bank of one."""
    if of_tasks[0] is None:
        return None
    return of_tasks[0][None] if all(p is of_tasks[0] for p in of_tasks) else torch.stack(of_tasks)


def select(task_ids: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Each sample's own among the outputs of all tasks."""
    y = outputs[0]
    ids = check_ids(task_ids, y).repeat_interleave(y.shape[0] // len(task_ids), output_size=y.shape[0]).view(-1, *(1,) * (y.dim() - 1))
    for task, other in enumerate(outputs[1:], 1):
        y = torch.where(ids == task, other, y)
    return y


def check_ids(task_ids: Tensor, x: Tensor) -> Tensor:
    """Several rows of the first dimension may belong to one id: a flattened sequence, or the beams of a sample."""
    if len(task_ids) == 0 or x.shape[0] % len(task_ids):
        raise ValueError(f"task_ids: {len(task_ids)} ids do not divide a batch of {x.shape[0]}")
    return task_ids
