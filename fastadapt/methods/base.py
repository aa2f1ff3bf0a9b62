"""What a method is: a frozen config that says which module goes to which role, and what else is trained.

To add a method over existing modules and roles, write one file beside this one with a subclass of `MethodConfig`, and name it in `fastadapt.methods`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.nn import Init, PerTask, share

INITS = ("repo", "identity")
LAYER_NORMS = ("all", "encoder", "none")


@dataclass(frozen=True)
class Target:
    """The place that a module is built for.

    Args:
        family: host family.
        width: D of what the module reads.
        out_width: D of what it gives.
        init: the starting values that the host's own rule gives to Linears it does not know.
        path: the module's path in the model.
        layer: number of the layer in its stack, from 0.
        tasks: names of the tasks.
        shared: modules of this patch that others share parameters with, see `share`.
    """

    family: str
    width: int
    out_width: int
    init: Init
    path: str = ""
    layer: int = 0
    tasks: tuple[str, ...] = ()
    shared: dict[str, nn.Module] = field(default_factory=dict)

    def share(self, key: str, module: nn.Module, *names: str) -> None:
        """Gives ``module`` the parameters ``names`` of the first module of this patch that was shared under ``key``; the first one keeps its own."""
        if (first := self.shared.setdefault(key, module)) is not module:
            share(first, module, *names)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method. A field that is None takes the value published for the host (``published``).

    Args:
        layer_norms: which of the host's layer norms are trained: "all", those of the "encoder", or "none".
        visual_embedding: train the module called ``visual_embedding``, where the model has one.
        biases: train every tensor of the base whose name contains "bias", as the published rule goes; on T5 these are the two tables of relative position biases.
        lm_head: train the token table and the output layer (tied in BART and T5).
        language_model: train the whole base.
        trained_modules: names of further modules of the base that are trained, wherever they are ("itm_head").
    """

    method: ClassVar[str]
    published: ClassVar[dict[str, dict[str, Any]]]
    """Per host family: published values of the fields that default to None."""

    layer_norms: Literal["all", "encoder", "none"] | None = None
    visual_embedding: bool = True
    biases: bool = False
    lm_head: bool = False
    language_model: bool = False
    trained_modules: tuple[str, ...] = ()

    def resolved(self, family: str, init: str) -> Self:
        """The config with every None replaced by what is published for ``family``; checked.

        Raises:
            ValueError: nothing is published for the family, or an option is out of range.
        """
        if family not in self.published:
            raise ValueError(f"{self.method}: no published values for {family!r}; known: {', '.join(self.published)}")
        fill = {name: value for name, value in self.published[family].items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **fill)
        if config.layer_norms not in LAYER_NORMS:
            raise ValueError(f"layer_norms: must be one of {', '.join(LAYER_NORMS)}, not {config.layer_norms!r}")
        for name in ("visual_embedding", "biases", "lm_head", "language_model"):
            if not isinstance(value := getattr(config, name), bool):
                raise ValueError(f"{name}: must be True or False, not {value!r}")
        if isinstance(config.trained_modules, str) or not all(isinstance(name, str) and name for name in config.trained_modules):
            raise ValueError(f"trained_modules: must be a list of names, not {config.trained_modules!r}")
        config = dataclasses.replace(config, trained_modules=tuple(config.trained_modules))
        return config

    def stored(self) -> dict[str, Any]:
        """What a file keeps of the config: every field that makes a difference to the numbers (``compare=False`` marks those that do not)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def roles(self) -> tuple[str, ...]:
        """The roles that get a module."""
        raise NotImplementedError

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """The module for one place, or None to leave it; the config is a resolved one."""
        raise NotImplementedError


def per_task(sharing: str, target: Target, make: Callable[[], nn.Module], shared: Sequence[str] = ()) -> nn.Module:
    """One module for all tasks (``sharing="single"``), or one per task that share the parameters whose names start with one of ``shared``.

    Raises:
        ValueError: a module per task, and no tasks.
    """
    if sharing == "single":
        return make()
    if not target.tasks:
        raise ValueError(f"tasks: must name the tasks, since sharing={sharing!r} makes an adapter for each")
    adapters = {task: make() for task in target.tasks}
    names = [name for name, _ in adapters[target.tasks[0]].named_parameters(remove_duplicate=False) if name.startswith(tuple(shared))]
    return PerTask(adapters, names)
