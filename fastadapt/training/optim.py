"""Parameter groups of the published optimiser."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float = 0.01, *, decay_norms: bool = True) -> list[dict[str, Any]]:
    """The trainable parameters in two groups, with and without weight decay, as VL-Adapter and VL-PET group them: no decay where the name contains ``bias`` or
    ``LayerNorm.weight``.

    By that rule the layer norms of BART and T5 are decayed, since they are named otherwise (``final_layer_norm.weight``), as they were in every published run;
    ``decay_norms=False`` exempts every norm.

    The rest of the published optimiser, linear warm-up included, is torch's and transformers' own::

        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, eps=1e-6)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(0.1 * steps), steps)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # in every step

    Args:
        model: a patched model, or any other.
        weight_decay: of the first group.
        decay_norms: False: no weight decay in norm layers, which are told by their class's name (``LayerNorm``, ``T5LayerNorm``, ``RMSNorm``, ``BatchNorm2d``).

    Returns:
        Two groups for a torch optimiser, the decayed one first; a group without parameters is left out.

    Raises:
        ValueError: a weight decay that is negative or not finite, or a model without trainable parameters.
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay: must be finite and not negative, not {weight_decay}")
    norms = {id(p) for module in model.modules() if "norm" in type(module).__name__.lower() for p in module.parameters(recurse=False)}
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = "bias" in name or "LayerNorm.weight" in name or (not decay_norms and id(parameter) in norms)
            groups[0.0 if spared else weight_decay].append(parameter)
    if not any(groups.values()):
        raise ValueError(f"model: this {type(model).__name__} has no parameter that requires gradients")
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
