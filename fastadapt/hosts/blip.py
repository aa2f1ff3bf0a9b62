"""BLIP: pre-norm image blocks, post-norm text layers with cross-attention. UniAdapter's outputs are added to a block's output (section 3).

The forwards are those of transformers' BlipEncoderLayer (Apache 2.0), BlipTextLayer and, for video, the cross-attention of BlipTextAttention and BlipTextSelfAttention
(BSD 3-Clause) with the adapters put in. The text layers take the scores of a video's frames as one more keyword, ``frame_aware_attention_weight``, which the stock text models
pass on.

Stock cross-attention of 5.23 does not heed ``encoder_attention_mask``: BlipTextAttention hands it on under a name that its inner module does not read there, so the VQA decoder
attends to a question's padding too. A patched model does what its base does; only `frame_aware_attention` heeds the mask, as the published code does everywhere.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.pytorch_utils import apply_chunking_to_forward

from fastadapt.hosts.roles import Host, Place, UnknownHostError, check_source, register
from fastadapt.nn import Init, frame_weights


class BlipEncoderLayer(modeling_blip.BlipEncoderLayer):
    """A BlipEncoderLayer with an ``adapter``."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        residual = hidden_states
        hidden_states = self.layer_norm1(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        hidden_states = hidden_states + residual

        residual = hidden_states
        hidden_states = self.layer_norm2(hidden_states)
        hidden_states = self.mlp(hidden_states)
        return self.adapter(residual, hidden_states + residual, "visual")


class BlipTextLayer(modeling_blip_text.BlipTextLayer):
    """A BlipTextLayer with an ``adapter`` of the text and a ``cross_attention_adapter``, in UniAdapter one and the same module.

    ``frame_aware_attention_weight`` (B, frames), scores of the frames of a video, scales the keys of cross-attention by `fastadapt.nn.frame_weights`; the attention's
    probabilities are not recorded then.
    """

    # Names under which a layer may hold what other layers hold too: ``save_pretrained`` writes a tensor once, and asks for them.
    _tied_weights_keys = dict.fromkeys(("adapter", "cross_attention_adapter", "crossattention.self.key.parallel_adapter", "crossattention.self.value.parallel_adapter"), "")

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        frame_aware_attention_weight: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        attention_output, _ = self.attention(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values)
        text = attention_output

        if encoder_hidden_states is not None:
            if frame_aware_attention_weight is None:
                attention_output, _ = self.crossattention(
                    attention_output, attention_mask=encoder_attention_mask, encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values
                )
            else:
                attention_output = frame_aware_attention(self.crossattention, attention_output, encoder_hidden_states, encoder_attention_mask, frame_aware_attention_weight)
        output = apply_chunking_to_forward(self.feed_forward_chunk, self.chunk_size_feed_forward, self.seq_len_dim, attention_output)
        if (adapter := self.adapter) is not None:
            output = adapter(text, output, "text")
        if encoder_hidden_states is not None and (adapter := self.cross_attention_adapter) is not None:
            output = adapter(attention_output, output, "multimodal")
        return output


def frame_aware_attention(attention: Any, hidden_states: Tensor, states: Tensor, mask: Tensor | None, scores: Tensor) -> Tensor:
    """What a BlipTextAttention makes of hidden_states (B, L, D) and encoder states, with the keys scaled frame by frame, behind any key adapter. It needs no cache: it never
    reads one, and leaves none behind.

    Args:
        attention: the layer's ``crossattention``.
        states: encoder states of the frames (B, frames * tokens, D), frame by frame.
        mask: additive, broadcast to (B, heads, L, frames * tokens).
        scores: (B, frames), see `fastadapt.nn.frame_scores`.

    Raises:
        ValueError: the states are no multiple of the frames.
        UnknownHostError: the stock attention of this version of transformers is not the one that is known.
    """
    if _UNKNOWN_ATTENTION:
        raise UnknownHostError(_UNKNOWN_ATTENTION)
    inner = attention.self

    def heads(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, inner.attention_head_size).transpose(1, 2)

    keys = inner.key(states)
    keys = heads(keys * frame_weights(scores, states.shape[1]).to(keys.dtype))
    logits = heads(inner.query(hidden_states)) @ keys.transpose(-1, -2) / math.sqrt(inner.attention_head_size)
    if mask is not None:
        logits = logits + mask
    context = inner.dropout(logits.softmax(-1)) @ heads(inner.value(states))
    return attention.output(context.transpose(1, 2).flatten(2), hidden_states)


def _unknown_attention() -> str:
    """Why `frame_aware_attention` cannot stand for the installed cross-attention, or nothing. Found once: a compiled forward cannot read source texts."""
    try:
        check_source(modeling_blip_text.BlipTextAttention, {"6f8f6790b183f427": "5.23"})
        check_source(modeling_blip_text.BlipTextSelfAttention, {"3c3aade98d4f2632": "5.23"})
    except UnknownHostError as error:
        return str(error)
    return ""


_UNKNOWN_ATTENTION = _unknown_attention()
_VISION = (Place("vision.block", "", "adapter"),)
_TEXT = (Place("text.self_attention", "", "adapter"),)
_CROSS = (
    Place("text.cross_attention", "", "cross_attention_adapter"),
    Place("text.cross_attention.key", "crossattention.self.key", "parallel_adapter"),
    Place("text.cross_attention.value", "crossattention.self.value", "parallel_adapter"),
)


def _text_places(layer: Any) -> tuple[Place, ...]:
    return _TEXT + _CROSS if hasattr(layer, "crossattention") else _TEXT


def _host(block: type[nn.Module], adapted: type[nn.Module], source: str, places: Any, width: Any) -> Host:
    return Host(
        family="blip",
        block=block,
        places=places,
        width=width,
        adapted={block: adapted},
        sources={block: {source: "5.23"}},
        norms=(nn.LayerNorm,),
        # BLIP's rule for Linears. Stock vision configs say 1e-10, which is of use only under a checkpoint.
        init=lambda _: Init(std=0.02),
        stages=("text.temporal_embedding",),
    )


register(
    _host(modeling_blip.BlipEncoderLayer, BlipEncoderLayer, "bec59c87ca93e324", lambda _: _VISION, lambda block: block.embed_dim),
    _host(modeling_blip_text.BlipTextLayer, BlipTextLayer, "ce31799afb25d0e2", _text_places, lambda block: block.config.hidden_size),
)
