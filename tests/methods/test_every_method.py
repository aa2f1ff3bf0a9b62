"""What holds for every method on every host: train, tasks, save and load, generate, copy, switch off, take out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt import patching
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import FAMILIES, assert_same, batch, logits, randomize, snapshot, tiny

hosts = pytest.mark.parametrize("family", FAMILIES)
R4: dict[str, Any] = {"reduction_factor": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "multiple": ("vl_adapter", {"sharing": "multiple", "layer_norm_before": True, **R4}),
    "half-shared": ("vl_adapter", {"sharing": "up", **R4}),
    "compacter": ("compacter", R4),
    "compacter, all shared": ("compacter", {"division": 4, "phm_rank": 1, "shared_rule": True, "shared_weight": True, "factorized_rule": True, **R4}),
    "compacter, rules over tasks": ("compacter", {"sharing": "multiple", "shared_rule_over_tasks": True, **R4}),
    "low-rank": ("low_rank_adapter", R4),
    "lora": ("lora", {"rank": 4}),
    "lora, multiple": ("lora", {"rank": 4, "sharing": "multiple"}),
    "bitfit": ("bitfit", {}),
    "lm_head": ("lm_head", {}),
    "full": ("full", {}),
}
every = pytest.mark.parametrize("variant", VARIANTS)


def put(model: nn.Module, variant: str, **options: Any) -> Handle:
    method, own = VARIANTS[variant]
    handle = patch(model, method, tasks=["vqa", "gqa"], **own, **options)
    handle.set_task("vqa")
    return handle


def patched(family: str, variant: str) -> tuple[nn.Module, Handle]:
    model = tiny(family)
    return model, put(model, variant)


def per_task(variant: str) -> bool:
    return VARIANTS[variant][1].get("sharing", "single") != "single"


@hosts
@every
def test_trains_and_comes_out_again(family: str, variant: str) -> None:
    model = tiny(family)
    before, out = snapshot(model), logits(model)
    handle = put(model, variant)
    randomize(handle)
    with handle.disabled():
        assert torch.equal(logits(model), out)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    for site in handle.report.sites:
        parameters = [(n, p) for n, p in handle.sites[site.id].named_parameters() if not per_task(variant) or p.grad is not None]
        assert parameters and all(p.grad is not None and p.grad.any() for _, p in parameters), site.id
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))


@hosts
@pytest.mark.parametrize("variant", [v for v in VARIANTS if per_task(v)])
def test_only_the_selected_task_learns(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    randomize(handle)
    outputs = {}
    for task in ("vqa", "gqa"):
        handle.set_task(task)
        outputs[task] = logits(model)
    assert not torch.equal(outputs["vqa"], outputs["gqa"])
    model(**batch()).loss.backward()
    for site in handle.sites.values():
        own = {id(p) for p in site.adapters["gqa"].parameters()}  # type: ignore[union-attr, operator, index]
        assert all((p.grad is not None) == (id(p) in own) for p in site.parameters())
    handle._select(None)
    with pytest.raises(RuntimeError, match="no task is selected"):
        logits(model)


@hosts
@every
def test_saved_and_loaded(family: str, variant: str, tmp_path: Path) -> None:
    model, handle = patched(family, variant)
    randomize(handle)
    handle.save(tmp_path)
    fresh = tiny(family)
    loaded = patching.load(fresh, tmp_path)
    loaded.set_task("vqa")
    assert torch.equal(logits(fresh), logits(model))
    shared = [len({id(p) for s in h.sites.values() for p in s.parameters()}) for h in (handle, loaded)]
    assert shared[0] == shared[1]
    again = copy.deepcopy(model)
    randomize(Handle.of(again), seed=7)
    assert not torch.equal(logits(again), logits(model)) and torch.equal(logits(fresh), logits(model))


@hosts
@every
def test_generates_with_a_cache(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    randomize(handle, std=0.1)
    inputs = {name: t for name, t in batch().items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))  # type: ignore[operator]


@hosts
@every
def test_identity_start(family: str, variant: str) -> None:
    model = tiny(family)
    out = logits(model)
    put(model, variant, init="identity")
    assert torch.equal(logits(model), out)


def test_tasks_are_needed() -> None:
    before = snapshot(model := tiny("bart"))
    with pytest.raises(ValueError, match="tasks: must name the tasks, since sharing='multiple' makes an adapter for each"):
        patch(model, "vl_adapter", sharing="multiple")
    with pytest.raises(ValueError, match="sharing: must be one of single, multiple, up, down, not 'none'"):
        patch(model, "vl_adapter", sharing="none")
    assert_same(before, snapshot(model))


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    _, handle = patched("bart", "compacter, all shared")
    handle.save(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum("phm_rule_left" in key for key in stored) == 1 and sum(key.endswith("W_right") for key in stored) == 2
    assert sum(key.endswith(".b") for key in stored) == 20
