"""AdapterHub's bottleneck layers: sequential, parallel and Compacter adapters, on `fastadapt.functional.bottleneck` and `phm_bottleneck`; and the files of
these adapters in and out.

What is fused is the layer that holds the adapters of one place, and of it the step that runs one adapter: compositions (Stack, Parallel, BatchSplit, Split, Average, Fuse),
adapters that are added later, and the context of shared Compacter parameters stay the library's. The layer norms and sums with the transformer's residual stream are the library's
too.

An adapter runs its own ``forward`` where its activation is none that the op has, where a part has hooks or is no plain Linear or PHM layer, for parameters of another
half-precision dtype than the input's, or where gating scores are asked for. Inside a Fuse, with dropout, stochastic depth or gating, and under autocast the op computes the scaled
up-projection and the library's own steps follow.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import checkpoint, functional, patching
from fastadapt.checkpoint import AdapterFileError
from fastadapt.interop.fusing import Foreign, Fused, Kind, activation_name, autocast_dtype, check_model, fits, plain, quiet
from fastadapt.interop.published import check_handle, read_state_dict
from fastadapt.nn import Bottleneck, PerTask, PHMLinear, StreamBottleneck
from fastadapt.nn.projections import factor_product, kronecker_sum
from fastadapt.patching import Handle, _some

_PARTS = ("input_size", "add_layer_norm_before", "add_layer_norm_after", "adapter_residual_before_ln", "use_gating", "adapter_down", "adapter_up", "scaling", "dropout")
_PARALLEL = "ParallelAdapter.forward"


class _BottleneckLayer(Fused):
    def compose_single(self: Any, adapter_setup: str, state: Any, lvl: int = 0) -> Any:
        """The library's step, without the down-projection that it does not use; the up-projection only for a Fuse."""
        adapter = self.adapters[adapter_setup]
        context = _forward_context(type(adapter))
        if getattr(context, "output_adapter_gating_scores", False):
            return super().compose_single(adapter_setup, state, lvl)  # type: ignore[misc]
        fusing = len(self.adapter_fusion_layer) > 0 and _holds_fuse(self.get_active_setup())
        found = _run(adapter, state.hidden_states, state.adapter_residual, fusing)
        if found is None:
            return super().compose_single(adapter_setup, state, lvl)  # type: ignore[misc]
        return state._replace(hidden_states=found[0], bottleneck_up=found[1], last=adapter_setup)


def _forward_context(cls: type) -> Any:
    """What the forward pass carries along, by the library's own thread-local stack."""
    holder = getattr(sys.modules.get(cls.__module__), "ForwardContext", None)
    return None if holder is None else holder.get_context()


def _holds_fuse(setup: Any) -> bool:
    if type(setup).__name__ == "Fuse":
        return True
    return not isinstance(setup, str) and any(_holds_fuse(child) for child in setup or ())


def _run(adapter: Any, x: Tensor, residual: Tensor, need_up: bool) -> tuple[Tensor, Tensor | None] | None:
    """The adapter's output, and the scaled up-projection where that was computed; None: the op does not take the call."""
    arguments = _arguments(adapter, x) if isinstance(residual, Tensor) else None
    if arguments is None:
        return None
    op, projections, common = arguments
    parallel, norm = _forward(adapter) == _PARALLEL, adapter.adapter_norm_after if adapter.add_layer_norm_after else None
    early = not parallel and (norm is None or adapter.adapter_residual_before_ln)  # the residual is added before the norm
    drops = (adapter.dropout.training and adapter.dropout.p > 0.0) or (adapter.training and hasattr(adapter, "DropPath"))
    alone = need_up or drops or adapter.use_gating or autocast_dtype(x) is not None or residual.dtype != x.dtype or residual.shape != x.shape
    y = up = op(x, *projections, residual=residual if early and not alone else None, **common)
    if alone:
        if hasattr(adapter, "DropPath") and not parallel:
            up = adapter.DropPath(up)
        y = adapter.dropout(up)
        if adapter.use_gating:
            y = y * torch.sigmoid(adapter.gate(x)).mean(dim=1).unsqueeze(-1)
        if early:
            y = y + residual
    if norm is not None:
        y = norm(y)
    return (y if parallel or early else y + residual), up if alone else None


def _arguments(adapter: Any, x: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    *before, down, middle = adapter.adapter_down
    up, activation, scaling = adapter.adapter_up, activation_name(adapter.non_linearity.f), adapter.scaling
    if activation is None or not all(quiet(m) for m in (adapter, adapter.adapter_down, middle, down, up, *before)) or not all(type(norm) is nn.LayerNorm for norm in before):
        return None
    common: dict[str, Any] = {"activation": activation, "norm_before": (before[0].weight, before[0].bias, before[0].eps) if before else None}
    op: Any
    projections: tuple[Any, ...]
    if plain(down) and plain(up):
        op, projections = functional.bottleneck, (down.weight, up.weight, down.bias, up.bias)
    elif type(down).__name__ == type(up).__name__ == "PHMLayer":
        (rule_down, w_down), (rule_up, w_up) = _phm(down), _phm(up)
        if _by_factors(adapter):
            op, projections = functional.phm_bottleneck, (rule_down, *w_down, rule_up, *w_up, down.b, up.b)
        else:
            matrices = [kronecker_sum(rule, w[0] if len(w) == 1 else factor_product(*w)) for rule, w in ((rule_down, w_down), (rule_up, w_up))]
            op, projections = functional.bottleneck, (*(matrix.t() for matrix in matrices), down.b, up.b)
    else:
        return None
    vectors = (*before[0].parameters(),) if before else ()
    if isinstance(scaling, Tensor):
        common["scale" if scaling.numel() == 1 else "gate"] = scaling
        vectors = (*vectors, scaling)
    else:
        common["scale"] = float(scaling)
    return (op, projections, common) if fits(x, *projections, *vectors) else None


def _by_factors(adapter: Any) -> bool:
    """Whether a Compacter adapter's projections need not be formed. The op of factors takes a number as its scale, and one rank."""
    down, up = adapter.adapter_down[-2], adapter.adapter_up
    return down.factorized_phm_W and up.factorized_phm_W and down.phm_rank == up.phm_rank and isinstance(adapter.scaling, (int, float))


def _phm(layer: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A Compacter projection's rule, and its W or the two factors of it; what all layers share is in the forward's context, as in the library."""
    shared: Any = None
    if layer.shared_W_phm or layer.shared_phm_rule:
        shared = _forward_context(type(layer)).shared_parameters[layer.name]

    def get(name: str, from_shared: bool) -> Tensor:
        return shared[name] if from_shared else getattr(layer, name)

    def names(factorised: bool, stem: str) -> tuple[str, ...]:
        return (f"{stem}_left", f"{stem}_right") if factorised else (stem,)

    rules = [get(name, layer.shared_phm_rule) for name in names(layer.factorized_phm_rule, "phm_rule")]
    stem = f"W_{layer.position}" if layer.shared_W_phm else "W"
    weights = tuple(get(name, layer.shared_W_phm) for name in names(layer.factorized_phm_W, stem))
    return rules[0] if len(rules) == 1 else rules[0] * rules[1], weights


def _forward(adapter: Any) -> str:
    return getattr(type(adapter).forward, "__qualname__", "").split("<locals>.")[-1]


def recognise(module: nn.Module) -> Kind | Foreign | None:
    """A place of bottleneck adapters: a module with the library's ``compose_single`` over ``adapters`` that are bottlenecks. Other methods of the library are named."""
    cls = module._base if isinstance(module, Fused) else type(module)
    names = {c.__name__ for c in cls.__mro__}
    if "BottleneckLayer" in names and hasattr(cls, "compose_single") and hasattr(module, "adapters"):
        layer: Any = module
        kinds, ops = set[str](), set[str]()
        for name, adapter in layer.adapters.items():
            if _forward(adapter) not in ("Adapter.forward", _PARALLEL) or not all(hasattr(adapter, part) for part in _PARTS):
                return Foreign(f"AdapterHub's {cls.__name__}", f"its adapter {name!r}, a {type(adapter).__name__}, is no bottleneck of the library")
            phm = type(adapter.adapter_up).__name__ == "PHMLayer"
            kinds.add(f"{'parallel ' if _forward(adapter) == _PARALLEL else ''}{'Compacter' if phm else 'bottleneck'} adapter")
            ops.add("phm_bottleneck" if phm and _by_factors(adapter) else "bottleneck")
        if not layer.adapters:
            return None
        notes = [f"{name!r} runs as before: no op has its activation" for name, adapter in layer.adapters.items() if activation_name(adapter.non_linearity.f) is None]
        return Kind(f"AdapterHub's {' and '.join(sorted(kinds))}", " and ".join(sorted(ops)), _BottleneckLayer, "; ".join(notes))
    if "AdapterLayerBase" in names and len(getattr(module, getattr(module, "adapter_modules_name", ""), ())) > 0:
        return Foreign(f"AdapterHub's {cls.__name__}", "only bottleneck, parallel and Compacter adapters have a fused op")
    return None


# Files.

_CONFIG, _FILES = "adapter_config.json", ("pytorch_adapter.bin", "adapter.safetensors")
# What a config must say, or leave out.
_FIXED: dict[str, Any] = {
    "original_ln_after": True, "ln_before": False, "ln_after": False, "use_gating": False, "dropout": 0.0, "stochastic_depth": 0.0, "inv_adapter": None, "leave_out": [],
    "learn_phm": True, "phm_bias": True,
}  # fmt: skip
_ACTIVATION_NAMES = {"gelu_new": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
# By model type and place, the name of the module that holds the adapters; T5's sub-layers hold them themselves.
_HOLDERS = {
    "bart": {"self_attention": "attention_adapters.", "cross_attention": "cross_attention_adapters.", "feed_forward": "output_adapters."},
    "t5": {"self_attention": "", "cross_attention": "", "feed_forward": ""},
}
_NAMES = {"down_sampler": "adapter_down.0", "up_sampler": "adapter_up"}
_SHARED = {"bart": "model.shared_parameters", "t5": "shared_parameters"}
_LOST = "AdapterHub leaves the tensors that a T5's Compacter adapters share out of its files"


def from_adapterhub(model: nn.Module, directory: str | os.PathLike[str], *, name: str = "default", dtype: torch.dtype | None = None) -> Handle:
    """Patches a BART or T5 with the bottlenecks of a directory of AdapterHub's ``save_adapter``, and loads its tensors; `Handle.save` then writes fastadapt's file.

    The adapters are of the kinds ``seq_bn`` (Pfeiffer), ``double_seq_bn`` (Houlsby), ``par_bn``, ``compacter`` or ``compacter++``, at any places, of one rank, without layer norms
    and gates of their own and with a number as scale. AdapterHub puts a host's dropout before the adapter, fastadapt behind it as VL-Adapter does, so training differs by that and
    evaluation does not.

    Args:
        model: the base model.
        directory: holds ``adapter_config.json``, and ``pytorch_adapter.bin`` or ``adapter.safetensors``.
        name, dtype: as in `fastadapt.patch`.

    Raises:
        fastadapt.patching.AdapterFileError: the files are missing, hold another kind of adapter, or do not fit the model, which stays as it was.
        ValueError, TypeError: see `fastadapt.patch`.
    """
    check_model(model)
    saved, tensors, file = _read(Path(directory))
    method, options = _options(Path(directory) / _CONFIG, saved, file, tensors)
    handle = patching.patch(model, method, name=name, dtype=dtype, **options)
    try:
        targets = _places(handle, saved["model_type"], saved["name"], None)
        unequal = sorted(targets.keys() ^ tensors.keys())
        if unequal and all(".shared_parameters." in f".{key}" and key in targets for key in unequal):
            raise AdapterFileError(f"{file}: {', '.join(unequal)} are not there: {_LOST}")
        if unequal:
            raise AdapterFileError(f"{file}: {len(unequal)} tensors are in the file or in the model only: {_some(unequal)}")
        if wrong := [key for key, tensor in tensors.items() if tensor.shape != targets[key].shape]:
            raise AdapterFileError(f"{file}: {wrong[0]} is {tuple(tensors[wrong[0]].shape)}; the model has {tuple(targets[wrong[0]].shape)}")
        with torch.no_grad():
            for key, tensor in tensors.items():
                targets[key].copy_(tensor)
    except BaseException:
        handle.unpatch(restore_base=True)
        raise
    return handle


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    """The config of a directory, its tensors, and the file that holds them."""
    try:
        saved = json.loads((folder / _CONFIG).read_text())
        dict(saved["config"]), saved["model_type"], saved["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{folder / _CONFIG}: is no adapter config of AdapterHub ({type(error).__name__}: {error})") from None
    file = next((folder / f for f in _FILES if (folder / f).exists()), folder / _FILES[0])
    return saved, read_state_dict(file), file


def _options(where: Path, saved: dict[str, Any], file: Path, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The method that a config's adapters are of, and its options."""
    config, kind = saved["config"], saved["model_type"]

    def must(key: str, value: Any) -> None:
        if config.get(key, value) != value:
            raise AdapterFileError(f"{where}: {key} is {config[key]!r}; only adapters with {key}={value!r} have a fastadapt method")

    for key, value in _FIXED.items():
        must(key, value)
    if isinstance(factor := config.get("reduction_factor"), dict):
        raise AdapterFileError(f"{where}: reduction_factor is {factor!r}, one per layer; only adapters of one rank have a fastadapt method")
    scale = config.get("scaling", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise AdapterFileError(f"{where}: scaling is {scale!r}; only adapters with a number as scale have a fastadapt method")
    activation = _ACTIVATION_NAMES.get(str(config.get("non_linearity")).lower())
    if kind not in _HOLDERS or activation is None:
        what = f"model_type {kind!r}" if kind not in _HOLDERS else f"non_linearity {config.get('non_linearity')!r}"
        raise AdapterFileError(f"{where}: {what} has no place in fastadapt; must be one of {', '.join(_HOLDERS if kind not in _HOLDERS else _ACTIVATION_NAMES)}")
    reads = "stream" if config.get("is_parallel") else "sum" if config.get("original_ln_before") else "output"
    if reads == "sum":
        must("residual_before_ln", True)
    biases = [t for key, t in tensors.items() if key.endswith(("adapter_down.0.bias", "adapter_down.0.b"))]
    if not biases:
        raise AdapterFileError(f"{file}: holds no bottleneck adapter")
    if unsaid := [key for key in ("mh_adapter", "output_adapter") if not isinstance(config.get(key), bool)]:
        raise AdapterFileError(f"{where}: {unsaid[0]} must be true or false, not {config.get(unsaid[0])!r}")
    places = {"self_attention": config["mh_adapter"], "cross_attention": config.get("cross_adapter", False), "feed_forward": config["output_adapter"]}
    options: dict[str, Any] = {
        "rank": biases[0].numel(),
        "activation": activation,
        "reads": reads,
        "scale": float(scale),
        "layer_norms": "none",
        "visual_embedding": False,
        **places,
    }
    if not config.get("phm_layer"):
        return "vl_adapter", options
    products = {"division": config.get("phm_dim", 4), "phm_rank": config.get("phm_rank", 1) if config.get("factorized_phm_W", True) else None}
    shared = {"shared_rule": config.get("shared_phm_rule", True), "shared_weight": config.get("shared_W_phm", False), "factorized_rule": config.get("factorized_phm_rule", False)}
    return "compacter", {**options, **products, **shared}


def to_adapterhub(handle: Handle, directory: str | os.PathLike[str], *, name: str = "default", task: str | None = None) -> None:
    """Writes a patched BART's or T5's bottlenecks as AdapterHub's ``adapter_config.json`` and ``pytorch_adapter.bin``, which its ``load_adapter`` reads on the same base.

    Args:
        handle: of a model patched with VL-Adapter's bottlenecks or Compacter's in encoder and decoder, and no trained tensor of the base.
        directory: made if it is not there.
        name: of the adapter in the file.
        task: whose adapters, where there is one per task.

    Raises:
        TypeError: ``handle`` is no `fastadapt.Handle`.
        ValueError: the model is another, the adapters are others, in some layers only, or have layer norms or an activation that AdapterHub has not, the patch trains
            tensors of the base, ``task`` is missing or unknown, or a T5's Compacter adapters share tensors.
        OSError: the directory cannot be written.
    """
    check_handle(handle)
    kind = getattr(getattr(handle.model, "config", None), "model_type", None)
    if kind not in _HOLDERS:
        raise ValueError(f"handle: of a {kind!r}; must be of one of {', '.join(_HOLDERS)}")
    tensors = _places(handle, kind, name, task)
    if handle._trained:
        raise ValueError(f"handle: trains {handle._trained[0].id} of the base, which AdapterHub's file has no place for; patch with {_without_base(handle)}")
    first, *others = (_bottleneck(site.module, task) for site in handle._sites)
    if any(_config(other) != _config(first) for other in others):
        raise ValueError("handle: its adapters differ in more than their tensors, which AdapterHub's file has no place for")
    if first.activation not in _ACTIVATION_NAMES:
        raise ValueError(f"handle: AdapterHub has no activation {first.activation!r}")
    shared = {key.rpartition(".")[2] for key in tensors if key.startswith(_SHARED[kind])}
    if shared and kind == "t5":
        raise ValueError(f"handle: {_LOST}; patch with shared_rule=False and shared_weight=False")
    width, rank = first.up_sampler.weight.shape  # type: ignore[union-attr, misc]
    roles = {site.id.rpartition(".")[2] for site in handle._sites}
    own = {site.id for site in handle._sites}
    of: Any = handle.model.config
    layers = (of.encoder_layers, of.decoder_layers) if kind == "bart" else (of.num_layers, of.num_decoder_layers)
    stacks = zip(("encoder", "decoder"), layers, (roles - {"cross_attention"}, roles), strict=True)
    if absent := [place for stack, count, wanted in stacks for i in range(count) for role in sorted(wanted) if (place := f"{stack}.{i}.{role}") not in own]:
        raise ValueError(f"handle: AdapterHub's file has adapters at every layer of encoder and decoder; this patch has none at {_some(absent)}")
    # Its rank is the whole part of width / factor, in floating point.
    factor = width // rank if width % rank == 0 else width / rank * (1 - 1e-9)
    config = {
        **_FIXED, "mh_adapter": "self_attention" in roles, "cross_adapter": "cross_attention" in roles, "output_adapter": "feed_forward" in roles, "reduction_factor": factor,
        "residual_before_ln": True, "adapter_residual_before_ln": False, "init_weights": "bert", **_config(first),
        "shared_phm_rule": any(leaf.startswith("phm_rule") for leaf in shared), "shared_W_phm": any(leaf.startswith("W_") for leaf in shared),
    }  # fmt: skip
    saved = {"config": config, "hidden_size": width, "model_class": type(handle.model).__name__, "model_name": "", "model_type": kind, "name": name, "version": "adapters.1.3.0"}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, data := io.BytesIO())
    text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
    checkpoint.put({folder / _FILES[0]: data.getvalue(), folder / _CONFIG: text.encode()})


def _without_base(handle: Handle) -> str:
    """The options that train tensors of the base in this patch, as they would have to be."""
    visual = any("visual_embedding" in trained.id for trained in handle._trained)
    off: dict[str, str] = {}
    for config in handle.resolved.values():
        on = [name for name in ("biases", "add_biases", "lm_head", "language_model") if getattr(config, name)] + ["visual_embedding"] * (visual and config.visual_embedding)
        off |= dict.fromkeys(on, "False") | ({} if config.layer_norms == "none" else {"layer_norms": "'none'"}) | ({"trained_modules": "()"} if config.trained_modules else {})
    return ", ".join(f"{name}={value}" for name, value in off.items())


def _config(module: Bottleneck) -> dict[str, Any]:
    """What AdapterHub's config says of one adapter."""
    reads, down = getattr(module, "reads", "output"), module.down_sampler
    phm = {"phm_layer": False}
    if isinstance(down, PHMLinear):
        factors = {"factorized_phm_W": down.rank is not None, "factorized_phm_rule": "phm_rule" not in down._parameters}
        phm = {"phm_layer": True, "phm_dim": down.division, "phm_rank": down.rank or 1, **factors}  # type: ignore[dict-item]
    return {"non_linearity": module.activation, "scaling": module.scale, "is_parallel": reads == "stream", "original_ln_before": reads == "sum", **phm}


def _bottleneck(module: nn.Module, task: str | None) -> Bottleneck:
    if isinstance(module, PerTask):
        if task is None or task not in module.adapters:
            raise ValueError(f"task: must be one of {', '.join(module.adapters)}, whose adapters differ, not {task!r}")
        module = module.adapters[task]
    simple = type(module) in (Bottleneck, StreamBottleneck) and module.residual and (module.input_scale, module.pair) == (1.0, False)
    if (
        not simple
        or module.gate is not None
        or module.pre_layer_norm is not None
        or module.post_layer_norm is not None
        or not isinstance(module.down_sampler, (nn.Linear, PHMLinear))
    ):
        raise ValueError(f"handle: {type(module).__name__}({module.extra_repr()}) is no bottleneck of AdapterHub's")
    return module  # type: ignore[return-value]


def _places(handle: Handle, kind: str, adapter: str, task: str | None) -> dict[str, Tensor]:
    """The patched model's tensors by AdapterHub's keys. What all projections of a patch share, or all of one direction, has one key."""
    found: dict[str, Tensor] = {}
    holders: dict[int, set[str]] = {}
    for site in handle._sites:
        module = _bottleneck(site.module, task)
        holder = f"{site.owner_path}.{_HOLDERS[kind][site.id.rpartition('.')[2]]}adapters.{adapter}"
        for ours, theirs in _NAMES.items():
            for leaf, tensor in getattr(module, ours).named_parameters():
                found[f"{holder}.{theirs}.{leaf}"] = tensor
                holders.setdefault(id(tensor), set()).add(f"{holder}.{theirs}.{leaf}")
    for keys in holders.values():
        if len(keys) > 1:
            tensors = [found.pop(key) for key in keys]
            path, _, leaf = min(keys).rpartition(".")
            direction = "_down" if path.endswith(_NAMES["down_sampler"]) else "_up"
            found[f"{_SHARED[kind]}.{adapter}.{leaf if leaf.startswith('phm_rule') else 'W' + direction + leaf[1:]}"] = tensors[0]
    return found
