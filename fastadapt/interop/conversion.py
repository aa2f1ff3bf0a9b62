"""``fastadapt convert``: adapter files to and from the state dicts of the original repositories and the directories of AdapterHub and PEFT, without the base's weights."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import checkpoint, patching
from fastadapt.hosts import generic
from fastadapt.interop.adapterhub import from_adapterhub, to_adapterhub
from fastadapt.interop.peft import from_peft, to_peft
from fastadapt.interop.published import PublishedFileError, load_published, published_state_dict, read_state_dict

HOSTS = ("vlbart", "vlt5", "t5", "bart")
LAYOUTS = ("vl", "compacter", "adapterhub", "peft")
_LIBRARIES = {"adapterhub": "AdapterHub", "peft": "PEFT"}
# Where directories of the libraries keep their tensors.
_FILES = {"adapterhub": ("pytorch_adapter.bin", "adapter.safetensors"), "peft": ("adapter_model.safetensors",)}
# Sizes of bart-base and t5-base with the published vocabularies and image features.
_BART = {"vocab_size": 50465, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "ffn": 3072, "positions": 1024, "feat_dim": 2048}
_T5 = {"vocab_size": 32200, "d_model": 768, "encoder_layers": 12, "decoder_layers": 12, "ffn": 3072, "feat_dim": 2048}
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
_WHERE["bart"] = {name: place for name, place in _WHERE["vlbart"].items() if name != "feat_dim"}
_WHERE["t5"] = {name: place for name, place in _WHERE["vlt5"].items() if name != "feat_dim"}
# A name below which the layers are numbered, whatever else the file holds.
_BLOCKS = {"bart": re.compile(r"^model\.(encoder|decoder)\.layers\.(\d+)\."), "t5": re.compile(r"^(encoder|decoder)\.block\.(\d+)\.")}
# Of adapters, whoever wrote them: a layer's number, and tensors that are as wide as the model and as others of its parts.
_NUMBER = re.compile(r"\b(encoder|decoder)\.(?:layers\.|block\.)?(\d+)\.")
_SIZES = (
    ("d_model", re.compile(r"(?:up_sampler|adapter_up)\.b(?:ias)?$"), 0),
    ("d_model", re.compile(r"(?:query|value|\b(?:[qkv](?:_proj)?|fc1|wi|wi_0|wi_1|lm_head))[./].*lora_A\.weight$"), 1),
    ("d_model", re.compile(r"\b(?:out_proj|o|fc2|wo)[./].*lora_B\.weight$"), 0),
    ("d_model", re.compile(r"visual_embedding\.feat_embedding\.0\.bias$"), 0),
    ("feat_dim", re.compile(r"visual_embedding\.feat_embedding\.0\.weight$"), 1),
    ("ffn", re.compile(r"\bfc1\.bias$"), 0),
    ("ffn", re.compile(r"\b(?:fc1|wi|wi_0|wi_1)[./].*lora_B\.weight$"), 0),
    ("ffn", re.compile(r"\b(?:fc2|wo)[./].*lora_A\.weight$"), 1),
    ("inner", re.compile(r"(?:query|value|\b[qkv])[./].*lora_B\.weight$"), 0),
    ("inner", re.compile(r"\bo[./].*lora_A\.weight$"), 1),
    ("vocab_size", re.compile(r"\blm_head[./].*lora_B\.weight$"), 0),
    ("heads", re.compile(r"relative_attention_bias\.weight$"), 1),
    ("encoder_layers", re.compile(r"\bencoder\.\w+[./]layer_id_embeddings\.weight$"), 0),
    ("decoder_layers", re.compile(r"\bdecoder\.\w+[./]layer_id_embeddings\.weight$"), 0),
)


def build_host(host: str, tensors: Mapping[str, Tensor] | None = None, known: Mapping[str, int] | None = None) -> nn.Module:
    """A random model of a host, of the sizes that are ``known`` or that a state dict shows; the others are bart-base's or t5-base's, and a stack whose depth nothing shows is as
    deep as the other. The number of heads of a BART is 1.

    Raises:
        ValueError: the host is unknown.
    """
    if host not in HOSTS:
        raise ValueError(f"host: must be one of {', '.join(HOSTS)}, not {host!r}")
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config

    tensors = tensors or {}
    sizes = dict(_BART if host in ("vlbart", "bart") else _T5)
    sizes |= _sizes(tensors) | {name: tensors[key].shape[axis] + more for name, (key, axis, more) in _WHERE[host].items() if key in tensors and tensors[key].dim() > axis}
    sizes |= _depths(tensors, _BLOCKS[host.removeprefix("vl")]) | (known or {})  # type: ignore[operator]
    if host in ("vlbart", "bart"):
        stacks: dict[str, Any] = {
            f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", sizes[f"{side}_layers"]), ("attention_heads", 1), ("ffn_dim", sizes["ffn"]))
        }
        stacks |= {"vocab_size": sizes["vocab_size"], "d_model": sizes["d_model"], "max_position_embeddings": sizes["positions"]}
        return BartForConditionalGeneration(BartConfig(**stacks)) if host == "bart" else VLBart(VLBartConfig(**stacks, feat_dim=sizes["feat_dim"]))
    inner = next((t.shape[0] for key, t in tensors.items() if key.endswith("block.0.layer.0.SelfAttention.q.weight") and t.dim() == 2), sizes.get("inner", sizes["d_model"]))
    heads = next((t.shape[1] for key, t in tensors.items() if key.endswith("block.0.layer.0.SelfAttention.relative_attention_bias.weight") and t.dim() == 2), sizes.get("heads", 0))
    heads = heads or (12 if inner % 12 == 0 else 1)
    common: dict[str, Any] = {"vocab_size": sizes["vocab_size"], "d_model": sizes["d_model"], "d_kv": inner // heads, "num_heads": heads, "d_ff": sizes["ffn"]}
    common |= {"num_layers": sizes["encoder_layers"], "num_decoder_layers": sizes["decoder_layers"]}
    return T5ForConditionalGeneration(T5Config(**common)) if host == "t5" else VLT5(VLT5Config(**common, feat_dim=sizes["feat_dim"]))


def _depths(tensors: Iterable[str], numbered: re.Pattern[str]) -> dict[str, int]:
    """The depths of the two stacks, by the highest numbers of their layers; of one that is not there, the other's."""
    found: dict[str, int] = {}
    for key in tensors:
        if match := numbered.search(key):
            found[match[1]] = max(found.get(match[1], 0), 1 + int(match[2]))
    return {f"{side}_layers": found.get(side, max(found.values())) for side in ("encoder", "decoder")} if found else {}


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of a host that the tensors of its adapters show. A feed-forward network that they do not show is taken as 4 times as wide as the model, as in BART's and T5's
    published ones."""
    sizes = _depths(tensors, _NUMBER)
    for name, pattern, axis in reversed(_SIZES):
        sizes[name] = next((t.shape[axis] for key, t in tensors.items() if pattern.search(key) and t.dim() > axis), sizes.get(name, 0))
    sizes = {name: size for name, size in sizes.items() if size}
    return {"ffn": 4 * sizes["d_model"], **sizes} if "d_model" in sizes else sizes


def _known(folder: Path, host: str) -> dict[str, int]:
    """The sizes of a host that a directory of fastadapt shows. Of places that were given by their paths, as PEFT's are, only the paths say how deep its stacks are and
    which Linear a tensor is beside."""
    config, tensors = checkpoint.read(folder)
    depths = _depths(re.findall(r"[\w.]+", json.dumps(config.get("options")).replace("\\", "")), _NUMBER)
    if sites := next(iter(patching._saved(config, folder).values())).selected().sites:
        with torch.device("meta"):
            blocks = generic.chosen(build_host(host, known=depths), sites)
        labels = patching._labels(blocks)
        paths = {f"{labels[path]}.{place.id}": f"{path}.{place.owner}" for path, block, there in blocks for place in there.places(block)}
        tensors = {re.sub("^[^/]*", lambda site: paths.get(site[0], site[0]), key): tensor for key, tensor in tensors.items()}
    return _sizes(tensors) | depths


def _library(folder: Path) -> str | None:
    """Whose adapter directory it is: "adapterhub" or "peft"; None: fastadapt's, or none."""
    try:
        config = json.loads((folder / checkpoint.CONFIG).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    return "peft" if "peft_type" in config else "adapterhub" if "config" in config and "model_type" in config else None


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
    """Writes an adapter directory from an original state dict (a file) or a directory of AdapterHub or PEFT, or the other way round from a directory of `Handle.save`. Only what
    the method trains is converted.

    Args:
        source: ``.pth`` or ``.safetensors``, or an adapter directory of fastadapt, AdapterHub or PEFT.
        destination: a directory, or a ``.pth`` or ``.safetensors`` file.
        host: "vlbart", "vlt5", "t5" or "bart".
        method, options: as in `fastadapt.patch`; needed for a file only, a directory knows them.
        tasks: of a file, the tasks' names; of a directory with adapters per task that AdapterHub or PEFT shall read, the one task.
        layout: keys of the "vl" repositories or of the "compacter" one, or the directories of "adapterhub" or "peft", to be written; those are known when they are the source.

    Returns:
        What was written, in a sentence.

    Raises:
        fastadapt.interop.PublishedFileError, fastadapt.patching.AdapterFileError: the source does not fit.
        ValueError, TypeError: see `fastadapt.patch`, the destination's name says nothing, or an argument is given that is not for this kind of source.
        OSError: the destination cannot be written.
    """
    target, folder = Path(destination), Path(source)
    if not folder.exists():
        raise PublishedFileError(f"source: {os.fspath(source)!r} does not exist; must be a .pth or .safetensors file or an adapter directory")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    library = _library(folder)
    _refuse_unused(folder, library, layout, method, tasks, options)
    if library is not None or layout in _LIBRARIES:
        if target.suffix in (".pth", ".safetensors"):
            raise ValueError(f"destination: must be a directory, since AdapterHub's and PEFT's adapters are directories; it is {os.fspath(target)!r}")
        if library is not None:
            file = next((folder / name for name in _FILES[library] if (folder / name).exists()), folder / _FILES[library][0])
            model = build_host(host, known=_sizes(read_state_dict(file)))
            handle = (from_peft if library == "peft" else from_adapterhub)(model, folder)
            handle.save(target)
            return _said(target, handle)
        if layout == "peft" and any("relative_attention_bias" in key for key in checkpoint.read(folder)[1]):
            raise ValueError(
                "source: holds T5's tables of relative position biases, for which PEFT's files have no place; whether they are still the base's only the base tells: use "
                "fastadapt.interop.to_peft on it"
            )
        handle = patching.load(build_host(host, known=_known(folder, host)), folder)
        (to_peft if layout == "peft" else to_adapterhub)(handle, target, task=tasks[0] if tasks else None)
        return f"{target}: the adapters of {len(handle.sites)} sites as {_LIBRARIES[layout]} reads them"
    if folder.is_dir():
        if target.suffix not in (".pth", ".safetensors"):
            raise ValueError(f"destination: must end in .pth or .safetensors, since the source is an adapter directory; it is {os.fspath(target)!r}")
        handle = patching.load(build_host(host, known=_known(folder, host)), source)
        tensors = {key: tensor.detach().clone().contiguous() for key, tensor in published_state_dict(handle, base=False, layout=layout).items()}
        if target.suffix == ".pth":
            torch.save(tensors, data := io.BytesIO())
        else:
            from safetensors.torch import save

            data = io.BytesIO(save(tensors, metadata={"format": "pt"}))
        checkpoint.put({target: data.getvalue()})
        return f"{target}: {len(tensors)} tensors under the keys of the {layout} layout"
    if target.suffix in (".pth", ".safetensors"):
        raise ValueError(f"destination: must be a directory, since the source is a state dict; it is {os.fspath(target)!r}")
    if method is None:
        raise ValueError("method: must be given, since a state dict does not say what it is of")
    tensors = read_state_dict(source)
    handle = patching.patch(build_host(host, tensors), method, tasks=list(tasks), **options)
    load_published(handle, tensors, layout=layout)
    handle.save(target)
    return _said(target, handle)


def _refuse_unused(folder: Path, library: str | None, layout: str, method: str | None, tasks: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuses the arguments that `convert` has no use for with this kind of source: what they ask for would not be done."""
    if not folder.is_dir():
        if layout in _LIBRARIES:
            raise ValueError(f"layout: the source is a state dict; must be vl or compacter, not {layout!r}")
        if "model" in options:
            raise ValueError("model: is no option of a method; the model is the host's")
        return
    what = f"the source is an adapter directory of {_LIBRARIES.get(library or '', 'fastadapt')}"
    for name, given in (*([("method", method)] if method is not None else []), *options.items()):
        raise ValueError(f"{name}: {what}, which knows its method and options; must not be given, not {given!r}")
    if tasks and (library or layout not in _LIBRARIES):
        raise ValueError(f"tasks: {what}, {'which has none' if library else 'which knows its tasks'}; must not be given, not {list(tasks)!r}")
    if len(tasks) > 1:
        raise ValueError(f"tasks: a directory of {_LIBRARIES[layout]} holds one task's adapters; must be one, not {list(tasks)!r}")
    if library and layout not in ("vl", library):
        raise ValueError(f"layout: {what}, which is written as fastadapt's; must not be given, not {layout!r}")


def _said(target: Path, handle: patching.Handle) -> str:
    return f"{target}: {handle.config.method} at {len(handle.sites)} sites, {handle.parameter_counts()[0]:,} trained parameters"
