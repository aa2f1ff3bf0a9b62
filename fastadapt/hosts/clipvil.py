"""CLIP-ViL's LXMERT-style layers with VL-Adapter's adapters. The model is none of transformers': this is the part of a layer that changes, a drop-in for any BERT-like one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastadapt.nn import Bottleneck


class AdaptedOutput(nn.Module):
    r"""The output half of a BERT-like sub-layer (``BertSelfOutput``, ``BertOutput``, ``BertAttOutput``, ``LxmertOutput``) with an adapter behind its projection.

    .. math:: y = LN(dropout(adapter(W h + b)) + x)

    It takes over the very modules of the half that it replaces, so their keys stay: ``dense``, ``dropout``, ``LayerNorm``; the adapter is ``adapter``. VL-Adapter's CLIP-ViL
    runs put one behind self-attention and one behind the feed-forward network of each of the 12 layers, a `fastadapt.nn.Bottleneck` with ``scalar_gate=True``, which starts as the
    identity::

        layer.attention.output = AdaptedOutput(layer.attention.output, Bottleneck(768, 192, scalar_gate=True))
        layer.output = AdaptedOutput(layer.output, Bottleneck(768, 192, scalar_gate=True))

    Args:
        output: the stock half.
        adapter: module(h, x) of what it makes of h = W h + b and of the residual x.

    Raises:
        TypeError: the half lacks one of its modules.
    """

    def __init__(self, output: nn.Module, adapter: Bottleneck | nn.Module) -> None:
        super().__init__()
        stock: Any = output
        if missing := [name for name in ("dense", "dropout", "LayerNorm") if not isinstance(getattr(output, name, None), nn.Module)]:
            raise TypeError(f"output: a {type(output).__name__} without {', '.join(missing)} is no output half of a BERT-like sub-layer")
        self.dense, self.adapter, self.dropout, self.LayerNorm = stock.dense, adapter, stock.dropout, stock.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """y (B, L, D) of the sub-layer's inner activations (B, L, inner) and the residual ``input_tensor`` (B, L, D)."""
        return self.LayerNorm(self.dropout(self.adapter(self.dense(hidden_states), input_tensor)) + input_tensor)
