"""Decoder-only language models: Llama's pre-norm layer, which most of them share, and Gemma 2's and 3's with a second norm behind each sub-layer.

Adapters act on a sub-layer's output before the residual, in the sandwich before its second norm; x is the stream before the first. The forwards are those of transformers'
LlamaDecoderLayer, Qwen3VLTextDecoderLayer and Gemma3DecoderLayer (Apache 2.0) with the adapters put in.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER, projections
from fastadapt.hosts.roles import Copy, declare


def _sub_layers(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    return residual + hidden_states


def _llama(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    return _sub_layers(
        self,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )


def _qwen3_vl(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Tensor:
    return _llama(self, hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings, **kwargs)


def _gemma3(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        **kwargs,
    )
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.pre_feedforward_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = self.post_feedforward_layernorm(hidden_states)
    return residual + hidden_states


# Within one copy the sources differ in annotations only.
_LLAMA = Copy(_llama, {"75d1d62e173e8c57": "5.8, 5.16, 5.22, 5.23", "2feb63cef86c758e": "5.23", "0714a1ed3b4d3aa3": "5.8, 5.16, 5.22"})
_QWEN3_VL = Copy(_qwen3_vl, {"48b425ff62ec41e2": "5.8, 5.16, 5.22, 5.23"})
_GEMMA3 = Copy(
    _gemma3,
    {"5f227c60549015e0": "5.22, 5.23", "967d4000cb189ddd": "5.8, 5.16", "192b8a5ec4fa4aa3": "5.23", "6b9a02d8a6f02c39": "5.8, 5.16, 5.22"},
)

for _model, _block, _copy, _models in (
    ("llama", "LlamaDecoderLayer", _LLAMA, "Llama; LLaVA, LLaVA-NeXT, Idefics3, SmolVLM (language)"),
    ("mistral", "MistralDecoderLayer", _LLAMA, "Mistral; LLaVA-NeXT, Idefics2 (language)"),
    ("gemma", "GemmaDecoderLayer", _LLAMA, "Gemma; PaliGemma (language)"),
    ("qwen2", "Qwen2DecoderLayer", _LLAMA, "Qwen2; InternVL (language)"),
    ("qwen3", "Qwen3DecoderLayer", _LLAMA, "Qwen3; InternVL 3.5 (language)"),
    ("qwen2_vl", "Qwen2VLDecoderLayer", _LLAMA, "Qwen2-VL (language)"),
    ("qwen2_5_vl", "Qwen2_5_VLDecoderLayer", _LLAMA, "Qwen2.5-VL (language)"),
    ("qwen3_vl", "Qwen3VLTextDecoderLayer", _QWEN3_VL, "Qwen3-VL (language)"),
    ("gemma2", "Gemma2DecoderLayer", _GEMMA3, "Gemma 2; PaliGemma 2 (language)"),
    ("gemma3", "Gemma3DecoderLayer", _GEMMA3, "Gemma 3 (language)"),
):
    declare(
        "llama",
        _model,
        _block,
        _copy,
        places=(*LAYER, *projections("encoder.self_attention", "self_attn")),
        width=lambda block: block.hidden_size,
        models=_models,
        stack="language",
    )
