"""Vision blocks of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pre-norm, over the patches of all images of a batch in one sequence without a batch dimension, (tokens, D).

The forward is that of transformers' Qwen2VLVisionBlock (Apache 2.0) with the adapters put in. VL-PET's "small" gate, which averages over a sequence, refuses such an input.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER
from fastadapt.hosts.roles import Copy, declare


def _block(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> Tensor:
    output = self.attn(self.norm1(hidden_states), cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        output = adapter(output, hidden_states)
    hidden_states = hidden_states + output
    output = self.mlp(self.norm2(hidden_states))
    if (adapter := self.feed_forward_adapter) is not None:
        output = adapter(output, hidden_states)
    return hidden_states + output


_COPY = Copy(_block, {"c68a8532e7df1519": "5.16, 5.22, 5.23", "681e62f9206787af": "5.16, 5.22, 5.23"})

for _model, _name, _models in (
    ("qwen2_vl", "Qwen2VLVisionBlock", "Qwen2-VL"),
    ("qwen2_5_vl", "Qwen2_5_VLVisionBlock", "Qwen2.5-VL"),
    ("qwen3_vl", "Qwen3VLVisionBlock", "Qwen3-VL"),
):
    declare("qwen_vl", _model, _name, _COPY, places=LAYER, width=lambda block: block.norm1.weight.shape[0], models=f"{_models} (vision)", stack="vision", flat=True)
