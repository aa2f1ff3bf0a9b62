"""Weight-decay groups by the published names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from fastadapt import patch
from fastadapt.training import parameter_groups
from tests.hosts.tiny import FAMILIES, SMALL, tiny


def names(model: nn.Module, decay_norms: bool = True) -> tuple[set[str], set[str]]:
    """Of the decayed and of the spared parameters."""
    known = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, decay_norms=decay_norms)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    return {known[id(p)] for p in decayed["params"]}, {known[id(p)] for p in spared["params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_names_decay_the_hosts_norms(family: str) -> None:
    model = tiny(family)
    patch(model, "vl_adapter", layer_norms="all", **SMALL["vl_adapter"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    decayed, spared = names(model)
    assert decayed | spared == trained and spared == {name for name in trained if name.endswith(".bias")}
    norms = {name for name in trained if "layer_norm.weight" in name or "layernorm_embedding.weight" in name}
    assert norms and norms <= decayed
    fewer, more = names(model, decay_norms=False)
    assert decayed - fewer == norms == more - spared


def test_names_that_spare_a_parameter() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.LayerNorm, self.norm, self.relative_attention_bias, self.linear = nn.LayerNorm(2), nn.LayerNorm(2), nn.Embedding(2, 2), nn.Linear(2, 2)
            self.tied = self.linear

    assert names(Host()) == ({"norm.weight", "linear.weight"}, {"LayerNorm.weight", "LayerNorm.bias", "norm.bias", "relative_attention_bias.weight", "linear.bias"})


def test_groups_without_parameters_and_without_decay() -> None:
    linear = nn.Linear(2, 2)
    assert parameter_groups(linear, 0.0) == [{"params": [linear.weight, linear.bias], "weight_decay": 0.0}]
    linear.bias.requires_grad_(False)
    assert parameter_groups(linear, 0.1) == [{"params": [linear.weight], "weight_decay": 0.1}]


def test_with_torchs_optimiser_and_transformers_schedule() -> None:
    """At zero gradients weight decay alone moves a parameter: by the factor 1 - lr * decay, with the lr of the warm-up."""
    model = nn.Linear(3, 3).double()
    nn.init.ones_(model.weight)
    before = model.bias.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1, eps=1e-6)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 4)
    expected = 1.0
    for lr in (0.0, 0.05, 0.1, 0.05):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
        expected *= 1 - lr * 0.5
    torch.testing.assert_close(model.weight.detach(), torch.full((3, 3), expected, dtype=torch.float64), rtol=0, atol=8 * torch.finfo(torch.float64).eps)
    assert torch.equal(model.bias, before)


def test_errors() -> None:
    for bad in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"weight_decay: must be finite and not negative, not {bad}"):
            parameter_groups(nn.Linear(2, 2), bad)
    with pytest.raises(ValueError, match="model: this Linear has no parameter that requires gradients"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))
