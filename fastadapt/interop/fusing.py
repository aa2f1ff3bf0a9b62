"""`fuse`: the adapter layers that a model already has, of other libraries, onto fused ops; and `unfuse`.

A fused layer is the same object with the same tensors, children, hooks and attributes: only its ``__class__`` becomes a subclass of its own class with another ``forward``. So
``isinstance`` holds, keys do not move, the library's own methods work, checkpointing and ``torch.compile`` see an ordinary module, and copies and pickles are fused as well, which
a ``forward`` bound to the instance would break. What a call asks for decides whether the op or the library's own ``forward`` runs; each file beside this one says when.
"""

from __future__ import annotations

import copyreg
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

# The files of the foreign codebases; each has `recognise`.
_CODEBASES = ("peft", "adapterhub", "vl_adapter", "uniadapter")
KNOWN = "PEFT's LoRA layers, AdapterHub's bottleneck, parallel and Compacter adapters, and the adapter classes of the VL-Adapter, VL-PET, UniAdapter and Compacter repositories"


class Kind(NamedTuple):
    """What a module was recognised as, the op that it runs on, the class mixed into its own, and what keeps it on its own ``forward`` at present ("": nothing)."""

    name: str
    op: str
    mixin: type[Fused]
    note: str = ""


class Foreign(NamedTuple):
    """A layer of a known codebase that stays as it is, and why."""

    name: str
    why: str


class FusedSite(NamedTuple):
    """A fused layer: its path, what it is, the op, and what keeps it on its own ``forward`` at present ("": nothing)."""

    path: str
    kind: str
    op: str
    note: str = ""


class LeftSite(NamedTuple):
    """A layer of a known codebase that runs as before: its path, what it is, and why."""

    path: str
    kind: str
    why: str


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` found: the layers that run on fused ops, and those of known libraries that were left alone, with the reason."""

    fused: tuple[FusedSite, ...]
    left: tuple[LeftSite, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} layers fused, {len(self.left)} left alone"]
        for (path, kind, op, note), count in Counter((_pattern(s.path), s.kind, s.op, s.note) for s in self.fused).items():
            lines.append(f"  {path} ({count}): {kind} on {op}" + (f"; {note}" if note else ""))
        for (path, kind, why), count in Counter((_pattern(s.path), s.kind, s.why) for s in self.left).items():
            lines.append(f"  left alone: {path} ({count}): {kind}: {why}")
        return "\n".join(lines)


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path)


class Fused:
    """What every fused layer's class has: the class before, and how copies and pickles are made."""

    _base: ClassVar[type[nn.Module]]
    _mixin: ClassVar[type[Fused]]
    parts: ClassVar[tuple[str, ...]] = ()
    """Children that are no layers of their own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time; what finds it again are the two that it is made of.
        made: Any = super().__reduce_ex__(protocol)
        how, what, *rest = made
        if how is copyreg.__newobj__ and what == (type(self),):  # type: ignore[attr-defined]
            return (_new, (self._mixin, self._base), *rest)
        return made


def _new(mixin: type[Fused], base: type[nn.Module]) -> nn.Module:
    cls = fused_class(mixin, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def fused_class(mixin: type[Fused], base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` with the forward of ``mixin``. It keeps the name, by which FSDP and accelerate find layers."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__, "_base": base, "_mixin": mixin})


def fuse(model: nn.Module) -> FuseReport:
    """Puts the adapter layers that ``model`` already has onto fused ops, in place: PEFT's LoRA (several adapters, dropout, biases, batches with ``adapter_names``, quantised
    bases), AdapterHub's bottleneck, parallel and Compacter adapters, and the adapter classes of the VL-Adapter, VL-PET, UniAdapter and Compacter repositories, known by their
    attributes.

    Layers keep their tensors, hooks, keys and methods, so the library's own training, switching, merging, saving and loading go on as before; fusing draws no numbers and changes
    no value. Dropout draws other elements from the same generator. Layers that are added later are fused by another call. A layer that cannot be fused is left as it is and named
    in the report; a call that a fused layer cannot take (merged or disabled adapters, DoRA and other variants, hooks on its parts) runs the library's own ``forward``.

    Args:
        model: any module; wrapped and compiled ones too.

    Returns:
        A report, to be printed: the fused layers, and those left alone with the reason. Calling again changes nothing and reports the same.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no layer of a known library is in it; the message names what is known. The model stays as it was.
    """
    check_model(model)
    fused: list[FusedSite] = []
    left: list[LeftSite] = []
    plan: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, module, found in _outermost(model):
        if isinstance(found, Foreign):
            left.append(LeftSite(path, *found))
        elif found is not None:
            fused.append(FusedSite(path, found.name, found.op, found.note))
            if not isinstance(module, Fused):
                plan.append((module, fused_class(found.mixin, type(module))))  # type: ignore[arg-type]
    if not fused and not left:
        raise ValueError(f"model: no layer of this {type(model).__name__} is known; known are {KNOWN}")
    done: list[nn.Module] = []
    try:
        for module, cls in plan:
            module.__class__ = cls
            done.append(module)
    except BaseException:
        _restore(done)
        raise
    return FuseReport(tuple(fused), tuple(left))


def unfuse(model: nn.Module) -> None:
    """Gives every layer that `fuse` changed its own class back; nothing else of it was changed.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: nothing in it is fused.
        RuntimeError: somebody gave a fused layer yet another class (FSDP2's ``fully_shard`` does); the model stays as it is.
    """
    check_model(model)
    layers = [module for module in model.modules() if isinstance(module, Fused)]
    if not layers:
        raise ValueError(f"model: no layer of this {type(model).__name__} is fused")
    if changed := [layer for layer in layers if "_mixin" not in type(layer).__dict__]:
        raise RuntimeError(f"a fused {changed[0]._base.__name__} has become a {type(changed[0]).__module__}.{type(changed[0]).__qualname__}; undo that first")
    _restore(layers)


def _restore(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.__class__ = layer._base  # type: ignore[assignment]
        layer.__dict__.pop("_kept", None)  # weights made for calls without gradients


def _outermost(model: nn.Module) -> Iterator[tuple[str, nn.Module, Kind | Foreign | None]]:
    """Every module once and what it is, but not the parts of a recognised layer that its forward runs."""
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, Kind | Foreign | None]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        found = _recognise(module)
        yield path, module, found
        for name, child in module.named_children():
            if not (isinstance(found, Kind) and name in found.mixin.parts):
                yield from walk(f"{path}.{name}" if path else name, child)

    return walk("", model)


def _recognise(module: nn.Module) -> Kind | Foreign | None:
    if type(module).__module__.startswith("fastadapt."):
        return None
    for name in _CODEBASES:
        found = import_module(f"fastadapt.interop.{name}").recognise(module)
        if found is None:
            continue
        # accelerate's hooks put a forward on the instance, which hides every class's.
        if isinstance(found, Kind) and "forward" in module.__dict__:
            return Foreign(found.name, "has a forward of its own on the instance (accelerate's dispatch puts one there); fuse before that")
        return found
    return None


# What the codebases' files share.


def check_model(model: object) -> None:
    """Refuses what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be an nn.Module, not {type(model).__name__}")


def quiet(module: nn.Module) -> bool:
    """Whether nobody listens to calls of a part of a layer, or has put a forward on it: the op never calls it."""
    d = module.__dict__
    return not ("forward" in d or d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


def plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a part of a layer is exactly of the class that the op computes (not wrapped, quantised, sharded or parametrised), and `quiet`."""
    return type(module) is kind and quiet(module)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, casts activations like x to."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether an op takes these parameters over x: (..., D) of a float dtype, and parameters of one dtype, x's (or autocast's) or float32."""
    dtypes = {p.dtype for p in parameters if p is not None}
    return x.dim() > 1 and x.is_floating_point() and len(dtypes) == 1 and dtypes <= {autocast_dtype(x) or x.dtype, torch.float32}


# By the names of transformers' and torch's classes and, of older versions, functions.
_ACTIVATIONS = {
    "NewGELUActivation": "gelu_new", "GELUTanh": "gelu_new", "gelu_new": "gelu_new", "GELUActivation": "gelu", "gelu": "gelu", "ReLU": "relu", "relu": "relu", "SiLU": "silu",
    "SiLUActivation": "silu", "silu": "silu", "swish": "silu", "LinearActivation": "identity", "Identity": "identity",
}  # fmt: skip


def mentions_only(cls: type[nn.Module], names: set[str]) -> bool:
    """Whether the ``forward`` of a class mentions nothing but these: a class of the same name and attributes may compute something else."""
    return set(cls.forward.__code__.co_names) <= names


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """The op's name of an activation: a module of transformers or torch, or a function; None: no op has it."""
    if isinstance(function, nn.GELU):
        return "gelu_new" if function.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", ""))
