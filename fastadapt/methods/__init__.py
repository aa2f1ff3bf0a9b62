"""The methods that `fastadapt.patch` knows, one file each."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastadapt.methods.base import INITS, MethodConfig, Target
from fastadapt.methods.base_tuning import BaseTuningConfig
from fastadapt.methods.compacter import CompacterConfig, LowRankAdapterConfig
from fastadapt.methods.lora import LoRAConfig
from fastadapt.methods.prompts import TASK_PROMPTS, task_prompt
from fastadapt.methods.vl_adapter import VLAdapterConfig
from fastadapt.methods.vlpet import VLPETConfig

__all__ = [
    "INITS", "TASK_PROMPTS", "BaseTuningConfig", "CompacterConfig", "LoRAConfig", "LowRankAdapterConfig", "MethodConfig", "Target", "VLAdapterConfig", "VLPETConfig", "available",
    "config", "task_prompt",
]  # fmt: skip

_METHODS: dict[str, type[MethodConfig]] = {c.method: c for c in (VLAdapterConfig, VLPETConfig, CompacterConfig, LowRankAdapterConfig, LoRAConfig, BaseTuningConfig)}
# Names of the papers for a method with options.
_PRESETS: dict[str, tuple[type[MethodConfig], dict[str, Any]]] = {
    "visual_projection": (BaseTuningConfig, {}),
    "bitfit": (BaseTuningConfig, {"biases": True}),
    "layer_norm": (BaseTuningConfig, {"layer_norms": "all"}),
    "lm_head": (BaseTuningConfig, {"lm_head": True}),
    "full": (BaseTuningConfig, {"language_model": True}),
}


def available() -> tuple[str, ...]:
    """Names of the methods, and of presets of them under the papers' names."""
    return *_METHODS, *_PRESETS


def config(method: str | MethodConfig, **options: Any) -> MethodConfig:
    """The config of a method, by name and options.

    Raises:
        ValueError: the method is unknown.
        TypeError: an option is unknown, or options are given beside a config.
    """
    if isinstance(method, MethodConfig):
        if options:
            raise TypeError(f"options {', '.join(options)} beside a {type(method).__name__}: give them to the config")
        return method
    if method not in available():
        raise ValueError(f"method: {method!r} is unknown; must be one of {', '.join(available())}")
    cls, preset = _PRESETS[method] if method in _PRESETS else (_METHODS[method], {})
    known = [f.name for f in dataclasses.fields(cls)]
    if unknown := [name for name in options if name not in known]:
        raise TypeError(f"{method}: unknown option {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return cls(**{**preset, **options})
