"""``fastadapt convert``: adapter files to and from the state dicts of the original repositories, without the base's weights."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import patching
from fastadapt.interop.published import load_published, published_state_dict, read_state_dict

HOSTS = ("vlbart", "vlt5", "t5")
# Sizes of bart-base and t5-base with the published vocabularies and image features.
_BART = {"vocab_size": 50465, "d_model": 768, "layers": 6, "ffn": 3072, "positions": 1024, "feat_dim": 2048}
_T5 = {"vocab_size": 32200, "d_model": 768, "layers": 12, "ffn": 3072, "feat_dim": 2048}
_WHERE = {
    "vlbart": {
        "vocab_size": ("model.shared.weight", 0, 0),
        "d_model": ("model.shared.weight", 1, 0),
        "ffn": ("model.encoder.layers.0.fc1.weight", 0, 0),
        "positions": ("model.encoder.embed_positions.weight", 0, -2),
        "feat_dim": ("model.encoder.visual_embedding.feat_embedding.0.weight", 1, 0),
    },
    "vlt5": {
        "vocab_size": ("shared.weight", 0, 0),
        "d_model": ("shared.weight", 1, 0),
        "ffn": ("encoder.block.0.layer.1.DenseReluDense.wi.weight", 0, 0),
        "feat_dim": ("encoder.visual_embedding.feat_embedding.0.weight", 1, 0),
    },
}
_WHERE["t5"] = {name: place for name, place in _WHERE["vlt5"].items() if name != "feat_dim"}
# A name below which the layers are numbered, whatever else the file holds.
_LAYERS = {"vlbart": r"model\.(?:encoder|decoder)\.layers\.(\d+)\.", "vlt5": r"(?:encoder|decoder)\.block\.(\d+)\.", "t5": r"(?:encoder|decoder)\.block\.(\d+)\."}


def build_host(host: str, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A random model of a host, of the sizes that a state dict shows; what it does not show is bart-base's or t5-base's. The number of BART's heads makes no difference here.

    Raises:
        ValueError: the host is unknown.
    """
    if host not in HOSTS:
        raise ValueError(f"host: must be one of {', '.join(HOSTS)}, not {host!r}")
    from transformers import T5Config, T5ForConditionalGeneration

    from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config

    tensors = tensors or {}
    sizes = dict(_BART if host == "vlbart" else _T5)
    sizes |= {name: tensors[key].shape[axis] + more for name, (key, axis, more) in _WHERE[host].items() if key in tensors}
    if numbers := [int(found[1]) for key in tensors if (found := re.match(_LAYERS[host], key))]:
        sizes["layers"] = 1 + max(numbers)
    if host == "vlbart":
        stacks: dict[str, Any] = {
            f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", sizes["layers"]), ("attention_heads", 1), ("ffn_dim", sizes["ffn"]))
        }
        return VLBart(VLBartConfig(vocab_size=sizes["vocab_size"], d_model=sizes["d_model"], **stacks, max_position_embeddings=sizes["positions"], feat_dim=sizes["feat_dim"]))
    inner = next((t.shape[0] for key, t in tensors.items() if key.endswith("block.0.layer.0.SelfAttention.q.weight")), sizes["d_model"])
    heads = next((t.shape[1] for key, t in tensors.items() if key.endswith("block.0.layer.0.SelfAttention.relative_attention_bias.weight")), 12 if inner % 12 == 0 else 1)
    common: dict[str, Any] = {"vocab_size": sizes["vocab_size"], "d_model": sizes["d_model"], "d_kv": inner // heads, "num_heads": heads, "d_ff": sizes["ffn"]}
    common["num_layers"] = sizes["layers"]
    return T5ForConditionalGeneration(T5Config(**common)) if host == "t5" else VLT5(VLT5Config(**common, feat_dim=sizes["feat_dim"]))


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    host: str,
    method: str | None = None,
    tasks: Sequence[str] = (),
    layout: str = "vl",
    **options: Any,
) -> str:
    """Writes an adapter directory from an original state dict (a file), or the other way round from a directory of `Handle.save`. Only what the method trains is converted.

    Args:
        source: ``.pth`` or ``.safetensors``, or an adapter directory.
        destination: a directory, or a ``.pth`` or ``.safetensors`` file.
        host: "vlbart", "vlt5" or "t5".
        method, tasks, options: as in `fastadapt.patch`; needed for a file only, a directory knows them.
        layout: keys of the "vl" repositories or of the "compacter" one.

    Returns:
        What was written, in a sentence.

    Raises:
        fastadapt.interop.PublishedFileError, fastadapt.patching.AdapterFileError: the source does not fit.
        ValueError, TypeError: see `fastadapt.patch`, or the destination's name says nothing.
    """
    target = Path(destination)
    if Path(source).is_dir():
        if target.suffix not in (".pth", ".safetensors"):
            raise ValueError(f"destination: must end in .pth or .safetensors, since the source is an adapter directory; it is {os.fspath(target)!r}")
        handle = patching.load(build_host(host), source)
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in published_state_dict(handle, base=False, layout=layout).items()}
        if target.suffix == ".pth":
            torch.save(tensors, target)
        else:
            from safetensors.torch import save_file

            save_file(tensors, target, metadata={"format": "pt"})
        return f"{target}: {len(tensors)} tensors under the keys of the {layout} layout"
    if target.suffix in (".pth", ".safetensors"):
        raise ValueError(f"destination: must be a directory, since the source is a state dict; it is {os.fspath(target)!r}")
    if method is None:
        raise ValueError("method: must be given, since a state dict does not say what it is of")
    tensors = read_state_dict(source)
    handle = patching.patch(build_host(host, tensors), method, tasks=list(tasks), **options)
    load_published(handle, tensors, layout=layout)
    handle.save(target)
    return f"{target}: {handle.config.method} at {len(handle.sites)} sites, {handle.parameter_counts()[0]:,} trained parameters"
