"""BLIP (for methods other than UniAdapter), BLIP-2 and InstructBLIP: pre-norm image layers, BLIP's post-norm text layers, and the Q-Former, whose queries attend to the image.

The forwards are those of transformers' BlipEncoderLayer, BlipTextSelfOutput, BlipTextOutput and their namesakes in BLIP-2 and InstructBLIP (Apache 2.0, BSD 3-Clause) with the
adapters put in. Queries and text pass feed-forward
networks of their own in a Q-Former's layer, hence two places.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, Place, declare


def _vision_layer(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = self.layer_norm1(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = hidden_states + residual

    residual = hidden_states
    hidden_states = self.layer_norm2(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    return hidden_states + residual


def _output(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    hidden_states = self.dense(hidden_states)
    hidden_states = self.adapter(hidden_states, input_tensor)
    hidden_states = self.dropout(hidden_states)
    return self.LayerNorm(hidden_states + input_tensor)


_ALWAYS = (
    Place("decoder.self_attention", "attention.output", "adapter"),
    Place("decoder.feed_forward", "output_query", "adapter"),
    *projections("decoder.self_attention", "attention.attention", "query", "value"),
)
_CROSS = (
    Place("decoder.cross_attention", "crossattention.output", "adapter"),
    *projections("decoder.cross_attention", "crossattention.attention", "query", "value"),
)
_TEXT = (Place("decoder.feed_forward", "output", "adapter", name="feed_forward.text"),)


def _places(layer: Any) -> tuple[Place, ...]:
    return _ALWAYS + (_CROSS if layer.has_cross_attention else ()) + (_TEXT if hasattr(layer, "output") else ())


def _text_places(layer: Any) -> tuple[Place, ...]:
    """A text encoder alone, or with cross-attention to the image: in BLIP one class, also of the decoder."""
    side = "decoder" if hasattr(layer, "crossattention") else "encoder"
    own: tuple[Place, ...] = Place(f"{side}.self_attention", "attention.output", "adapter"), Place(f"{side}.feed_forward", "output", "adapter")
    own += projections(f"{side}.self_attention", "attention.self", "query", "value")
    if side == "encoder":
        return own
    return (*own, Place("decoder.cross_attention", "crossattention.output", "adapter"), *projections("decoder.cross_attention", "crossattention.self", "query", "value"))


_VISION = Copy(_vision_layer, {"bec59c87ca93e324": "5.23", "acf415a679b13cf3": "5.8, 5.16, 5.22"})
_OUTPUT = Copy(_output, {"0650f56bc438ef17": "5.8, 5.16, 5.22, 5.23"})

declare("blip2", "blip", "BlipEncoderLayer", _VISION, places=LAYER, width=lambda block: block.embed_dim, models="BLIP (vision)", stack="vision")
declare(
    "blip2",
    "blip.modeling_blip_text",
    "BlipTextLayer",
    {"BlipTextSelfOutput": _OUTPUT, "BlipTextOutput": _OUTPUT},
    places=_text_places,
    width=lambda block: block.config.hidden_size,
    models="BLIP (text)",
    stack="text",
)
for _model, _name, _models in (("blip_2", "Blip2", "BLIP-2"), ("instructblip", "InstructBlip", "InstructBLIP")):
    declare(
        "blip2",
        _model,
        f"{_name}EncoderLayer",
        _VISION,
        places=LAYER,
        width=lambda block: block.embed_dim,
        models=f"{_models} (vision)",
        stack="vision",
    )
    declare(
        "blip2",
        _model,
        f"{_name}QFormerLayer",
        {f"{_name}QFormerSelfOutput": _OUTPUT, f"{_name}QFormerOutput": _OUTPUT},
        places=_places,
        width=lambda block: block.output_query.dense.out_features,
        models=f"{_models} (Q-Former)",
        stack="qformer",
    )
