"""The names of the places where adapters go, and the register of hosts that have them.

A *role* is what a method asks for ("encoder.feed_forward"), a *place* is where a block of a host keeps it. The first part of a role is what a stack does, not what it is called:

* **encoder**: a stack that reads the input by itself. A text encoder, a vision tower, and the language model of a decoder-only model, whose one stack reads image and text as
  VL-BART's encoder does: there VL-PET's gates belong.
* **decoder**: a stack, or a layer, that also attends to what another one made: a decoder with cross-attention, a Q-Former, the cross-attention layers of Mllama.

What a stack is called ("language.3.feed_forward", "vision.0.self_attention") is the first part of its sites' ids, see `STACKS`; each belongs to one tower.

A host is one file beside this one: the stock ``forward`` of its layers with ``if (a := self.<slot>) is not None: h = a(h, x)`` at each place, and nothing else changed, the sha256
of the stock sources that it is a copy of (`source_hash`; an unknown one is refused by name), and which block has which places. Patching sets ``__class__`` of a layer to the
subclass with that forward and registers the adapter under the slot, so no key of the base moves, ``isinstance`` holds, and checkpointing, compilation and pickling work. To add a
host, `declare` it, and name the file in `_DECLARATIONS`; see ``llama.py``. (The files in `_FAMILIES` write their subclasses out and `register` them.)

A new role is one entry in `ROLES`, a new kind of stack one in `STACKS`.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastadapt.nn import Init

ROLES: dict[str, str] = {
    "encoder.self_attention": "module(h, x): h is the output of self-attention's output projection, before dropout and residual; x the residual stream that entered the sub-layer",
    "encoder.feed_forward": "module(h, x): the same behind the feed-forward network",
    "decoder.self_attention": "module(h, x): the same in the decoder",
    "decoder.cross_attention": "module(h, x): the same behind cross-attention",
    "decoder.feed_forward": "module(h, x): the same behind the feed-forward network",
    "encoder.self_attention.query": "module(x, q): q is the query projection of x; the result is scaled and split into heads",
    "encoder.self_attention.value": "module(x, v): the same beside the value projection",
    "decoder.self_attention.query": "module(x, q): the same in the decoder",
    "decoder.self_attention.value": "module(x, v): the same in the decoder; the result is cached",
    "decoder.cross_attention.query": "module(x, q): the same in cross-attention",
    "encoder.prompt": "module() -> (length, D): vectors before the encoder's embedded text, without positions; a stage, see `fastadapt.hosts.stages`",
    "decoder.prompt": "module() -> (length, D): vectors whose keys and values stand in the decoder's cache before the first token; a stage",
    "encoder.hypernetwork": "module.hand_out(): generates the weights of the stack's adapters, before every forward of the stack; a stage",
    "decoder.hypernetwork": "module.hand_out(): the same in the decoder; a stage",
    "decoder.cross_attention.value": "module(kv, v): v is the value projection of the encoder's output kv; the result is split into heads, and cached",
    "decoder.cross_attention.key_value": "module(kv): the encoder's output kv as this layer's key and value projections shall see it; not called where both are cached",
    "decoder.feed_forward.inner": "module(a): a is what the feed-forward network's last projection reads, the activations behind their dropout",
    "vision.block": "module(x, y, 'visual'): x is the residual stream behind self-attention, y the block's output; the result is the block's output",
    "text.self_attention": "module(x, y, 'text'): x is the output of the self-attention sub-layer, its layer norm included, y the layer's; the result is the layer's output",
    "text.cross_attention": "module(x, y, 'multimodal'): the same behind cross-attention, where there are encoder states; y holds what 'text.self_attention' added",
    "text.cross_attention.key": "module(kv, k): k is the key projection of the encoder states kv; the result is split into heads, and cached",
    "text.cross_attention.value": "module(kv, v): the same beside the value projection",
    "text.temporal_embedding": "module(kv): the encoder states as all layers of a text encoder shall see them; a stage",
}

STACKS: dict[str, str] = {"encoder": "text", "decoder": "text", "text": "text", "language": "text", "vision": "vision", "qformer": "projector", "projector": "projector"}
"""What a stack is called in the ids of its sites -> its tower: the projector stands between the other two."""

OTHER = "other hosts"
"""The family of published values that hosts take for which nothing is published."""

# Where each family's stock layers live, and the file here that adapts them.
_FAMILIES = {
    "bart": ("transformers.models.bart.modeling_bart", "fastadapt.hosts.bart"),
    "t5": ("transformers.models.t5.modeling_t5", "fastadapt.hosts.t5"),
    "blip": ("transformers.models.blip.modeling_blip_text", "fastadapt.hosts.blip"),
}
# The files that declare hosts; they need no transformers.
_DECLARATIONS = ("mbart", "mt5", "clip", "llama", "opt", "blip2", "qwen_vl", "internvl", "florence2", "mllama")


class UnknownHostError(ValueError):
    """The model, or its version, is none that an adapter can be put into."""


class Place(NamedTuple):
    """Where a block keeps a role: the module that changes class (path from the block, "" for the block itself) and the name under which the adapter becomes its child.

    ``name`` tells apart two places of one role in a block: it takes the place of the role's end in the site's id. At a place that is ``behind`` its owner the adapter changes what
    the owner gives, whatever its class, and sees no residual stream. ``norm`` is the layer norm, a path from the block, of the sum of the two ("": there is none behind the sum).
    """

    role: str
    owner: str
    slot: str
    name: str = ""
    behind: bool = False
    norm: str = ""

    @property
    def id(self) -> str:
        """The end of the site's id."""
        return self.name or self.role.partition(".")[2]


@dataclass(frozen=True)
class Host:
    """One kind of block, and what patching has to know of it.

    Args:
        family: name of the host family.
        block: the class of the block; subclasses are not taken, since their ``forward`` is unknown.
        places: the places of one block.
        width: D at the places of one block.
        adapted: the adapted subclass for each stock class that owns a place.
        sources: known hashes of each stock class's ``forward`` and the transformers version they are of.
        norms: classes of the host's layer norms.
        init: the starting values that the host's own ``_init_weights`` gives to foreign Linears, from a block.
        biased: for layer norms without a bias, the subclass that adds its parameter ``bias`` to the result.
        stages: the stages that a stack of these blocks can have.
        stack: what a block's stack is called, one of `STACKS`; None: the first part of its roles.
        published: the family under which methods keep published defaults; None: ``family``.
        ends: what the adapted layers fuse around their adapters by `fastadapt.hosts.ends`, in words; "": nothing.
        flat: the blocks see the tokens of all images of a batch as one sequence, without a batch dimension.
    """

    family: str
    block: type[nn.Module]
    places: Callable[[Any], tuple[Place, ...]]
    width: Callable[[Any], int]
    adapted: Mapping[type[nn.Module], type[nn.Module]]
    sources: Mapping[type[nn.Module], Mapping[str, str]]
    norms: tuple[type[nn.Module], ...]
    init: Callable[[Any], Init]
    biased: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    stack: Callable[[Any], str] | None = None
    published: str | None = None
    ends: str = ""
    flat: bool = False

    @property
    def defaults(self) -> str:
        """The family under which methods keep the values published for this host."""
        return self.family if self.published is None else self.published

    def side(self, block: nn.Module) -> str:
        """What the block's stack does: the first part of its roles."""
        return self.places(block)[0].role.partition(".")[0]

    def stack_name(self, block: nn.Module) -> str:
        """What the block's stack is called."""
        return self.side(block) if self.stack is None else self.stack(block)

    def tower(self, block: nn.Module) -> str:
        """The tower that the block is in."""
        return STACKS[self.stack_name(block)]

    def adapted_class(self, owner: nn.Module, place: Place) -> type[nn.Module]:
        """The class that ``owner`` takes to hold a module at ``place``.

        Raises:
            UnknownHostError: the owner's class, or the source of its forward, is unknown.
        """
        cls = type(owner)
        if place.behind:
            return derived(cls, "behind")  # type: ignore[arg-type]
        if is_beside(place.role):
            return beside(cls)  # type: ignore[arg-type]
        if is_before(place.role):
            return before(cls)  # type: ignore[arg-type]
        if cls not in self.adapted:
            raise UnknownHostError(f"{cls.__module__}.{cls.__name__} is no layer of {self.family} that is known; known: {', '.join(c.__name__ for c in self.adapted)}")
        check_source(cls, self.sources[cls])
        return self.adapted[cls]


def is_beside(role: str) -> bool:
    """Whether a role is that of a module beside a projection."""
    return role.endswith((".query", ".key", ".value"))


def is_before(role: str) -> bool:
    """Whether a role is that of a module before a projection."""
    return role.endswith(".inner")


_hosts: dict[type[nn.Module], list[Host]] = {}
"""A block's hosts: several where a method of its own wants other places than the others do."""
_adapted: set[type[nn.Module]] = set()


def register(*hosts: Host) -> None:
    for host in hosts:
        _hosts.setdefault(host.block, []).append(host)
        _adapted.update((*host.adapted.values(), *host.biased.values()))


class Copy(NamedTuple):
    """A stock forward with adapters put in, and known hashes of the sources that it is a copy of, with the transformers version."""

    forward: Callable[..., Any]
    sources: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A host that is made when a model brings its classes along; see `declare`."""

    family: str
    copies: Mapping[str, Copy]
    places: Callable[[Any], tuple[Place, ...]]
    width: Callable[[Any], int]
    stack: Callable[[Any], str] | None
    published: str
    stages: tuple[str, ...]
    init: Callable[[Any], Init]
    models: str
    ends: str
    flat: bool

    def host(self, block: type[nn.Module]) -> Host:
        stock: Any = sys.modules[block.__module__]
        norms = tuple(c for name, c in vars(stock).items() if name.endswith("Norm") and isinstance(c, type) and issubclass(c, nn.Module))
        return Host(
            family=self.family,
            block=block,
            places=self.places,
            width=self.width,
            adapted={getattr(stock, name): derived(getattr(stock, name), "layer") for name in self.copies},
            sources={getattr(stock, name): copy.sources for name, copy in self.copies.items()},
            norms=(*norms, nn.LayerNorm),
            init=self.init,
            biased={norm: derived(norm, "biased") for norm in norms if not issubclass(norm, nn.LayerNorm)},  # type: ignore[arg-type]
            stages=self.stages,
            stack=self.stack,
            published=self.published,
            ends=self.ends,
            flat=self.flat,
        )


_declared: dict[tuple[str, str], Declared] = {}
_made: set[tuple[str, str]] = set()
_copies: dict[tuple[str, str], Copy] = {}


def declare(
    family: str,
    model: str,
    block: str,
    copies: Copy | Mapping[str, Copy],
    *,
    places: Callable[[Any], tuple[Place, ...]] | tuple[Place, ...],
    width: Callable[[Any], int],
    models: str,
    stack: Callable[[Any], str] | str | None = None,
    published: str = OTHER,
    stages: tuple[str, ...] = (),
    init: Callable[[Any], Init] = lambda _: Init(std=0.02),
    ends: str = "",
    flat: bool = False,
) -> None:
    """Declares the blocks of a transformers model as hosts, without importing it.

    Args:
        family: see `Host`.
        model: name of the transformers model, "llama", or its module, "blip.modeling_blip_text".
        block: name of the block's class in it.
        copies: the adapted forward of the block, or of each class (by name) that owns a place.
        places, width, stages, ends, flat: see `Host`.
        models: what the table of hosts says of it.
        stack, published: see `Host`; nothing published: `OTHER`.
        init: see `Host`; where nothing is published, Linears start as in BART.
    """
    copies = {block: copies} if isinstance(copies, Copy) else copies
    stock = f"transformers.models.{model}" if "." in model else f"transformers.models.{model}.modeling_{model}"
    _declared[stock, block] = Declared(
        family=family, copies=copies, places=places if callable(places) else lambda _: places, width=width, stack=(lambda _: stack) if isinstance(stack, str) else stack,
        published=published, stages=stages, init=init, models=models, ends=ends, flat=flat,
    )  # fmt: skip
    _copies.update({(stock, name): copy for name, copy in copies.items()})


def load_declarations() -> None:
    """Imports the files that declare hosts."""
    for name in _DECLARATIONS:
        import_module(f"fastadapt.hosts.{name}")


def families() -> tuple[str, ...]:
    """Names of the supported host families, those of their files here."""
    return (*_FAMILIES, *_DECLARATIONS)


def find(model: nn.Module, published: Container[str] = ()) -> tuple[list[tuple[str, nn.Module, Host]], list[tuple[str, str]]]:
    """The blocks of a model that a host is registered for, as (path, block, host) in order; and (path, why) for each subclass of one that cannot be taken.

    Args:
        published: the families that a method has values for; of several hosts of a block one of these is taken.
    """
    load_declarations()
    for stock, ours in _FAMILIES.values():
        if stock in sys.modules:
            import_module(ours)
    blocks, refused = [], []
    for path, module in model.named_modules():
        if known := _hosts_of(type(module)):
            blocks.append((path, module, next((host for host in known if host.defaults in published), known[0])))
        elif (base := next((c for c in type(module).__mro__ if _hosts_of(c)), None)) is not None and not is_adapted(module):
            refused.append((path, f"{type(module).__module__}.{type(module).__qualname__} is a subclass of {base.__name__} with a forward of its own"))
    return blocks, refused


def _hosts_of(cls: type[nn.Module]) -> list[Host]:
    if (key := (cls.__module__, cls.__qualname__)) in _declared and key not in _made:
        register(_declared[key].host(cls))
        _made.add(key)
    return _hosts.get(cls, [])


def is_adapted(module: nn.Module) -> bool:
    """Whether a patch has changed this module's class."""
    return type(module) in _adapted


def mark_adapted(cls: type[nn.Module]) -> type[nn.Module]:
    """Lets `is_adapted` know a class that a patch gives to layers."""
    _adapted.add(cls)
    return cls


def source_hash(cls: type) -> str:
    """The first 16 hexadecimal digits of the sha256 of the source of ``cls.forward``."""
    return hashlib.sha256(inspect.getsource(cls.forward).encode()).hexdigest()[:16]  # type: ignore[attr-defined]


def check_source(cls: type, known: Mapping[str, str]) -> None:
    """Refuses a stock layer whose forward is none that an adapted copy was made from.

    Raises:
        UnknownHostError: with the versions that are known and the one that is installed.
    """
    import transformers

    try:
        found = source_hash(cls)
    except OSError as error:
        raise UnknownHostError(f"{cls.__name__}: the source of its forward cannot be read ({error}), so it cannot be compared with the known versions of transformers") from None
    if found not in known:
        versions = ", ".join(sorted(set(known.values())))
        raise UnknownHostError(f"{cls.__name__}.forward of transformers {transformers.__version__} is unknown (source {found}); known are those of transformers {versions}")


def is_projection(cls: type) -> bool:
    """Whether modules of a class are projections: an nn.Linear, or transformers' Conv1D, a Linear whose weight is stored (in, out)."""
    return issubclass(cls, nn.Linear) or any(c.__module__ == "transformers.pytorch_utils" and c.__name__ == "Conv1D" for c in cls.__mro__)


def features(projection: Any) -> tuple[int, int]:
    """The widths in and out of a projection. (Never its weight's shape: that of a quantised one is another.)"""
    return (projection.in_features, projection.out_features) if isinstance(projection, nn.Linear) else (projection.nx, projection.nf)


class _Beside:
    """A projection with a parallel adapter: ``adapter(x, projection(x))``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.parallel_adapter(x, super().forward(x))  # type: ignore[attr-defined, misc]


class Linear(_Beside, nn.Linear):
    """``nn.Linear`` with an adapter beside it."""


_adapted.add(Linear)


@functools.cache
def beside(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a projection's class (nn.Linear, a quantised one, Conv1D) that runs its child ``parallel_adapter`` beside it; cached, found by pickle by its name."""
    return Linear if cls is nn.Linear else _subclass(cls, _Beside, "")


class _Before:
    """A projection with an adapter of its input: ``projection(adapter(x))``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inner_adapter(x))  # type: ignore[attr-defined, misc]


@functools.cache
def before(cls: type[nn.Module]) -> type[nn.Module]:
    """As `beside`, with the child ``inner_adapter`` before the projection."""
    return _subclass(cls, _Before, "_inner")


def _subclass(cls: type[nn.Module], mixin: type, suffix: str) -> type[nn.Module]:
    if not is_projection(cls):
        raise UnknownHostError(f"the projection is a {cls.__module__}.{cls.__name__}, neither an nn.Linear nor a Conv1D of transformers")
    name = f"{cls.__module__}_{cls.__qualname__}{suffix}".replace(".", "_")
    adapted = type(cls.__name__, (mixin, cls), {"__module__": __name__, "__qualname__": name})
    globals()[name] = adapted
    _adapted.add(adapted)
    return adapted


# A model that is unpickled in a new process looks for it here.
before(nn.Linear)


class _Behind:
    """A module with an adapter of its output: ``adapter(module(...))``."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.sequential_adapter(super().forward(*args, **kwargs), None)  # type: ignore[attr-defined, misc]


class _Biased:
    """A layer norm that adds a bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias  # type: ignore[attr-defined, misc]


@functools.cache
def derived(cls: type[nn.Module], kind: str) -> type[nn.Module]:
    """The subclass that a stock class changes to: "layer", with its adapted forward; "behind", with an adapter of its output; "biased". Cached; pickle finds it in this module by
    its qualified name, in a new process too."""
    own = {"__module__": __name__, "__qualname__": f"{kind}:{cls.__module__}:{cls.__qualname__}".replace(".", "/")}
    if kind == "layer":
        return mark_adapted(type(cls.__name__, (cls,), {**own, "forward": _copies[cls.__module__, cls.__qualname__].forward}))
    return mark_adapted(type(cls.__name__, ({"behind": _Behind, "biased": _Biased}[kind], cls), own))


def __getattr__(name: str) -> Any:
    kind, _, rest = name.replace("/", ".").partition(":")
    module, found, qualified = rest.partition(":")
    if not found:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load_declarations()
    return derived(operator.attrgetter(qualified)(import_module(module)), kind)


def knows_keys(past_key_values: Any, layer: int | None) -> bool:
    """Whether a cache holds a layer's cross-attention keys and values, so that stock attention does not look at the encoder's output."""
    return bool(getattr(past_key_values, "is_updated", {}).get(layer))
