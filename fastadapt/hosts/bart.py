"""BART: post-norm blocks. Adapters act behind each sub-layer's last projection, before dropout, residual and layer norm (VL-Adapter, section 3.2; VL-PET, section 3.3).

The forwards are those of transformers' BartEncoderLayer and BartDecoderLayer (Apache 2.0) with the adapters put in. The clamp of overflowing fp16 values in the encoder gives the
stock's values without reading a tensor on the host, so a compiled fp16 encoder stays one graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bart import modeling_bart

from fastadapt.hosts.ends import end
from fastadapt.hosts.places import BART_DECODER, BART_ENCODER, SEQ2SEQ_STAGES
from fastadapt.hosts.roles import Host, Place, knows_keys, register
from fastadapt.nn import Init


class BartEncoderLayer(modeling_bart.BartEncoderLayer):
    """A BartEncoderLayer with adapters ``self_attention_adapter`` and ``feed_forward_adapter``."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        if (adapter := self.self_attention_adapter) is not None:
            hidden_states = adapter(hidden_states, residual)
        hidden_states = end(self, hidden_states, residual, self.dropout, self.self_attn_layer_norm)

        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = F.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        if (adapter := self.feed_forward_adapter) is not None:
            hidden_states = adapter(hidden_states, residual)
        hidden_states = end(self, hidden_states, residual, self.dropout, self.final_layer_norm)

        if hidden_states.dtype == torch.float16:
            largest = torch.finfo(torch.float16).max
            limit = torch.where(torch.isfinite(hidden_states).all(), largest, largest - 1000)
            hidden_states = torch.clamp(hidden_states, min=-limit, max=limit)
        return hidden_states


class BartDecoderLayer(modeling_bart.BartDecoderLayer):
    """A BartDecoderLayer with adapters ``self_attention_adapter``, ``key_value_adapter``, ``cross_attention_adapter`` and ``feed_forward_adapter``."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        residual = hidden_states
        hidden_states, _ = self.self_attn(hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
        if (adapter := self.self_attention_adapter) is not None:
            hidden_states = adapter(hidden_states, residual)
        hidden_states = end(self, hidden_states, residual, self.dropout, self.self_attn_layer_norm)

        if encoder_hidden_states is not None:
            residual = hidden_states
            if (adapter := self.key_value_adapter) is not None and not knows_keys(past_key_values, self.encoder_attn.layer_idx):
                encoder_hidden_states = adapter(encoder_hidden_states)
            hidden_states, _ = self.encoder_attn(
                hidden_states, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask, past_key_values=past_key_values, **kwargs
            )
            if (adapter := self.cross_attention_adapter) is not None:
                hidden_states = adapter(hidden_states, residual)
            hidden_states = end(self, hidden_states, residual, self.dropout, self.encoder_attn_layer_norm)

        residual = hidden_states
        hidden_states = self.activation_fn(self.fc1(hidden_states))
        hidden_states = F.dropout(hidden_states, p=self.activation_dropout, training=self.training)
        hidden_states = self.fc2(hidden_states)
        if (adapter := self.feed_forward_adapter) is not None:
            hidden_states = adapter(hidden_states, residual)
        return end(self, hidden_states, residual, self.dropout, self.final_layer_norm)


_ADAPTED: dict[type[nn.Module], type[nn.Module]] = {modeling_bart.BartEncoderLayer: BartEncoderLayer, modeling_bart.BartDecoderLayer: BartDecoderLayer}
_SOURCES: dict[type[nn.Module], dict[str, str]] = {
    # The first two differ in annotations only.
    modeling_bart.BartEncoderLayer: {"bcb0301b3fc6f8a4": "5.23", "14b1396be15a2de9": "5.8, 5.16, 5.22"},
    modeling_bart.BartDecoderLayer: {"e7637ffa58da6b8a": "5.8, 5.16, 5.22, 5.23"},
}


def _host(block: type[nn.Module], places: tuple[Place, ...]) -> Host:
    return Host(
        family="bart",
        block=block,
        places=lambda _: places,
        width=lambda block: block.embed_dim,
        adapted=_ADAPTED,
        sources=_SOURCES,
        norms=(nn.LayerNorm,),
        # BartPreTrainedModel._init_weights: every Linear N(0, init_std), bias 0.
        init=lambda block: Init(std=block.self_attn.config.init_std),
        stages=SEQ2SEQ_STAGES,
        ends="dropout, residual, layer norm",
    )


_NORMS = {"self_attention": "self_attn_layer_norm", "cross_attention": "encoder_attn_layer_norm", "feed_forward": "final_layer_norm"}


def _normed(places: tuple[Place, ...]) -> tuple[Place, ...]:
    return tuple(place._replace(norm=_NORMS.get(place.id, "")) for place in places)


register(_host(modeling_bart.BartEncoderLayer, _normed(BART_ENCODER)), _host(modeling_bart.BartDecoderLayer, _normed(BART_DECODER)))
