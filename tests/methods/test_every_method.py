"""What holds for every method on every host: train, tasks, save and load, generate, copy, switch off, take out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt import patching
from fastadapt.nn import GeneratedBottleneck, HyperNetwork, PerTask
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import FAMILIES, assert_same, batch, logits, randomize, snapshot, tiny

hosts = pytest.mark.parametrize("family", FAMILIES)
R4: dict[str, Any] = {"reduction_factor": 4}
PET: dict[str, Any] = {"rank": 8, "heads": 4, "value_rank": 5}
NO_IDENTITY = ("vl-pet, norm and value residual", "vl-pet on lora")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "multiple": ("vl_adapter", {"sharing": "multiple", "layer_norm_before": True, **R4}),
    "half-shared": ("vl_adapter", {"sharing": "up", **R4}),
    "compacter": ("compacter", R4),
    "compacter, all shared": ("compacter", {"division": 4, "phm_rank": 1, "shared_rule": True, "shared_weight": True, "factorized_rule": True, **R4}),
    "compacter, rules over tasks": ("compacter", {"sharing": "multiple", "shared_rule_over_tasks": True, **R4}),
    "low-rank": ("low_rank_adapter", R4),
    "beside the sub-layers, multiple": ("vl_adapter", {"reads": "stream", "scale": 4.0, "sharing": "multiple", **R4}),
    "compacter behind the sums": ("compacter", {"reads": "sum", "division": 4, "phm_rank": 1, "shared_rule": True, **R4}),
    "lora": ("lora", {"rank": 4}),
    "lora, multiple": ("lora", {"rank": 4, "sharing": "multiple"}),
    "hyperformer": ("hyperformer", {"task_dim": 12, "hidden_dim": 10, "layer_norm_before": True, **R4}),
    "hyperformer, one": ("hyperformer", {"task_dim": 12, "hidden_dim": 10, "one_hypernet": True, **R4}),
    "hyperformer and prompts": ("hyperformer", {"task_dim": 12, "hidden_dim": 10, "encoder_prompt": 2, "decoder_prompt": 2, "prompt_mid": 5, **R4}),
    "prompt": ("prompt", {"encoder_prompt": 3, "prompt_mid": 5}),
    "prompts of both sides, multiple": ("prompt", {"encoder_prompt": 3, "decoder_prompt": 2, "prompt_mid": None, "prompt_sharing": "multiple"}),
    "adapters and prompts": ("vl_adapter", {"sharing": "multiple", "encoder_prompt": 2, "decoder_prompt": 1, **R4}),
    "adapters of an encoder's layer": ("houlsby", {"layers": [1], "decoder": False, **R4}),
    "prompt of tokens": ("prompt_tuning_tokens", {"encoder_prompt": 3}),
    "said": ("said", {"dimension": 200}),
    "new biases": ("bitfit_t5", {}),
    "vl-pet, ungated": ("vlpet", {"granularity": "none", "adapter_scale": (0.5, 2.0), "decoder": ["key_value", "multihead"], **PET}),
    "vl-pet, norm and value residual": ("vlpet", {"granularity": "l2norm", "adapter": "low_rank", "value_residual": True, "value_gate_rank": 3, **PET}),
    "vl-pet, gates and vectors alone": ("vlpet", {"granularity": "middleX", "adapter": "none", "gating_rank": 3, "decoder": ["value_ia3", "feed_forward_ia3"]}),
    "vl-pet, vectors added": (
        "vlpet",
        {"granularity": "middleY", "gating_rank": 3, "gating_add_first": True, "decoder": ["value_ia3", "feed_forward_ia3"], "ia3_add": True, "rank": 8},
    ),
    "vl-pet, own ranks": (
        "vlpet",
        {"gate_rank": 3, "adapter": "none", "decoder": ["self_attention", "cross_attention", "feed_forward"], "decoder_ranks": [3, 4, 5], "cross_gate_rank": 6},
    ),
    "vl-pet, multiple": (
        "vlpet",
        {"granularity": "small", "sharing": "multiple", "decoder": ["value_parallel", "cross_attention"], "decoder_ranks": 3, "cross_gate_rank": 6, **PET},
    ),
    "vl-pet on compacter": ("vlpet", {"adapter": "compacter", "adapter_options": {"division": 4, "phm_rank": 1, "shared_rule": True}, "rank": 8, "value_rank": 8, "gate_rank": 3}),
    "vl-pet on lora": ("vlpet", {"granularity": "layernorm", "adapter": "lora", "adapter_options": {"rank": 3}, "decoder": "value_sequential", "value_rank": 5}),
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
    options = VARIANTS[variant][1]
    return "multiple" in (options.get("sharing"), options.get("prompt_sharing")) or options.get("sharing") == "up"


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
        module = handle.sites[site.id]
        parameters = [p for p in module.parameters() if not (per_task(variant) or isinstance(module, HyperNetwork)) or p.grad is not None]
        assert isinstance(module, GeneratedBottleneck) or parameters
        assert all(p.grad is not None and p.grad.any() for p in parameters), site.id
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
    for site in (s for s in handle.sites.values() if isinstance(s, PerTask)):
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
def test_save_pretrained_stays_loadable(family: str, variant: str, tmp_path: Path) -> None:
    """The stock class loads what `save_pretrained` of a patched model writes, shared adapters or not, with the trained values of the base."""
    model, handle = patched(family, variant)
    randomize(handle)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).eval()  # type: ignore[attr-defined]
    state = model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in again.state_dict().items())


@hosts
@every
def test_generates_with_a_cache(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    randomize(handle, std=0.1)
    inputs = {name: t for name, t in batch().items() if name != "labels"}
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, use_cache=False))  # type: ignore[operator]


@hosts
@pytest.mark.parametrize("variant", [v for v in VARIANTS if "prompt" not in v and v not in NO_IDENTITY])
def test_identity_start(family: str, variant: str) -> None:
    model = tiny(family)
    out = logits(model)
    handle = put(model, variant, init="identity")
    assert torch.equal(logits(model), out)
    assert handle.report.no_identity is None and "started exactly at the base's output" in str(handle.report)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "prompt" in v])
def test_no_identity_start(variant: str) -> None:
    _, handle = patched("bart", variant)
    why = handle.report.no_identity
    assert why is not None and "impossible with encoder_prompt" in why and why in str(handle.report)
    with pytest.raises(ValueError, match="impossible with encoder_prompt"):
        put(tiny("bart"), variant, init="identity")


def test_a_tasks_prompts_are_a_file_of_their_own(tmp_path: Path) -> None:
    model, handle = patched("bart", "prompts of both sides, multiple")
    randomize(handle)
    handle.save(tmp_path, task="vqa")
    patching.load(fresh := tiny("bart"), tmp_path)
    assert torch.equal(logits(fresh), logits(model))


def test_prompts_need_a_stack() -> None:
    before = snapshot(model := tiny("bart"))
    with pytest.raises(ValueError, match="model: has no decoder, so decoder_prompt must be 0"):
        patch(model.model.encoder, "prompt", encoder_prompt=0, decoder_prompt=2)  # type: ignore[union-attr, arg-type]
    with pytest.raises(ValueError, match=r"the model is no whole encoder, so encoder\.prompt has no place"):
        patch(model.model.encoder.layers[0], "prompt")  # type: ignore[union-attr, index, arg-type]
    assert_same(before, snapshot(model))


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


@hosts
@pytest.mark.parametrize("variant", ["hyperformer", "hyperformer, one"])
def test_every_site_gets_the_weights_of_its_own_layer_and_block(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    randomize(handle)
    logits(model)
    for side in ("encoder", "decoder"):
        with torch.no_grad():
            made = handle.sites[f"{side}.hypernetwork"]()
        sites = {name: s for name, s in handle.sites.items() if name.startswith(side) and isinstance(s, GeneratedBottleneck)}
        assert len(sites) == (4 if side == "encoder" else 6)
        for name, site in sites.items():
            _, layer, block = name.split(".")
            assert site.weights is not None and torch.equal(site.weights.w_down, made[block][int(layer)].w_down)
        assert len({s.weights.w_down.sum().item() for s in sites.values()}) == len(sites), "no two of them are alike"  # type: ignore[union-attr]
