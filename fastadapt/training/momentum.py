"""Momentum copies: a slowly moving average of a model, as UniAdapter's retrieval and VQA runs keep one for their targets."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn


@torch.no_grad()
def momentum_update(model: nn.Module, momentum_model: nn.Module, m: float = 0.995, *, adapters: Literal["once", "twice"] = "once") -> None:
    r"""One step of the moving average, in place: :math:`p_m \leftarrow m\,p_m + (1 - m)\,p` for every parameter p of ``model``, each tensor once.

    A UniAdapter belongs to an image block and to text layers. The published code walks through the image encoder and each text model, and so averages it once for each of them:
    twice in retrieval, an effective momentum of 0.990025 instead of 0.995. ``adapters="twice"`` does the same. Buffers are left alone, and tensors that are equal in both models
    stay exactly as they are, which those that hold integers (of a quantised base) must be.

    Args:
        model: the trained model.
        momentum_model: its copy, for instance ``copy.deepcopy(model).requires_grad_(False)``; a copy of a patched model is patched.
        m: from 0 to 1.
        adapters: "once", or "twice": a parameter that several of the model's direct children hold is averaged once for each of them.

    Raises:
        ValueError: an argument is out of range, or the models' parameters differ in names, shapes or in which are shared, or integers in value. Nothing is averaged then.
    """
    if isinstance(m, bool) or not isinstance(m, (int, float)) or not 0.0 <= m <= 1.0:
        raise ValueError(f"m: must be a number from 0 to 1, not {m!r}")
    if adapters not in ("once", "twice"):
        raise ValueError(f"adapters: must be 'once' or 'twice', not {adapters!r}")
    model, momentum_model = (getattr(m, "_orig_mod", m) for m in (model, momentum_model))  # of compiled ones
    ours, theirs = dict(model.named_parameters()), dict(momentum_model.named_parameters())
    if ours.keys() != theirs.keys():
        raise ValueError(f"momentum_model: its parameters are not those of the model: {', '.join(sorted(ours.keys() ^ theirs.keys())[:5])}")
    if wrong := [name for name, p in ours.items() if p.shape != theirs[name].shape]:
        raise ValueError(f"momentum_model: {wrong[0]} is {tuple(theirs[wrong[0]].shape)}, in the model {tuple(ours[wrong[0]].shape)}")
    if _sharing(model) != _sharing(momentum_model):
        raise ValueError("momentum_model: it shares other parameters among its modules than the model")
    averaged = {name: p for name, p in ours.items() if p.is_floating_point() and theirs[name].is_floating_point()}
    if wrong := [name for name, p in ours.items() if name not in averaged and not torch.equal(p, theirs[name])]:
        raise ValueError(f"momentum_model: {wrong[0]} holds integers, which have no average, and other ones than in the model")
    holders: dict[nn.Parameter, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        holders.setdefault(p, set()).add(name.partition(".")[0])
    for name, p in averaged.items():
        times = len(holders[p]) if adapters == "twice" else 1
        theirs[name].lerp_(p.to(theirs[name]), 1.0 - m**times)


def _sharing(model: nn.Module) -> dict[str, str]:
    """Each parameter's name, and the first one of the same tensor."""
    first: dict[nn.Parameter, str] = {}
    return {name: first.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}
