"""Layers that no host is registered for: adapters behind the output projections of their sub-blocks, found by name, or by the user's ``sites``.

Such a projection changes class to one that runs the adapter on its output, whatever the layer around it does. So the residual stream is out of sight here, and modules that read
it (VL-PET's gates) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from fastadapt.hosts.roles import OTHER, ROLES, Host, Place, features, is_beside, is_projection
from fastadapt.nn import Init

FAMILY = "generic"
SITE_ROLES = tuple(
    f"{stack}.{part}"
    for stack in ("encoder", "decoder")
    for part in ("self_attention", "cross_attention", "feed_forward", *(f"{kind}_attention.{projection}" for kind in ("self", "cross") for projection in ("query", "value")))
    if f"{stack}.{part}" in ROLES
)
"""The roles that ``sites`` may name: behind a Linear (or a Conv1D of transformers), or beside one."""

# Last parts of a path from a layer in a list. The attention or feed-forward network may hold the projection itself, or keep it in a module called output.
_ATTENTION = re.compile(
    r"(^|.*\.)\w*(attn|attention|attend)\w*(\.(self|output|attention))*\.(out_proj|o_proj|proj|projection|projection_layer|dense|output|o|wo|c_proj|out_lin|to_out\.0|linear_out)",
    re.IGNORECASE,
)
_FEED_FORWARD = re.compile(
    r"(.*\.)?(mlp|ffn|ff|feed_forward|feedforward|densereludense)\.(fc2|fc_out|down_proj|c_proj|wo|w2|dense_4h_to_h|lin2|linear2|linear_2|linear_fc2)|fc2|output\.dense",
    re.IGNORECASE,
)
_CROSS = re.compile(r"cross|enc(oder)?_?dec|encoder_?attn|xattn", re.IGNORECASE)
_PROJECTOR = re.compile(r"connector|projector|projection|resampler|perceiver|q_?former|merger|aligner|bridge", re.IGNORECASE)
_VISION = re.compile(r"vis|image|pixel", re.IGNORECASE)


def recognised(model: nn.Module, taken: Sequence[str]) -> list[tuple[str, nn.Module, Host]]:
    """The layers with a sub-block whose output projection is known by its name, as `fastadapt.hosts.find` gives blocks; none under the paths ``taken``."""
    linears = {path: module for path, module in _linears(model) if not any(_under(path, other) for other in taken)}
    found: dict[str, dict[str, str]] = {}
    for path in linears:
        layer, rest = _split(path)
        if layer is None:
            continue
        if _ATTENTION.fullmatch(rest):
            found.setdefault(layer, {})[rest] = "cross_attention" if _CROSS.search(rest) else "self_attention"
        elif _FEED_FORWARD.fullmatch(rest):
            found.setdefault(layer, {})[rest] = "feed_forward"
    blocks = []
    for layer, parts in found.items():
        side = "decoder" if "cross_attention" in parts.values() else "encoder"
        blocks.append(_block(model, layer, {rest: f"{side}.{part}" for rest, part in parts.items()}))
    return blocks


def chosen(model: nn.Module, sites: Mapping[str, str]) -> list[tuple[str, nn.Module, Host]]:
    """The Linears that ``sites`` names, one pattern of whole paths for each role, grouped by layer.

    Raises:
        ValueError: a pattern is none, or matches no module, a module that is no Linear or is never called, or one that another role has already.
    """
    never = _never_called(model)
    found: dict[str, dict[str, str]] = {}
    for role, pattern in sites.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"sites: {pattern!r} for {role} is no pattern: {error}") from None
        matched = [(path, module) for path, module in model.named_modules() if compiled.fullmatch(path)]
        if not matched:
            raise ValueError(f"sites: {pattern!r} for {role} matches no module of this {type(model).__name__}; it must match whole paths, such as {_example(model)!r}")
        for path, module in matched:
            if not is_projection(type(module)):
                raise ValueError(f"sites: {path}, which {pattern!r} matches, is a {type(module).__name__}; must be an nn.Linear, or a Conv1D of transformers")
            if path in never:
                raise ValueError(f"sites: {path} belongs to an nn.{never[path]}, which reads its weight without calling it")
            layer, rest = _split(path)
            layer, rest = (path.rpartition(".")[0], path.rpartition(".")[2]) if layer is None else (layer, rest)
            if found.setdefault(layer, {}).setdefault(rest, role) != role:
                raise ValueError(f"sites: {path} cannot be both {found[layer][rest]} and {role}")
    # In the model's order, whatever the order of the patterns.
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    ranked = sorted((min(order[f"{layer}.{rest}".lstrip(".")] for rest in roles), layer) for layer, roles in found.items())
    return [_block(model, layer, found[layer]) for _, layer in ranked]


def _block(model: nn.Module, layer: str, roles: Mapping[str, str]) -> tuple[str, nn.Module, Host]:
    """A layer as a block, with the role of each Linear by its path from there."""
    given = list(roles.values())

    def place(rest: str, role: str) -> Place:
        # Two of one role in a layer are told apart by their paths.
        name = f"{role.partition('.')[2]}.{rest}" if given.count(role) > 1 else ""
        return Place(role, rest, "parallel_adapter", name) if is_beside(role) else Place(role, rest, "sequential_adapter", name, behind=True)

    places = tuple(place(rest, role) for rest, role in roles.items())
    block = model.get_submodule(layer)
    stack = _stack(model, layer)
    width = features(block.get_submodule(places[0].owner))[1]
    host = Host(
        family=FAMILY,
        block=type(block),
        places=lambda _: places,
        width=lambda _: width,
        adapted={},
        sources={},
        norms=(nn.LayerNorm,),
        init=lambda _: Init(std=0.02),
        stack=lambda _: stack,
        published=OTHER,
    )
    return layer, block, host


def _stack(model: nn.Module, layer: str) -> str:
    """What a layer's stack is called: by the names on its path, or by the config around it, since a vision tower's has images and no vocabulary."""
    if _PROJECTOR.search(layer):
        return "projector"
    if _VISION.search(layer):
        return "vision"
    parts = layer.split(".")
    around = [getattr(model.get_submodule(".".join(parts[:end])), "config", None) for end in range(len(parts), -1, -1)]
    config = next((config for config in around if config is not None), None)
    return "vision" if hasattr(config, "image_size") and not hasattr(config, "vocab_size") else "text"


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    never = _never_called(model)
    return ((path, module) for path, module in model.named_modules() if is_projection(type(module)) and path not in never)


def _never_called(model: nn.Module) -> dict[str, str]:
    """Linears whose owner reads their weight instead of calling them, always or in its fast path (in evaluation), with the owner's class."""
    owners = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    return {
        f"{path}.{child}".lstrip("."): type(module).__name__ for path, module in model.named_modules() if isinstance(module, owners) for child, _ in module.named_modules() if child
    }


def _split(path: str) -> tuple[str | None, str]:
    """The layer that a path runs through, up to the innermost number in it, and the rest of the path; None without a number."""
    parts = path.split(".")
    at = next((i for i in range(len(parts) - 2, -1, -1) if parts[i].isdigit()), None)
    return (None, path) if at is None else (".".join(parts[: at + 1]), ".".join(parts[at + 1 :]))


def _under(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")


def _example(model: nn.Module) -> str:
    return next((path for path, _ in _linears(model)), "layers.0.linear")
