"""PEFT's LoRA layers on `fastadapt.functional.lora`, and on `routed_bottleneck` where a batch mixes adapters; and PEFT's adapter files in and out.

A fused layer computes what PEFT's ``forward`` does, one op an active adapter. Two things differ in the last digits: PEFT casts the input to the adapter's dtype (float32 over a
half-precision base), the op rounds the parameters to the input's and accumulates in float32; and dropout is drawn from a seed (`fastadapt.functional.lora`).

A call runs PEFT's own ``forward`` where adapters are merged or disabled, where an active adapter is a variant (DoRA, aLoRA and others), has parts that are no plain Linear (sharded
by FSDP, parametrised, with hooks of their own) or a scale that is a tensor, and for inputs of one dimension. A batch with ``adapter_names`` is one op where the adapters' ranks
and kinds agree; otherwise PEFT's own loop over the adapters runs, or its error where its layer takes no such batch.

A quantised base runs itself. The sum has the dtype of what it gives, whatever PEFT's layer over that quantiser casts (under CUDA's autocast to another half-precision type than the
base's, some of them give float32).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadapt import checkpoint, functional, patching
from fastadapt.checkpoint import AdapterFileError
from fastadapt.hosts import vlm
from fastadapt.interop.fusing import Foreign, Fused, Kind, autocast_dtype, check_model, plain, quiet
from fastadapt.interop.published import check_handle
from fastadapt.nn import LoRA, PerTask
from fastadapt.nn.per_task import of_widths
from fastadapt.patching import Handle, _some

# What PEFT hands down for variants only, and keeps from the base layer.
_VARIANTS = ("alora_offsets",)


class _PEFTLoRA(Fused):
    parts = ("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    runs = "base_layer"  # the name of the child whose output the update is added to

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        adapters = None
        if not (self._disable_adapters or self.merged_adapters) and x.dim() > 1:
            downs = self._modules["lora_A"]._modules
            active = [name for name in (self.active_adapters if names is None else dict.fromkeys(names)) if name in downs]
            adapters = _adapters(self, active)
            if names is not None:
                self._check_forward_args(x, *args, **kwargs)
                adapters = adapters if adapters is not None and _routable(adapters) else None
        if adapters is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "adapter_names" and key not in _VARIANTS}
        y = self._modules[self.runs](x, *args, **kwargs)
        if not adapters:
            return y
        ids = None if names is None else [active.index(name) if name in active else -1 for name in names]
        if autocast_dtype(y) not in (None, y.dtype):  # a base that keeps its precision: so does the sum
            with torch.autocast(y.device.type, enabled=False):
                return _add(x, y, adapters, ids)
        return _add(x, y, adapters, ids)


class _OneInput(_PEFTLoRA):
    """Over bases whose layers PEFT gives x alone, and no batch that mixes adapters."""

    def forward(self, x: Tensor) -> Tensor:  # the library's signature, so that what it refuses is refused
        return super().forward(x)


class _QuantLinear(_OneInput):
    runs = "quant_linear_module"  # the same module, under a second name, which PEFT calls it by


# The forwards that are replaced, and by what; a subclass with another one is left alone. (TorchaoLoraLinear and IncLoraLinear have Linear's.)
_FORWARDS: dict[tuple[str, str], type[Fused]] = {
    ("peft.tuners.lora.layer", "Linear.forward"): _PEFTLoRA,
    ("peft.tuners.lora.bnb", "Linear8bitLt.forward"): _PEFTLoRA,
    ("peft.tuners.lora.bnb", "Linear4bit.forward"): _PEFTLoRA,
    ("peft.tuners.lora.hqq", "HqqLoraLinear.forward"): _PEFTLoRA,
    ("peft.tuners.lora.aqlm", "AqlmLoraLinear.forward"): _OneInput,
    ("peft.tuners.lora.gptq", "GPTQLoraLinear.forward"): _QuantLinear,
    ("peft.tuners.lora.awq", "AwqLoraLinear.forward"): _QuantLinear,
    ("peft.tuners.lora.eetq", "EetqLoraLinear.forward"): _QuantLinear,
}


class _Adapter(NamedTuple):
    w_down: Tensor
    w_up: Tensor
    b_up: Tensor | None
    scale: float
    dropout: float


def _adapters(layer: Any, names: Sequence[str]) -> list[_Adapter] | None:
    """The adapters of these names; None: one of them is none that the op computes. (Without ``nn.Module.__getattr__``, which costs as much as the rest.)"""
    modules = layer._modules
    downs, ups, dropouts = (modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    found = []
    for name in names:
        down, up, dropout, scale = downs[name], ups[name], dropouts[name], layer.scaling[name]
        kind = type(dropout)
        if name in layer.lora_variant or type(scale) not in (float, int) or not (plain(down) and plain(up) and quiet(dropout)) or kind not in (nn.Identity, nn.Dropout):
            return None
        p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
        if p >= 1.0:
            return None
        found.append(_Adapter(down._parameters["weight"], up._parameters["weight"], up._parameters["bias"], float(scale), p))
    return found


def _routable(adapters: Sequence[_Adapter]) -> bool:
    """Whether a mixed batch of these is one `fastadapt.functional.routed_bottleneck`."""
    shapes = {(a.w_down.shape, a.w_up.shape, a.b_up is None) for a in adapters}
    return len(shapes) <= 1 and not any(a.dropout for a in adapters)


def _add(x: Tensor, y: Tensor, adapters: Sequence[_Adapter], ids: Sequence[int] | None) -> Tensor:
    """y plus the adapters' updates, in y's dtype; with ``ids`` each sample's own, -1 for none."""
    dtype = y.dtype
    x = x.to(dtype)
    if ids is not None:
        return _routed(x, y, adapters, ids)
    for w_down, w_up, b_up, scale, dropout in _stacked(adapters):
        if w_down.dtype is not dtype and w_down.dtype is not torch.float32:
            w_down, w_up, b_up = w_down.to(dtype), w_up.to(dtype), None if b_up is None else b_up.to(dtype)
        y = functional.lora(x, y, w_down, w_up, b_up, scale=scale, dropout=dropout)
    return y


def _stacked(adapters: Sequence[_Adapter]) -> Sequence[_Adapter]:
    """The adapters as few: those without dropout and bias and of one dtype are one, of the sum of their ranks, so that x is read once for them."""
    alike = [a for a in adapters if not a.dropout and a.b_up is None and a.scale and a.w_down.dtype == adapters[0].w_down.dtype]
    if len(alike) < 2:
        return adapters
    scale = alike[0].scale
    ups = [a.w_up if a.scale == scale else a.w_up * (a.scale / scale) for a in alike]
    one = _Adapter(torch.cat([a.w_down for a in alike]), torch.cat(ups, 1), None, scale, 0.0)
    return [one, *(a for a in adapters if not any(a is b for b in alike))]


def _routed(x: Tensor, y: Tensor, adapters: Sequence[_Adapter], ids: Sequence[int]) -> Tensor:
    common = adapters[0].scale if len({a.scale for a in adapters}) == 1 else 1.0
    dtype = y.dtype if adapters[0].w_down.dtype != torch.float32 else torch.float32

    def bank(tensors: Sequence[Tensor], scaled: bool) -> Tensor:
        return torch.stack([t if not scaled or a.scale == common else (a.scale / common) * t for t, a in zip(tensors, adapters, strict=True)]).to(dtype)

    w_down, w_up = bank([a.w_down for a in adapters], False), bank([a.w_up for a in adapters], True)
    b_up = None if adapters[0].b_up is None else bank([a.b_up for a in adapters], True)  # type: ignore[misc]
    places = torch.tensor(ids, device=x.device)
    return of_widths(x, places, w_down, w_up, None, b_up, activation="identity", residual=y, scale=common)


def recognise(module: nn.Module) -> Kind | Foreign | None:
    """PEFT's tuner layers, known by their base class's place; LoRA's Linears are fused."""
    cls = module._base if isinstance(module, Fused) else type(module)
    bases = {c.__name__ for c in cls.__mro__ if c.__module__.startswith("peft.tuners.")}
    if "BaseTunerLayer" not in bases:
        return None
    tuner = f"PEFT's {cls.__module__.removeprefix('peft.tuners.').partition('.')[0]}.{cls.__name__}"
    if "LoraLayer" not in bases:
        return Foreign(tuner, "only LoRA has a fused op")
    forward: Any = cls.forward
    mixin = _FORWARDS.get((forward.__module__, forward.__qualname__))
    if mixin is None:
        return Foreign(tuner, "its forward is not that of a LoRA Linear")
    layer: Any = module
    if not hasattr(layer, "lora_variant"):
        return Foreign(tuner, "this version of PEFT does not say which adapters are variants; 0.21 does")
    variants = {name: type(variant).__name__ if not isinstance(variant, type) else variant.__name__ for name, variant in layer.lora_variant.items()}
    if variants and set(variants) == set(layer.lora_A):
        return Foreign(tuner, "its adapters are variants: " + ", ".join(f"{name!r} is {variant}" for name, variant in sorted(variants.items())))
    notes = [f"{name!r} is {variant}, which runs as before" for name, variant in sorted(variants.items())]
    if layer.merged_adapters:
        notes.append(f"{', '.join(layer.merged_adapters)} merged: runs as before until unmerged")
    if layer._disable_adapters:
        notes.append("adapters disabled: runs as before until enabled")
    return Kind(tuner, "lora", mixin, "; ".join(notes))


# Files.

_CONFIG, _TENSORS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Options of PEFT's config that would need other modules than `fastadapt.nn.LoRA`, with the values that need none.
_NONE: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "lora_bias": (False, None), "modules_to_save": (None, []),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None, []), "use_bdlora": (None,), "alora_invocation_tokens": (None,),
    "arrow_config": (None,), "velora_config": (None,), "monteclora_config": (None,), "kasa_config": (None,), "use_qalora": (False, None),
}  # fmt: skip

# Starting values that leave the base as it was.
_STARTS = (True, False, None, "gaussian", "orthogonal")


def from_peft(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default", dtype: torch.dtype | None = None) -> Handle:
    """Patches ``model`` with LoRA as a directory of PEFT's ``save_pretrained`` says, and loads its tensors; `Handle.save` then writes fastadapt's file.

    Tensors of parts whose output the model never uses are left out.

    Args:
        model: the base model, without PEFT.
        directory: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name, dtype: as in `fastadapt.patch`.

    Raises:
        fastadapt.patching.AdapterFileError: the files are missing, of another method, use what `fastadapt.nn.LoRA` has not (DoRA, ranks by pattern, modules to save, ...), began
            with values that change the base (PiSSA, OLoRA, ...), hold some of the biases only, or do not fit the model, which stays as it was.
        ValueError, TypeError: see `fastadapt.patch`.
    """
    from safetensors.torch import load_file

    check_model(model)
    folder = Path(directory)
    try:
        config, tensors = json.loads((folder / _CONFIG).read_text()), load_file(folder / _TENSORS)
    except Exception as error:
        raise AdapterFileError(f"{folder}: must hold {_CONFIG} and {_TENSORS}: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterFileError(f"{folder / _CONFIG}: must be of peft_type 'LORA', not {config.get('peft_type') if isinstance(config, dict) else config!r}")
    if used := [key for key, values in _NONE.items() if config.get(key) not in values]:
        raise AdapterFileError(f"{folder / _CONFIG}: {used[0]} is {config[used[0]]!r}, which fastadapt's LoRA does not have")
    if (bias := config.get("bias", "none")) not in ("none", "all"):
        raise AdapterFileError(f"{folder / _CONFIG}: bias is {bias!r}; fastadapt trains all biases or none")
    if (init := config.get("init_lora_weights", True)) not in _STARTS:
        raise AdapterFileError(
            f"{folder / _CONFIG}: init_lora_weights is {init!r}, which may have changed the base's weights, and they are not in the file; "
            "PEFT writes it as plain LoRA with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    if wrong := [key for key in ("r", "lora_alpha") if type(config.get(key)) not in (int, float)]:
        raise AdapterFileError(f"{folder / _CONFIG}: {wrong[0]} must be a number, not {config.get(wrong[0])!r}")
    rank = config["r"]
    alpha = config["lora_alpha"] * (rank**0.5 if config.get("use_rslora") else 1.0)  # there the update is scaled by alpha / sqrt(r)
    paths = sorted({key.removeprefix(_PREFIX).rpartition(".lora_A.")[0] for key in tensors if ".lora_A." in key})
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": config.get("lora_dropout", 0.0), "biases": bias == "all", "visual_embedding": False, "layer_norms": "none"}
    if absent := sorted(set(paths) - {path for path, _ in model.named_modules()}):
        raise AdapterFileError(f"{folder}: {len(absent)} of its modules are not in this {type(model).__name__}: {_some(absent)}")
    if not paths:
        raise AdapterFileError(f"{folder / _TENSORS}: holds no lora_A")
    sites = {"encoder.self_attention.value": "|".join(re.escape(path) for path in paths)}
    unused = vlm.dead(model, alone=False)
    handle = patching.patch(model, "lora", name=name, dtype=dtype, sites=sites, **options)
    try:
        _copy(_places(handle, None), {key: tensor for key, tensor in tensors.items() if not patching._off(key.removeprefix(_PREFIX), unused)}, folder)
    except BaseException:
        handle.unpatch(restore_base=True)
        raise
    return handle


def to_peft(handle: Handle, directory: str | os.PathLike[str], *, task: str | None = None) -> None:
    """Writes a patched model's LoRA as PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained`` reads on the same base.

    Args:
        handle: of a model patched with LoRA.
        directory: made if it is not there.
        task: whose adapters, where there is one per task.

    Raises:
        TypeError: ``handle`` is no `fastadapt.Handle`.
        ValueError: the method has other adapters than LoRA, tensors of the base that are no biases have been trained, or ``task`` is missing or unknown.
        OSError: the directory cannot be written.
    """
    from safetensors.torch import save

    check_handle(handle)
    places = _places(handle, task)
    first = next(_lora(site.module, task) for site in handle._sites)
    biases = len(places) > 2 * len(handle._sites)
    base = getattr(getattr(handle.model, "config", None), "name_or_path", None)
    config = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base or None, "inference_mode": True, "r": first.rank, "lora_alpha": first.alpha,
        "lora_dropout": first.dropout, "bias": "all" if biases else "none", "target_modules": [site.owner_path for site in handle._sites], "use_rslora": False,
        "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    data = save({key: tensor.detach().cpu().clone().contiguous() for key, tensor in places.items()}, metadata={"format": "pt"})
    checkpoint.put({folder / _TENSORS: data, folder / _CONFIG: json.dumps(config, indent=2).encode() + b"\n"})


def _lora(module: nn.Module, task: str | None) -> LoRA:
    if isinstance(module, PerTask):
        if task is None or task not in module.adapters:
            raise ValueError(f"task: must be one of {', '.join(module.adapters)}, whose adapters differ, not {task!r}")
        module = module.adapters[task]
    if not isinstance(module, LoRA):
        raise ValueError(f"handle: {type(module).__name__} adapters are none that PEFT has")
    return module


def _places(handle: Handle, task: str | None) -> dict[str, Tensor]:
    """The patched model's tensors by PEFT's keys, of which a tied one has several."""
    found: dict[str, Tensor] = {}
    for site in handle._sites:
        lora = _lora(site.module, task)
        found |= {f"{_PREFIX}{site.owner_path}.lora_{letter}.weight": getattr(lora, f"lora_{letter}").weight for letter in "AB"}
    paths = {module: path for path, module in handle.model.named_modules()}
    targeted = {site.owner_path for site in handle._sites}
    for trained in handle._trained:
        for module, name in trained.owners:
            if (path := paths.get(module)) is None:
                continue
            if name == "bias":
                found[f"{_PREFIX}{path}.{'base_layer.' if path in targeted else ''}bias"] = trained.parameter
            elif trained.base is None or not torch.equal(trained.base, trained.parameter):  # T5's tables of relative position biases are biases to fastadapt, but not to PEFT
                raise ValueError(f"handle: trains {path}.{name} of the base, which PEFT's file has no place for")
    return found


def _copy(places: dict[str, Tensor], tensors: dict[str, Tensor], folder: Path) -> None:
    file, held = folder / _TENSORS, {id(places[key]) for key in places.keys() & tensors.keys()}
    unknown, missing = tensors.keys() - places.keys(), [key for key, tensor in places.items() if id(tensor) not in held]
    if missing and not unknown and all(key.endswith(".bias") for key in missing):
        raise AdapterFileError(
            f"{file}: bias is 'all', but {len(missing)} of the model's biases are not in it: {_some(missing)}; fastadapt trains all biases or none. A patch of some towers writes "
            "such a file: its own are those of Handle.save. To add the base's biases: PeftModel.from_pretrained(base, directory).save_pretrained(directory)"
        )
    if different := sorted({*unknown, *missing}):
        raise AdapterFileError(f"{file}: {len(different)} tensors are in the file or in the model only: {_some(different)}")
    if wrong := [key for key, tensor in tensors.items() if tensor.shape != places[key].shape]:
        raise AdapterFileError(f"{file}: {wrong[0]} is {tuple(tensors[wrong[0]].shape)}; the model has {tuple(places[wrong[0]].shape)}")
    first: dict[int, str] = {}
    for key, tensor in tensors.items():
        if (one := first.setdefault(id(places[key]), key)) != key and not torch.equal(tensors[one], tensor):
            raise AdapterFileError(f"{file}: {one} and {key} differ, but are one tensor of the model")
    with torch.no_grad():
        for key, tensor in tensors.items():
            places[key].copy_(tensor)
