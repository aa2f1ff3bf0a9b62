"""Tuning of the base itself, with no adapters: what the papers compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastadapt.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class BaseTuningConfig(MethodConfig):
    """Trains chosen tensors of the base, by default the visual embedding alone ("visual projection tuning"). BitFit, layer-norm, LM-head and full fine-tuning are presets of it.

    Args:
        layer_norms: published: "none".
        visual_embedding, biases, add_biases, lm_head, language_model: see `MethodConfig`.
    """

    method: ClassVar[str] = "base_tuning"
    published: ClassVar[dict[str, dict[str, Any]]] = {"bart": {"layer_norms": "none"}, "t5": {"layer_norms": "none"}, "other hosts": {"layer_norms": "none"}}

    def roles(self) -> tuple[str, ...]:
        return ()
