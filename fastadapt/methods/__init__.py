"""The methods that `fastadapt.patch` knows, one file each, and presets of them under the papers' names.

Presets of VL-Adapter's baselines: "visual_projection", "bitfit", "layer_norm", "lm_head", "full", "prompt".

Presets of Compacter's repository, for stock T5; published there with t5-base, an adapter rank of D / 32 (or / 16, / 8) and the learning rate in brackets:

* "houlsby" [3e-4]: adapters behind self-attention and feed-forward (never cross-attention), encoder and decoder; layer norms are trained too, here and in the next six.
* "pfeiffer" [3e-4]: behind self-attention only, as published there; Pfeiffer et al. put them behind the feed-forward network.
* "adapterdrop" [3e-4]: "houlsby" in the layers 5 to 11.
* "low_rank" [3e-3]: "houlsby" with projections of rank 1.
* "phm_adapter" [3e-3]: "houlsby" with Kronecker projections, n = 12, full W.
* "compacter_t5", "compacter++" [3e-3]: n = 4, rank 1, one rule for all; the latter behind the feed-forward network only.
* "bitfit_t5" [3e-4]: new biases of all Linears, the output layer's included, and of the layers' norms.
* "prompt_tuning" [3e-2], "prompt_tuning_tokens" [3e-1]: 100 vectors before the encoder's text, uniform or the first rows of the token table.
* "said" [3e-2], "said_dense": intrinsic dimension 20,000 by fastfood, or by a dense projection.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastadapt.methods.base import INITS, SELECTORS, TOWERS, BaseTensor, MethodConfig, Reparametrisation, StageSite, Target
from fastadapt.methods.base_tuning import BaseTuningConfig
from fastadapt.methods.compacter import CompacterConfig, LowRankAdapterConfig
from fastadapt.methods.hyperformer import HyperformerConfig
from fastadapt.methods.intrinsic import IntrinsicDimensionConfig
from fastadapt.methods.lora import LoRAConfig
from fastadapt.methods.prompts import TASK_PROMPTS, task_prompt
from fastadapt.methods.recipes import Recipe, recipe
from fastadapt.methods.uniadapter import UniAdapterConfig
from fastadapt.methods.vl_adapter import VLAdapterConfig
from fastadapt.methods.vlpet import VLPETConfig

__all__ = [
    "INITS", "SELECTORS", "TASK_PROMPTS", "TOWERS", "BaseTensor", "BaseTuningConfig", "CompacterConfig", "HyperformerConfig", "IntrinsicDimensionConfig", "LoRAConfig",
    "LowRankAdapterConfig",
    "MethodConfig", "Recipe", "Reparametrisation", "StageSite", "Target", "UniAdapterConfig", "VLAdapterConfig", "VLPETConfig", "available", "config", "recipe", "task_prompt",
]  # fmt: skip

_METHODS: dict[str, type[MethodConfig]] = {
    c.method: c
    for c in (VLAdapterConfig, VLPETConfig, CompacterConfig, LowRankAdapterConfig, LoRAConfig, HyperformerConfig, BaseTuningConfig, UniAdapterConfig, IntrinsicDimensionConfig)
}
# Adapters of Compacter's repository: its T5 starts foreign Linears with N(0, 0.01), and rules that projections do not share with N(0, 0.01), shared ones with N(0, 1e-4).
_ON_T5: dict[str, Any] = {"cross_attention": False, "reduction_factor": 32, "std": 0.01, "layer_norms": "all"}
_COMPACTER: dict[str, Any] = {**_ON_T5, "division": 4, "phm_rank": 1, "shared_rule": True, "rule_range": 1e-4}
# Names of the papers for a method with options.
_PRESETS: dict[str, tuple[type[MethodConfig], dict[str, Any]]] = {
    "visual_projection": (BaseTuningConfig, {}),
    "bitfit": (BaseTuningConfig, {"biases": True}),
    "layer_norm": (BaseTuningConfig, {"layer_norms": "all"}),
    "lm_head": (BaseTuningConfig, {"lm_head": True}),
    "full": (BaseTuningConfig, {"language_model": True}),
    "prompt": (BaseTuningConfig, {"encoder_prompt": 40}),
    "houlsby": (VLAdapterConfig, _ON_T5),
    "pfeiffer": (VLAdapterConfig, {**_ON_T5, "feed_forward": False}),
    "adapterdrop": (VLAdapterConfig, {**_ON_T5, "layers": tuple(range(5, 12))}),
    "low_rank": (LowRankAdapterConfig, _ON_T5),
    "phm_adapter": (CompacterConfig, {**_ON_T5, "division": 12}),
    "compacter_t5": (CompacterConfig, _COMPACTER),
    "compacter++": (CompacterConfig, {**_COMPACTER, "self_attention": False}),
    "bitfit_t5": (BaseTuningConfig, {"add_biases": True}),
    "prompt_tuning": (BaseTuningConfig, {"encoder_prompt": 100, "prompt_mid": None}),
    "prompt_tuning_tokens": (BaseTuningConfig, {"encoder_prompt": 100, "prompt_mid": None, "prompt_start": "tokens"}),
    "said": (IntrinsicDimensionConfig, {}),
    "said_dense": (IntrinsicDimensionConfig, {"projection": "dense"}),
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
