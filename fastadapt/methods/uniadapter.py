"""UniAdapter (ICLR 2024): one bottleneck for image block i and text layer i of BLIP, with partly shared weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, StageSite, Target
from fastadapt.nn import Init, KeyValueAdapter, TemporalEmbedding, UniAdapter

_BLOCKS = {"vision.block": "visual", "text.self_attention": "textual", "text.cross_attention": "multimodal"}
_KEY_VALUE = ("text.cross_attention.key", "text.cross_attention.value")
_TIME = "text.temporal_embedding"


@dataclass(frozen=True, kw_only=True)
class UniAdapterConfig(MethodConfig):
    """UniAdapter on BLIP (section 3). Image block i and text layer i, of every text encoder and decoder, hold the very same `fastadapt.nn.UniAdapter`.

    An image block adds ``UniAdapter(x, "visual")`` of the stream behind its attention to its output. A text layer adds ``UniAdapter(s, "text")`` of its self-attention's output
    (with encoder states this is the query residual) and, with encoder states, ``UniAdapter(c, "multimodal")`` of its cross-attention's output. The key projections of all layers
    of a text encoder share one `fastadapt.nn.KeyValueAdapter`, the value projections another.

    ``init="repo"`` is the published start: text mode adds nothing, image mode a little, cross-modal mode a vector of unit variance times ``scale``, so patching changes the
    model's output. ``init="identity"`` starts with all up-projections at zero and leaves the output exactly as it was; LN_cross magnifies the first steps away from zero, by up to
    1 / sqrt(eps) = 316.

    Args:
        rank: of the UniAdapters.
        scale: factor of their output.
        learnable_scale: train that factor, one for each UniAdapter.
        dropout: behind their relu, in training.
        layer_norm: "in", "out" or "none", see `fastadapt.nn.UniAdapter`.
        key_value_rank: of the key and value adapters; None: none.
        visual, textual, multimodal: which modes run; textual=False leaves out the query residual too. Up-projections of modes that do not run are kept, frozen.
        train_cross_norm: train LN_cross. The published filter of names ("_m" stands for momentum copies) freezes it by accident.
        init_adapter_weights: start as the published retrieval runs do: down-projections uniform in +-1/sqrt(D), the text's up-projections zero. False: as the VQA runs do, where
            this call is commented out: everything N(0, 0.02).
        frames: learn a temporal embedding for videos of so many frames, 8 in the published code, where it is off; encoder states must then hold them frame by frame.
        layer_norms: published: "none"; BLIP has no "encoder".
        trained_modules: published: the projections and the head of image-text retrieval, where the model has them.
        biases, lm_head, language_model, visual_embedding: see `MethodConfig`.
    """

    method: ClassVar[str] = "uniadapter"
    published: ClassVar[dict[str, dict[str, Any]]] = {"blip": {"layer_norms": "none"}}

    trained_modules: tuple[str, ...] = ("vision_proj", "text_proj", "itm_head")
    rank: int = 512
    scale: float = 0.1
    learnable_scale: bool = False
    dropout: float = 0.0
    layer_norm: Literal["in", "out", "none"] = "in"
    key_value_rank: int | None = 64
    visual: bool = True
    textual: bool = True
    multimodal: bool = True
    train_cross_norm: bool = False
    init_adapter_weights: bool = True
    frames: int | None = None

    def resolved(self, family: str, init: str) -> Self:
        if self.layer_norms == "encoder":
            raise ValueError("layer_norms: must be 'all' or 'none'; BLIP has no one encoder")
        if self.encoder_prompt or self.decoder_prompt:
            raise ValueError("encoder_prompt, decoder_prompt: must be 0; there are no prompts for BLIP")
        return super().resolved(family, init)

    def roles(self) -> tuple[str, ...]:
        blocks = tuple(role for role, mode in _BLOCKS.items() if getattr(self, mode))
        return blocks if self.key_value_rank is None else blocks + _KEY_VALUE

    def stages(self) -> tuple[str, ...]:
        return () if self.frames is None else (_TIME,)

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        if role in _KEY_VALUE:
            # One for all layers of a text encoder: what is left of the path without layer and projection.
            stack = re.sub(r"\.?\d+\.crossattention\.self\.\w+$", "", target.path)
            key = f"uniadapter.{role}.{stack}"
            if key not in target.shared:
                rule = Init(target.init.std, ("up_proj",) if init == "identity" else ())
                target.shared[key] = KeyValueAdapter(target.width, target.out_width, self.key_value_rank, init=rule, **where)  # type: ignore[arg-type]
            return target.shared[key]
        key = f"uniadapter.{target.layer}"
        if key not in target.shared:
            target.shared[key] = self._uni_adapter(target, init, where)
        adapter = target.shared[key]
        weight: Any = adapter.get_parameter("down_proj.weight")
        if weight.shape[1] != target.width or weight.device != device:
            raise ValueError(
                f"model: {target.path} needs an adapter of width {target.width} on {device}, but that of layer {target.layer}, which it shares, has width {weight.shape[1]} and is "
                f"on {weight.device}; patch with visual=False, or with textual=False and multimodal=False"
            )
        return adapter

    def build_stage(self, role: str, target: Target, init: str, sites: Sequence[StageSite], *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        # The encoder states are as wide as the key adapters' inputs, the texts where there are none.
        width = next((site.module.down_proj.in_features for site in sites if isinstance(site.module, KeyValueAdapter)), target.width)
        return TemporalEmbedding(self.frames, width, zero=init == "identity", device=device, dtype=dtype)  # type: ignore[arg-type]

    def _uni_adapter(self, target: Target, init: str, where: dict[str, Any]) -> UniAdapter:
        zero = ("up_proj", "visual_up_proj", "multi_up_proj") if init == "identity" else ("up_proj",) if self.init_adapter_weights else ()
        uniform = ("down_proj",) if self.init_adapter_weights else ()
        adapter = UniAdapter(
            target.width,
            self.rank,
            dropout=self.dropout,
            scale=self.scale,
            learnable_scale=self.learnable_scale,
            layer_norm=self.layer_norm,
            init=Init(target.init.std, zero, uniform),
            **where,
        )
        adapter.adapter_layer_norm_cross_modal.requires_grad_(self.multimodal and self.train_cross_norm)
        adapter.multi_up_proj.requires_grad_(self.multimodal)
        adapter.visual_up_proj.requires_grad_(self.visual)
        adapter.up_proj.requires_grad_(self.textual or self.multimodal)
        return adapter
