"""VL-Adapter (CVPR 2022): a sequential bottleneck behind every sub-layer of encoder and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target, per_task
from fastadapt.nn import Bottleneck, Init, Projection

SHARING = ("single", "multiple", "up", "down")


@dataclass(frozen=True, kw_only=True)
class VLAdapterConfig(MethodConfig):
    """VL-Adapter's bottlenecks (section 3.2), 4.18 % of VL-BART with the single adapter.

    Args:
        sharing: between tasks (section 3.3): "single", one adapter for all; "multiple", one per task; "up", one down-projection per task and one up-projection for all (the paper's
            half-shared adapters); "down", the other way round. Layer norms around the adapter are always shared.
        reduction_factor: rank = D // reduction_factor; 8 in the published BART runs (rank 96), 8 and 4 on T5.
        rank: the rank itself, instead of a reduction factor.
        activation: see `fastadapt.nn.Bottleneck`.
        layer_norm_before, layer_norm_after: layer norms around the adapter.
        cross_attention: adapters behind cross-attention too.
        layer_norms: published: "all" on BART; "none" on T5, where the published code looks for another class of layer norm and leaves them frozen (as its
            counts, 4.49 % and 7.98 %, say).
        visual_embedding, biases, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "vl_adapter"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "all"}, "t5": {"layer_norms": "none"}}

    sharing: Literal["single", "multiple", "up", "down"] = "single"
    reduction_factor: int = 8
    rank: int | None = None
    activation: str = "gelu_new"
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    cross_attention: bool = True

    def roles(self) -> tuple[str, ...]:
        cross = ("decoder.cross_attention",) if self.cross_attention else ()
        return "encoder.self_attention", "encoder.feed_forward", "decoder.self_attention", *cross, "decoder.feed_forward"

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        if self.sharing not in SHARING:
            raise ValueError(f"sharing: must be one of {', '.join(SHARING)}, not {self.sharing!r}")
        if self.rank is None and (isinstance(self.reduction_factor, bool) or not isinstance(self.reduction_factor, int) or not 1 <= self.reduction_factor <= target.width):
            raise ValueError(f"reduction_factor: must be an integer from 1 to the width {target.width}, not {self.reduction_factor!r}")
        rule = self.rule(target)

        def make() -> Bottleneck:
            adapter = Bottleneck(
                target.width,
                target.width // self.reduction_factor if self.rank is None else self.rank,
                activation=self.activation,
                norm_before=self.layer_norm_before,
                norm_after=self.layer_norm_after,
                projection=self.projection(),
                init=rule if init == "repo" else Init(rule.std, zero=("up_sampler",)),
                device=device,
                dtype=dtype,
            )
            self.connect(adapter, target)
            return adapter

        half = {"up": ("up_sampler.",), "down": ("down_sampler.",)}.get(self.sharing, ())
        return per_task(self.sharing, target, make, (*half, "pre_layer_norm.", "post_layer_norm.", *self.shared_over_tasks()))

    def rule(self, target: Target) -> Init:
        """How the projections start with ``init="repo"``."""
        return target.init

    def projection(self) -> Projection | None:
        """What makes the projections; None: ``nn.Linear``."""
        return None

    def connect(self, adapter: Bottleneck, target: Target) -> None:
        """Lets a new adapter share parameters with others of the patch."""

    def shared_over_tasks(self) -> tuple[str, ...]:
        """Starts of the names of further parameters that all tasks share."""
        return ()
