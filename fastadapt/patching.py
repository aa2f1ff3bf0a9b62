"""`patch`: adapters into an existing model, in place and reversibly, and the `Handle` that controls them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt import backend, checkpoint, hosts, methods
from fastadapt.checkpoint import AdapterFileError
from fastadapt.hosts import generic, vlm
from fastadapt.hosts.ends import ENDS
from fastadapt.hosts.roles import UnknownHostError, features, is_adapted, is_before, is_beside, is_projection
from fastadapt.hosts.stages import STAGES, Hook
from fastadapt.hosts.tensors import SUFFIX, reparametrised
from fastadapt.methods import MethodConfig
from fastadapt.methods.base import as_bool, has_tasks, of_task, task_parameters

_Blocks = list[tuple[str, nn.Module, hosts.Host]]
"""Blocks of a model, with their paths and hosts."""

__all__ = ["AdapterFileError", "Handle", "NotMergeableError", "Report", "SiteReport", "UnknownHostError", "load", "patch"]

_ATTRIBUTE = "_fastadapt_handle"
_HANDLES: weakref.WeakSet[Handle] = weakref.WeakSet()
"""Of the patched models that there are, and of some that are patched no more."""


class NotMergeableError(ValueError):
    """The adapters cannot be folded into the base's weights."""


class SiteReport(NamedTuple):
    """One site: its id, the path of its adapter in the model, the adapter's class and size, which backend would run it, with the reasons of those passed over, and what of the
    layer around it is fused, in operations of its own."""

    id: str
    path: str
    module: str
    parameters: int
    backend: str
    reasons: dict[str, list[str]]
    around: str = ""


@dataclass(frozen=True)
class Report:
    """What a patch did: sites, places left alone and why, base tensors that are trained, and counts over unique parameters."""

    method: str
    name: str
    sites: tuple[SiteReport, ...]
    skipped: tuple[tuple[str, str], ...]
    trained_base: tuple[str, ...]
    trainable: int
    total: int
    init: str = "repo"
    no_identity: str | None = None
    """Why ``init="identity"``, a start exactly at the base's output, is impossible; None: it is possible."""

    @property
    def percent(self) -> float:
        """Trainable of all parameters, in percent."""
        return 100.0 * self.trainable / self.total

    def __str__(self) -> str:
        lines = [f"{self.method} ({self.name}): {len(self.sites)} sites, {self.trainable:,} of {self.total:,} parameters trained ({self.percent:.4f} %)"]
        width = max((len(s.id) for s in self.sites), default=0)
        lines += [f"  {s.id:<{width}}  {s.module} {s.parameters:,} parameters, {s.backend}{s.around and f'; fused around it: {s.around}'}" for s in self.sites]
        passed_over = Counter((name, s.backend, "; ".join(why)) for s in self.sites for name, why in s.reasons.items() if why)
        lines += [f"  {chosen} instead of {name} at {count} sites: {why}" for (name, chosen, why), count in passed_over.items()]
        lines.append(f"  trained in the base: {len(self.trained_base)} tensors" + (f" ({_some(self.trained_base)})" if self.trained_base else ""))
        if self.init == "identity":
            lines.append("  started exactly at the base's output")
        else:
            lines.append("  started as published; " + ("init='identity' starts exactly at the base's output" if self.no_identity is None else self.no_identity))
        left = Counter((re.sub(r"\.\d+\.", ".*.", path), why) for path, why in self.skipped)
        lines += [f"  left alone: {path} ({count} places): {why}" for (path, why), count in left.items()]
        return "\n".join(lines)


@dataclass
class _Site:
    id: str
    owner_path: str
    slot: str
    owner: nn.Module
    module: nn.Module
    dtype: torch.dtype
    flat: bool = False


@dataclass
class _Swap:
    """A module that changes class, the children that the adapted class reads (None where the method puts nothing), and what it fuses around them, see `Host.ends`."""

    owner: nn.Module
    base: type[nn.Module]
    adapted: type[nn.Module]
    slots: dict[str, nn.Module | None]
    ends: str = ""


@dataclass
class _Trained:
    """A tensor of the base that is trained: every (module, name) that holds it, and its value before."""

    id: str
    owners: list[tuple[nn.Module, str]]
    base: nn.Parameter | None

    @property
    def parameter(self) -> nn.Parameter:
        module, name = self.owners[0]
        return module._parameters[name]  # type: ignore[return-value]

    def put(self, parameter: nn.Parameter | None) -> None:
        _put(self.owners, parameter)


@dataclass
class _Added(_Trained):
    """A trained tensor that the base does not have: ``base`` is None. A module that ``declares`` the name holds None there."""

    start: nn.Parameter
    declared: bool

    def put(self, parameter: nn.Parameter | None) -> None:
        super().put(parameter)
        if parameter is None and not self.declared:
            for module, name in self.owners:
                del module._parameters[name]


@dataclass
class _Before:
    """What `Handle.unpatch` puts back."""

    requires_grad: list[tuple[nn.Module, str, bool]]
    training: list[tuple[nn.Module, bool]]
    paths: dict[nn.Module, str]
    """Where each module was."""


@dataclass(eq=False)
class Handle:
    """A patched model's adapters. Made by `patch`; a deep copy or an unpickled copy of the model has its own, `Handle.of(copy)`. A copy that is made inside `disabled` or `route`
    is outside of them: its adapters are on, for the task that is selected. Inside `merged` the model cannot be copied.

    ``model.state_dict()`` holds the base under its own keys plus the adapters' keys, with trained base tensors at their trained values; ``model.save_pretrained`` therefore writes
    a file that the stock class loads (the adapters' keys are unexpected to it), trained layer norms included. To save the adapter alone, use `save`.

    A module that takes the place of one whose tensors are trained (``resize_token_embeddings`` makes a new output layer where it is not tied) counts in its stead. Where a layer
    with an adapter, or every module that holds a trained tensor, is gone, what needs it raises a RuntimeError that names it; `unpatch` goes without. A tensor that stands in
    several places stays one: equal tensors that ``model.load_state_dict(assign=True)`` put there become one again, different ones are refused by name.
    """

    model: nn.Module = field(repr=False)
    config: MethodConfig
    resolved: dict[str, MethodConfig] = field(repr=False)
    name: str
    init: str
    tasks: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = field(repr=False)
    fuse_residual: bool = field(default=True, repr=False)
    active_task: str | None = None
    _sites: list[_Site] = field(default_factory=list, repr=False)
    _swaps: list[_Swap] = field(default_factory=list, repr=False)
    _trained: list[_Trained] = field(default_factory=list, repr=False)
    _hooks: list[Hook] = field(default_factory=list, repr=False)
    _shared: list[list[tuple[nn.Module, str]]] = field(default_factory=list, repr=False)
    _before: _Before | None = field(default=None, repr=False)
    _disabled: int = field(default=0, repr=False)
    _kept: list[nn.Parameter] = field(default_factory=list, repr=False)
    _merged: bool = field(default=False, repr=False)

    @staticmethod
    def of(model: nn.Module) -> Handle:
        """The handle of a patched model, or of one inside ``torch.compile``, ``DistributedDataParallel`` or ``DataParallel``.

        Raises:
            ValueError: the model is not patched.
            TypeError: it is no ``nn.Module``.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: must be an nn.Module, not {type(model).__name__}")
        inside: nn.Module | None = model
        while inside is not None and _ATTRIBUTE not in inside.__dict__:
            wraps = isinstance(inside, (nn.DataParallel, nn.parallel.DistributedDataParallel))
            inside = inside._modules.get("module" if wraps else "_orig_mod")
        if inside is None:
            raise ValueError(f"model: this {type(model).__name__} is not patched")
        return inside.__dict__[_ATTRIBUTE]

    # What there is.

    def _adapters(self) -> list[nn.Module]:
        """Every adapter once."""
        return list({id(site.module): site.module for site in self._sites}.values())

    @property
    def sites(self) -> dict[str, nn.Module]:
        """The adapters by site id."""
        return {site.id: site.module for site in self._sites}

    @property
    def report(self) -> Report:
        """What the patch did, with the backend that 4,096 rows of the base's dtype would take at each site now."""
        trainable, total = self.parameter_counts()
        sites = tuple(_site_report(site) for site in self._sites)
        return Report(self.config.method, self.name, sites, self.skipped, tuple(t.id for t in self._trained), trainable, total, self.init, self._no_identity())

    def _no_identity(self) -> str | None:
        try:
            for family, config in self.resolved.items():
                # What is as published may give way, whether it was given or not.
                published: dict[str, Any] = {name: None for name, value in config.published[family].items() if getattr(config, name) == value}
                dataclasses.replace(config, **published).resolved(family, "identity")
        except ValueError as error:
            return str(error)
        return None

    def parameter_counts(self) -> tuple[int, int]:
        """Trainable and all parameters of the model, each tensor counted once."""
        self._check_active()
        parameters = list(self.model.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the model that require gradients: adapters and trained base tensors."""
        self._check_active()
        return [p for p in self.model.parameters() if p.requires_grad]

    def print_trainable_parameters(self) -> None:
        """Prints the counts, as PEFT does."""
        trainable, total = self.parameter_counts()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    def reset_parameters(self) -> None:
        """Draws the adapters' starting values again, for instance after ``to_empty`` on a model built on the meta device."""
        self._check_active()
        self._follow()
        for places in self._shared:  # to each of which ``to_empty`` gives a tensor of its own
            _put(places, places[0][0]._parameters[places[0][1]])
        for module in self._adapters():
            module.reset_parameters()  # type: ignore[operator]
        with torch.no_grad():
            for trained in self._trained:
                if trained.base is None:
                    trained.parameter.zero_()

    # Tasks.

    def set_task(self, task: str) -> None:
        """Makes ``task`` the active one: its adapters run, where the method has one per task; the others get no gradient. With gradient checkpointing, which runs layers again in
        backward, call backward before another task is selected; what differs is refused (of reentrant checkpointing: from the last forward). The task is the model's, for all
        threads: as with `route` and `disabled`, do not run one model under two tasks at a time.

        Raises:
            ValueError: the task is none of ``tasks``.
            RuntimeError: unpatched, or inside `route`, where every sample has a task of its own.
        """
        self._check_active()
        if any(part.task_ids is not None for part in self._routable()):
            raise RuntimeError("task: not inside `with handle.route(...)`, where every sample has a task of its own")
        if task not in self.tasks:
            known = f"must be one of {', '.join(self.tasks)}" if self.tasks else "the model was patched without tasks"
            raise ValueError(f"task: {task!r} is unknown; {known}")
        self._select(task)

    def _select(self, task: str | None) -> None:
        for part in self._parts("set_task"):
            part.set_task(task)
        self.active_task = task

    def _parts(self, method: str) -> list[Any]:
        """The parts of the adapters whose class has the method; a module itself takes long to say that it has not."""
        return [part for module in self._adapters() for part in module.modules() if hasattr(type(part), method)]

    def _routable(self) -> list[Any]:
        """The parts of the adapters that know tasks."""
        return self._parts("set_route")

    @contextlib.contextmanager
    def task(self, task: str) -> Iterator[Handle]:
        """`set_task` inside the ``with`` block only. With gradient checkpointing backward runs layers again: keep it inside the block."""
        before = self.active_task
        self.set_task(task)
        try:
            yield self
        finally:
            self._select(before)

    @contextlib.contextmanager
    def route(self, task_ids: Sequence[str] | Tensor) -> Iterator[Handle]:
        """A batch that mixes tasks: inside the ``with`` block each sample gets the adapters of its own task, row for row what batches of one task give at the same padded length.

        `set_task` and `task` are refused inside. Every task's parameters get gradients, zero where no sample is of the task. Ids on a GPU are never read on the host: other mixes
        need no synchronisation and no other compiled graph. With gradient checkpointing backward runs layers again: keep it inside the block. Methods whose adapters serve all
        tasks do the same as without. Vision towers and projectors see images, not samples: there every sample must have as many images (of as many tiles) as any other, in the
        samples' order; of other batches patch the text alone (``towers=["text"]``).

        Args:
            task_ids: a task's name for each sample, or an int64 tensor (batch,) of places in ``tasks``. Beams of a sample follow it.

        Raises:
            ValueError: a name or a place is unknown (places on a GPU are not read), the model was patched without tasks, or adapters per task are in a vision tower that takes the
                patches of all images as one sequence (Qwen-VL).
            TypeError: neither names nor an int64 tensor of one dimension.
            RuntimeError: unpatched.
        """
        self._check_active()
        if flat := [site.id for site in self._sites if site.flat and has_tasks(site.module)]:
            raise ValueError(f"task_ids: {flat[0]} sees the patches of all images as one sequence, and not whose they are; patch with towers=['text'] to mix tasks in a batch")
        ids, parts = self._places(task_ids), self._routable()
        before = [part.task_ids for part in parts]
        for part in parts:
            part.set_route(ids)
        try:
            yield self
        finally:
            for part, old in zip(parts, before, strict=True):
                part.set_route(old)

    def _places(self, task_ids: Sequence[str] | Tensor) -> Tensor:
        if not self.tasks:
            raise ValueError("task_ids: the model was patched without tasks")
        if not isinstance(task_ids, Tensor):
            if isinstance(task_ids, str) or not all(isinstance(task, str) for task in task_ids):
                raise TypeError(f"task_ids: must be a task's name for each sample or an int64 tensor, not {task_ids!r}")
            if unknown := [task for task in task_ids if task not in self.tasks]:
                raise ValueError(f"task_ids: {unknown[0]!r} is unknown; must be one of {', '.join(self.tasks)}")
            return torch.tensor([self.tasks.index(task) for task in task_ids], device=next(self.model.parameters()).device)
        if task_ids.dtype != torch.int64 or task_ids.dim() != 1:
            raise TypeError(f"task_ids: must be an int64 tensor of one dimension, not {task_ids.dtype} of shape {tuple(task_ids.shape)}")
        if task_ids.device.type == "cpu" and ((task_ids < 0) | (task_ids >= len(self.tasks))).any():
            raise ValueError(f"task_ids: must be places from 0 to {len(self.tasks) - 1} of the tasks {', '.join(self.tasks)}, got {task_ids.tolist()}")
        return task_ids

    # Off and on, in and out.

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model inside the ``with`` block: its own layers, and its own values of the tensors that the patch trains. No tensor is written, so graphs from inside or outside
        the block stay right. Do not move, save or unpatch the model inside it.

        Raises:
            RuntimeError: base values are unknown (patched on the meta device; see `remember_base`) or of other shapes than the tensors have now, or the layers were changed by
                somebody else.
        """
        self._check_active()
        if self._disabled == 0:
            self._check_untouched()
            self._check_whole("disabled")
            self._check_base_known("disabled")
            self._kept = [trained.parameter for trained in self._trained]
            for trained, now in zip(self._trained, self._kept, strict=True):
                if trained.base is not None and (trained.base.device != now.device or trained.base.dtype != now.dtype):
                    trained.base = nn.Parameter(trained.base.detach().to(now.device, now.dtype), requires_grad=False)
                trained.put(trained.base)
            for swap in self._swaps:
                swap.owner.__class__ = swap.base
            for hook in self._hooks:
                hook.enabled = False
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1
            if self._disabled == 0:
                for trained, now in zip(self._trained, self._kept, strict=True):
                    trained.put(now)
                self._kept = []
                self._enable()

    def _enable(self) -> None:
        for swap in self._swaps:
            swap.owner.__class__ = swap.adapted
        for hook in self._hooks:
            hook.enabled = True

    def __getstate__(self) -> dict[str, Any]:
        if self._merged:
            raise RuntimeError("model: cannot be copied or pickled inside `with handle.merged()`; copy it outside, and merge the copy")
        if not self._disabled:
            return self.__dict__
        # Of a copy, which is inside no `with` block, modules that hold the handle are empty still when it is filled; their dictionaries of parameters are not.
        puts = [(module._parameters, name, now) for trained, now in zip(self._trained, self._kept, strict=True) for module, name in trained.owners]
        return {**self.__dict__, "_disabled": 0, "_kept": [], "_puts": puts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        puts = state.pop("_puts", None)
        self.__dict__.update(state)
        _HANDLES.add(self)
        if puts is not None:
            for parameters, name, now in puts:
                parameters[name] = now
            self._enable()

    def remember_base(self) -> None:
        """Takes the present values of the trained base tensors as the base's: for a model that was patched on the meta device and has got its weights since, or
        whose trained tensors have got other shapes (more words, for instance)."""
        self._check_active()
        self._check_enabled("remember_base")
        self._check_whole("remember_base")
        for trained in self._trained:
            if trained.base is not None:
                trained.base = nn.Parameter(trained.parameter.detach().clone(), requires_grad=False)

    def unpatch(self, restore_base: bool = False) -> None:
        """Puts the model back: classes, keys, ``requires_grad`` and train / eval flags as before `patch`. Models that share frozen parts are unpatched in reverse order.

        Args:
            restore_base: also the values of the base tensors that were trained.

        Raises:
            RuntimeError: already unpatched, inside `disabled`, base values unknown or of other shapes than the tensors have now, or layers changed by somebody else; nothing is
                changed then.
        """
        self._check_active()
        self._check_enabled("unpatch")
        self._check_untouched()
        self._follow()
        if restore_base:
            self._check_whole("restore_base")
            self._check_base_known("restore_base")
            with torch.no_grad():
                for trained in self._trained:
                    if trained.base is not None:
                        trained.parameter.copy_(trained.base)
        self._undo()

    # Into the weights.

    def merge(self) -> nn.Module:
        """Folds the adapters into the base's weights for good, and unpatches; trained base tensors keep their trained values. For methods that are linear: LoRA.

        Each weight becomes W + (alpha / r) B A, added up in fp64 and rounded once to its own dtype; of adapters per task those of the active task. Every projection
        is then tried on random rows: what it gave with its adapter and what it gives now must be the same to the rounding of its dtype.

        Returns:
            The model, which has no adapters any more.

        Raises:
            NotMergeableError: a method that is not linear, a quantised or sharded weight, one that other modules hold too, no active task, or a sum that its dtype cannot
                hold; the model stays as it is.
            RuntimeError: as `unpatch`, or inside `route`.
        """
        with self.merged():
            weights: list[tuple[Any, Tensor]] = [(site.owner, site.owner.weight.data) for site in self._sites]  # type: ignore[misc]
        self.unpatch()
        for owner, weight in weights:
            owner.weight.data = weight
        return self.model

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """As `merge`, inside the ``with`` block only, for inference at the base's own speed; afterwards the base's weights are the very ones they were.

        Takes the memory of the merged weights. Do not train, move, copy, save or unpatch the model inside the block.
        """
        self._check_active()
        self._check_enabled("merge")
        self._check_untouched()
        self._check_whole("merge")
        found = _mergeable(self)
        before: list[tuple[Any, Tensor]] = [(site.owner, site.owner.weight.data) for site in self._sites]  # type: ignore[misc]
        try:
            for site, adapter, base in found:
                _merge(site, adapter, base)
            self._merged, kept = True, [trained.base for trained in self._trained]
            for trained in self._trained:  # what `disabled` takes for the base's
                trained.base = trained.parameter
            try:
                with self.disabled():
                    yield
            finally:
                self._merged = False
                for trained, was in zip(self._trained, kept, strict=True):
                    trained.base = was
        finally:
            for owner, weight in before:
                owner.weight.data = weight

    def _undo(self) -> None:
        for swap in self._swaps:
            swap.owner.__class__ = swap.base
            swap.owner.__dict__.pop(ENDS, None)
            for slot in swap.slots:
                swap.owner._modules.pop(slot, None)
        for hook in self._hooks:
            hook.remove()
        for trained in self._trained:
            if trained.base is None:
                trained.put(None)
        if self._before is not None:
            for module, name, flag in self._before.requires_grad:
                if (parameter := module._parameters.get(name)) is not None:
                    parameter.requires_grad_(flag)
            for module, training in self._before.training:
                module.training = training
        loaded = self.model._load_state_dict_post_hooks
        for key in [key for key, hook in loaded.items() if hook == self._loaded]:
            del loaded[key]
        self.model.__dict__.pop(_ATTRIBUTE, None)

    # Files.

    def save(self, directory: str | os.PathLike[str], *, task: str | None = None) -> None:
        """Writes ``adapter_config.json`` and ``adapter_model.safetensors``: the adapters by site id and the base tensors that the method trains. See `fastadapt.checkpoint`.

        Where FSDP2 shards the parameters, every process calls it: the tensors are gathered and the first process writes.

        Args:
            directory: is made where it does not exist. Not that of ``save_pretrained``: where PEFT is installed, ``from_pretrained`` takes these files beside a model for PEFT's.
            task: the adapters of this task alone, as those of a patch with ``sharing="single"``; what tasks share is part of them.

        Raises:
            ValueError: an unknown task, or adapters that serve all tasks.
            RuntimeError: the model is on the meta device, or inside `disabled`.
        """
        self._check_active()
        self._check_enabled("save")
        _reshard(self.model)
        self._check_whole("save", shared=True)
        tensors = self._tensors(task)
        options = self._options(task)
        if any(t.is_meta for t in tensors.values()):
            raise RuntimeError("save: the model is on the meta device and has no values")
        if sharded := any(_is_sharded(t) for t in tensors.values()):
            tensors = {key: _whole(t) for key, t in tensors.items()}
        if sharded and torch.distributed.get_rank():
            return
        if os.path.exists(os.path.join(directory, "config.json")):
            why = "from_pretrained of transformers would take an adapter's files beside it for PEFT's, and fail; save adapters elsewhere"
            warnings.warn(f"{os.fspath(directory)}: holds a model's config.json: {why}", stacklevel=2)
        config = getattr(self.model, "config", None)
        base = {"class": type(self.model).__name__, "model_type": getattr(config, "model_type", None), "name_or_path": getattr(config, "name_or_path", None)}
        checkpoint.write(
            directory,
            {
                "method": self.config.method,
                "name": self.name,
                "tasks": [] if task else list(self.tasks),
                "init": self.init,
                "options": options,
                "base_model": base,
                "sites": {site.id: type(of_task(site.module, task)).__name__ for site in self._sites},
                "trained_base": [trained.id for trained in self._trained],
            },
            tensors,
        )

    def load(self, directory: str | os.PathLike[str], *, task: str | None = None) -> None:
        """Reads what `save` wrote into this model. Method, options, sites, names and shapes must be equal; nothing is left out or made up.

        Values are written in place: a compiled model or a captured CUDA graph goes on with them. Where FSDP2 shards the parameters, every process calls it and takes its part.

        Args:
            directory: what `save` wrote.
            task: loads the adapters of a patch with ``sharing="single"`` as this task's, so that adapters that were trained apart serve one model. What tasks share, trained base
                tensors for one (``layer_norms="none"``, ``biases=False``, ``visual_embedding=False`` train none), must have the same values in the file as here.

        Raises:
            ValueError: an unknown task, or adapters that serve all tasks.
            fastadapt.patching.AdapterFileError: the files are missing, corrupted, foreign, or of another patch; the model stays as it is.
        """
        self._check_active()
        self._check_enabled("load")
        _reshard(self.model)
        self._check_whole("load", shared=True)
        config, tensors = checkpoint.read(directory)
        self._load(config, tensors, directory, task)

    def _load(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], directory: str | os.PathLike[str], task: str | None = None) -> None:
        _reshard(self.model)
        target = self._tensors(task)
        where = os.fspath(directory)
        if config.get("method") != self.config.method:
            raise AdapterFileError(f"{where}: holds an adapter of {config.get('method')!r}; the model is patched with {self.config.method!r}")
        here = self._options(task)
        saved = config.get("options")
        if isinstance(saved, dict) and all(isinstance(values, dict) for values in saved.values()):
            # A file of an earlier version lacks the options that came later: it was written with what they default to.
            # A selector that was not given may stand there as none.
            given = {family: {name: v for name, v in values.items() if v is not None or name not in methods.SELECTORS} for family, values in saved.items()}
            saved = {family: {**type(self.config)().stored(), **values} for family, values in given.items()}
        if saved != here:
            raise AdapterFileError(f"{where}: saved with other options: {_difference(saved, here)}")
        if missing := sorted(target.keys() - tensors.keys()):
            raise AdapterFileError(f"{where}: lacks {len(missing)} tensors of the model: {_some(missing)}")
        if unexpected := sorted(tensors.keys() - target.keys()):
            raise AdapterFileError(f"{where}: has {len(unexpected)} tensors that the model does not have: {_some(unexpected)}")
        for key, tensor in tensors.items():
            if tensor.shape != target[key].shape or not tensor.is_floating_point():
                raise AdapterFileError(f"{where}: {key} is {tensor.dtype} {tuple(tensor.shape)}; the model has {target[key].dtype} {tuple(target[key].shape)}")
            if target[key].is_meta:
                raise RuntimeError("load: the model is on the meta device and cannot hold values")
        others = {id(t) for other in self.tasks if task and other != task for t in self._tensors(other).values()}
        if held := [key for key in tensors if id(target[key]) in others and not torch.equal(_whole(target[key]).cpu(), tensors[key].to(target[key].dtype))]:
            remedy = "; train adapters apart with layer_norms='none', biases=False, visual_embedding=False" if any(key.startswith("base/") for key in held) else ""
            shared = f"{len(held)} tensors that tasks share here, so that loading it would change the other tasks: {_some(held)}"
            raise AdapterFileError(f"{where}: holds other values of {shared}{remedy}")
        with torch.no_grad():
            for key, tensor in tensors.items():
                target[key].copy_(_sharded_like(target[key], tensor))
        for module in self.model.modules():  # of FSDP2's shards a module sees copies, whose versions do not tell
            module.__dict__.pop("_kept", None)

    def _options(self, task: str | None) -> dict[str, dict[str, Any]]:
        """What a file says of the method, or that of one task."""
        return {family: (config.one_task() if task else config).stored() for family, config in self.resolved.items()}

    def _tensors(self, task: str | None = None) -> dict[str, Tensor]:
        """What a file holds, or that of one task, each tensor once: a shared one under the first of its names."""
        if task is not None:
            if task not in self.tasks:
                raise ValueError(f"task: must be one of {', '.join(self.tasks) or '(the model was patched without tasks)'}, not {task!r}")
            if not any(has_tasks(site.module) for site in self._sites):
                raise ValueError(f"task: the adapters of {self.config.method} with these options serve all tasks")
        adapters = {parameter: f"{site.id}/{name}" for site in reversed(self._sites) for name, parameter in reversed(list(task_parameters(site.module, task)))}
        return {**{name: p for p, name in reversed(adapters.items())}, **{f"base/{trained.id}": trained.parameter for trained in self._trained}}

    def _touched(self) -> set[object]:
        """The modules and the tensors of the model that are not the base's while it is patched."""
        places = [place for trained in self._trained for place in trained.owners]
        modules = [*(swap.owner for swap in self._swaps), *(hook.owner for hook in self._hooks), *(module for module, _ in places)]
        tensors = [p for adapter in self._adapters() for p in adapter.parameters()] + [p for module, name in places if (p := module._parameters.get(name)) is not None]
        return {*modules, *tensors}

    def _is_active(self) -> bool:
        return self.model.__dict__.get(_ATTRIBUTE) is self

    def _check_active(self) -> None:
        if not self._is_active():
            raise RuntimeError("this handle's model is no longer patched")

    def _check_enabled(self, what: str) -> None:
        if self._disabled:
            raise RuntimeError(f"{what}: not inside `with handle.{'merged' if self._merged else 'disabled'}()`")

    def _check_untouched(self) -> None:
        for swap in self._swaps:
            if type(swap.owner) is not swap.adapted and not self._disabled:
                raise RuntimeError(f"a patched {swap.base.__name__} has become a {type(swap.owner).__module__}.{type(swap.owner).__qualname__}; undo that first")
            forward = swap.owner.__dict__.get("forward")
            if forward is None or swap.adapted is swap.base:
                continue
            if getattr(forward, "__func__", None) is not swap.adapted.forward:
                raise RuntimeError(f"a patched {swap.base.__name__} has got a forward of its own, as a hook of accelerate gives one; undo that first (remove_hook_from_submodules)")
            del swap.owner.forward  # the class's own, which accelerate leaves there

    def _follow(self) -> dict[nn.Module, str]:
        """All modules of the model, with their paths. New ones where the patch knew others that are gone, as ``resize_token_embeddings`` makes an output layer, stand for these."""
        there = dict(self.model.named_modules(remove_duplicate=False))
        inside, before = {module: path for path, module in reversed(there.items())}, self._before
        if before is not None:
            gone = {module: there[path] for module, path in before.paths.items() if module not in inside and path in there}
            if now := {module: new for module, new in gone.items() if new not in before.paths}:
                before.requires_grad += [(now[module], name, flag) for module, name, flag in before.requires_grad if module in now]
                before.training += [(now[module], flag) for module, flag in before.training if module in now]
                before.paths |= {now[module]: path for module, path in before.paths.items() if module in now}
                for trained in self._trained:
                    owners = [(now[module] if module in now and now[module]._parameters.get(name) is not None else module, name) for module, name in trained.owners]
                    trained.owners = list(dict.fromkeys(owners))
        for trained in self._trained:  # whose tensor is that of the first
            trained.owners.sort(key=lambda place: place[0] not in inside)
        return inside

    def _base_places(self) -> list[list[tuple[nn.Module, str]]]:
        return [trained.owners for trained in self._trained]

    def _apart(self, groups: Sequence[Sequence[tuple[nn.Module, str]]], paths: Mapping[nn.Module, str], *, tie: bool) -> list[list[str]]:
        """The places of one tensor of the patch where different ones stand now. With ``tie`` equal ones become one again."""
        apart = []
        for group in groups:
            places = [(module, name) for module, name in group if module in paths]
            held = list({id(p): p for module, name in places if (p := module._parameters.get(name)) is not None}.values())
            if len(held) > 1:
                first, *others = [p for p in held if not p.is_meta] or held[:1]
                if not all(_equal(p, first) for p in others):
                    apart.append([_join(paths[module], name) for module, name in places])
                elif tie:
                    _put(places, first)
        return apart

    def _loaded(self, model: nn.Module, incompatible: Any) -> None:
        """What the model does after ``load_state_dict``, which with ``assign=True`` gives each place a tensor of its own."""
        if not self._disabled:
            apart = self._apart([*self._shared, *self._base_places()], self._follow(), tie=True)
            # What was not loaded may not have its values yet.
            if apart := [names for names in apart if not any(key.endswith(name) for key in incompatible.missing_keys for name in names)]:
                raise _different("load_state_dict", apart)

    def _check_whole(self, what: str, *, shared: bool = False) -> None:
        """Refuses a model that has lost what the patch put in or trains; with ``shared`` one whose adapters share no more what they shared, too."""
        if self._disabled:
            return
        inside = self._follow()
        lost = [site.id for site in self._sites if site.owner not in inside] + [t.id for t in self._trained if all(module not in inside for module, _ in t.owners)]
        if lost:
            raise RuntimeError(
                f"{what}: {len(lost)} places of the patch are in the model no more ({_some(lost)}): other modules stand there; put those of the patch back, or unpatch"
            )
        if apart := self._apart(self._base_places(), inside, tie=False) + (self._apart(self._shared, inside, tie=True) if shared else []):
            raise _different(what, apart)

    def _check_base_known(self, what: str) -> None:
        if unknown := [t.id for t in self._trained if t.base is not None and t.base.is_meta and not t.parameter.is_meta]:
            raise RuntimeError(f"the model was patched on the meta device, so the base values of {_some(unknown)} are unknown; call remember_base() once the base's weights are in")
        shapes = ((t.id, tuple(t.base.shape), tuple(t.parameter.shape)) for t in self._trained if t.base is not None)
        if reshaped := [f"{key} {before} -> {now}" for key, before, now in shapes if before != now]:
            raise RuntimeError(
                f"{what}: {len(reshaped)} tensors have another shape than before the patch ({_some(reshaped)}), so the base's values do not fit; give it back, or call "
                "remember_base(), which takes the present values as the base's"
            )


def patch(
    model: nn.Module,
    method: str | MethodConfig = "vlpet",
    *,
    tasks: Sequence[str] | None = None,
    name: str = "default",
    init: str = "repo",
    dtype: torch.dtype | None = None,
    fuse_residual: bool = True,
    **options: Any,
) -> Handle:
    """Puts a method's adapters into ``model``, in place; freezes the base except for what the method trains.

    Layers keep their place, name and keys: their class becomes a subclass whose forward runs the adapter, which is registered as a child. Other models of the class are
    untouched.

    Args:
        model: a transformers model with layers of a supported host anywhere inside (`fastadapt.hosts.table`), or with sub-blocks that have usual names, on any device, the meta
            device included.
        method: a name of `fastadapt.methods.available`, or a config of `fastadapt.methods`.
        tasks: names of the tasks that `Handle.set_task` will accept, in an order that files keep (no set); needed where the method has an adapter per task.
        name: name of the patch, kept in reports and files.
        init: "repo", the published starting values, or "identity": the model's output stays exactly what it was.
        dtype: of the adapters' parameters; None: the base's, float32 if that is a half precision.
        fuse_residual: what follows an adapter in its layer (dropout, sum with the residual stream, and the layer norm where it stands behind the sum) runs as one
            `fastadapt.functional.dropout_add_norm`, in training, in hosts that have it (the report says which). The numbers are the same up to rounding; dropout draws other
            masks of the same distribution.
        options: fields of the method's config; what is not given is what was published for the host. Every method has ``towers``, ``layers`` and ``sites``, which say where in the
            model it works, see `fastadapt.methods.MethodConfig`.

    Returns:
        The handle: report, tasks, saving, switching off, unpatching.

    Raises:
        ValueError: unknown method or init, a bad option, layers or ``trained_modules`` that the model does not have, no site, or a model that is patched, compiled or wrapped
            already, or has a part in common with a patched one that either patch changes.
        TypeError: unknown option, or an argument of the wrong type.
        fastadapt.patching.UnknownHostError: (a ValueError) no layer of the model is known, or this version's layer is not.

    A call that raises leaves the model as it was.
    """
    # A preset's layers are those of the published depth, of which a model may lack some.
    strict = {"layers", "trained_modules"} if isinstance(method, MethodConfig) else options.keys()
    return _patch(model, methods.config(method, **options), {}, strict, tasks=tasks, name=name, init=init, dtype=dtype, fuse_residual=fuse_residual)


def _patch(
    model: nn.Module,
    config: MethodConfig,
    by_family: Mapping[str, MethodConfig],
    strict: Collection[str],
    *,
    tasks: Sequence[str] | None,
    name: str,
    init: str,
    dtype: torch.dtype | None,
    fuse_residual: bool,
) -> Handle:
    """`patch` with a config, or one for each family of published values; ``strict`` are the options that may name nothing that the model lacks."""
    _check_model(model, name)
    if init not in methods.INITS:
        raise ValueError(f"init: must be one of {', '.join(methods.INITS)}, not {init!r}")
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype: must be a floating torch.dtype or None, not {dtype!r}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"name: must be a non-empty string, not {name!r}")
    names = () if tasks is None else None if isinstance(tasks, (str, set, frozenset)) or not isinstance(tasks, Collection) else tuple(tasks)
    if names is None or not all(isinstance(t, str) and t for t in names) or len(set(names)) != len(names):
        raise TypeError(f"tasks: must be a list of distinct names, not {tasks!r}")
    fuse_residual = as_bool("fuse_residual", fuse_residual)

    config = config.selected()
    if config.layers is not None and not config.roles():
        raise ValueError(f"layers: {config.method} has no adapters that could be in some layers only")
    blocks, skipped, off = _select(model, config)
    labels = _labels(blocks)
    _check_layers(config, blocks, labels, strict)
    live = [(path, block, host) for path, block, host in blocks if not _off(path, off)]
    if not live:
        raise ValueError(f"model: no layer of this {type(model).__name__} is left to patch: " + "; ".join(f"{path}: {why}" for path, why in off.items()))
    resolved = {family: by_family.get(family, config).resolved(family, init) for family in dict.fromkeys(host.defaults for _, _, host in live)}
    handle = Handle(model, config, resolved, name, init, names, tuple(skipped), fuse_residual)
    shared: dict[str, nn.Module] = {}
    for path, block, host in blocks:
        if why := _off(path, off):
            handle.skipped += tuple((f"{labels[path]}.{place.id}", why) for place in host.places(block))
        else:
            _build(handle, path, block, host, labels[path], dtype, shared, off)
    blocks = live
    _build_stages(handle, model, blocks, labels, dtype, shared)
    _build_reparametrisation(handle, model, dtype)
    handle._shared = [places for _, places in _holders(nn.ModuleList(handle._adapters())) if len(places) > 1]
    handle._trained = _trained(model, blocks, labels, resolved, off)
    if "trained_modules" in strict:
        _check_trained_modules(model, config, off)
    if any(config.add_biases for config in resolved.values()):
        _add_biases(handle, model, blocks, labels, off)
    if not handle._sites and (config.roles() or not handle._trained):
        raise ValueError(f"model: {config.method} has no site in this {type(model).__name__} and nothing that its options train: " + _reasons(handle.skipped))
    _check_apart(handle)
    handle._before = _Before(
        [(module, name, p.requires_grad) for module in model.modules() for name, p in module._parameters.items() if p is not None],
        [(module, module.training) for module in model.modules()],
        {module: path for path, module in model.named_modules()},
    )
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for trained in handle._trained:
            if isinstance(trained, _Added):
                trained.put(trained.start)
            trained.parameter.requires_grad_(True)
        for swap in handle._swaps:
            for slot, adapter in swap.slots.items():
                swap.owner.register_module(slot, adapter)
            swap.owner.__class__ = swap.adapted
            if swap.ends:
                swap.owner.__dict__[ENDS] = swap.ends
        for hook in handle._hooks:
            hook.install()
        model.register_load_state_dict_post_hook(handle._loaded)
        model.__dict__[_ATTRIBUTE] = handle
    except BaseException:
        handle._undo()
        raise
    _HANDLES.add(handle)
    return handle


def _select(model: nn.Module, config: MethodConfig) -> tuple[_Blocks, list[tuple[str, str]], dict[str, str]]:
    """The blocks of a model; what was refused, and why; and the paths in it that a patch leaves alone, and why.

    Raises:
        UnknownHostError: there are none.
        ValueError: a role in ``sites``, or a tower in ``towers``, that the model does not have.
    """
    refused: list[tuple[str, str]] = []
    if config.sites is not None:
        if unknown := [role for role in config.sites if role not in generic.SITE_ROLES]:
            raise ValueError(f"sites: {', '.join(map(repr, unknown))} is no role that a pattern can have; must be of {', '.join(generic.SITE_ROLES)}")
        if unused := [role for role in config.sites if role not in config.roles()]:
            raise ValueError(f"sites: {config.method} puts nothing at {', '.join(unused)}; it has {', '.join(role for role in config.roles() if role in generic.SITE_ROLES)}")
        blocks = generic.chosen(model, config.sites)
    else:
        blocks, refused = hosts.find(model, config.published)
        blocks = blocks + generic.recognised(model, [*(path for path, _, _ in blocks), *(path for path, _ in refused)])
    if not blocks:
        why = "".join(f"; {path or 'the model'}: {reason}" for path, reason in refused)
        raise UnknownHostError(
            f"model: {type(model).__module__}.{type(model).__name__} has no layers of a supported host ({', '.join(hosts.families())}) and no sub-blocks with usual names; "
            f"name its Linears with sites={{role: pattern}}{why}"
        )
    if config.sites is None:
        blocks += vlm.projectors(model, [path for path, _, _ in blocks])
    off = vlm.dead(model, alone=config.sites is None)
    if config.towers is not None:
        towers = {path: host.tower(block) for path, block, host in blocks}
        if missing := [tower for tower in config.towers if tower not in towers.values()]:
            raise ValueError(f"towers: this {type(model).__name__} has no {', '.join(missing)}; it has {', '.join(dict.fromkeys(towers.values()))}")
        roots = _roots(towers)
        for path, tower in roots.items():
            if tower not in config.towers:
                off[path] = f"belongs to the {tower} tower; towers={list(config.towers)}"
        if "text" not in config.towers:
            outside = [path for path, _ in model.named_parameters() if not any(_under(path, root) for root in roots)]
            off |= dict.fromkeys(outside, f"counts as text; towers={list(config.towers)}")
    return blocks, refused, off


def _in_stack(path: str, host: hosts.Host) -> bool:
    """Whether a block is one of a stack of layers; a projector is none, nor is a layer by itself."""
    return host.family != vlm.FAMILY and any(part.isdigit() for part in path.split("."))


def _check_layers(config: MethodConfig, blocks: _Blocks, labels: Mapping[str, str], strict: Collection[str]) -> None:
    """Refuses ``layers`` that no stack in the ``towers`` has."""
    depths = Counter(labels[path].rpartition(".")[0] for path, block, host in blocks if _in_stack(path, host) and (config.towers is None or host.tower(block) in config.towers))
    unknown = [str(n) for n in config.layers or () if n >= max(depths.values(), default=0)]
    # Of layers of which there is none, every method's adapters would be left out.
    if unknown and ("layers" in strict or len(unknown) == len(config.layers or ())):
        there = ", ".join(f"{stack} has 0 to {depth - 1}" for stack, depth in depths.items()) or "there is none here"
        raise ValueError(f"layers: no stack has {_some(unknown)}; {there}")


def _check_trained_modules(model: nn.Module, config: MethodConfig, off: Mapping[str, str]) -> None:
    """Refuses names in ``trained_modules`` of nothing in the ``towers``."""
    there = {part for path, _ in model.named_parameters(remove_duplicate=False) if not _off(path, off) for part in path.split(".")}
    # The method's own names are those of modules that some models have.
    if unknown := [name for name in config.trained_modules if name not in there and name not in type(config).trained_modules]:
        where = "" if config.towers is None else f" in towers={list(config.towers)}"
        raise ValueError(f"trained_modules: {', '.join(map(repr, unknown))} names no module of this {type(model).__name__} that has parameters{where}")


def _roots(groups: Mapping[str, str]) -> dict[str, str]:
    """Of blocks that are of groups, the modules, as far up as possible, that hold blocks of one group only; with that group."""
    roots: dict[str, str] = {}
    for path, group in groups.items():
        while path and all(other == group for p, other in groups.items() if _under(p, _parent(path))):
            path = _parent(path)
        roots[path] = group
    return roots


def _off(path: str, off: Mapping[str, str]) -> str | None:
    """Why a patch leaves a path alone; None: it does not."""
    return next((why for prefix, why in off.items() if _under(path, prefix)), None)


def _build(handle: Handle, path: str, block: nn.Module, host: hosts.Host, label: str, dtype: torch.dtype | None, shared: dict[str, nn.Module], off: Mapping[str, str]) -> None:
    """Makes the adapters of one block and the class changes that put them in; changes nothing in the model."""
    settings = handle.resolved[host.defaults]
    swaps: dict[str, _Swap] = {}
    for place in host.places(block):
        owner, owner_path = block.get_submodule(place.owner), _join(path, place.owner)
        site_id, layer = f"{label}.{place.id}", int(label.rpartition(".")[2])
        if why := _why_not(settings, host, place, owner_path, label, layer if _in_stack(path, host) else None, off):
            handle.skipped += ((site_id, why),)
            continue
        adapted = host.adapted_class(owner, place)
        _check_owner(owner, owner_path, place.slot)
        device, base_dtype, parameter_dtype = _factory(owner, dtype)
        if is_beside(place.role):
            width, out_width = features(owner)
        elif is_before(place.role):
            width = out_width = features(owner)[0]
        else:
            width = out_width = features(owner)[1] if place.behind and is_projection(type(owner)) else host.width(block)
        norm = block.get_submodule(place.norm) if place.norm else None
        target = methods.Target(host.defaults, width, out_width, host.init(block), owner_path, layer, handle.tasks, shared, norm=norm)
        module = settings.build(place.role, target, handle.init, device=device, dtype=parameter_dtype)
        if module is None:
            handle.skipped += ((site_id, f"{settings.method} leaves out this layer"),)
            continue
        module.train(owner.training)
        handle._sites.append(_Site(site_id, owner_path, place.slot, owner, module, base_dtype, host.flat))
        ends = host.ends if handle.fuse_residual and adapted in host.adapted.values() else ""
        swaps.setdefault(place.owner, _Swap(owner, type(owner), adapted, {}, ends)).slots[place.slot] = module
    # An adapted class reads every slot of its own: places without an adapter hold None.
    for place in host.places(block):
        if place.owner in swaps:
            swaps[place.owner].slots.setdefault(place.slot, None)
    handle._swaps += swaps.values()


def _why_not(settings: MethodConfig, host: hosts.Host, place: hosts.Place, path: str, label: str, layer: int | None, off: Mapping[str, str]) -> str | None:
    """Why a place in a layer, or in none, gets no adapter; None: it gets one.

    Raises:
        ValueError: the method's module reads the residual stream, which cannot be seen there, or tokens that come later.
    """
    if why := _off(_join(path, place.slot), off):
        return why
    if place.role not in settings.roles():
        return f"{settings.method} puts nothing there"
    if settings.layers is not None and layer is not None and layer not in settings.layers:
        return f"{settings.method} leaves out this layer"
    if label.startswith("language") and settings.reads_whole_sequence(place.role):
        raise ValueError(
            f"granularity: 'small' averages a gate over the sequence, so in {path}, of a causal language model, tokens would see those behind them; choose another granularity, or "
            "leave out its tower with towers=..."
        )
    if place.behind and settings.reads_stream(place.role):
        if host.family == vlm.FAMILY:
            return f"there is no residual stream, which {settings.method} reads"
        raise ValueError(
            f"model: {path} is known by its name only, so the residual stream around it, which {settings.method} reads at {place.role}, is out of sight; choose a method without "
            f"gates (vl_adapter with reads='output', or vlpet with granularity='middleY' or 'none'), or leave out its tower with towers=..."
        )
    return None


def _factory(owner: nn.Module, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """Device and dtype of a part of the base, and the dtype of adapters in it."""
    reference = next(owner.parameters())
    base = reference.dtype if reference.dtype.is_floating_point else torch.float32
    if dtype not in (None, base, torch.float32):
        raise TypeError(f"dtype: adapters of {dtype} over a base of {base}; must be that or float32")
    return reference.device, base, dtype or (base if base == torch.float64 else torch.float32)


def _build_stages(handle: Handle, model: nn.Module, blocks: _Blocks, labels: dict[str, str], dtype: torch.dtype | None, shared: dict[str, nn.Module]) -> None:
    """Makes the modules that belong to whole stacks, and their hooks; changes nothing in the model."""
    stacks: dict[str, tuple[str, nn.Module, hosts.Host]] = {}
    for path, block, host in blocks:
        if host.stages:
            stacks.setdefault(_container(path), (labels[path].rpartition(".")[0], block, host))
    sides = {host.side(block) for _, block, host in stacks.values()}
    for settings in handle.resolved.values():
        for role in settings.stages():
            if role.partition(".")[0] not in sides and role.endswith(".prompt"):
                raise ValueError(f"model: has no {role.partition('.')[0]}, so {role.replace('.', '_')} must be 0")
    for container, (label, block, host) in stacks.items():
        settings, stack, side = handle.resolved[host.defaults], model.get_submodule(container), host.side(block)
        for role in (role for role in settings.stages() if role.startswith(f"{side}.")):
            slot, hooks = STAGES[role]
            if not container or not (hasattr(stack, "embed_tokens") or hasattr(stack, "layer")):
                raise ValueError(f"model: {container or 'the model'} is no whole {side}, so {role} has no place")
            _check_owner(stack, container, slot)
            device, base, parameter_dtype = _factory(stack, dtype)
            width, inside = host.width(block), [s for s in handle._sites if s.id.startswith(f"{label}.")]
            target = methods.Target(host.defaults, width, width, host.init(block), container, 0, handle.tasks, shared, getattr(stack, "embed_tokens", None))
            sites = [methods.StageSite(f"{side}.{s.id.split('.', 2)[2]}", int(s.id.split(".")[1]), s.module) for s in inside if s.id.count(".") >= 2]
            module = settings.build_stage(role, target, handle.init, sites, device=device, dtype=parameter_dtype)
            if module is None:
                continue
            module.train(stack.training)
            others = [path for path, (name, _, _) in stacks.items() if name != label and _parent(path) == _parent(container)]
            handle._sites.append(_Site(f"{label}.{role.partition('.')[2]}", container, slot, stack, module, base))
            handle._swaps.append(_Swap(stack, type(stack), type(stack), {slot: module}))
            handle._hooks += hooks(stack, model.get_submodule(others[0]) if others else None, module)


def _build_reparametrisation(handle: Handle, model: nn.Module, dtype: torch.dtype | None) -> None:
    """Makes the module through which layers read the base's tensors, and the class changes of the layers; changes nothing in the model."""
    settings = next(iter(handle.resolved.values()))
    device, base, parameter_dtype = _factory(model, dtype)
    tensors = [methods.BaseTensor(owners[0][0]._parameters[owners[0][1]], tuple(owners)) for _, owners in _holders(model)]  # type: ignore[arg-type]
    built = settings.reparametrise(tensors, device=device, dtype=parameter_dtype)
    if built is None:
        return
    _check_owner(model, "the model", settings.method)
    handle._sites.append(_Site(settings.method, "", settings.method, model, built.module, base))
    handle._swaps.append(_Swap(model, type(model), type(model), {settings.method: built.module}))
    paths, swaps = {module: path for path, module in model.named_modules()}, dict[nn.Module, _Swap]()
    for layer, name, read in built.reads:
        _check_owner(layer, paths[layer], slot := name + SUFFIX)
        swaps.setdefault(layer, _Swap(layer, type(layer), reparametrised(type(layer)), {})).slots[slot] = read  # type: ignore[arg-type]
    handle._swaps += swaps.values()


def _add_biases(handle: Handle, model: nn.Module, blocks: _Blocks, labels: dict[str, str], off: Mapping[str, str]) -> None:
    """Makes biases for the Linears and the layers' norms that have none, and the class changes of the norms; changes nothing in the model."""
    norms = {module: host.biased[type(module)] for _, block, host in blocks for module in block.modules() if type(module) in host.biased}
    for path, module in model.named_modules():
        if _off(path, off) or _off(_join(path, "weight"), off):
            continue
        if module in norms:
            _check_owner(module, path, "bias")
            handle._swaps.append(_Swap(module, type(module), norms[module], {}))
        elif not isinstance(module, nn.Linear) or module.bias is not None:
            continue
        weight: Any = module.weight
        size, dtype = weight.shape[0] if module in norms else module.out_features, weight.dtype if weight.dtype.is_floating_point else torch.float32
        bias = nn.Parameter(torch.zeros(size, device=weight.device, dtype=dtype))  # type: ignore[arg-type]
        handle._trained.append(_Added(_base_id(_join(path, "bias"), labels), [(module, "bias")], None, bias, "bias" in module._parameters))


def load(model: nn.Module, directory: str | os.PathLike[str], *, name: str | None = None, dtype: torch.dtype | None = None, fuse_residual: bool = True) -> Handle:
    """Patches ``model`` as the saved adapter was and loads it.

    Args:
        model: a fresh base model.
        directory: what `Handle.save` wrote.
        name: another name for the patch.
        dtype, fuse_residual: as in `patch`.

    Raises:
        fastadapt.patching.AdapterFileError: the files are missing, corrupted, foreign, or do not fit the model; it stays as it was.
        ValueError, TypeError: see `patch`.
    """
    _check_model(model, str(name))
    config, tensors = checkpoint.read(directory)
    saved = _saved(config, directory)
    try:
        common: dict[str, Any] = {
            "tasks": config.get("tasks") or None,
            "name": name or config.get("name"),
            "init": config.get("init"),
            "dtype": dtype,
            "fuse_residual": fuse_residual,
        }
        handle = _patch(model, next(iter(saved.values())), saved, (), **common)
    except TypeError as error:
        raise AdapterFileError(f"{os.fspath(directory)}: {error}") from error
    try:
        handle._load(config, tensors, directory)
    except BaseException:
        handle.unpatch(restore_base=True)
        raise
    return handle


def _saved(config: Mapping[str, Any], directory: str | os.PathLike[str]) -> dict[str, MethodConfig]:
    """The method's configs that a directory was saved with, one for each family of published values."""
    options = config.get("options")
    if not isinstance(options, dict) or not options or not all(isinstance(values, dict) for values in options.values()):
        raise AdapterFileError(f"{os.fspath(directory)}: 'options' must hold the options of one host family or several, not {options!r}")
    try:  # the method may be anything that a file holds, and is refused there
        return {family: methods.config(config.get("method"), **values) for family, values in options.items()}  # type: ignore[arg-type]
    except TypeError as error:
        raise AdapterFileError(f"{os.fspath(directory)}: {error}") from error


def _mergeable(handle: Handle) -> list[tuple[_Site, Any, type[nn.Module]]]:
    """The sites, the linear adapter of each, and the projection's own class; they are all that the patch added."""
    if any(part.task_ids is not None for part in handle._routable()):
        raise RuntimeError("merge: not inside `with handle.route(...)`, where every sample has a task of its own")
    reasons: Counter[str] = Counter()
    found = []
    bases = {id(swap.owner): swap.base for swap in handle._swaps}
    holders = Counter(id(p) for module in handle.model.modules() for p in module._parameters.values() if p is not None)
    for site in handle._sites:
        if handle.active_task is None and has_tasks(site.module):
            raise NotMergeableError(f"merge: choose the task whose adapters to fold in with set_task; tasks: {', '.join(handle.tasks)}")
        adapter: Any = of_task(site.module, handle.active_task)
        weight = site.owner._parameters.get("weight")
        if not hasattr(adapter, "merged_weight"):
            reasons[f"{type(adapter).__name__} is not linear in what it reads, so no weight can hold it"] += 1
        elif weight is None or weight.is_meta or not weight.is_floating_point() or type(weight.data) is not Tensor:
            reasons[
                f"the weight of {type(site.owner).__name__} is {'missing' if weight is None else f'{type(weight.data).__name__} of {weight.dtype}'}, not a plain floating tensor"
            ] += 1
        elif holders[id(weight)] > 1:
            reasons["a weight is held by other modules too"] += 1
        else:
            found.append((site, adapter, bases[id(site.owner)]))
    owners = {id(site.owner) for site in handle._sites}
    for what in (*handle._hooks, *(swap.base for swap in handle._swaps if id(swap.owner) not in owners), *(trained.id for trained in handle._trained if trained.base is None)):
        name = what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__)
        reasons[f"{name} has a part that the base lacks"] += 1
    if reasons or not found:
        raise NotMergeableError(f"merge: {handle.config.method}: " + ("; ".join(f"{why} ({n} of them)" for why, n in reasons.items()) or "there is no adapter to fold in"))
    return found


@torch.no_grad()
def _merge(site: _Site, adapter: Any, base: type[nn.Module]) -> None:
    owner: Any = site.owner
    weight = owner.weight.data
    wide = torch.promote_types(weight.dtype, torch.float32)
    x = torch.randn(16, features(owner)[0], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    training, adapted = adapter.training, type(owner)
    adapter.eval()
    try:
        expected = owner(x).to(wide)
        merged = adapter.merged_weight(owner)
        owner.weight.data, owner.__class__ = merged, base
        difference = (owner(x).to(wide) - expected).norm().item()
    except ValueError as error:
        raise NotMergeableError(f"merge: {site.id}: {error}") from None
    finally:
        owner.__class__ = adapted
        adapter.train(training)
    # A rounding each of the weight, of the adapter's parts and of the outputs; sums of thousands of products lose no more than a few.
    if not difference <= 32 * torch.finfo(weight.dtype).eps * (size := expected.norm().item()):
        raise NotMergeableError(f"merge: {site.id}: with its weight merged the projection gives other numbers: by {difference:.2g} where they are {size:.2g}, in {weight.dtype}")


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose module takes long to import


def _shards(model: nn.Module) -> list[Any]:
    """The modules whose parameters FSDP2 shards."""
    return [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "unshard")]


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves the outermost module's parameters whole after a forward without a backward; what is written into those is gone with them."""
    for module in _shards(model):
        module.reshard()


def _whole(tensor: Tensor) -> Tensor:
    """Without gradients, and, of one that is sharded over processes, all of it: all of them must call this."""
    return tensor.detach().full_tensor() if _is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined, no-any-return]


def _sharded_like(like: Tensor, tensor: Tensor) -> Tensor:
    if not _is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _check_model(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: must be an nn.Module, not {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError(f"model: is compiled ({type(model).__name__}); patch the model first and compile it then, or patch model._orig_mod")
    if hasattr(model, "peft_config"):
        raise ValueError(f"model: {type(model).__name__} carries adapters of PEFT, which the patch would freeze; merge and unload them first")
    for path, module in model.named_modules():
        what = f"model: {path or type(model).__name__}"
        if _ATTRIBUTE in module.__dict__:
            raise ValueError(f"{what} is patched already under the name {module.__dict__[_ATTRIBUTE].name!r}, so {name!r} cannot be added; unpatch it first")
        if is_adapted(module) or any(isinstance(hook, Hook) for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())):
            raise ValueError(f"{what} is part of a model that is patched already; unpatch that first")
        names = {c.__name__ for c in type(module).__mro__}
        if wrapper := names & {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{what} is wrapped ({wrapper.pop()}); patch the model before wrapping it")
        if "_hf_hook" in module.__dict__:
            raise ValueError(
                f"{what} carries a hook of accelerate, which would run the layer's old forward; remove the hooks, patch, and dispatch then, with the adapters on the device"
            )


def _check_apart(handle: Handle) -> None:
    """Refuses a model that has a part in common with one that is patched, where either patch changes that part."""
    if _in_common(handle):
        gc.collect()  # a model that nobody holds any more is patched until then
        if where := _in_common(handle):
            raise ValueError(f"model: {where}; unpatch that first")


def _in_common(handle: Handle) -> str | None:
    parts: dict[object, str] = {part: path for path, part in (*handle.model.named_modules(), *handle.model.named_parameters())}
    mine = handle._touched()
    for other in list(_HANDLES):
        if other._is_active():
            theirs, whole = other._touched(), {*other.model.modules(), *other.model.parameters()}
            for part, path in parts.items():
                if part in theirs or (part in mine and part in whole):
                    return f"{path or type(part).__name__} is part of a model that is patched already under the name {other.name!r}"
    return None


def _check_owner(owner: nn.Module, path: str, slot: str) -> None:
    if "forward" in owner.__dict__:
        raise ValueError(f"model: {path} has a forward of its own on the instance, which would hide the adapter; remove it first")
    if hasattr(owner, slot):
        raise ValueError(f"model: {path} has a {slot!r} already")


def _put(places: Sequence[tuple[nn.Module, str]], parameter: nn.Parameter | None) -> None:
    for module, name in places:
        module._parameters[name] = parameter


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _different(what: str, apart: Sequence[Sequence[str]]) -> RuntimeError:
    return RuntimeError(
        f"{what}: the patch has one tensor at {_some(apart[0])}, where different ones stand now ({len(apart)} such tensors); give the places one of equal values, dtype and device"
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _container(path: str) -> str:
    """The module whose list a block is in: "model.encoder" of "model.encoder.layers.0"."""
    return path.rsplit(".", 2)[0] if path.count(".") >= 2 else ""


def _list(path: str) -> str:
    """The list that a block is in, or is inside an element of: "model.encoder.layers" of "model.encoder.layers.0"."""
    parts = path.split(".")
    at = next((i for i in reversed(range(len(parts))) if parts[i].isdigit()), None)
    return _container(path) if at is None else ".".join(parts[:at])


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _labels(blocks: _Blocks) -> dict[str, str]:
    """A name for each block that does not depend on module paths: "encoder.0", and "encoder@1.0" in a second encoder."""
    labels: dict[str, str] = {}
    containers: dict[str, list[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for path, block, host in blocks:
        stack, container = host.stack_name(block), _list(path)
        known = containers.setdefault(stack, [])
        if container not in known:
            known.append(container)
        number = known.index(container)
        index = sizes[stack, container] = sizes.get((stack, container), -1) + 1
        labels[path] = f"{stack}{f'@{number}' if number else ''}.{index}"
    return labels


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _holders(model: nn.Module) -> list[tuple[list[str], list[tuple[nn.Module, str]]]]:
    """For each tensor of the model, in order: all its paths, and every (module, name) that holds it."""
    found: dict[int, tuple[list[str], list[tuple[nn.Module, str]]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                paths, owners = found.setdefault(id(parameter), ([], []))
                paths.append(_join(path, name))
                if (module, name) not in owners:
                    owners.append((module, name))
    return list(found.values())


def _trained(model: nn.Module, blocks: _Blocks, labels: dict[str, str], resolved: dict[str, MethodConfig], off: Mapping[str, str]) -> list[_Trained]:
    """The tensors of the base that the method trains, each once, with a name that survives moves of modules."""
    encoders = {_container(path): host for path, block, host in blocks if host.side(block) == "encoder"}
    norms = tuple({norm for _, _, host in blocks for norm in host.norms})
    everywhere = any(config.layer_norms == "all" for config in resolved.values())
    # Norms outside of every family's part of the model go with the family that trains all.
    others = [root for root, family in _roots({path: host.defaults for path, _, host in blocks}).items() if resolved[family].layer_norms != "all"]
    inside = [container for container, host in encoders.items() if resolved[host.defaults].layer_norms == "encoder"]

    def wants(option: str) -> bool:
        return any(getattr(config, option) for config in resolved.values())

    visual = wants("visual_embedding")
    named = {name for config in resolved.values() for name in config.trained_modules}
    trained = []
    for paths, holders in _holders(model):
        module, name = holders[0]
        path = paths[0]
        if all(_off(p, off) for p in paths):
            continue
        # A token table that the visual embedding borrows from the host belongs to the host.
        in_visual = all("visual_embedding" in p.split(".") for p in paths)
        if (
            (visual if in_visual else wants("language_model"))
            or (wants("biases") and any("bias" in p for p in paths))
            or (wants("lm_head") and any("lm_head" in p or "shared" in p for p in paths))
            or any(part in named for p in paths for part in p.split("."))
            or (isinstance(module, norms) and ((everywhere and not any(_under(path, root) for root in others)) or any(_under(path, container) for container in inside)))
        ):
            parameter = module._parameters[name]
            trained.append((path, _Trained(_base_id(path, labels), holders, nn.Parameter(parameter.detach().clone(), requires_grad=False))))  # type: ignore[union-attr]
    ids = [t.id for _, t in trained]
    return [t if ids.count(t.id) == 1 else dataclasses.replace(t, id=path) for path, t in trained]


def _base_id(path: str, labels: dict[str, str]) -> str:
    parts = path.split(".")
    if "visual_embedding" in parts:
        return ".".join(parts[parts.index("visual_embedding") :])
    for block, label in labels.items():
        if _under(path, block):
            return _join(label, path[len(block) :].lstrip("."))
    for block, label in labels.items():
        # What is around a list belongs to its stack; a projector is in none.
        if any(part.isdigit() for part in block.split(".")) and _under(path, container := _container(block)):
            return _join(label.rsplit(".", 1)[0], path[len(container) :].lstrip("."))
    return path


def _site_report(site: _Site) -> SiteReport:
    parameters = sum(p.numel() for p in site.module.parameters())
    device, around = next(site.owner.parameters()).device, site.owner.__dict__.get(ENDS, "")
    call = site.module.call() if hasattr(site.module, "call") else None  # type: ignore[operator]
    if call is None:
        return SiteReport(site.id, _join(site.owner_path, site.slot), type(site.module).__name__, parameters, "torch", {}, around)
    try:
        explanation = backend.explain(rows=4096, dtype=site.dtype, device=device, **call)
        chosen, reasons = explanation.chosen, explanation.reasons
    except backend.BackendError as error:
        chosen, reasons = "none", {"demanded": [str(error)]}
    return SiteReport(site.id, _join(site.owner_path, site.slot), type(site.module).__name__, parameters, chosen, reasons, around)


def _difference(saved: Any, here: dict[str, dict[str, Any]]) -> str:
    if not isinstance(saved, dict) or saved.keys() != here.keys() or not all(isinstance(v, dict) for v in saved.values()):
        return f"host families {list(saved) if isinstance(saved, dict) else saved!r} in the file, {list(here)} here"
    parts = [
        f"{name} is {saved[family].get(name, 'absent')!r} in the file and {here[family].get(name, 'absent')!r} here"
        for family in here
        for name in sorted(saved[family].keys() | here[family].keys())
        if saved[family].get(name, here) != here[family].get(name, here)
    ]
    return "; ".join(parts)


def _reasons(skipped: Sequence[tuple[str, str]]) -> str:
    """Why places were left alone, each reason with the first of them."""
    places: dict[str, list[str]] = {}
    for path, why in skipped:
        places.setdefault(why, []).append(path)
    return "; ".join(f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {why}" for why, paths in places.items())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
