"""State dicts of the VL-Adapter, VL-PET, UniAdapter and Compacter repositories: into a patched model, and back out under their own keys.

The repositories register one tensor under many keys: one adapter under every task, a shared Kronecker rule in every projection. Reading takes the first and refuses aliases that
differ; writing gives them all. Heads of a multi-head adapter are Linears of their own there and rows of one weight here. The base of UniAdapter's checkpoints is BLIP's first
release, whose tensors have other names and shapes than transformers': of those checkpoints only what the method trains is read and written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt.nn import (
    IA3,
    Gate,
    GatingOnly,
    GeneratedBottleneck,
    HyperNetwork,
    IntrinsicDimension,
    InTurn,
    KeyValueAdapter,
    LoRA,
    PerTask,
    Prompt,
    StreamBottleneck,
    TemporalEmbedding,
    UniAdapter,
    ValueResidual,
)
from fastadapt.patching import Handle, _Site, _some

__all__ = ["PublishedFileError", "load_published", "published_state_dict", "read_state_dict"]

_CONTROLLERS = {
    "bart": {
        "encoder.self_attention": "attn_adapter",
        "encoder.feed_forward": "ff_adapter",
        "decoder.self_attention": "self_attn_adapter",
        "decoder.cross_attention": "enc_attn_adapter",
        "decoder.feed_forward": "ff_adapter",
    },
    "t5": {
        "encoder.self_attention": "attn_adapter",
        "encoder.feed_forward": "ff_adapter",
        "decoder.self_attention": "attn_adapter",
        "decoder.cross_attention": "enc_attn_adapter",
        "decoder.feed_forward": "ff_adapter",
    },
}
_GATES = {"large_full": "large_x", "small": "small_xy_cat", "middleX": "middle_xy_add", "middleY": "middle_ia3_add"}
LAYOUTS = ("vl", "compacter")


class PublishedFileError(ValueError):
    """A state dict of an original repository is unreadable, incomplete, or does not fit the patched model."""


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` (None: to the end) of one of our tensors, and the keys that they have in the original, all of them aliases of one tensor."""

    keys: tuple[str, ...]
    start: int = 0
    stop: int | None = None


def check_handle(handle: object) -> None:
    """Refuses what is no handle, and one whose model has lost parts of the patch."""
    if not isinstance(handle, Handle):
        raise TypeError(f"handle: must be the fastadapt.Handle that fastadapt.patch returns, not {type(handle).__name__}")
    handle._check_whole("handle", shared=True)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pth`` file; the latter is unpickled with ``weights_only=True``, so that it cannot run code. One level of nesting ("model",
    "state_dict") and the prefix "module." of DistributedDataParallel are taken off.

    Raises:
        PublishedFileError: the file is missing, is none of the two, holds other objects than tensors, or needs code to be run.
    """
    import pickle

    where = os.fspath(path)
    try:
        if where.endswith(".safetensors"):
            from safetensors.torch import load_file

            found: Any = load_file(where)
        else:
            found = torch.load(where, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PublishedFileError(f"{where}: holds more than tensors, and is not unpickled since that could run code ({str(error).splitlines()[0]})") from None
    except Exception as error:
        raise PublishedFileError(f"{where}: cannot be read as a state dict ({type(error).__name__}: {error})") from None
    for name in ("model", "state_dict"):
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found or not all(isinstance(k, str) and isinstance(t, Tensor) for k, t in found.items()):
        raise PublishedFileError(f"{where}: holds no state dict of names and tensors")
    return {key.removeprefix("module."): tensor for key, tensor in found.items()}


def published_state_dict(handle: Handle, *, base: bool = True, layout: str = "vl", momentum: bool = False) -> dict[str, Tensor]:
    """The patched model's tensors under the keys of the repository that the method comes from; bit for bit, aliases share their tensor.

    Args:
        handle: of a model patched with a method of those repositories; tasks must be named where the original has a key per task.
        base: also the base's tensors that are not trained.
        layout: "vl", the keys of VL-Adapter and VL-PET, or "compacter", those of the Compacter repository.
        momentum: with UniAdapter, the keys of the momentum copies.

    Raises:
        TypeError: ``handle`` is no `fastadapt.Handle`.
        ValueError: a method or an option that the repositories do not have, no tasks, an unknown layout, or ``base`` with UniAdapter.
    """
    check_handle(handle)
    _check_momentum(handle, momentum)
    if base and _is_blip(handle):
        raise ValueError("base: must be False; the base of UniAdapter's checkpoints has other names and shapes than transformers' BLIP")
    state = handle.model.state_dict()
    pieces = _pieces(handle, layout)
    trained = set(_trained_keys(handle))
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in pieces:
            for piece in pieces[key]:
                part = tensor[piece.start : piece.stop] if piece.start or piece.stop is not None else tensor
                found.update(dict.fromkeys(piece.keys, part))
        elif base or key in trained:
            found.update(dict.fromkeys((key, *_base_aliases(handle, key)), tensor))
    return {_with_momentum(key): tensor for key, tensor in found.items()} if momentum else found


def load_published(handle: Handle, tensors: Mapping[str, Tensor], *, layout: str = "vl", momentum: bool = False) -> None:
    """Copies an original state dict into a patched model: adapters, trained tensors of the base, and the rest of the base if it is there (UniAdapter's is passed over, as are the
    momentum copies, queues and the unused "adapters_dec" of its checkpoints).

    Args:
        handle, layout: see `published_state_dict`.
        tensors: by their original names.
        momentum: with UniAdapter, read the momentum copies, for the momentum model.

    Raises:
        PublishedFileError: a tensor of the adapters or of the trained base is missing or has another shape, aliases differ, the patched model has no place for a key, or the rest
            of the base is there in part. Nothing is copied then.
        TypeError: ``handle`` is no `fastadapt.Handle`, or ``tensors`` no mapping.
        ValueError: see `published_state_dict`.
    """
    check_handle(handle)
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: must be a mapping of names to tensors, as read_state_dict gives, not {type(tensors).__name__}")
    _check_momentum(handle, momentum)
    if _is_blip(handle):
        names = {_with_momentum(key) if momentum else key: key for key in _uni_keys(handle, layout)}
        tensors = {names[key]: tensor for key, tensor in tensors.items() if key in names}
    state = handle.model.state_dict()
    pieces, trained = _pieces(handle, layout), set(_trained_keys(handle))
    plan: list[tuple[Tensor, Tensor]] = []
    missing: list[str] = []
    used: set[str] = set()
    frozen_missing: list[str] = []
    frozen_found = False
    for key, target in state.items():
        parts = pieces.get(key) or [Piece((key, *_base_aliases(handle, key)))]
        needed = key in pieces or key in trained
        for piece in parts:
            present = [k for k in piece.keys if k in tensors]
            used.update(present)
            if not present:
                (missing if needed else frozen_missing).append(piece.keys[0])
                continue
            frozen_found |= not needed
            for k in present:
                t: Any = tensors[k]
                if not isinstance(t, Tensor) or t.is_meta or t.layout != torch.strided or t.is_complex():
                    raise PublishedFileError(
                        f"{k}: must be a dense tensor of real numbers, not {f'one of {t.dtype}, {t.layout} on {t.device}' if isinstance(t, Tensor) else repr(t)}"
                    )
            first = tensors[present[0]]
            if different := [k for k in present[1:] if tensors[k].shape != first.shape or not torch.equal(tensors[k], first)]:
                raise PublishedFileError(f"{present[0]} and {different[0]} are one tensor in the original, but differ here")
            part = target[piece.start : piece.stop] if piece.start or piece.stop is not None else target
            if first.shape != part.shape:
                raise PublishedFileError(f"{present[0]}: is {tuple(first.shape)}; the patched model has {tuple(part.shape)}")
            plan.append((part, first))
    # Aliases inside our own state dict (tied tables) are written once each, with equal values.
    frozen_missing = [key for key in frozen_missing if not _tied_to_found(state, key, tensors)]
    if missing:
        raise PublishedFileError(f"{len(missing)} tensors of the patched model are not there: {_some(missing)}")
    if frozen_found and frozen_missing:
        raise PublishedFileError(f"{len(frozen_missing)} tensors of the base are not there, though others are: {_some(frozen_missing)}")
    if unexpected := sorted(set(tensors) - used):
        raise PublishedFileError(f"{len(unexpected)} tensors have no place in the patched model: {_some(unexpected)}")
    with torch.no_grad():
        for part, value in plan:
            part.copy_(value)


def _tied_to_found(state: Mapping[str, Tensor], key: str, tensors: Mapping[str, Tensor]) -> bool:
    mine = state.get(key)
    return mine is not None and any(other in tensors and state[other].data_ptr() == mine.data_ptr() and state[other].shape == mine.shape for other in state if other != key)


def _trained_keys(handle: Handle) -> Iterator[str]:
    trained = {id(t.parameter) for t in handle._trained}
    for path, module in handle.model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if id(parameter) in trained:
                yield f"{path}.{name}" if path else name


def _is_blip(handle: Handle) -> bool:
    return "blip" in handle.resolved


def _check_momentum(handle: Handle, momentum: bool) -> None:
    if momentum and not _is_blip(handle):
        raise ValueError(f"momentum: must be False; checkpoints of {handle.config.method} have no momentum copies, only UniAdapter's have")


def _uni_keys(handle: Handle, layout: str) -> Iterator[str]:
    """Every original key of what UniAdapter trains."""
    yield from _trained_keys(handle)
    for pieces in _pieces(handle, layout).values():
        for piece in pieces:
            yield from piece.keys


def _with_momentum(key: str) -> str:
    """The key of a tensor's momentum copy."""
    head, dot, rest = key.partition(".")
    return f"{head}_m{dot}{rest}"


def _base_aliases(handle: Handle, key: str) -> tuple[str, ...]:
    """Further keys of a base tensor in the original: the visual embedding holds the token table as its table of object numbers."""
    if key.endswith("encoder.embed_tokens.weight"):
        stack = key.removesuffix("embed_tokens.weight")
        if f"{stack}visual_embedding.feat_embedding.0.weight" in handle.model.state_dict():
            return (f"{stack}visual_embedding.obj_order_embedding.weight",)
    return ()


def _pieces(handle: Handle, layout: str) -> dict[str, list[Piece]]:
    """For each of our keys of an adapter, its parts and their original keys."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    found = {}
    for site in handle._sites:
        path = f"{site.owner_path}.{site.slot}" if site.owner_path else site.slot
        for name, tensor in site.module.state_dict().items():
            found[f"{path}.{name}"] = _site_pieces(handle, site, name, tensor, layout)
    return found


def _tasks(handle: Handle) -> tuple[str, ...]:
    if not handle.tasks:
        raise ValueError("tasks: the original has keys per task; patch the model with tasks=[...]")
    return handle.tasks


def _site_pieces(handle: Handle, site: _Site, name: str, tensor: Tensor, layout: str) -> list[Piece]:
    family = next(iter(handle.resolved))
    label, _, place = site.id.partition(".")
    side = label.partition("@")[0]
    module: nn.Module = site.module
    root = "model." if site.owner_path.startswith("model.") else ""
    task, rest = None, name
    if isinstance(module, PerTask):
        _, task, rest = name.split(".", 2)
        module = module.adapters[task]
    tasks = (task,) if task is not None else ()
    if isinstance(module, IntrinsicDimension):
        raise ValueError(f"{site.id}: the original's files do not hold the random projections that its vector belongs to, so they cannot be read or written")
    if isinstance(module, (UniAdapter, KeyValueAdapter, TemporalEmbedding)):
        return [Piece(_uni(handle, site, module, rest))]
    if isinstance(module, HyperNetwork):
        if rest.startswith("task_embeddings."):
            tail = rest.removeprefix("task_embeddings.")
            return [Piece((f"{root}shared_task_embed.{tail}", f"{root}encoder.task_embed.{tail}", f"{root}decoder.task_embed.{tail}"))]
        return [Piece((f"{site.owner_path}.adapter_layers_hyper_net.{rest}",))]
    if isinstance(module, Prompt):
        if layout == "compacter":
            return [Piece(("prefix_shared", "encoder.prefix_emb", "decoder.prefix_emb"))]
        # The decoder's prompt belongs to the whole model there.
        holder = f"{site.owner_path}." if side == "encoder" else site.owner_path.removesuffix("decoder")
        return [Piece(tuple(f"{holder}prompt_modules.prompts.{t}.{rest}" for t in tasks or _tasks(handle)))]
    if isinstance(module, LoRA):
        kind = rest.removeprefix("lora_").removesuffix(".weight")
        return [Piece(tuple(f"{site.owner_path}.lora_{kind}s.{t}" for t in tasks or _tasks(handle)))]
    role = f"{side}.{place.partition('.')[2]}"
    if isinstance(module, GeneratedBottleneck):
        return []
    if "vlpet" in (config.method for config in handle.resolved.values()):
        return _vlpet(handle, site, name, tensor, family, role)
    if role not in _CONTROLLERS.get(family, {}) or isinstance(module, StreamBottleneck):
        raise ValueError(f"{site.id}: a {type(module).__name__} is in none of the original repositories")
    controller = "adapter_controller" if layout == "compacter" else _CONTROLLERS[family][role]
    return _controlled(handle, f"{site.owner_path}.{controller}" if site.owner_path else controller, site.module, name)


def _uni(handle: Handle, site: _Site, module: nn.Module, name: str) -> tuple[str, ...]:
    """UniAdapter's modules: adapter i is in a list of its own, in the image blocks and in every text stack."""
    stacks = ["text_encoder.encoder", *(["text_decoder.bert.encoder"] if hasattr(handle.model, "text_decoder") else [])]
    if isinstance(module, UniAdapter):
        i = site.id.split(".")[1]
        holders = (f"adapters.{i}", f"visual_encoder.adapters.{i}", f"visual_encoder.blocks.{i}.adapter", *(f"{stack}.layer.{i}.adapter" for stack in stacks))
        return tuple(f"{holder}.{name}" for holder in holders)
    stack = stacks[-1] if site.owner_path.startswith("text_decoder") else stacks[0]
    if isinstance(module, TemporalEmbedding):
        return (f"{stack}.{name}",)
    return (f"{stack}.video_{'key' if site.id.endswith('.key') else 'value'}_adapter.{name}",)


def _vlpet(handle: Handle, site: _Site, name: str, tensor: Tensor, family: str, role: str) -> list[Piece]:
    """VL-PET's modules: heads are Linears of their own, gates are named after what they read, each decoder variant has a name of its own."""
    config: Any = handle.resolved[family]
    part, module = _part(site.module)
    if isinstance(site.module, InTurn):
        part, _, name = name.partition(".")
        module = site.module.get_submodule(part)
    stack, _, place = role.partition(".")
    if family == "t5" and stack == "decoder" and not (place == "cross_attention.value" and part == "adapter" and "value_parallel" in config.decoder):
        raise ValueError(f"{site.id}: on T5 the original has no decoder variant but value_parallel")
    owner = site.owner_path
    if place in ("cross_attention.value", "feed_forward.inner"):  # the original has these beside the projection, not in it
        owner = owner.rpartition(".")[0]
    start = f"{owner}." if owner else ""
    short = {"self_attention": "attn" if stack == "encoder" else "self_attn", "feed_forward": "ff", "cross_attention": "enc_attn"}.get(place, "")
    child, _, leaf = name.partition(".")
    if part == "ia3":
        return [Piece((f"{start}{'decoder_ff_ia3' if place == 'feed_forward.inner' else 'attn_value_ia3'}",))]
    if part == "residual":
        return [Piece((f"{start}decoder_enc_attn_value_parallel_adapter_gating_large_x_{child.removeprefix('gate_')}.{leaf}",))]
    if part == "gating":
        return [Piece((f"{start}encoder_{short}_gating_large_x_{child.removeprefix('gate_')}.{leaf}",))]
    if child in ("gate_down", "gate_up"):
        return [Piece((f"{start}{stack}_{short}_adapter_gating_large_x_{child.removeprefix('gate_')}.{leaf}",))]
    if child in ("gate", "gate_vector", "layer_norm"):
        gate = "layernorm" if child == "layer_norm" else _GATES[config.granularity]
        return [Piece((f"{start}encoder_{short}_adapter_gating_{gate}{'.' + leaf if leaf else ''}",))]
    if place == "cross_attention.value":
        return _controlled(handle, f"{start}{'attn_value_parallel' if 'value_parallel' in config.decoder else 'enc_attn_value_sequential'}_adapter", module, name)
    if place == "cross_attention.key_value":
        return _controlled(handle, f"{start}decoder_enc_attn_key_value_adapter", module, name)
    if stack == "decoder" and "multihead" not in config.decoder:
        return _controlled(handle, f"{start}decoder_{short}_adapter", module, name)
    if stack == "encoder" and (config.adapter != "bottleneck" or config.heads == 1):
        return _controlled(handle, f"{start}{short}_adapter", module, name)
    heads = f"{start}{short}_adapter_multihead_{child.removesuffix('_sampler')}"
    if child == "up_sampler" and not config.pair:
        return [Piece((f"{heads}.{leaf}",))]
    size = tensor.shape[0] // config.heads
    return [Piece((f"{heads}.{i}.{leaf}",), i * size, (i + 1) * size) for i in range(config.heads)]


def _part(module: nn.Module) -> tuple[str, nn.Module]:
    """What a module that stands alone is in a chain of them."""
    kinds: dict[type[nn.Module], str] = {Gate: "gate", GatingOnly: "gating", IA3: "ia3", ValueResidual: "residual"}
    return kinds.get(type(module), "adapter"), module


def _controlled(handle: Handle, controller: str, module: nn.Module, name: str) -> list[Piece]:
    """An adapter inside one of the original's controllers, which holds it under every task, and shared tensors under further names."""
    task, rest = None, name
    if isinstance(module, PerTask):
        _, task, rest = name.split(".", 2)
    if rest.startswith(("pre_layer_norm.", "post_layer_norm.")):
        return [Piece((f"{controller}.{rest}",))]
    keys = tuple(f"{controller}.adapters.{t}.{rest}" for t in ((task,) if task is not None else _tasks(handle)))
    config: Any = next(iter(handle.resolved.values()))
    options = {**vars(config), **getattr(config, "adapter_options", {})}
    leaf = rest.rpartition(".")[2]
    if leaf.startswith("phm_rule") and options.get("shared_rule"):
        keys = (leaf, *keys)
    elif leaf.startswith("W") and options.get("shared_weight"):
        keys = (f"W_{rest.removesuffix('_sampler.' + leaf)}{leaf[1:]}", *keys)
    return [Piece(keys)]
