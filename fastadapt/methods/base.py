"""What a method is: a frozen config that says which module goes to which role, and what else is trained.

To add a method over existing modules and roles, write one file beside this one with a subclass of `MethodConfig`, and name it in `fastadapt.methods`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import nn

from fastadapt.nn import Init

INITS = ("repo", "identity")
LAYER_NORMS = ("all", "encoder", "none")


class Target(NamedTuple):
    """The place that a module is built for: host family, width D, and the starting values that the host's own rule gives to Linears it does not know."""

    family: str
    width: int
    init: Init


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method. A field that is None takes the value published for the host (``published``).

    Args:
        layer_norms: which of the host's layer norms are trained: "all", those of the "encoder", or "none".
        visual_embedding: train the module called ``visual_embedding``, where the model has one.
    """

    method: ClassVar[str]
    published: ClassVar[dict[str, dict[str, Any]]]
    """Per host family: published values of the fields that default to None."""

    layer_norms: Literal["all", "encoder", "none"] | None = None
    visual_embedding: bool = True

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
        if not isinstance(config.visual_embedding, bool):
            raise ValueError(f"visual_embedding: must be True or False, not {config.visual_embedding!r}")
        return config

    def stored(self) -> dict[str, Any]:
        """What a file keeps of the config: every field that makes a difference to the numbers (``compare=False`` marks those that do not)."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare}

    def roles(self) -> tuple[str, ...]:
        """The roles that get a module."""
        raise NotImplementedError

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The module for one place; the config is a resolved one."""
        raise NotImplementedError
