"""Compacter (NeurIPS 2021) and low-rank adapters, at VL-Adapter's places."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from fastadapt.methods.base import Target
from fastadapt.methods.vl_adapter import VLAdapterConfig
from fastadapt.nn import Bottleneck, LowRankLinear, PHMLinear, Projection


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(VLAdapterConfig):
    """Bottlenecks whose projections are sums of Kronecker products (`fastadapt.nn.PHMLinear`; VL-Adapter and Compacter).

    The defaults are VL-Adapter's published runs: n = 2, full W, a rule of its own in every projection, 2.70 % of VL-BART. Compacter proper is ``division=4, phm_rank=1,
    shared_rule=True``.

    Args:
        division: n, which must divide D and the rank.
        phm_rank: rank of each W_i; None: full.
        shared_rule: one rule for all projections of the patch.
        shared_rule_over_tasks: with an adapter per task and rules of their own, tasks share them: one for the down-projections of a place and one for its up-projections.
        factorized_rule: rules as products of rank 1.
        shared_weight: one W (or one pair of factors) for all down-projections of the patch and one for all up-projections (Compacter's "shared W").
        weight_init, rule_init, init_range, rule_range: see `fastadapt.nn.PHMLinear`.
        sharing, reduction_factor, rank, activation, layer_norm_before, layer_norm_after, self_attention, cross_attention, feed_forward, decoder, reads, scale,
            layers, std, layer_norms: see `VLAdapterConfig`.
        visual_embedding, biases, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "compacter"
    published: ClassVar[dict[str, dict[str, Any]]] = VLAdapterConfig.published

    division: int = 2
    phm_rank: int | None = None
    shared_rule: bool = False
    shared_rule_over_tasks: bool = False
    factorized_rule: bool = False
    shared_weight: bool = False
    weight_init: str = "glorot-uniform"
    rule_init: str = "normal"
    init_range: float = 0.01
    rule_range: float = 0.01

    def projection(self) -> Projection:
        options = {name: getattr(self, name) for name in ("factorized_rule", "weight_init", "rule_init", "init_range", "rule_range")}
        return functools.partial(PHMLinear, division=self.division, rank=self.phm_rank, **options)

    def connect(self, adapter: Bottleneck, target: Target) -> None:
        for name in ("down_sampler", "up_sampler"):
            projection = getattr(adapter, name)
            if self.shared_rule:
                target.share("phm_rule", projection, *self._names(projection, "phm_rule"))
            if self.shared_weight:
                target.share(f"W of {name}", projection, *self._names(projection, "W"))

    def shared_over_tasks(self) -> tuple[str, ...]:
        return ("down_sampler.phm_rule", "up_sampler.phm_rule") if self.shared_rule_over_tasks else ()

    @staticmethod
    def _names(projection: PHMLinear, start: str) -> list[str]:
        return [name for name in projection._parameters if name.startswith(start)]


@dataclass(frozen=True, kw_only=True)
class LowRankAdapterConfig(VLAdapterConfig):
    """Bottlenecks whose projections are products of low rank (`fastadapt.nn.LowRankLinear`).

    Args:
        low_rank_rank: k of both projections.
        weight_init: "glorot-uniform" or "glorot-normal".
        sharing, reduction_factor, rank, activation, layer_norm_before, layer_norm_after, self_attention, cross_attention, feed_forward, decoder, reads, scale,
            layers, std, layer_norms: see `VLAdapterConfig`.
        visual_embedding, biases, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "low_rank_adapter"
    published: ClassVar[dict[str, dict[str, Any]]] = VLAdapterConfig.published

    low_rank_rank: int = 1
    weight_init: str = "glorot-uniform"

    def projection(self) -> Projection:
        return functools.partial(LowRankLinear, rank=self.low_rank_rank, weight_init=self.weight_init)
