"""LoRA as VL-Adapter compares with it: beside the query and value projections of every attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastadapt.methods.base import MethodConfig, Target, per_task
from fastadapt.nn import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(MethodConfig):
    """LoRA on query and value projections, and all biases: 5.93 % of VL-BART. The published T5 code builds no LoRA at all (its counts hold 768 position biases); here it has it.

    Args:
        rank: r.
        alpha: the update is scaled by alpha / r.
        dropout: of the update's input, in training.
        sharing: "single", one pair of matrices for all tasks, or "multiple", one per task.
        layer_norms: published: "none" (their biases are trained all the same).
        biases: published: True.
        visual_embedding, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "lora"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "none"}, "t5": {"layer_norms": "none"}, "other hosts": {"layer_norms": "none"}}

    biases: bool = True
    rank: int = 128
    alpha: float = 32.0
    dropout: float = 0.1
    sharing: Literal["single", "multiple"] = "single"

    def roles(self) -> tuple[str, ...]:
        attentions = ("encoder.self_attention", "decoder.self_attention", "decoder.cross_attention")
        return tuple(f"{attention}.{projection}" for attention in attentions for projection in ("query", "value"))

    def build(self, role: str, target: Target, init: str, *, device: torch.device, dtype: torch.dtype) -> nn.Module | None:
        if self.sharing not in ("single", "multiple"):
            raise ValueError(f"sharing: must be one of single, multiple, not {self.sharing!r}")
        return per_task(self.sharing, target, lambda: LoRA(target.width, target.out_width, self.rank, alpha=self.alpha, dropout=self.dropout, device=device, dtype=dtype))
