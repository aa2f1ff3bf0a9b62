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


ANOTHER = (
    "gradient checkpointing runs this layer again in backward, but another task is selected than in forward: "
    "call backward before another task is selected, and inside the `with` block"
)


class _SameTask(torch.autograd.Function):
    """The identity. Where a layer is run again for what backward needs (checkpointing that is not reentrant), backward gets that run's ids: they must be the first's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, task_ids: Tensor) -> Tensor:
        ctx.first = task_ids
        ctx.save_for_backward(task_ids)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (again,) = ctx.saved_tensors
        if not _same_ids(ctx.first, again):
            raise RuntimeError(ANOTHER)
        return dy, None


def _same_ids(a: Tensor, b: Tensor) -> bool:
    """Read on the host only where the two lie in different memory."""
    return (a.device, a.shape) == (b.device, b.shape) and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _saves_through_hooks() -> bool:
    """As a layer does that is checkpointed and not reentrant, in both of its runs."""
    return torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def guarded(y: Any, task: str | Tensor) -> Any:
    """y, a tensor, of a task, or of each sample's; where backward may run its layer again, refused there for another task.

    Raises:
        RuntimeError: (in backward) another task is selected than in forward.
    """
    if torch.compiler.is_compiling() or not _saves_through_hooks() or functional.transformed() or not isinstance(y, Tensor):
        return y
    return _SameTask.apply(y, task if isinstance(task, Tensor) else torch.tensor(list(task.encode())))  # type: ignore[no-untyped-call]  # torch's own apply is untyped


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
        self._ran: str | Tensor | None = None  # the last forward's task, or tasks
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

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no `with handle.route(...)`.
        return {**self.__dict__, "task_ids": None, "_ran": None}

    def reset_parameters(self) -> None:
        """Draws the starting values of all tasks again."""
        for adapter in self.adapters.values():
            adapter.reset_parameters()  # type: ignore[operator]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the selected task's adapter gives, or each sample's.

        Raises:
            ValueError: the ids of a mixed batch do not divide it.
            RuntimeError: no task is selected. Or this is a checkpointed layer that backward runs again, and another task is selected than in forward (reentrant: in the last
                forward).
        """
        if not torch.compiler.is_compiling():
            self._check_rerun()
        if self.task_ids is not None:
            return guarded(self._routed(self.task_ids, *inputs), self.task_ids)
        if self.task is None:
            raise RuntimeError(f"no task is selected: use `handle.set_task(...)` or `with handle.task(...)`; tasks: {', '.join(self.adapters)}")
        return guarded(self.adapters[self.task](*inputs), self.task)

    def _check_rerun(self) -> None:
        now = self.task if self.task_ids is None else self.task_ids
        if torch._C._current_graph_task_id() < 0:
            self.__dict__["_ran"] = now  # nn.Module's own way to set an attribute takes 0.9 us (measured on CPU)
        elif not (_saves_through_hooks() or self._ran is now or (_same_ids(self._ran, now) if isinstance(self._ran, Tensor) and isinstance(now, Tensor) else self._ran == now)):
            raise RuntimeError(ANOTHER)

    def _routed(self, task_ids: Tensor, *inputs: Tensor) -> Tensor:
        adapters: list[Any] = list(self.adapters.values())
        if not inputs:
            stacked = torch.stack([adapter() for adapter in adapters])
            return stacked[task_ids.to(stacked.device)]
        calls = [_bottleneck_call(adapter, inputs) for adapter in adapters]
        return select(task_ids, [adapter(*inputs) for adapter in adapters]) if any(call is None for call in calls) else routed(task_ids, calls)  # type: ignore[arg-type]

    def call(self) -> dict[str, Any] | None:
        """The call of one task's adapter, see `Bottleneck.call`; None where that is plain torch."""
        call = getattr(next(iter(self.adapters.values())), "call", None)
        return None if call is None else call()


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
    return task_ids.to(x.device)  # a model may be spread over several
