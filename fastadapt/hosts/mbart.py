"""mBART: BART with the layer norms before the sub-layers. Adapters act behind each sub-layer's last projection, as in ``bart.py``; x is the stream before the layer norm.

The forwards are those of transformers' MBartEncoderLayer and MBartDecoderLayer (Apache 2.0) with the adapters put in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.hosts.ends import end
from fastadapt.hosts.places import BART_DECODER, BART_ENCODER, SEQ2SEQ_STAGES
from fastadapt.hosts.roles import Copy, declare, knows_keys
from fastadapt.nn import Init


def _encoder_layer(self: Any, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = self.self_attn_layer_norm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = _feed_forward(self, end(self, hidden_states, residual, self.dropout))
    if hidden_states.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max - 1000
        hidden_states = torch.clamp(hidden_states, min=-limit, max=limit)
    return hidden_states


def _decoder_layer(
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
    hidden_states = self.self_attn_layer_norm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = end(self, hidden_states, residual, self.dropout)

    if encoder_hidden_states is not None:
        residual = hidden_states
        hidden_states = self.encoder_attn_layer_norm(hidden_states)
        if (adapter := self.key_value_adapter) is not None and not knows_keys(past_key_values, self.encoder_attn.layer_idx):
            encoder_hidden_states = adapter(encoder_hidden_states)
        hidden_states, _ = self.encoder_attn(
            hidden_states=hidden_states, key_value_states=encoder_hidden_states, attention_mask=encoder_attention_mask, past_key_values=past_key_values, **kwargs
        )
        if (adapter := self.cross_attention_adapter) is not None:
            hidden_states = adapter(hidden_states, residual)
        hidden_states = end(self, hidden_states, residual, self.dropout)
    return _feed_forward(self, hidden_states)


def _feed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    residual = hidden_states
    hidden_states = self.final_layer_norm(hidden_states)
    hidden_states = self.activation_fn(self.fc1(hidden_states))
    hidden_states = F.dropout(hidden_states, p=self.activation_dropout, training=self.training)
    hidden_states = self.fc2(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    return end(self, hidden_states, residual, self.dropout)


# The two sources of each differ in annotations only.
_ENCODER = Copy(_encoder_layer, {"26f76fe37863f5a1": "5.23", "ed3b7d73bbcd4b68": "5.8, 5.16, 5.22"})
_DECODER = Copy(_decoder_layer, {"5003f637bff3795f": "5.23", "75a6388d79e003b5": "5.8, 5.16, 5.22"})

for _block, _copy, _places in (("MBartEncoderLayer", _ENCODER, BART_ENCODER), ("MBartDecoderLayer", _DECODER, BART_DECODER)):
    declare(
        "mbart",
        "mbart",
        _block,
        _copy,
        places=_places,
        width=lambda block: block.embed_dim,
        models="mBART, mBART-50",
        # BART's published values, and its rule for Linears.
        published="bart",
        init=lambda block: Init(std=block.self_attn.config.init_std),
        stages=SEQ2SEQ_STAGES,
        ends="dropout, residual",
    )
