"""Hyperformer (ACL 2021) as VL-Adapter compares with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, StageSite, Target, reduced_rank
from fastadapt.nn import GeneratedBottleneck, HyperNetwork, Init, TaskEmbeddings


@dataclass(frozen=True, kw_only=True)
class HyperformerConfig(MethodConfig):
    """Bottleneck adapters behind every sub-layer whose weights one network per stack generates from task and layer embeddings (`fastadapt.nn.HyperNetwork`); 5.79 % of VL-BART.

    Args:
        reduction_factor: rank = D // reduction_factor.
        rank: the rank itself, instead of a reduction factor.
        task_dim, hidden_dim, projected_dim: widths of the embeddings, the network's middle and what the generators read; published runs: 512, 128 and 8.
        one_hypernet: the "efficient" form: one generator for all kinds of sub-layers.
        activation: see `fastadapt.nn.Bottleneck`.
        hypernet_layer_norm: the layer norm of what the generators read.
        layer_norm_before, layer_norm_after: generated layer norms around the adapters.
        cross_attention: adapters behind cross-attention too.
        layer_norms: published: "all" on BART; "none" on T5 (see `VLAdapterConfig`).
        visual_embedding, biases, lm_head, language_model, trained_modules, encoder_prompt, decoder_prompt, prompt_mid, prompt_sharing: see `MethodConfig`.
    """

    method: ClassVar[str] = "hyperformer"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "all"}, "t5": {"layer_norms": "none"}}

    reduction_factor: int = 8
    rank: int | None = None
    task_dim: int = 512
    hidden_dim: int = 128
    projected_dim: int = 8
    one_hypernet: bool = False
    activation: str = "gelu_new"
    hypernet_layer_norm: bool = True
    layer_norm_before: bool = False
    layer_norm_after: bool = False
    cross_attention: bool = True

    def one_task(self) -> Self:
        """As `MethodConfig.one_task`: there is none."""
        raise ValueError("task: one network generates the adapters of all tasks of hyperformer, so there is none of one task; save or load all tasks")

    def roles(self) -> tuple[str, ...]:
        cross = ("decoder.cross_attention",) if self.cross_attention else ()
        return "encoder.self_attention", "encoder.feed_forward", "decoder.self_attention", *cross, "decoder.feed_forward"

    def stages(self) -> tuple[str, ...]:
        return "encoder.hypernetwork", "decoder.hypernetwork", *super().stages()  # a decoder's prompt runs through its adapters

    def _rank(self, width: int) -> int:
        return reduced_rank(width, self.rank, self.reduction_factor)

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        return GeneratedBottleneck(target.width, self._rank(target.width), activation=self.activation)

    def build_stage(self, role: str, target: Target, init: str, sites: Sequence[StageSite], *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        if not role.endswith(".hypernetwork"):
            return super().build_stage(role, target, init, sites, device=device, dtype=dtype)
        if not sites:  # ``layers`` may leave out all of a stack
            return None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        embeddings: Any = target.shared.get("task embeddings")
        if embeddings is None:
            embeddings = target.shared["task embeddings"] = TaskEmbeddings(target.tasks, self.task_dim, **factory)
        network = HyperNetwork(
            target.width,
            self._rank(target.width),
            1 + max(site.layer for site in sites),
            tuple(dict.fromkeys(site.role.rpartition(".")[2] for site in sites)),
            embeddings,
            task_dim=self.task_dim,
            hidden=self.hidden_dim,
            projected=self.projected_dim,
            layer_norm=self.hypernet_layer_norm,
            norm_before=self.layer_norm_before,
            norm_after=self.layer_norm_after,
            one=self.one_hypernet,
            init=target.init if init == "repo" else Init(target.init.std, zero=("up_sampler",)),
            **factory,
        )
        network.sites = [(site.role.rpartition(".")[2], site.layer, site.module) for site in sites]  # type: ignore[misc]
        return network
