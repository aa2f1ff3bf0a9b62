"""VL-PET (ICCV 2023): granularity-controlled adapters in the encoder, lightweight adapters in the decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target, are_several, checked, per_task
from fastadapt.methods.compacter import CompacterConfig, LowRankAdapterConfig
from fastadapt.methods.lora import LoRAConfig
from fastadapt.methods.vl_adapter import VLAdapterConfig
from fastadapt.nn import IA3, Bottleneck, Gate, GatedBottleneck, GatingOnly, Init, LoRA, ValueParallelAdapter, ValueResidual, in_turn

GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small", "layernorm", "l2norm", "none")
ADAPTERS = ("bottleneck", "compacter", "low_rank", "lora", "none")
_VALUES = ("value_parallel", "value_sequential", "value_ia3")
_SEQUENTIAL = ("self_attention", "cross_attention", "feed_forward")
DECODER = (*_VALUES, "key_value", *_SEQUENTIAL, "multihead", "feed_forward_ia3")
_ENCODER_ROLES = ("encoder.self_attention", "encoder.feed_forward")
# The last layer of each gate. At zero, its logistic is 1/2 and middleY's 1 + v is 1.
_GATE_ENDS = ("gate_up", "gate", "gate_vector")


def _each(name: str, kind: str, values: Any) -> Any:
    """`checked` of an option that may be one value or several."""
    return tuple(checked(name, kind, value) for value in values) if isinstance(values, Sequence) and not isinstance(values, str) else checked(name, kind, values)


@dataclass(frozen=True, kw_only=True)
class VLPETConfig(MethodConfig):
    """VL-PET-large, -middleX, -middleY and -small, and the further modules of the published code. VL-PET's modules on VL-Adapter are ``heads=1``; on Compacter,
    ``adapter="compacter"`` (paper, table 9).

    With ``init="repo"`` patching changes the model's output, as published: a gate near 1/2 halves every encoder sub-layer (BART), or the multiplier is exactly 0.15, for middleY
    0.3 (T5). With ``init="identity"`` the up-projections and the gates' last layers start at zero and ``scale`` makes up for the gates (2; middleY or no gate: 1; twice that
    with ``gating_rank``), so the output stays exactly what it was.

    What the published code builds to no effect, or wrongly, is not here: multi-head value adapters, value adapters and IA3 in self-attention, the encoder's included (their results
    are dropped), the key adapter (it scrambles the heads), and the switch that leaves out the adapters of the encoder's attention (half of them stay). The published code has
    everything but the four designs, their scales and the ungated adapter on BART only.

    Args:
        granularity: "large", "middleX", "middleY", "small", or "large_full", the full-rank gate of "large"; "layernorm" or "l2norm" in the place of a gate; "none".
        adapter: of the encoder's sub-layers, under the gate: "bottleneck"; "compacter" or "low_rank", the same with such projections, in the decoder too; "lora", LoRA beside the
            encoder's query and value projections (as `LoRAConfig` has it, without its trained biases); "none".
        adapter_options: options of `CompacterConfig`, `LowRankAdapterConfig` or `LoRAConfig` that say what the adapter is ({"division": 4, "phm_rank": 1}).
        rank, heads: multi-head bottleneck of the encoder, and of the decoder's "multihead"; published: 96 and 4 on BART, 192 and 4 on T5.
        gate_rank: rank of the gate of "large"; published: 96 on BART, 192 on T5.
        combine: "multiply" or "add".
        pair: the down-up-pair form of the heads, a block-diagonal up-projection.
        gating_rank: rank of the "gating only" module behind adapter and gate (`fastadapt.nn.GatingOnly`); None: none.
        gating_add_first: its second form.
        scale: factor of the encoder's gated output; published: 1 on BART, 0.3 on T5.
        input_scale, adapter_scale: factors of the sub-layer's output and of the adapter; ``adapter_scale`` may be a pair, for self-attention and feed-forward.
        decoder: the decoder's modules, one name or several:

            * "value_parallel": an adapter of kv beside the value projection of cross-attention, V = v_proj(kv) + adapter(kv); published;
            * "value_sequential": V = kv + adapter(kv), without the projection, as the published code has it;
            * "value_ia3": V = v_proj(kv) times a vector;
            * "key_value": an adapter of kv before both the key and the value projection;
            * "self_attention", "cross_attention", "feed_forward": an adapter behind that sub-layer, of its own rank (``decoder_ranks``);
            * "multihead": an adapter with ``rank`` and ``heads`` behind all three;
            * "feed_forward_ia3": a vector on the activations of the feed-forward network;
            * none of them: ().
        value_rank: rank of "value_parallel", "value_sequential" and "key_value"; published: 96.
        value_scale: factor of the adapter of "value_parallel" and "value_sequential".
        value_residual: adds kv to the values, behind everything else.
        value_gate_rank: with it, rank of a gate of the values by kv (`fastadapt.nn.ValueResidual`); None: no gate.
        decoder_ranks: one number, or one for each of "self_attention", "cross_attention" and "feed_forward" that ``decoder`` names, in that order; 96.
        cross_gate_rank: rank of a gate "large" behind the adapter of "cross_attention"; None: no gate.
        ia3_add: IA3 as V + V v.
        ia3_one: vectors of IA3 and of middleY start at one instead of N(0, 0.02^2).
        sharing: "single", or "multiple": adapters of the decoder's attention and feed-forward one per task. What is VL-PET's own (encoder, multi-head, gates, IA3) has no tasks.
        activation: of all bottlenecks.
        save_gate: see `fastadapt.nn.GatedBottleneck`.
        layer_norms: published: "encoder"; "none" where nothing is published, and the rest there as on BART.
        visual_embedding: see `MethodConfig`.
    """

    method: ClassVar[str] = "vlpet"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "bart": {"rank": 96, "heads": 4, "gate_rank": 96, "value_rank": 96, "decoder_ranks": 96, "scale": 1.0, "layer_norms": "encoder"},
        "t5": {"rank": 192, "heads": 4, "gate_rank": 192, "value_rank": 96, "decoder_ranks": 96, "scale": 0.3, "layer_norms": "encoder"},
        "other hosts": {"rank": 96, "heads": 4, "gate_rank": 96, "value_rank": 96, "decoder_ranks": 96, "scale": 1.0, "layer_norms": "none"},
    }

    granularity: Literal["large", "large_full", "middleX", "middleY", "small", "layernorm", "l2norm", "none"] = "large"
    adapter: Literal["bottleneck", "compacter", "low_rank", "lora", "none"] = "bottleneck"
    adapter_options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    heads: int | None = None
    gate_rank: int | None = None
    value_rank: int | None = None
    combine: Literal["multiply", "add"] = "multiply"
    pair: bool = False
    gating_rank: int | None = None
    gating_add_first: bool = False
    scale: float | None = None
    input_scale: float = 1.0
    adapter_scale: float | tuple[float, float] = 1.0
    decoder: str | Sequence[str] = ("value_parallel",)
    value_scale: float = 1.0
    value_residual: bool = False
    value_gate_rank: int | None = None
    decoder_ranks: int | Sequence[int] | None = None
    cross_gate_rank: int | None = None
    ia3_add: bool = False
    ia3_one: bool = False
    sharing: Literal["single", "multiple"] = "single"
    activation: str = "gelu_new"
    save_gate: bool | None = field(default=None, compare=False)

    def resolved(self, family: str, init: str) -> Self:
        config = self._checked()
        if init == "identity":
            config = dataclasses.replace(config, scale=config._neutral())
        config = super(VLPETConfig, config).resolved(family, init)
        unused: dict[str, Any] = {name: None for name, (used, _) in config._ranks().items() if not used}
        sequential = sum(part in _SEQUENTIAL for part in config.decoder)
        if sequential and isinstance(config.decoder_ranks, int):
            config = dataclasses.replace(config, decoder_ranks=(config.decoder_ranks,) * sequential)
        return dataclasses.replace(config, **unused)

    def _checked(self) -> Self:
        """The config with sequences as tuples; what no rank, size or module can be found for is refused."""
        parts = tuple(self.decoder) if are_several(self.decoder) else (self.decoder,)
        if unknown := [part for part in parts if part not in DECODER]:
            raise ValueError(f"decoder: {', '.join(map(repr, unknown))} is unknown; must be of {', '.join(DECODER)}")
        parts = tuple(part for part in DECODER if part in parts)
        for one in (*_VALUES, "multihead"):
            rivals = _SEQUENTIAL if one == "multihead" else _VALUES
            if one in parts and (found := [part for part in parts if part in rivals and part != one]):
                raise ValueError(f"decoder: {one} and {', '.join(found)} exclude each other")
        for name, known in (("granularity", GRANULARITIES), ("adapter", ADAPTERS), ("combine", ("multiply", "add")), ("sharing", ("single", "multiple"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; must be one of {', '.join(known)}")
        made = self._adapter()
        config = dataclasses.replace(
            self,
            decoder=parts,
            adapter_options={} if made is None else {name: getattr(made, name) for name in self.adapter_options},
            decoder_ranks=None if self.decoder_ranks is None else _each("decoder_ranks", "int", self.decoder_ranks),
            adapter_scale=_each("adapter_scale", "float", self.adapter_scale),
        )
        for name, (used, why) in config._ranks().items():
            if getattr(config, name) is not None and not used:
                raise ValueError(f"{name}: {why}")
        sequential = [part for part in parts if part in _SEQUENTIAL]
        if isinstance(config.decoder_ranks, tuple) and len(config.decoder_ranks) != len(sequential):
            raise ValueError(f"decoder_ranks: {len(config.decoder_ranks)} numbers for {len(sequential)} adapters, {', '.join(sequential)}")
        if isinstance(config.adapter_scale, tuple) and len(config.adapter_scale) != 2:
            raise ValueError(f"adapter_scale: must be a number or one for self-attention and one for feed-forward, not {config.adapter_scale!r}")
        if not config._encoder_adapter() and (config.input_scale, config.adapter_scale) != (1.0, 1.0):
            raise ValueError(f"input_scale, adapter_scale: adapter={config.adapter!r} puts no bottleneck behind a sub-layer that could be scaled")
        ia3 = any(part.endswith("ia3") for part in parts)
        for name, needs, there in (
            ("value_gate_rank", "value_residual=True", config.value_gate_rank is None or config.value_residual),
            ("cross_gate_rank", "'cross_attention' in decoder", config.cross_gate_rank is None or "cross_attention" in parts),
            ("gating_add_first", "a gating_rank", not config.gating_add_first or config.gating_rank is not None),
            ("ia3_add", "an IA3 in decoder", not config.ia3_add or ia3),
            ("ia3_one", "an IA3 in decoder, or granularity='middleY'", not config.ia3_one or ia3 or config.granularity == "middleY"),
            ("combine", "a gate to add", config.combine == "multiply" or config.granularity in GRANULARITIES[:5]),
        ):
            if not there:
                raise ValueError(f"{name}: {getattr(config, name)!r} needs {needs}")
        return config

    def _ranks(self) -> dict[str, tuple[bool, str]]:
        """Options that have published values: whether this config uses them, and why not."""
        heads, known = self._encoder_adapter() or "multihead" in self.decoder, f"decoder={list(self.decoder)}"
        return {
            "gate_rank": (self.granularity == "large", f"granularity {self.granularity!r} has no gate rank"),
            "rank": (heads, f"adapter={self.adapter!r} and {known} have no multi-head adapter"),
            "heads": (heads, f"adapter={self.adapter!r} and {known} have no multi-head adapter"),
            "value_rank": (any(part in self.decoder for part in ("value_parallel", "value_sequential", "key_value")), f"{known} has no adapter of the encoder's output"),
            "decoder_ranks": (any(part in self.decoder for part in _SEQUENTIAL), f"{known} has no adapter with a rank of its own"),
        }

    def _neutral(self) -> float:
        """The scale at which gates that start at 1/2 change nothing."""
        changed = [f"{name}={getattr(self, name)!r}" for name in ("combine", "input_scale") if getattr(self, name) not in ("multiply", 1.0)]
        changed += [f"granularity={self.granularity!r}"] if self.granularity in ("layernorm", "l2norm") else []
        changed += ["value_residual=True"] if self.value_residual else []
        changed += ["decoder='value_sequential'"] if "value_sequential" in self.decoder else []
        if changed:
            raise ValueError(f"init: 'identity' needs combine='multiply' and input_scale=1, and no layernorm, l2norm, value_residual or value_sequential; not {', '.join(changed)}")
        neutral = (1.0 if self.granularity in ("middleY", "none") else 2.0) * (1.0 if self.gating_rank is None else 2.0)
        if self.scale not in (None, neutral):
            raise ValueError(f"scale: init='identity' with granularity {self.granularity!r} needs scale={neutral}, not {self.scale!r}")
        if self.ia3_one and self.granularity == "middleY":
            raise ValueError("ia3_one: init='identity' starts middleY's vector at zero")
        return neutral

    def _encoder_adapter(self) -> bool:
        """Whether there are bottlenecks behind the encoder's sub-layers."""
        return self.adapter not in ("lora", "none")

    def _adapter(self) -> VLAdapterConfig | LoRAConfig | None:
        """The config of the method whose adapter it is; None for VL-PET's own."""
        kinds: dict[str, tuple[type[VLAdapterConfig] | type[LoRAConfig], type[MethodConfig]]] = {
            "compacter": (CompacterConfig, VLAdapterConfig),
            "low_rank": (LowRankAdapterConfig, VLAdapterConfig),
            "lora": (LoRAConfig, MethodConfig),
        }
        kind, base = kinds.get(self.adapter, (None, None))
        own = [] if kind is None else [f.name for f in dataclasses.fields(kind)]
        other = {"sharing", "shared_rule_over_tasks"} | (set() if base is None else {f.name for f in dataclasses.fields(base)})
        known = [name for name in own if name not in other]
        if not isinstance(self.adapter_options, Mapping):
            raise ValueError(f"adapter_options: must be {{option: value}}, not {self.adapter_options!r}")
        if unknown := [name for name in self.adapter_options if name not in known]:
            raise ValueError(f"adapter_options: adapter={self.adapter!r} has no option {', '.join(map(repr, unknown))}; known: {', '.join(known) or 'none'}")
        return None if kind is None else kind(**self.adapter_options)

    def roles(self) -> tuple[str, ...]:
        roles = list(_ENCODER_ROLES) if self._encoder_adapter() or self.granularity != "none" or self.gating_rank is not None else []
        roles += [f"encoder.self_attention.{projection}" for projection in ("query", "value")] if self.adapter == "lora" else []
        roles += [f"decoder.{part}" for part in _SEQUENTIAL if part in self.decoder or "multihead" in self.decoder]
        if self.value_residual or any(part in self.decoder for part in _VALUES):
            roles.append("decoder.cross_attention.value")
        roles += ["decoder.cross_attention.key_value"] if "key_value" in self.decoder else []
        roles += ["decoder.feed_forward.inner"] if "feed_forward_ia3" in self.decoder else []
        return tuple(roles)

    def reads_stream(self, role: str) -> bool:
        if role in _ENCODER_ROLES:
            return self.gating_rank is not None or self.granularity not in ("middleY", "layernorm", "l2norm", "none")
        return role == "decoder.cross_attention" and self.cross_gate_rank is not None

    def reads_whole_sequence(self, role: str) -> bool:
        return role in _ENCODER_ROLES and self.granularity == "small"

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        # The published T5 runs start from zero up-projections and gate ends, BART's from the host's rule throughout.
        published = init == "repo" and target.family != "t5"
        one = ("gate_vector",) if self.ia3_one else ()
        rule = Init(target.init.std, () if published else ("up_sampler", *_GATE_ENDS), one=one)
        # Nothing is published of the other modules on T5: they start by the host's rule too.
        other = Init(target.init.std, ("up_sampler", *_GATE_ENDS) if init == "identity" else ())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if role in _ENCODER_ROLES:
            return self._encoder(_ENCODER_ROLES.index(role), target, rule, other, factory)
        if role.startswith("encoder."):
            lora: Any = self._adapter()
            return LoRA(target.width, target.out_width, lora.rank, alpha=lora.alpha, dropout=lora.dropout, **factory)
        ia3 = Init(target.init.std, ("ia3",) if init == "identity" and self.ia3_add else (), one=("ia3",) if self.ia3_one or (init == "identity" and not self.ia3_add) else ())
        if role == "decoder.feed_forward.inner":
            return IA3(target.width, add=self.ia3_add, init=ia3, **factory)
        if role == "decoder.cross_attention.value":
            return self._value(target, rule, other, ia3, factory)
        if role == "decoder.cross_attention.key_value":
            return self._per_task(target, self.value_rank, other, factory)
        part = role.partition(".")[2]
        if part not in self.decoder:
            return self._bottleneck(Bottleneck, target, self.rank, other, heads=self.heads, pair=self.pair, **factory)
        rank = self.decoder_ranks[[p for p in self.decoder if p in _SEQUENTIAL].index(part)]  # type: ignore[index]
        if part != "cross_attention" or self.cross_gate_rank is None:
            return self._per_task(target, rank, other, factory)
        # The gate is VL-PET's own and the adapter may be one per task, but one operation runs both.
        if self.sharing == "single":
            return self._bottleneck(GatedBottleneck, target, rank, other, gate_rank=self.cross_gate_rank, scale=2.0 if init == "identity" else 1.0, **factory)
        gate = Gate(target.width, "large", gate_rank=self.cross_gate_rank, activation=self.activation, scale=2.0 if init == "identity" else 1.0, init=other, **factory)
        return in_turn({"adapter": self._per_task(target, rank, other, factory), "gate": gate})

    def one_task(self) -> Self:
        """As `MethodConfig.one_task`; a gated cross-attention adapter for one task is one operation, whose parameters have other names."""
        if self.sharing == "multiple" and self.cross_gate_rank is not None and "cross_attention" in self.decoder:
            raise ValueError("task: adapters per task behind a gate of cross-attention (cross_gate_rank) are no adapters of one task; save or load all tasks")
        return super().one_task()

    def _encoder(self, index: int, target: Target, rule: Init, other: Init, factory: dict[str, Any]) -> nn.Module:
        """Adapter, gate and gating-only module, in this order; ``scale`` is behind the last of them."""
        gate: dict[str, Any] = {"granularity": self.granularity, "gate_rank": self.gate_rank, "combine": self.combine}
        adapter_scale = self.adapter_scale[index] if isinstance(self.adapter_scale, tuple) else self.adapter_scale
        scale: Any = self.scale if self.gating_rank is None else 1.0
        parts: dict[str, nn.Module] = {}
        if self._encoder_adapter():
            shape: dict[str, Any] = {"heads": self.heads, "pair": self.pair, **factory}
            if self.granularity in GRANULARITIES[:5]:
                shape |= {**gate, "input_scale": self.input_scale, "adapter_scale": adapter_scale, "scale": scale, "save_gate": self.save_gate}
                parts["adapter"] = self._bottleneck(GatedBottleneck, target, self.rank, rule, **shape)
            else:
                factor = scale if self.granularity == "none" else 1.0
                parts["adapter"] = self._bottleneck(Bottleneck, target, self.rank, rule, scale=factor * adapter_scale, input_scale=factor * self.input_scale, **shape)
        if self.granularity != "none" and not isinstance(parts.get("adapter"), GatedBottleneck):
            parts["gate"] = Gate(target.width, **gate, activation=self.activation, scale=scale, init=rule, **factory)
        if self.gating_rank is not None:
            options: dict[str, Any] = {"add_first": self.gating_add_first, "activation": self.activation, "scale": self.scale}
            parts["gating"] = GatingOnly(target.width, self.gating_rank, **options, init=other, **factory)
        return in_turn(parts)

    def _value(self, target: Target, rule: Init, other: Init, ia3: Init, factory: dict[str, Any]) -> nn.Module:
        parts: dict[str, nn.Module] = {}
        if target.width != target.out_width and (self.value_residual or "value_ia3" not in self.decoder):
            raise ValueError(f"model: {target.path} maps {target.width} to {target.out_width}; an adapter beside it needs one width on both sides")
        if "value_parallel" in self.decoder:
            parts["adapter"] = self._per_task(target, self.value_rank, rule, factory, ValueParallelAdapter, scale=self.value_scale)
        if "value_sequential" in self.decoder:
            parts["adapter"] = self._per_task(target, self.value_rank, other, factory, scale=self.value_scale)
        if "value_ia3" in self.decoder:
            parts["ia3"] = IA3(target.out_width, add=self.ia3_add, init=ia3, **factory)
        if self.value_residual:
            parts["residual"] = ValueResidual(target.width, self.value_gate_rank, activation=self.activation, init=other, **factory)
        return in_turn(parts, beside=True)

    def _per_task(self, target: Target, rank: int | None, init: Init, factory: dict[str, Any], kind: type[Bottleneck] = Bottleneck, **options: Any) -> nn.Module:
        return per_task(self.sharing, target, lambda: self._bottleneck(kind, target, rank, init, **options, **factory))

    def _bottleneck(self, kind: type[nn.Module], target: Target, rank: int | None, init: Init, **options: Any) -> Any:
        config = self._adapter()
        method = config if isinstance(config, VLAdapterConfig) else None
        adapter = kind(target.width, rank, activation=self.activation, projection=None if method is None else method.projection(), init=init, **options)
        if method is not None:
            method.connect(adapter, target)  # type: ignore[arg-type]
        return adapter
