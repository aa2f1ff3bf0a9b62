"""VL-PET (ICCV 2023): granularity-controlled adapters in the encoder, value-parallel adapters in the decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target
from fastadapt.nn import GatedBottleneck, Init, ValueParallelAdapter

# The last layer of each gate. At zero, its logistic is 1/2 and middleY's 1 + v is 1.
_GATE_ENDS = ("gate_up", "gate", "gate_vector")


@dataclass(frozen=True, kw_only=True)
class VLPETConfig(MethodConfig):
    """VL-PET-large, -middleX, -middleY and -small.

    With ``init="repo"`` patching changes the model's output, as published: a gate near 1/2 halves every encoder sub-layer (BART), or the multiplier is exactly 0.15, for middleY
    0.3 (T5). With ``init="identity"`` the up-projections and the gates' last layers start at zero and ``scale`` is 2 (middleY: 1), so the output stays exactly what it was.

    Args:
        granularity: "large", "middleX", "middleY", "small", or "large_full", the full-rank gate of "large".
        rank, heads: multi-head bottleneck of the encoder; published: 96 and 4 on BART, 192 and 4 on T5.
        gate_rank: rank of the gate of "large"; published: 96 on BART, 192 on T5.
        value_rank: rank of the value-parallel adapter in cross-attention; published: 96.
        combine: "multiply" or "add".
        pair: the down-up-pair form of the heads, a block-diagonal up-projection.
        scale: factor of the gated output; published: 1 on BART, 0.3 on T5.
        input_scale, adapter_scale: factors of the sub-layer's output and of the adapter.
        value_scale: factor of the value-parallel adapter.
        activation: of all bottlenecks.
        save_gate: see `fastadapt.nn.GatedBottleneck`.
        layer_norms: published: "encoder".
        visual_embedding: see `MethodConfig`.
    """

    method: ClassVar[str] = "vlpet"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "bart": {"rank": 96, "heads": 4, "gate_rank": 96, "value_rank": 96, "scale": 1.0, "layer_norms": "encoder"},
        "t5": {"rank": 192, "heads": 4, "gate_rank": 192, "value_rank": 96, "scale": 0.3, "layer_norms": "encoder"},
    }

    granularity: Literal["large", "large_full", "middleX", "middleY", "small"] = "large"
    rank: int | None = None
    heads: int | None = None
    gate_rank: int | None = None
    value_rank: int | None = None
    combine: Literal["multiply", "add"] = "multiply"
    pair: bool = False
    scale: float | None = None
    input_scale: float = 1.0
    adapter_scale: float = 1.0
    value_scale: float = 1.0
    activation: str = "gelu_new"
    save_gate: bool | None = field(default=None, compare=False)

    def resolved(self, family: str, init: str) -> Self:
        if self.gate_rank is not None and self.granularity != "large":
            raise ValueError(f"gate_rank: granularity {self.granularity!r} has no gate rank")
        config = self
        if init == "identity":
            if self.combine != "multiply" or self.input_scale != 1.0:
                raise ValueError("init: 'identity' needs combine='multiply' and input_scale=1")
            neutral = 1.0 if self.granularity == "middleY" else 2.0
            if self.scale not in (None, neutral):
                raise ValueError(f"scale: init='identity' with granularity {self.granularity!r} needs scale={neutral}, not {self.scale!r}")
            config = dataclasses.replace(config, scale=neutral)
        config = super(VLPETConfig, config).resolved(family, init)
        return config if config.granularity == "large" else dataclasses.replace(config, gate_rank=None)

    def roles(self) -> tuple[str, ...]:
        return "encoder.self_attention", "encoder.feed_forward", "decoder.cross_attention.value"

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        # The published T5 runs start from zero up-projections and gate ends, BART's from the host's rule throughout.
        zero = () if init == "repo" and target.family != "t5" else ("up_sampler", *_GATE_ENDS)
        rule = Init(target.init.std, zero)
        if role == "decoder.cross_attention.value":
            if target.width != target.out_width:
                raise ValueError(f"model: {target.path} maps {target.width} to {target.out_width}; an adapter beside it needs one width on both sides")
            return ValueParallelAdapter(target.width, self.value_rank, activation=self.activation, scale=self.value_scale, init=rule, device=device, dtype=dtype)  # type: ignore[arg-type]
        return GatedBottleneck(
            target.width,
            self.rank,  # type: ignore[arg-type]
            granularity=self.granularity,
            gate_rank=self.gate_rank,
            combine=self.combine,
            activation=self.activation,
            heads=self.heads,  # type: ignore[arg-type]
            pair=self.pair,
            input_scale=self.input_scale,
            adapter_scale=self.adapter_scale,
            scale=self.scale,  # type: ignore[arg-type]
            save_gate=self.save_gate,
            init=rule,
            device=device,
            dtype=dtype,
        )
