"""Mllama (Llama 3.2 Vision): Llama's layers, between them layers of gated cross-attention to the image, and a vision tower whose last layers are gated.

The forwards are those of transformers' MllamaSelfAttentionDecoderLayer, MllamaCrossAttentionDecoderLayer and MllamaVisionEncoderLayer (Apache 2.0) with the adapters put in, before
the gates. A cross-attention layer's gates are zero in a new model: it and its adapters do nothing then.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, Place, declare


def _self_attention_layer(
    self: Any,
    hidden_states: Tensor,
    cross_attention_states: Tensor | None = None,
    cross_attention_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    full_text_row_masked_out_mask: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    return residual + hidden_states


def _cross_attention_layer(
    self: Any,
    hidden_states: Tensor,
    cross_attention_states: Tensor,
    cross_attention_mask: Tensor,
    attention_mask: Tensor,
    full_text_row_masked_out_mask: tuple[Tensor, Tensor] | None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.cross_attn(
        hidden_states=hidden_states, attention_mask=cross_attention_mask, cross_attention_states=cross_attention_states, past_key_values=past_key_values, **kwargs
    )
    if (adapter := self.cross_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + self.cross_attn_attn_gate.tanh() * hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    if full_text_row_masked_out_mask is not None:
        hidden_states = full_text_row_masked_out_mask[:, 0] * hidden_states  # type: ignore[call-overload]
    return residual + self.cross_attn_mlp_gate.tanh() * hidden_states


def _vision_layer(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states, attention_mask=attention_mask)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    if self.is_gated:
        hidden_states = self.gate_attn.tanh() * hidden_states
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    if self.is_gated:
        hidden_states = self.gate_ffn.tanh() * hidden_states
    return residual + hidden_states


_SELF = (*LAYER, *projections("encoder.self_attention", "self_attn"))
_CROSS = (
    Place("decoder.cross_attention", "", "cross_attention_adapter"),
    Place("decoder.feed_forward", "", "feed_forward_adapter"),
    *projections("decoder.cross_attention", "cross_attn"),
)

# Within one copy the sources differ in annotations only.
_SELF_COPY = Copy(_self_attention_layer, {"ea9e0f7773724f87": "5.23", "7e46fdb299f8634d": "5.8, 5.16, 5.22"})
_CROSS_COPY = Copy(_cross_attention_layer, {"46f41b010a0b700b": "5.8, 5.16, 5.22, 5.23"})
_VISION_COPY = Copy(_vision_layer, {"034c5f0ddc441cec": "5.23", "1d58ef3d757b84a6": "5.16, 5.22"})

for _block, _copy, _places, _stack in (
    ("MllamaSelfAttentionDecoderLayer", _SELF_COPY, _SELF, "language"),
    ("MllamaCrossAttentionDecoderLayer", _CROSS_COPY, _CROSS, "language"),
    ("MllamaVisionEncoderLayer", _VISION_COPY, _SELF, "vision"),
):
    declare(
        "mllama",
        "mllama",
        _block,
        _copy,
        places=_places,
        width=lambda block: block.mlp.fc2.out_features if hasattr(block.mlp, "fc2") else block.mlp.down_proj.out_features,
        models=f"Mllama ({_stack})",
        stack=_stack,
    )
