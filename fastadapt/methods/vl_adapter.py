"""VL-Adapter (CVPR 2022): a sequential bottleneck behind every sub-layer of encoder and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target
from fastadapt.nn import Bottleneck, Init


@dataclass(frozen=True, kw_only=True)
class VLAdapterConfig(MethodConfig):
    """The single adapter: one module per place, shared by all tasks (section 3.3), 4.18 % of VL-BART.

    Args:
        reduction_factor: rank = D // reduction_factor; 8 in the published BART runs (rank 96), 8 and 4 on T5.
        rank: the rank itself, instead of a reduction factor.
        activation: see `fastadapt.nn.Bottleneck`.
        layer_norm_before, layer_norm_after: layer norms around the adapter.
        cross_attention: adapters behind cross-attention too.
        layer_norms: published: "all" on BART; "none" on T5, where the published code looks for another class of layer norm and leaves them frozen (as its
            counts, 4.49 % and 7.98 %, say).
        visual_embedding: see `MethodConfig`.
    """

    method: ClassVar[str] = "vl_adapter"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "all"}, "t5": {"layer_norms": "none"}}

    reduction_factor: int = 8
    rank: int | None = None
    activation: str = "gelu_new"
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    cross_attention: bool = True

    def roles(self) -> tuple[str, ...]:
        cross = ("decoder.cross_attention",) if self.cross_attention else ()
        return "encoder.self_attention", "encoder.feed_forward", "decoder.self_attention", *cross, "decoder.feed_forward"

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        if self.rank is None and (isinstance(self.reduction_factor, bool) or not isinstance(self.reduction_factor, int) or not 1 <= self.reduction_factor <= target.width):
            raise ValueError(f"reduction_factor: must be an integer from 1 to the width {target.width}, not {self.reduction_factor!r}")
        return Bottleneck(
            target.width,
            target.width // self.reduction_factor if self.rank is None else self.rank,
            activation=self.activation,
            norm_before=self.layer_norm_before,
            norm_after=self.layer_norm_after,
            init=target.init if init == "repo" else Init(target.init.std, zero=("up_sampler",)),
            device=device,
            dtype=dtype,
        )
