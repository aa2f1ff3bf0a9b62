"""T5: pre-norm blocks with a module per sub-layer. Adapters act on a sub-layer's output before dropout and residual; x is the stream before the layer norm (VL-PET, 3.3).

The forwards, in ``mt5.py``, are those of transformers' T5LayerSelfAttention, T5LayerCrossAttention and T5LayerFF (Apache 2.0) with the adapters put in; the block, with its
clamp of overflowing fp16 values, stays the stock one. fp16 checkpoints keep ``wo`` in fp32, so there a sub-layer's output and the stream may differ in dtype: the adapter runs in
the output's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.t5 import modeling_t5

from fastadapt.hosts import mt5
from fastadapt.hosts.places import SEQ2SEQ_STAGES, T5_DECODER, T5_ENCODER
from fastadapt.hosts.roles import Host, register
from fastadapt.nn import Init


class T5LayerSelfAttention(modeling_t5.T5LayerSelfAttention):
    """A T5LayerSelfAttention with an adapter."""

    forward = mt5.self_attention


class T5LayerCrossAttention(modeling_t5.T5LayerCrossAttention):
    """A T5LayerCrossAttention with an adapter, and one of the encoder's output, ``key_value_adapter``."""

    forward = mt5.cross_attention


class T5LayerFF(modeling_t5.T5LayerFF):
    """A T5LayerFF with an adapter."""

    forward = mt5.feed_forward


class T5LayerNorm(modeling_t5.T5LayerNorm):
    """A T5LayerNorm with a bias, as Compacter's repository has it for BitFit: ``weight * x / rms(x) + bias``."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + self.bias


register(
    Host(
        family="t5",
        block=modeling_t5.T5Block,
        places=lambda block: T5_DECODER if block.is_decoder else T5_ENCODER,
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
        stages=SEQ2SEQ_STAGES,
        ends="dropout, residual (and the RMS norm before)",
    )
)
