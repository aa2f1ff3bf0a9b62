"""OPT, the language model of BLIP-2: pre-norm layers, in one size post-norm ones. The forward is that of transformers' OPTDecoderLayer (Apache 2.0) with the adapters put in; the
feed-forward network's rows, which it flattens, get their (B, L, D) back before the adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.ends import end
from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, declare


def _layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    if self.do_layer_norm_before:
        hidden_states = self.self_attn_layer_norm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, past_key_values=past_key_values, position_ids=position_ids, attention_mask=attention_mask, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = end(self, hidden_states, residual, self.dropout, None if self.do_layer_norm_before else self.self_attn_layer_norm)

    residual = hidden_states
    hidden_states = hidden_states.reshape(-1, hidden_states.size(-1))
    if self.do_layer_norm_before:
        hidden_states = self.final_layer_norm(hidden_states)
    hidden_states = self.fc2(self.activation_fn(self.fc1(hidden_states))).view(residual.shape)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = end(self, hidden_states, residual, self.dropout, None if self.do_layer_norm_before else self.final_layer_norm)
    return hidden_states


declare(
    "opt",
    "opt",
    "OPTDecoderLayer",
    Copy(_layer, {"9d8d1897a2c4f3d2": "5.8, 5.16, 5.22, 5.23"}),
    places=(*LAYER, *projections("encoder.self_attention", "self_attn")),
    width=lambda block: block.embed_dim,
    models="OPT; BLIP-2 (language)",
    stack="language",
    ends="dropout, residual (and the layer norm in a post-norm model)",
)
