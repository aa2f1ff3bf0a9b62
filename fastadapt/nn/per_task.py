"""One adapter per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastadapt.nn.projections import share


class PerTask(nn.Module):
    """Adapters of several tasks at one place; the selected task's one runs, and only its parameters get gradients (VL-Adapter, section 3.3: multiple and half-shared adapters).

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

    def reset_parameters(self) -> None:
        """Draws the starting values of all tasks again."""
        for adapter in self.adapters.values():
            adapter.reset_parameters()  # type: ignore[operator]

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the selected task's adapter gives.

        Raises:
            RuntimeError: no task is selected. A checkpointed layer runs again in backward, so keep the task selected until then.
        """
        if self.task is None:
            raise RuntimeError(f"no task is selected: use `handle.set_task(...)` or `with handle.task(...)`; tasks: {', '.join(self.adapters)}")
        return self.adapters[self.task](*inputs)

    def call(self) -> dict[str, Any] | None:
        """The call of one task's adapter, see `Bottleneck.call`; None where that is plain torch."""
        call = getattr(next(iter(self.adapters.values())), "call", None)
        return None if call is None else call()
