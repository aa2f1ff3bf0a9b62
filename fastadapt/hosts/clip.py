"""Pre-norm encoder layers with q/k/v projections: CLIP's and SigLIP's text and vision towers, and the vision towers that took over their layer.

The forward is that of transformers' CLIPEncoderLayer (Apache 2.0) with the adapters put in; they act on a sub-layer's output before the residual, and x is the stream before the
layer norm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, declare


def _layer(self: Any, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = self.layer_norm1(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.layer_norm2(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    return residual + hidden_states


def _stack(layer: Any) -> str:
    """One class serves both towers; only the vision tower's config has patches."""
    return "vision" if hasattr(layer.self_attn.config, "patch_size") else "text"


# One forward under several sources: annotations, decorators and a docstring differ.
_COPY = Copy(
    _layer,
    {
        "75b63a9d281a8af0": "5.23",
        "e2aec042a10f7e92": "5.23",
        "ec8a2687f8e03fd7": "5.23",
        "9c77f9ba2eeb4169": "5.8, 5.16, 5.22",
        "22f28409c86c589b": "5.8, 5.16, 5.22",
        "b8d3e3849ba36a14": "5.8, 5.16, 5.22",
    },
)

for _model, _block, _models in (
    ("clip", "CLIPEncoderLayer", "CLIP"),
    ("siglip", "SiglipEncoderLayer", "SigLIP"),
    ("siglip2", "Siglip2EncoderLayer", "SigLIP 2"),
    ("metaclip_2", "MetaClip2EncoderLayer", "MetaCLIP 2"),
    ("idefics2", "Idefics2EncoderLayer", "Idefics2 (vision)"),
    ("idefics3", "Idefics3EncoderLayer", "Idefics3 (vision)"),
    ("smolvlm", "SmolVLMEncoderLayer", "SmolVLM (vision)"),
):
    declare(
        "clip",
        _model,
        _block,
        _COPY,
        places=(*LAYER, *projections("encoder.self_attention", "self_attn")),
        width=lambda block: block.embed_dim,
        models=_models,
        stack=_stack,
    )
