"""One adapter per task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.projections import share

Call = tuple[Tensor, dict[str, Any]]
"""The input and the other arguments of a `fastadapt.functional.bottleneck`."""


class Reruns:
    """What gradient checkpointing may run again of one part, and under which task: a layer that backward runs under another task than its forward's gives wrong gradients."""

    def __init__(self) -> None:
        self._last: str | Tensor | None = None  # the last forward's task, or tasks
        self._open: dict[str, int] = {}  # checkpointed forwards by task that backward has not run again, or never will

    def check(self, now: str | Tensor | None, training: bool) -> None:
        """Notes a forward; refuses a run of backward that no forward of its task is left for.

        Raises:
            RuntimeError: this is a checkpointed layer that backward runs again, and another task is selected than in its forward.
        """
        if torch._C._current_graph_task_id() < 0:
            self._last = now
            # Checkpointing runs a layer without gradients (reentrant), or with hooks on what autograd saves.
            if training and type(now) is str and (not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None):
                self._open[now] = self._open.get(now, 0) + 1
            return
        if type(now) is str and self._open.get(now):
            self._open[now] -= 1
        elif (type(now) is str and any(self._open.values())) or not self._is_last(now):
            self._open.clear()  # that backward is over
            raise RuntimeError(
                "gradient checkpointing runs this layer again in backward, but another task is selected than in forward: "
                "call backward before another task is selected, and inside the `with` block"
            )

    def _is_last(self, now: str | Tensor | None) -> bool:
        last = self._last
        return last is now or (torch.equal(last, now) if isinstance(last, Tensor) and isinstance(now, Tensor) else last == now)


class PerTask(nn.Module):
    """Adapters of several tasks at one place; the selected task's one runs, and only its parameters get gradients (VL-Adapter, section 3.3: multiple and half-shared adapters).

    In a batch that mixes tasks (`set_route`) each sample gets its own task's adapter: one `functional.routed_bottleneck` where every adapter is a bottleneck, with or without
    layer norms, a scalar gate and dropout, or LoRA of any widths; otherwise every adapter runs over the whole batch, and each sample keeps its own task's result.

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
        check_task_names(adapters, nn.ModuleDict())
        self.adapters = nn.ModuleDict(dict(adapters))
        self.task: str | None = None
        self.task_ids: Tensor | None = None
        self._reruns = Reruns()
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
        """Gives each sample of the batches to come its task, by its place among ``adapters``, int64, (batch,); None: all samples are of the selected task again.
        Ids go to the device of the adapters: a model may be spread over several."""
        self.task_ids = beside(self, task_ids)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no `with handle.route(...)`.
        return {**self.__dict__, "task_ids": None, "_reruns": Reruns()}

    def reset_parameters(self) -> None:
        """Draws the starting values of all tasks again."""
        for adapter in self.adapters.values():
            adapter.reset_parameters()  # type: ignore[operator]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the selected task's adapter gives, or each sample's.

        Raises:
            ValueError: the ids of a mixed batch do not divide it.
            RuntimeError: no task is selected. Or this is a checkpointed layer that backward runs again, and another task is selected than in the last forward.
        """
        if not torch.compiler.is_compiling():
            self._reruns.check(self.task if self.task_ids is None else self.task_ids, self.training)
        if self.task_ids is not None:
            return self._routed(self.task_ids, *inputs)
        if self.task is None:
            raise RuntimeError(f"no task is selected: use `handle.set_task(...)` or `with handle.task(...)`; tasks: {', '.join(self.adapters)}")
        return self.adapters[self.task](*inputs)

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


def beside(module: nn.Module, task_ids: Tensor | None) -> Tensor | None:
    """The ids on the device of a module's parameters."""
    device = next((p.device for p in module.parameters() if not p.is_meta), None)
    return task_ids if task_ids is None or device is None else task_ids.to(device)


def check_task_names(tasks: Iterable[str], container: nn.Module) -> None:
    """Refuses names that no part of an empty ``container`` may have.

    Raises:
        ValueError: a name.
    """
    for task in tasks:
        if not task or "." in task or hasattr(container, task):
            raise ValueError(f"tasks: {task!r} cannot name a module; it must hold no dot and be no attribute of nn.{type(container).__name__}")


def _bottleneck_call(adapter: Any, inputs: tuple[Tensor, ...]) -> Call | None:
    return adapter.bottleneck_call(*inputs) if hasattr(adapter, "bottleneck_call") else None


def routed(task_ids: Tensor, calls: Sequence[Call]) -> Tensor:
    """One bottleneck a task over the samples of that task, in one op. What tasks have of their own around it becomes part of its weights: those of a layer norm before it (the norm
    itself is the same for all), scales, trained gates. The weights of a layer norm behind it are gathered by row. Dropout draws one mask for the batch."""
    x, first = calls[0]
    before, after = first["norm_before"], first["norm_after"]
    ids, residual = check_ids(task_ids, x), x if isinstance(first["residual"], str) else first["residual"]

    def bank(name: str, part: int | None = None) -> Any:
        return _bank([call[name] if part is None else call[name][part] for _, call in calls])

    w_down, b_down, b_up = bank("w_down"), bank("b_down"), bank("b_up")
    w_up: Any = _bank([call["w_up"] if call["heads"] == 1 else torch.block_diag(*call["w_up"].chunk(call["heads"])) for _, call in calls])
    if dropout := first.get("dropout", 0.0):
        x = functional.dropout_add_norm(x, norm=None, dropout=dropout)
    if before is not None:
        x = functional.dropout_add_norm(x, eps=before[2])
        shift = (w_down * bank("norm_before", 1)[:, None]).sum(-1)
        w_down, b_down = w_down * bank("norm_before", 0)[:, None], shift if b_down is None else b_down + shift
    scales, scale = [call["scale"] for _, call in calls], 1.0
    if any(isinstance(s, Tensor) or s != scales[0] for s in scales):
        own = torch.stack([s.view(()) if isinstance(s, Tensor) else w_up.new_tensor(s) for s in scales])[:, None]
        w_up, b_up = w_up * own[..., None], None if b_up is None else b_up * own
    else:
        scale = scales[0]
    y = of_widths(x, ids, w_down, w_up, b_down, b_up, activation=first["activation"], residual=residual if after is None else None, scale=scale)
    if after is None:
        return y
    rows, y = _of_rows(ids, y).view(-1, *(1,) * (y.dim() - 2)), functional.dropout_add_norm(y, eps=after[2])
    of_rows = rows.clamp(0, len(calls) - 1)
    weight, bias = (bank("norm_after", part).expand(len(calls), -1)[of_rows].to(y.dtype) for part in range(2))
    y = torch.where(((rows >= 0) & (rows < len(calls)))[..., None], torch.addcmul(bias, y, weight), 0.0)
    return y if residual is None else y + residual.to(y.dtype)


def of_widths(x: Tensor, task_ids: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor | None, b_up: Tensor | None, *, residual: Tensor | None, **options: Any) -> Tensor:
    """`functional.routed_bottleneck` where in and out may differ: zeros stand behind the narrower of the two, of which nothing comes; where that is x, backward keeps it so.

    Forward and backward take a fifth to a third (768 -> 3072) and half to seven tenths (back) of the time of every task's `functional.lora` over all rows: measured on one
    CPU core, 512 rows of fp32, 4 tasks, rank 16.
    """
    more = w_up.shape[1] - x.shape[-1]
    if more > 0:
        x, w_down = F.pad(x, (0, more)), F.pad(w_down, (0, more))
    if more >= 0:
        return functional.routed_bottleneck(x, task_ids, w_down, w_up, b_down, b_up, residual=residual, **options)
    w_up, b_up = F.pad(w_up, (0, 0, 0, -more)), None if b_up is None else F.pad(b_up, (0, -more))
    u = functional.routed_bottleneck(x, task_ids, w_down, w_up, b_down, b_up, residual=None, **options)[..., :more]
    return u if residual is None else residual.to(u.dtype) + u


def _bank(of_tasks: list[Any]) -> Tensor | None:
    """Tasks' parameters as one tensor; what they share as a bank of one."""
    if of_tasks[0] is None:
        return None
    return of_tasks[0][None] if all(p is of_tasks[0] for p in of_tasks) else torch.stack(of_tasks)


def select(task_ids: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Each sample's own among the outputs of all tasks."""
    y = outputs[0]
    ids = _of_rows(check_ids(task_ids, y), y).view(-1, *(1,) * (y.dim() - 1))
    for task, other in enumerate(outputs[1:], 1):
        y = torch.where(ids == task, other, y)
    return y


def _of_rows(task_ids: Tensor, y: Tensor) -> Tensor:
    """The ids of all of y's first dimension."""
    return task_ids.repeat_interleave(y.shape[0] // len(task_ids), output_size=y.shape[0])


def check_ids(task_ids: Tensor, x: Tensor) -> Tensor:
    """Several rows of the first dimension may belong to one id: a flattened sequence, or the beams of a sample."""
    if len(task_ids) == 0 or x.shape[0] % len(task_ids):
        raise ValueError(f"task_ids: {len(task_ids)} ids do not divide a batch of {x.shape[0]}")
    return task_ids
