"""VL-BART and VL-T5: one encoder over text and visual tokens, on the stock BART and T5 classes.

The encoder's sequence is ``[text | visual]``. In BART the text gets its learned positions and ``layernorm_embedding``, the visual tokens only their own embedding (unless
``share_vis_lang_layer_norm``). In T5 the relative position bias holds between text tokens and is zero for every pair that involves vision. Layers are the stock ones, so a stock
checkpoint loads with unchanged keys; only ``visual_embedding`` is new. Without visual inputs both are the stock models.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers.initialization as init
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import BartEncoder
from transformers.models.t5.modeling_t5 import T5LayerNorm, T5Stack
from transformers.utils.output_capturing import capture_outputs

from fastadapt.hosts.visual import LowRankVisualEmbedding, VisualEmbedding, downsample, shorten

VisualInputs = tuple[Tensor, ...]
"""``(feats, boxes)`` or ``(feats, boxes, img_order_ids, obj_order_ids)``, see `VisualEmbedding`."""


class VLBartConfig(BartConfig):
    """`BartConfig` and the visual options of `VisualEmbedding`. ``n_boxes``: pool each image's grid to that many tokens; ``share_vis_lang_layer_norm``: visual tokens pass BART's
    ``layernorm_embedding`` too. ``visual_projector_rank`` and the options after it are those of `LowRankVisualEmbedding` (VL-PET); None: the full-rank projection."""

    feat_dim: int = 2048
    pos_dim: int = 4
    n_images: int = 2
    n_boxes: int | None = None
    use_vis_order_embedding: bool = True
    use_vis_layer_norm: bool = True
    individual_vis_layer_norm: bool = True
    share_vis_lang_layer_norm: bool = False
    visual_projector_rank: int | None = None
    visual_projector_heads: int = 1
    visual_projector_gate_rank: int | None = None
    visual_projector_residual: bool = False


class VLT5Config(T5Config):
    """`T5Config` and the visual options of `VisualEmbedding`. ``n_boxes``: pool each image's grid to that many tokens. ``visual_projector_rank``: as in `VLBartConfig`."""

    feat_dim: int = 2048
    pos_dim: int = 4
    n_images: int = 2
    n_boxes: int | None = None
    use_vis_order_embedding: bool = True
    use_vis_layer_norm: bool = True
    individual_vis_layer_norm: bool = True
    visual_projector_rank: int | None = None
    visual_projector_heads: int = 1
    visual_projector_gate_rank: int | None = None
    visual_projector_residual: bool = False


def _visual_embedding(config: Any, norm: Any) -> VisualEmbedding:
    options = ("pos_dim", "n_images", "use_vis_order_embedding", "use_vis_layer_norm", "individual_vis_layer_norm")
    values = {name: getattr(config, name) for name in options}
    projector = {name: getattr(config, f"visual_projector_{name}") for name in ("rank", "heads", "gate_rank", "residual")}
    if projector["rank"] is not None:
        return LowRankVisualEmbedding(config.feat_dim, config.d_model, norm, **projector, **values)
    if projector != {"rank": None, "heads": 1, "gate_rank": None, "residual": False}:
        raise ValueError(f"visual_projector_rank: None leaves no low-rank projector for {projector}")
    return VisualEmbedding(config.feat_dim, config.d_model, norm, **values)


def _visual_tokens(encoder: JointBartEncoder | JointT5Encoder, vis_inputs: VisualInputs) -> Tensor:
    if len(vis_inputs) not in (2, 4):
        raise ValueError(f"vis_inputs: {len(vis_inputs)} tensors, must be (feats, boxes) or (feats, boxes, img_order_ids, obj_order_ids)")
    feats, *per_token = vis_inputs
    if encoder.config.n_boxes is not None:
        # Boxes and order ids are cut to the pooled length image by image, so that the second image's tokens keep its order id.
        images = encoder.config.n_images if len(vis_inputs) == 4 else 1
        feats = downsample(feats, encoder.config.n_boxes, images)
        per_token = [shorten(t, feats.shape[1], images) for t in per_token]
    boxes, *ids = per_token
    return encoder.visual_embedding(feats, boxes, encoder.embed_tokens.weight, *ids)


class JointBartEncoder(BartEncoder):
    """BART's encoder over ``[text | visual]``; the stock encoder when called without ``vis_inputs``. ``attention_mask`` then covers both, (B, L + V)."""

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(config)
        self.visual_embedding = _visual_embedding(config, nn.LayerNorm)
        self.post_init()

    @capture_outputs
    def _joint(self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None, vis_inputs: VisualInputs, **kwargs: Any) -> BaseModelOutput:
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        text = text + self.embed_positions(text[:, :, -1])
        visual = _visual_tokens(self, vis_inputs).to(text.dtype)
        if self.config.share_vis_lang_layer_norm:
            hidden = self.layernorm_embedding(torch.cat([text, visual], 1))
        else:
            hidden = torch.cat([self.layernorm_embedding(text), visual], 1)
        hidden = F.dropout(hidden, p=self.dropout, training=self.training)  # type: ignore[arg-type]
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        for layer in self.layers:
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            hidden = layer(hidden, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden)

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None, vis_inputs: VisualInputs | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        if vis_inputs is None:
            return super().forward(input_ids, attention_mask, inputs_embeds, **kwargs)
        return self._joint(input_ids, attention_mask, inputs_embeds, vis_inputs, **kwargs)


class JointT5Encoder(T5Stack):
    """T5's encoder over ``[text | visual]``; the stock encoder when called without ``vis_inputs``. ``attention_mask`` then covers both, (B, L + V)."""

    def __init__(self, config: VLT5Config) -> None:
        super().__init__(config)
        self.visual_embedding = _visual_embedding(config, functools.partial(T5LayerNorm, eps=config.layer_norm_epsilon))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Not from the visual embedding down: transformers passes over modules of foreign classes that hold no parameters themselves.
        if not any(module is part for part in getattr(self, "visual_embedding", nn.Module()).modules()):
            super()._init_weights(module)
        elif isinstance(module, nn.Linear):
            # The published T5 host leaves torch's own initialisation: U(+-1/sqrt(fan in)) for projections, N(0, 1) for the order embedding.
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            init.uniform_(module.bias, -(module.in_features**-0.5), module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, T5LayerNorm):
            init.ones_(module.weight)

    @capture_outputs
    def _joint(self, input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None, vis_inputs: VisualInputs, **kwargs: Any) -> BaseModelOutput:
        text = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        visual = _visual_tokens(self, vis_inputs).to(text.dtype)
        hidden = self.dropout(torch.cat([text, visual], 1))
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        n, v = text.shape[1], visual.shape[1]
        first: Any = self.block[0]
        bias = F.pad(first.layer[0].SelfAttention.compute_bias(n, n, device=hidden.device), (0, v, 0, v))
        for block in self.block:
            hidden, _, _ = block(hidden, mask, bias, **kwargs)
        return BaseModelOutput(last_hidden_state=self.dropout(self.final_layer_norm(hidden)))

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None, vis_inputs: VisualInputs | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        if vis_inputs is None:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)
        return self._joint(input_ids, attention_mask, inputs_embeds, vis_inputs, **kwargs)


class _VisionLanguage:
    """What both models add to their stock class: ``vis_inputs`` in `forward` and `generate`."""

    if TYPE_CHECKING:
        config: Any
        get_encoder: Any

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        vis_inputs: VisualInputs,
        vis_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[BaseModelOutput, Tensor]:
        """The encoder's output and the joint attention mask (B, L + V), which the decoder needs beside it.

        Args:
            attention_mask: of the text, (B, L); None: every token but padding.
            vis_attention_mask: of the visual tokens (after pooling), (B, V); None: all of them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: exactly one of the two must be given")
        encoder = self.get_encoder()
        shape = tuple(input_ids.shape) if input_ids is not None else tuple(inputs_embeds.shape[:2])  # type: ignore[union-attr]
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=vis_inputs[0].device) if input_ids is None else input_ids.ne(self.config.pad_token_id).long()
        feats, pooled = vis_inputs[0], self.config.n_boxes
        tokens = feats.shape[1] if pooled is None else pooled * (self.config.n_images if len(vis_inputs) == 4 else 1)
        if vis_attention_mask is None:
            vis_attention_mask = attention_mask.new_ones(feats.shape[0], tokens)
        for name, mask, wanted in (("attention_mask", attention_mask, shape), ("vis_attention_mask", vis_attention_mask, (shape[0], tokens))):
            if tuple(mask.shape) != wanted:
                raise ValueError(f"{name}: shape {tuple(mask.shape)} must be {wanted}")
        joint = torch.cat([attention_mask, vis_attention_mask.to(attention_mask.dtype)], 1)
        return encoder(input_ids=input_ids, attention_mask=joint, inputs_embeds=inputs_embeds, vis_inputs=vis_inputs, **kwargs | {"return_dict": True}), joint

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        vis_inputs: VisualInputs | None = None,
        vis_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        """The stock forward, with visual tokens behind the text.

        Args:
            vis_inputs: ``(feats, boxes)`` or ``(feats, boxes, img_order_ids, obj_order_ids)``, see `VisualEmbedding`; None: the stock model.
            vis_attention_mask: (B, V); None: every visual token.
            encoder_outputs: of `encode`; then ``attention_mask`` is the joint mask that `encode` returns and ``vis_inputs`` is not looked at.
        """
        if vis_inputs is not None and encoder_outputs is None:
            encoder_outputs, attention_mask = self.encode(input_ids, attention_mask, inputs_embeds, vis_inputs=vis_inputs, vis_attention_mask=vis_attention_mask, **kwargs)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, vis_inputs: VisualInputs | None = None, vis_attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The stock ``generate`` (cache, beams, sampling), with visual tokens behind the text."""
        if vis_inputs is None:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        text = {"input_ids": inputs if inputs is not None else kwargs.pop("input_ids", None), "inputs_embeds": kwargs.pop("inputs_embeds", None)}
        encoded, mask = self.encode(**text, attention_mask=kwargs.pop("attention_mask", None), vis_inputs=vis_inputs, vis_attention_mask=vis_attention_mask)
        return super().generate(None, *args, encoder_outputs=encoded, attention_mask=mask, **kwargs)  # type: ignore[misc]


class VLBart(_VisionLanguage, BartForConditionalGeneration):
    """VL-BART (VL-Adapter, section 3.1): `BartForConditionalGeneration` with a joint encoder and a `VisualEmbedding` at ``model.encoder.visual_embedding``."""

    config_class = VLBartConfig

    def __init__(self, config: VLBartConfig) -> None:
        super().__init__(_checked(config, VLBartConfig))
        self.model.encoder = JointBartEncoder(self.model.encoder.config)
        self.post_init()


class VLT5(_VisionLanguage, T5ForConditionalGeneration):
    """VL-T5 (VL-Adapter, section 3.1): `T5ForConditionalGeneration` with a joint encoder and a `VisualEmbedding` at ``encoder.visual_embedding``."""

    config_class = VLT5Config

    def __init__(self, config: VLT5Config) -> None:
        super().__init__(_checked(config, VLT5Config))
        self.encoder = JointT5Encoder(self.encoder.config)  # type: ignore[arg-type]
        self.post_init()


def _checked(config: Any, kind: type) -> Any:
    if not isinstance(config, kind):
        raise TypeError(f"config: must be a {kind.__name__}, not {type(config).__name__}")
    return config
