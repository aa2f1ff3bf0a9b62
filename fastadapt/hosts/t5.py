"""T5: pre-norm blocks with a module per sub-layer. Adapters act on a sub-layer's output before dropout and residual; x is the stream before the layer norm (VL-PET, 3.3).

The forwards are those of transformers' T5LayerSelfAttention, T5LayerCrossAttention and T5LayerFF (Apache 2.0) with the adapters put in; the block, with its clamp of overflowing
fp16 values, stays the stock one. fp16 checkpoints keep ``wo`` in fp32, so there a sub-layer's output and the stream may differ in dtype: the adapter runs in the output's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from fastadapt.hosts.roles import Host, Place, knows_keys, register
from fastadapt.nn import Init


class T5LayerSelfAttention(modeling_t5.T5LayerSelfAttention):
    """A T5LayerSelfAttention with an adapter."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, position_bias: Tensor | None = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        output, position_bias, weights = self.SelfAttention(
            self.layer_norm(hidden_states), mask=attention_mask, position_bias=position_bias, past_key_values=past_key_values, **kwargs
        )
        output = self.adapter(output, hidden_states.to(output.dtype))
        return hidden_states + self.dropout(output), position_bias, weights


class T5LayerCrossAttention(modeling_t5.T5LayerCrossAttention):
    """A T5LayerCrossAttention with an adapter, and one of the encoder's output, ``key_value_adapter``."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (adapter := self.key_value_adapter) is not None and not knows_keys(past_key_values, self.EncDecAttention.layer_idx):
            key_value_states = adapter(key_value_states)
        output, position_bias, weights = self.EncDecAttention(
            self.layer_norm(hidden_states), mask=attention_mask, key_value_states=key_value_states, position_bias=position_bias, past_key_values=past_key_values, **kwargs
        )
        if (adapter := self.adapter) is not None:
            output = adapter(output, hidden_states.to(output.dtype))
        return hidden_states + self.dropout(output), position_bias, weights


class T5LayerFF(modeling_t5.T5LayerFF):
    """A T5LayerFF with an adapter."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        output = self.DenseReluDense(self.layer_norm(hidden_states))
        output = self.adapter(output, hidden_states.to(output.dtype))
        return hidden_states + self.dropout(output)


class T5LayerNorm(modeling_t5.T5LayerNorm):
    """A T5LayerNorm with a bias, as Compacter's repository has it for BitFit: ``weight * x / rms(x) + bias``."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.bias


_ENCODER = (
    Place("encoder.self_attention", "layer.0", "adapter"),
    Place("encoder.feed_forward", "layer.1", "adapter"),
    Place("encoder.self_attention.query", "layer.0.SelfAttention.q", "parallel_adapter"),
    Place("encoder.self_attention.value", "layer.0.SelfAttention.v", "parallel_adapter"),
)
_DECODER = (
    Place("decoder.self_attention", "layer.0", "adapter"),
    Place("decoder.cross_attention", "layer.1", "adapter"),
    Place("decoder.feed_forward", "layer.2", "adapter"),
    Place("decoder.self_attention.query", "layer.0.SelfAttention.q", "parallel_adapter"),
    Place("decoder.self_attention.value", "layer.0.SelfAttention.v", "parallel_adapter"),
    Place("decoder.cross_attention.query", "layer.1.EncDecAttention.q", "parallel_adapter"),
    Place("decoder.cross_attention.value", "layer.1.EncDecAttention.v", "parallel_adapter"),
    Place("decoder.cross_attention.key_value", "layer.1", "key_value_adapter"),
    Place("decoder.feed_forward.inner", "layer.2.DenseReluDense.wo", "inner_adapter"),
)

register(
    Host(
        family="t5",
        block=modeling_t5.T5Block,
        places=lambda block: _DECODER if block.is_decoder else _ENCODER,
        width=lambda block: block.layer[0].SelfAttention.d_model,
        adapted={
            modeling_t5.T5LayerSelfAttention: T5LayerSelfAttention,
            modeling_t5.T5LayerCrossAttention: T5LayerCrossAttention,
            modeling_t5.T5LayerFF: T5LayerFF,
        },
        sources={
            modeling_t5.T5LayerSelfAttention: {"fce4997b3576493f": "5.16, 5.22, 5.23"},
            modeling_t5.T5LayerCrossAttention: {"ab21facfc696ed3a": "5.16, 5.22, 5.23"},
            modeling_t5.T5LayerFF: {"b7f2c285f08b51b0": "5.8, 5.16, 5.22, 5.23"},
        },
        norms=(modeling_t5.T5LayerNorm, nn.LayerNorm),
        # T5PreTrainedModel._init_weights leaves foreign Linears alone: torch's default.
        init=lambda block: Init(),
        biased={modeling_t5.T5LayerNorm: T5LayerNorm},
    )
)
