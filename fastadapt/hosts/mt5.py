"""mT5: T5's layers under names of their own, with T5's published values. The forwards here are those of both, see ``t5.py``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.ends import begin, end
from fastadapt.hosts.places import SEQ2SEQ_STAGES, T5_DECODER, T5_ENCODER
from fastadapt.hosts.roles import Copy, declare, knows_keys
from fastadapt.nn import Init


def self_attention(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
    """T5LayerSelfAttention's, with an ``adapter``."""
    normed = begin(self, hidden_states, self.layer_norm)
    output, position_bias, weights = self.SelfAttention(normed, mask=attention_mask, position_bias=position_bias, past_key_values=past_key_values, **kwargs)
    output = self.adapter(output, hidden_states.to(output.dtype))
    return end(self, output, hidden_states, self.dropout), position_bias, weights


def cross_attention(
    self: Any,
    hidden_states: Tensor,
    key_value_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """T5LayerCrossAttention's, with an ``adapter``, and one of the encoder's output, ``key_value_adapter``."""
    if (adapter := self.key_value_adapter) is not None and not knows_keys(past_key_values, self.EncDecAttention.layer_idx):
        key_value_states = adapter(key_value_states)
    output, position_bias, weights = self.EncDecAttention(
        begin(self, hidden_states, self.layer_norm), mask=attention_mask, key_value_states=key_value_states, position_bias=position_bias, past_key_values=past_key_values, **kwargs
    )
    if (adapter := self.adapter) is not None:
        output = adapter(output, hidden_states.to(output.dtype))
    return end(self, output, hidden_states, self.dropout), position_bias, weights


def feed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """T5LayerFF's, with an ``adapter``."""
    output = self.DenseReluDense(begin(self, hidden_states, self.layer_norm))
    output = self.adapter(output, hidden_states.to(output.dtype))
    return end(self, output, hidden_states, self.dropout)


declare(
    "mt5",
    "mt5",
    "MT5Block",
    {
        "MT5LayerSelfAttention": Copy(self_attention, {"fce4997b3576493f": "5.16, 5.22, 5.23"}),
        "MT5LayerCrossAttention": Copy(cross_attention, {"ab21facfc696ed3a": "5.16, 5.22, 5.23"}),
        "MT5LayerFF": Copy(feed_forward, {"b7f2c285f08b51b0": "5.8, 5.16, 5.22, 5.23"}),
    },
    places=lambda block: T5_DECODER if block.is_decoder else T5_ENCODER,
    width=lambda block: block.layer[0].SelfAttention.d_model,
    models="mT5",
    published="t5",
    init=lambda _: Init(),
    stages=SEQ2SEQ_STAGES,
    ends="dropout, residual (and the RMS norm before)",
)
