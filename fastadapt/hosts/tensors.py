"""Layers that read ``module(tensor)`` where their stock class reads its own tensor: what a method puts in place of the base's parameters."""

from __future__ import annotations

import functools
import operator
from importlib import import_module
from typing import Any

from torch import nn

from fastadapt.hosts.roles import mark_adapted

SUFFIX = "_reparametrised"
"""The child ``weight_reparametrised`` stands between ``weight`` and the layer's forward."""


class _Reparametrised:
    """A layer with such children. Its own tensors stay what and where they are: the stock forward runs on a stand-in, as torch makes them for replicas, so that threads share no
    state, a layer that checkpointing runs again reads the same values, and each tensor is computed once per call."""

    _stock: type[nn.Module]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        children, tensors = self._modules, dict(self._parameters)
        for name, tensor in tensors.items():
            if (child := children.get(name + SUFFIX)) is not None:
                tensors[name] = child(tensor)
        stand_in = object.__new__(self._stock)
        stand_in.__dict__ = {**self.__dict__, "_parameters": tensors}
        return self._stock.forward(stand_in, *args, **kwargs)


@functools.cache
def reparametrised(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a layer's class that reads its tensors through children; cached. Pickle finds it in this module by its qualified name, in a new process too."""
    adapted = type(cls.__name__, (_Reparametrised, cls), {"__module__": __name__, "__qualname__": f"{cls.__module__}:{cls.__qualname__}".replace(".", "/"), "_stock": cls})
    return mark_adapted(adapted)


def __getattr__(name: str) -> Any:
    module, found, qualified = name.replace("/", ".").partition(":")
    if not found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reparametrised(operator.attrgetter(qualified)(import_module(module)))
