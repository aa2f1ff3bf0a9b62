"""Intrinsic dimension (SAID) as Compacter compares with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.methods.base import FROM_ZERO, BaseTensor, MethodConfig, Reparametrisation
from fastadapt.nn import IntrinsicDimension


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimensionConfig(MethodConfig):
    """Moves all tensors of the base by one projected vector (`fastadapt.nn.IntrinsicDimension`; Aghajanyan et al. 2021); the defaults are Compacter's published run on T5.

    The tensors are computed anew whenever a layer runs, as published, so a step takes more time than full fine-tuning and about as much memory: what is trained and saved is small.

    Args:
        dimension: trained numbers in all.
        projection: "fastfood" or "dense"; the latter holds ``dimension`` times as many numbers as the model.
        said: a trained factor per tensor, too.
        published_gradient: the published gradient of the vector instead of the true one: divided by N = 2^ceil(log2 D) in each tensor of D numbers.
        tied_output: move the output layer that is tied to the token table, too; the published code leaves it at the base's values.
        seed: of the projections.
        layer_norms: published: "none" beside it.
        visual_embedding: False: it moves with the rest.
        biases, lm_head, language_model, trained_modules, encoder_prompt, decoder_prompt, prompt_mid, prompt_start, prompt_sharing: see `MethodConfig`.
    """

    method: ClassVar[str] = "intrinsic_dimension"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "none"}, "t5": {"layer_norms": "none"}}

    visual_embedding: bool = False
    dimension: int = 20_000
    projection: Literal["fastfood", "dense"] = "fastfood"
    said: bool = True
    published_gradient: bool = False
    tied_output: bool = False
    seed: int = field(default=0, metadata=FROM_ZERO)

    def resolved(self, family: str, init: str) -> Self:
        if self.add_biases:
            raise ValueError("add_biases: not with an intrinsic dimension, which moves the tensors that the base has")
        if self.towers is not None:
            raise ValueError("towers: not with an intrinsic dimension, which moves the whole base")
        return super().resolved(family, init)

    def roles(self) -> tuple[str, ...]:
        return ()

    def reparametrise(self, tensors: Sequence[BaseTensor], *, device: torch.device, dtype: torch.dtype) -> Reparametrisation | None:
        for tensor, _ in tensors:
            if not tensor.is_floating_point() or tensor.device != device:
                raise ValueError(f"model: an intrinsic dimension moves floating tensors on one device, {device}; one is {tensor.dtype} on {tensor.device}")
        options = {name: getattr(self, name) for name in ("projection", "said", "published_gradient", "seed")}
        whole = IntrinsicDimension([t.tensor.numel() for t in tensors], self.dimension, **options, device=device, dtype=dtype)
        return Reparametrisation(whole, [(layer, name, whole.of(k)) for k, t in enumerate(tensors) for layer, name in self._moved(t)])

    def _moved(self, tensor: BaseTensor) -> Sequence[tuple[nn.Module, str]]:
        tables = [owner for owner in tensor.owners if isinstance(owner[0], nn.Embedding)]
        return tables if tables and not self.tied_output else tensor.owners
