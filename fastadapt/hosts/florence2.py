"""Florence-2's vision tower, DaViT: blocks that attend inside windows alternate with blocks that attend between channels. Its language model is BART.

The forwards are those of transformers' Florence2VisionSpatialBlock and Florence2VisionChannelBlock (Apache 2.0) with the adapters put in. Tokens are an image's pixels (B, H W, D)
at the places; x is the stream behind the depthwise convolution, before the layer norm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastadapt.hosts.places import LAYER
from fastadapt.hosts.roles import Copy, declare


def _spatial_block(self: Any, hidden_states: Tensor) -> Tensor:
    batch, width, rows, columns = hidden_states.shape
    return _block(self, hidden_states, lambda normed: self.window_attn(normed.view(batch, rows, columns, width)))


def _channel_block(self: Any, hidden_states: Tensor) -> Tensor:
    return _block(self, hidden_states, self.channel_attn)


def _block(self: Any, hidden_states: Tensor, attention: Any) -> Tensor:
    shape = hidden_states.shape
    residual = _tokens(self.conv1(hidden_states) + hidden_states)
    hidden_states = attention(self.norm1(residual))
    if (adapter := self.self_attention_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + self.drop_path1(hidden_states)
    hidden_states = hidden_states.transpose(1, 2).view(shape)

    residual = _tokens(self.conv2(hidden_states) + hidden_states)
    hidden_states = self.ffn(self.norm2(residual))
    if (adapter := self.feed_forward_adapter) is not None:
        hidden_states = adapter(hidden_states, residual)
    hidden_states = residual + self.drop_path2(hidden_states)
    return hidden_states.transpose(1, 2).view(shape)


def _tokens(image: Tensor) -> Tensor:
    return image.flatten(2).transpose(1, 2)


for _name, _copy in (
    ("Florence2VisionSpatialBlock", Copy(_spatial_block, {"1252d437c69d16f3": "5.8, 5.16, 5.22, 5.23"})),
    ("Florence2VisionChannelBlock", Copy(_channel_block, {"6c4bed5655f412c3": "5.8, 5.16, 5.22, 5.23"})),
):
    declare(
        "florence2",
        "florence2",
        _name,
        _copy,
        places=LAYER,
        width=lambda block: block.norm1.weight.shape[0],
        models="Florence-2 (vision; its language model is BART)",
        stack="vision",
    )
