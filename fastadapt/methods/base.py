"""What a method is: a frozen config that says which module goes to which role, and what else is trained.

To add a method over existing modules and roles, write one file beside this one with a subclass of `MethodConfig`, and name it in `fastadapt.methods`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastadapt.nn import Init, PerTask, Prompt, share
from fastadapt.nn.init import as_bool, is_number, positive

INITS = ("repo", "identity")
LAYER_NORMS = ("all", "encoder", "none")
TOWERS = ("text", "vision", "projector")
SELECTORS = ("towers", "layers", "sites")

FROM_ZERO = {"from_zero": True}
"""Metadata of an integer option that may be zero; the others are positive."""


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
        table: the token table of the stack that a stage is built for.
        norm: the host's layer norm of the sum of a sub-layer's output and the residual stream; None: there is none behind the sum.
    """

    family: str
    width: int
    out_width: int
    init: Init
    path: str = ""
    layer: int = 0
    tasks: tuple[str, ...] = ()
    shared: dict[str, nn.Module] = field(default_factory=dict)
    table: nn.Embedding | None = None
    norm: nn.Module | None = None

    def share(self, key: str, module: nn.Module, *names: str) -> None:
        """Gives ``module`` the parameters ``names`` of the first module of this patch that was shared under ``key``; the first one keeps its own."""
        if (first := self.shared.setdefault(key, module)) is not module:
            share(first, module, *names)


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Options of a method. A field that is None takes the value published for the host (``published``).

    Fields of types bool, int and float, or None, hold Python's own, whether they were given so or as numpy's; the integers are positive unless `FROM_ZERO` is their metadata.

    Args:
        layer_norms: which of the host's layer norms are trained: "all", those of the "encoder", or "none".
        visual_embedding: train the module called ``visual_embedding``, where the model has one.
        biases: train every tensor of the base whose name contains "bias", as the published rule goes; on T5 these are the two tables of relative position biases.
        add_biases: give every Linear of the base that has no bias, and every layer norm of its layers that has none, a trained one that starts at zero (BitFit on T5; as in
            Compacter's repository, a norm behind the last layer stays without).
        lm_head: train the token table and the output layer (tied in BART and T5).
        language_model: train the whole base.
        trained_modules: names of further modules of the base that are trained, wherever they are ("itm_head").
        encoder_prompt, decoder_prompt: number of trained prompt vectors before the encoder's text (VL-Adapter) and before the decoder's tokens; 0: none.
        prompt_mid: width of the prompts' MLP; None: no MLP.
        prompt_start: "random", see `fastadapt.nn.Prompt`, or "tokens", the first rows of the token table; the latter without MLP.
        prompt_sharing: "single", one prompt for all tasks, or "multiple", one per task.
        towers: which parts of a vision-and-language model are patched, of "text", "vision" and "projector"; None: all that it has. Adapters, and base tensors that are trained,
            stay inside them; what is in no tower (an output layer) counts as text.
        layers: the numbers of the layers of each stack, from 0, that get adapters (a list, or a range); None: all. What is in no stack, a projector for instance, gets its adapter
            all the same.
        sites: for models that no host is registered for, or in place of the registered sites: {role: pattern}, where the pattern matches the whole path of ``nn.Linear`` modules
            ("model.layers.[0-9]+.mlp.down_proj"). Behind each goes an adapter, beside it for a ".query" or ".value" role; none there sees the residual stream.

    Raises:
        ValueError: a field's value is not of its type.
    """

    method: ClassVar[str]
    published: ClassVar[dict[str, dict[str, Any]]]
    """Per host family: published values of the fields that default to None. "other hosts" are those that nothing is published for; without it, the method refuses them."""

    layer_norms: Literal["all", "encoder", "none"] | None = None
    visual_embedding: bool = True
    biases: bool = False
    add_biases: bool = False
    lm_head: bool = False
    language_model: bool = False
    trained_modules: tuple[str, ...] = ()
    encoder_prompt: int = field(default=0, metadata=FROM_ZERO)
    decoder_prompt: int = field(default=0, metadata=FROM_ZERO)
    prompt_mid: int | None = 800
    prompt_start: Literal["random", "tokens"] = "random"
    prompt_sharing: Literal["single", "multiple"] = "single"
    towers: tuple[str, ...] | None = None
    layers: Sequence[int] | None = None
    sites: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            name = f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))  # a string where annotations are not evaluated
            kind, _, optional = name.partition(" | ")
            value = getattr(self, f.name)
            if kind in ("bool", "int", "float") and optional in ("", "None") and not (optional and value is None):
                object.__setattr__(self, f.name, checked(f.name, kind, value, " or None" if optional else "", f.metadata.get("from_zero", False)))

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
        for name in ("encoder_prompt", "decoder_prompt"):
            if (value := getattr(config, name)) < 0:
                raise ValueError(f"{name}: must be a number of prompt vectors, 0 for none, not {value!r}")
            if value and init == "identity":
                raise ValueError(f"init: 'identity' is impossible with {name}={value}: the vectors are attended to whatever they are")
        if config.prompt_start not in ("random", "tokens") or (config.prompt_start == "tokens" and config.prompt_mid is not None):
            raise ValueError(f"prompt_start: must be 'random', or 'tokens' with prompt_mid=None, not {config.prompt_start!r} with prompt_mid={config.prompt_mid}")
        if config.prompt_sharing not in ("single", "multiple"):
            raise ValueError(f"prompt_sharing: must be one of single, multiple, not {config.prompt_sharing!r}")
        if not are_several(config.trained_modules) or not all(isinstance(name, str) and name for name in config.trained_modules):
            raise ValueError(f"trained_modules: must be a list of names, not {config.trained_modules!r}")
        return dataclasses.replace(config, trained_modules=tuple(config.trained_modules)).selected()

    def selected(self) -> Self:
        """The config with ``towers``, ``layers`` and ``sites`` checked, as tuples and a dictionary.

        Raises:
            ValueError: one is not what it must be.
        """
        towers, layers, sites = self.towers, self.layers, self.sites
        if towers is not None and (not are_several(towers) or not towers or any(tower not in TOWERS for tower in towers)):
            raise ValueError(f"towers: must be some of {', '.join(TOWERS)}, or None for all, not {towers!r}")
        numbers: Any = layers
        if layers is not None and (
            isinstance(layers, str) or not isinstance(layers, Sequence) or not layers or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers)
        ):
            raise ValueError(f"layers: must be numbers of layers, from 0, or None for all, not {layers!r}")
        if sites is not None and (not isinstance(sites, Mapping) or not sites or not all(isinstance(text, str) for item in sites.items() for text in item)):
            raise ValueError(f"sites: must be {{role: pattern of module paths}}, not {sites!r}")
        return dataclasses.replace(
            self,
            towers=None if towers is None else tuple(towers),
            layers=None if layers is None else tuple(layers),
            sites=None if sites is None else dict(sites),
        )

    def stored(self) -> dict[str, Any]:
        """What a file keeps of the config: every field that makes a difference to the numbers (``compare=False`` marks those that do not), and the selectors that were given."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.compare and (f.name not in SELECTORS or getattr(self, f.name) is not None)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def one_task(self) -> Self:
        """The config of a patch whose adapters are those of one of this patch's tasks.

        Raises:
            ValueError: there is none, since the modules for one task are others.
        """
        return dataclasses.replace(self, **{name: "single" for name in ("sharing", "prompt_sharing") if hasattr(self, name)})  # type: ignore[arg-type]

    def roles(self) -> tuple[str, ...]:
        """The roles that get a module."""
        raise NotImplementedError

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """The module for one place, or None to leave it; the config is a resolved one."""
        raise NotImplementedError

    def reads_stream(self, role: str) -> bool:
        """Whether the module of a role behind a sub-layer reads x, the residual stream that entered the sub-layer; the config is a resolved one."""
        return False

    def reads_whole_sequence(self, role: str) -> bool:
        """Whether what the module of a role gives for a token depends on all tokens of the sequence; the config is a resolved one."""
        return False

    def stages(self) -> tuple[str, ...]:
        """The roles of modules that belong to a whole stack."""
        lengths = {"encoder.prompt": self.encoder_prompt, "decoder.prompt": self.decoder_prompt}
        return tuple(role for role, length in lengths.items() if length)

    def build_stage(self, role: str, target: Target, init: str, sites: Sequence[StageSite], *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        """The module of one stack, whose layers have ``sites``, or None to leave it; the config is a resolved one."""
        length = self.encoder_prompt if role == "encoder.prompt" else self.decoder_prompt
        start = {"init": target.init, "table": target.table if self.prompt_start == "tokens" else None}
        return per_task(self.prompt_sharing, target, lambda: Prompt(length, target.width, self.prompt_mid, **start, device=device, dtype=dtype))  # type: ignore[arg-type]

    def reparametrise(self, tensors: Sequence[BaseTensor], *, device: torch.device, dtype: torch.dtype) -> Reparametrisation | None:
        """A module of the whole model, and what layers read instead of their own tensors; None: nothing. The config is a resolved one.

        Args:
            tensors: all tensors of the base, in the model's order.
        """
        return None


def are_several(value: object) -> bool:
    """Whether an option that may hold several names does: a string is one."""
    return isinstance(value, Collection) and not isinstance(value, str)


def checked(name: str, kind: str, value: Any, or_none: str = "", from_zero: bool = False) -> Any:
    """The value of an option of type bool, int or float as Python's own.

    Raises:
        ValueError: it is not of that type.
    """
    if kind == "bool":
        return as_bool(name, value, or_none)
    if kind == "float":
        if not is_number(value):
            raise ValueError(f"{name}: must be a finite number{or_none}, not {value!r}")
        return value if type(value) in (int, float) else float(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    if not from_zero:
        positive(**{name: value})
    elif type(value) is not int:
        raise ValueError(f"{name}: must be an integer, 0 or more, not {value!r}")
    return value


class BaseTensor(NamedTuple):
    """A tensor of the base, and every layer that holds it with the name under which it does."""

    tensor: Tensor
    owners: tuple[tuple[nn.Module, str], ...]


class Reparametrisation(NamedTuple):
    """A module with parameters, and (layer, name, module without parameters) for each tensor that a layer reads as ``module(tensor)``."""

    module: nn.Module
    reads: list[tuple[nn.Module, str, nn.Module]]


class StageSite(NamedTuple):
    """A site inside the stack that a stage is built for."""

    role: str
    layer: int
    module: nn.Module


def reduced_rank(width: int, rank: int | None, reduction_factor: int) -> int:
    """The rank that was given, or D // reduction_factor.

    Raises:
        ValueError: no rank, and a factor outside 1 to D.
    """
    if rank is not None:
        return rank
    if isinstance(reduction_factor, bool) or not isinstance(reduction_factor, int) or not 1 <= reduction_factor <= width:
        raise ValueError(f"reduction_factor: must be an integer from 1 to the width {width}, not {reduction_factor!r}")
    return width // reduction_factor


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


def has_tasks(module: nn.Module) -> bool:
    """Whether a module, or a part of it, holds an adapter per task."""
    return any(isinstance(part, PerTask) for part in module.modules())


def of_task(module: nn.Module, task: str | None) -> nn.Module:
    """A task's module, where each task has one; the module itself where it serves all tasks or ``task`` is None."""
    return module.adapters[task] if task is not None and isinstance(module, PerTask) else module


def task_parameters(module: nn.Module, task: str | None) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a task's adapters have in a module or its parts, under their names in a module for one task; all under their own where ``task`` is None."""
    starts = [] if task is None else [f"{path}.adapters.".lstrip(".") for path, part in module.named_modules() if isinstance(part, PerTask)]
    for name, parameter in module.named_parameters(remove_duplicate=task is None):
        start = next((start for start in starts if name.startswith(start)), None)
        if start is None:
            yield name, parameter
        elif name.startswith(f"{start}{task}."):
            yield start.removesuffix("adapters.") + name.removeprefix(f"{start}{task}."), parameter
