"""InternVL's vision layers: pre-norm, with a trained factor per channel behind each sub-layer. The forward is that of transformers' InternVLVisionLayer (Apache 2.0) with the
adapters put in, before the factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, declare


def _layer(self: Any, hidden_states: Tensor) -> Tensor:
    output, _ = self.attention(self.layernorm_before(hidden_states))
    if (adapter := self.self_attention_adapter) is not None:
        output = adapter(output, hidden_states)
    hidden_states = self.lambda_1 * output + hidden_states

    output = self.mlp(self.layernorm_after(hidden_states))
    if (adapter := self.feed_forward_adapter) is not None:
        output = adapter(output, hidden_states)
    output = self.dropout(output)
    if self.lambda_2 is not None:
        output = self.lambda_2 * output
    return output + hidden_states


declare(
    "internvl",
    "internvl",
    "InternVLVisionLayer",
    Copy(_layer, {"89b20d4de9a92bf8": "5.22, 5.23", "669cf6d027dd95db": "5.8, 5.16"}),
    places=(*LAYER, *projections("encoder.self_attention", "attention")),
    width=lambda block: block.attention.embed_dim,
    models="InternVL (vision)",
    stack="vision",
)
