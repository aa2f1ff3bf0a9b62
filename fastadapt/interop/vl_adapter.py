"""The adapter classes of the VL-Adapter, VL-PET and Compacter repositories on fused ops, known by class name and attributes, since each repository has a copy of its own.

An `AdapterController` is one op: its layer norms, scale and residual are part of it. An ``Adapter``, ``HyperComplexAdapter`` or ``LowRankAdapter`` outside of a known controller is
one as well. `MetaLayersAdapterController` (Hyperformer) runs on the weights that its hypernetwork hands it, `LoRALinearController` beside its own frozen weight. Their own
``forward`` runs where ``track_z`` is on, whose regulariser reads the activations, where a part has hooks, or where an activation or a dtype is none that the op takes.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.interop.fusing import Foreign, Fused, Kind, activation_name, autocast_dtype, fits, mentions_only, plain, quiet
from fastadapt.nn.projections import factor_product, kronecker_sum

# Everything that the forwards of the repositories' classes mention; one that mentions more does more (an early copy of Compacter's classes clips gradients and clamps activations).
_ADAPTER_NAMES = {"down_sampler", "activation", "track_z", "z", "up_sampler", "use_gate", "gate"}
_PROJECTION_NAMES = {
    "LowRankLinear": {"W_left", "matmul", "W_right", "torch", "bias", "b"},
    "PHMLinear": {
        "factorized_phm", "torch", "bmm", "W_left", "W_right", "factorized_phm_rule", "phm_rule_left", "phm_rule_right", "matvec_product", "W", "b", "phm_rule", "kronecker_prod",
    },
}  # fmt: skip
_LORA_NAMES = {"F", "linear", "weight", "bias", "fan_in_fan_out", "lora_As", "lora_Bs", "training", "lora_dropout", "T", "scaling"}
_CONTROLLER_NAMES = {
    "get_task", "enable_adapters", "disable_adapters", "tasks", "use_single_adapter", "get_adapter", "add_layer_norm_before_adapter", "pre_layer_norm", "config",
    "use_scaling_factor", "scaling_factor", "add_layer_norm_after_adapter", "post_layer_norm", "use_parallel_adapter",
}  # fmt: skip

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An op, its weights and its options."""


class _Adapter(Fused):
    def forward(self: Any, x: Tensor) -> Tensor:
        call = _call(self, x)
        if call is None:
            return super().forward(x)  # type: ignore[misc]
        op, weights, options = call
        return op(x, *weights, residual=None, **options)


class _Controller(Fused):
    parts = ("adapters", "pre_layer_norm", "post_layer_norm")
    switches = False
    """Whether every call makes the task's parameters the only trained ones, as the Compacter repository's does."""

    def forward(self: Any, inputs: Tensor, task: str, y: Tensor | None = None) -> Tensor:
        others = () if y is None else (y,)
        key = self.get_task(task)
        adapter = self.get_adapter(key)
        before = self.pre_layer_norm if self.add_layer_norm_before_adapter else None
        after = self.post_layer_norm if self.add_layer_norm_after_adapter else None
        residual: Any = y if getattr(self.config, "use_parallel_adapter", False) else inputs
        if self.switches:
            self.enable_adapters(key)
            self.disable_adapters([other for other in self.tasks if other != key])
        call = _call(adapter, inputs, before, after) if quiet(adapter) and isinstance(residual, Tensor) and residual.shape == inputs.shape else None
        if call is None:
            return super().forward(inputs, task, *others)  # type: ignore[misc]
        op, weights, options = call
        if getattr(self.config, "use_scaling_factor", False):
            options["scale"] = options["scale"] * self.config.scaling_factor
        if residual.dtype != (autocast_dtype(inputs) or inputs.dtype):
            # A residual stream stays in float32 under autocast.
            return op(inputs, *weights, residual=None, **options) + residual
        return op(inputs, *weights, residual=residual, **options)


class _SwitchingController(_Controller):
    switches = True


class _MetaController(Fused):
    def forward(self: Any, inputs: Tensor, adapter_weights: Any) -> Tensor:
        down, up = adapter_weights.down, adapter_weights.up
        norms = [
            (norm.weight, norm.bias, 1e-5) if on else None
            for norm, on in ((adapter_weights.pre_norm, self.add_layer_norm_before_adapter), (adapter_weights.post_norm, self.add_layer_norm_after_adapter))
        ]
        activation = _NAMES.get(self.activation_type)
        vectors = [p for norm in norms if norm is not None for p in norm[:2]]
        if self.track_z or activation is None or not fits(inputs, down.weight, up.weight, down.bias, up.bias, *vectors):
            return super().forward(inputs, adapter_weights)  # type: ignore[misc]
        options: dict[str, Any] = {"activation": activation, "norm_before": norms[0], "norm_after": norms[1]}
        if inputs.dtype != (autocast_dtype(inputs) or inputs.dtype):
            return functional.bottleneck(inputs, down.weight, up.weight, down.bias, up.bias, residual=None, **options) + inputs
        return functional.bottleneck(inputs, down.weight, up.weight, down.bias, up.bias, **options)


# transformers' names of activations.
_NAMES = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu", "linear": "identity"}


class _LoRALinear(Fused):
    parts = ("lora_As", "lora_Bs", "lora_dropout")

    def forward(self: Any, x: Tensor, task: str) -> Tensor:
        a, b = self.lora_As[task], self.lora_Bs[task]
        # Without dropout the attribute is a function.
        dropout = self.lora_dropout.p if isinstance(self.lora_dropout, nn.Dropout) and self.training and self.lora_dropout.training else 0.0
        if not fits(x, a, b) or dropout == 1.0:
            return super().forward(x, task)  # type: ignore[misc]
        y = F.linear(x, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)
        return functional.lora(x, y, a, b, scale=float(self.scaling), dropout=dropout)


def _call(adapter: Any, x: Tensor, before: Any = None, after: Any = None) -> Call | None:
    """The op that an adapter between two layer norms is; None: none takes it."""
    down, up, activation = adapter.down_sampler, adapter.up_sampler, activation_name(adapter.activation.f)
    if getattr(adapter, "track_z", False) or activation is None or not all(quiet(part) for part in (down, up, adapter.activation)):
        return None
    if any(norm is not None and not plain(norm, nn.LayerNorm) for norm in (before, after)):
        return None
    gate = adapter.gate if getattr(adapter, "use_gate", False) else None
    options: dict[str, Any] = {"activation": activation, "scale": 1.0 if gate is None else gate}
    options |= {name: None if norm is None else (norm.weight, norm.bias, norm.eps) for name, norm in (("norm_before", before), ("norm_after", after))}
    found = _projections(down, up, gate is not None)
    if found is None:
        return None
    op, weights = found
    norms = [p for norm in (before, after) if norm is not None for p in (norm.weight, norm.bias)]
    return (op, weights, options) if fits(x, *weights, gate, *norms) else None


def _projections(down: Any, up: Any, gated: bool) -> tuple[Any, tuple[Any, ...]] | None:
    if plain(down) and plain(up):
        return functional.bottleneck, (down.weight, up.weight, down.bias, up.bias)
    kinds = {type(down).__name__, type(up).__name__}
    if kinds == {"LowRankLinear"}:
        return functional.bottleneck, ((down.W_left @ down.W_right).t(), (up.W_left @ up.W_right).t(), getattr(down, "b", None), getattr(up, "b", None))
    if kinds != {"PHMLinear"}:
        return None
    rules: list[Any] = []
    factors: list[list[Any]] = []
    for layer in (down, up):
        rule: list[Any] = [getattr(layer, name, None) for name in (("phm_rule_left", "phm_rule_right") if layer.factorized_phm_rule else ("phm_rule",))]
        w = [getattr(layer, name, None) for name in (("W_left", "W_right") if layer.factorized_phm else ("W",))]
        if not all(isinstance(t, Tensor) for t in (*rule, *w)):  # a shared one that nobody has set
            return None
        rules.append(rule[0] if len(rule) == 1 else rule[0] * rule[1])
        factors.append(w)
    biases = (getattr(down, "b", None), getattr(up, "b", None))
    if not gated and _by_factors(down, up):
        return functional.phm_bottleneck, (rules[0], *factors[0], rules[1], *factors[1], *biases)
    matrices = [kronecker_sum(rule, w[0] if len(w) == 1 else factor_product(*w)).t() for rule, w in zip(rules, factors, strict=True)]
    return functional.bottleneck, (*matrices, *biases)


def _by_factors(down: Any, up: Any) -> bool:
    """Whether the projections are Kronecker products whose factors the op takes, so that they need not be formed."""
    return all(type(layer).__name__ == "PHMLinear" and layer.factorized_phm for layer in (down, up)) and down.phm_rank == up.phm_rank


_ADAPTERS = ("Adapter", "HyperComplexAdapter", "LowRankAdapter")
_MORE = "its forward does more than the repositories'"
# VL-PET's layers have all of these attributes, most of them None.
_VLPET_PART = re.compile(r"\w+_adapter_multihead_(down|up)|\w+_gating_(large_x(_down|_up)?|small_xy_cat|middle_xy_add|middle_ia3_add|layernorm)|\w+_ia3")


def _op(adapter: Any) -> str:
    return "phm_bottleneck" if _by_factors(adapter.down_sampler, adapter.up_sampler) and not getattr(adapter, "use_gate", False) else "bottleneck"


def _reason(adapter: Any) -> str:
    """Why an adapter has no op; "": it has one."""
    cls = _class(adapter)
    if _arguments(cls) != ["x"] or not mentions_only(cls, _ADAPTER_NAMES):
        return _MORE
    if activation_name(adapter.activation.f) is None:
        return "no op has its activation"
    down, up = adapter.down_sampler, adapter.up_sampler
    if isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
        return ""
    kind = type(down).__name__
    if type(up).__name__ != kind or kind not in _PROJECTION_NAMES:
        return f"its projections are a {kind} and a {type(up).__name__}"
    if not all(mentions_only(type(layer), _PROJECTION_NAMES[kind]) for layer in (down, up)):
        return f"the forward of its {kind}s does more than the repositories'"
    if kind == "LowRankLinear" and down.rank > 1 and type(down).forward.__code__.co_names[:3] != ("W_left", "matmul", "W_right"):
        # VL-Adapter takes the product of the factors, Compacter multiplies their elements, which is the same for rank 1 and an error for others.
        return f"its rank is {down.rank} and its factors are multiplied by elements"
    return ""


def _is_adapter(module: Any) -> bool:
    return _class(module).__name__ in _ADAPTERS and all(hasattr(module, name) for name in ("down_sampler", "up_sampler", "activation")) and hasattr(module.activation, "f")


def _class(module: nn.Module) -> type[nn.Module]:
    return module._base if isinstance(module, Fused) else type(module)


def _arguments(cls: type[nn.Module]) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]


def recognise(module: nn.Module) -> Kind | Foreign | None:
    """The repositories' classes, by name, attributes and the arguments of their ``forward``."""
    cls: Any = _class(module)
    layer: Any = module
    name = cls.__name__
    if name in _ADAPTERS and _is_adapter(layer):
        why = _reason(layer)
        return Foreign(name, why) if why else Kind(name, _op(layer), _Adapter, _note(layer))
    if name == "AdapterController" and hasattr(layer, "get_adapter") and _arguments(cls) in (["inputs", "task"], ["inputs", "task", "y"]):
        adapters = list(layer.adapters.values())
        if not adapters or not all(_is_adapter(adapter) and not _reason(adapter) for adapter in adapters) or not mentions_only(cls, _CONTROLLER_NAMES):
            return None  # its adapters are layers by themselves
        mixin = _SwitchingController if "enable_adapters" in cls.forward.__code__.co_names else _Controller
        return Kind(f"{name} of {_class(adapters[0]).__name__}s", _op(adapters[0]), mixin, _note(adapters[0]))
    if name == "MetaLayersAdapterController" and hasattr(layer, "activation_type"):
        if _arguments(cls) != ["inputs", "adapter_weights"]:
            return Foreign(name, _MORE)
        if layer.activation_type not in _NAMES:
            return Foreign(name, "no op has its activation")
        return Kind(name, "bottleneck", _MetaController, _note(layer))
    if name == "LoRALinearController" and hasattr(layer, "lora_As"):
        return Kind(name, "lora", _LoRALinear) if _arguments(cls) == ["x", "task"] and mentions_only(cls, _LORA_NAMES) else Foreign(name, _MORE)
    if any(part is not None and _VLPET_PART.fullmatch(own) for own, part in (*module._modules.items(), *module._parameters.items())):
        return Foreign(
            f"VL-PET's {name}",
            "its multi-head adapters, gates and vectors are lines of its own forward; fastadapt.patch(model, 'vlpet') and interop.load_published have them fused",
        )
    if name in ("OutputAdapter", "VisualAdapter") and any(hasattr(layer, part) for part in ("up_sampler", "adapter_kind")):
        return Foreign(name, "no op has an output of another width than its input" if name == "OutputAdapter" else "no op has convolutions and batch norms")
    return None


def _note(module: Any) -> str:
    return "track_z is on: runs as before, for the regulariser that reads its activations" if getattr(module, "track_z", False) else ""
