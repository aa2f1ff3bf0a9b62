"""`patch` and the handle: reversibility, refusals, switching, copying. Numbers are judged in tests/hosts and tests/methods."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

import fastadapt
from fastadapt import checkpoint, interop, methods
from fastadapt.hosts import roles
from fastadapt.methods import VLAdapterConfig, VLPETConfig
from fastadapt.patching import Handle, UnknownHostError, load, patch
from tests.hosts.tiny import FAMILIES, METHODS, SMALL, assert_same, batch, logits, randomize, snapshot, tiny
from tests.hosts_models import models

both = pytest.mark.parametrize("method", METHODS)
hosts = pytest.mark.parametrize("family", FAMILIES)


def train_a_step(model: nn.Module, handle: Handle) -> None:
    model.train()
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.5)
    model(**batch()).loss.backward()
    optimizer.step()


@hosts
@both
def test_unpatch_restores_everything(family: str, method: str) -> None:
    model = tiny(family)
    next(model.parameters()).requires_grad_(False)
    before, out = snapshot(model), logits(model)
    handle = patch(model, method, **SMALL[method])
    assert logits(model).shape == out.shape
    train_a_step(model, handle)
    trained = [t.id for t in handle._trained]
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model), out)
    assert trained or (family, method) == ("t5", "vl_adapter")
    # Again, keeping the base as it was trained.
    handle = patch(model, method, **SMALL[method])
    train_a_step(model, handle)
    kept = {t.id: t.parameter.detach().clone() for t in handle._trained}
    handle.unpatch()
    after = snapshot(model)
    assert {name for name, value in before["values"].items() if not torch.equal(value, after["values"][name])} != set() or not kept
    after["values"] = before["values"]
    assert_same(before, after)


@hosts
def test_an_unpatched_handle_is_dead(family: str) -> None:
    model = tiny(family)
    handle = patch(model, "vl_adapter", tasks=["vqa"])
    handle.unpatch()
    for use in (
        handle.unpatch,
        lambda: handle.report,
        lambda: handle.save("/nonexistent"),
        lambda: handle.disabled().__enter__(),
        lambda: handle.set_task("vqa"),
        lambda: handle.task("vqa").__enter__(),
        lambda: handle.route(["vqa", "vqa"]).__enter__(),
        handle.trainable_parameters,
        handle.parameter_counts,
        handle.print_trainable_parameters,
        handle.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match="no longer patched"):
            use()
    with pytest.raises(ValueError, match="is not patched"):
        Handle.of(model)


@hosts
@both
def test_base_keys_stay(family: str, method: str) -> None:
    model = tiny(family)
    base = dict(model.state_dict())
    other = tiny(family)
    handle = patch(model, method, **SMALL[method])
    state = model.state_dict()
    assert {k for k in state if k not in base} == {f"{s.path}.{n}" for s in handle.report.sites for n, _ in handle.sites[s.id].named_parameters()}
    assert all(torch.equal(state[k], base[k]) for k in base)
    assert [type(m).__name__ for m in model.modules() if type(m).__name__ not in ("Bottleneck", "GatedBottleneck", "ValueParallelAdapter")][:5] == [
        type(m).__name__ for m in other.modules()
    ][:5]
    stock = {type(m) for m in other.modules()}
    assert not any(roles.is_adapted(m) for m in other.modules()) and stock == {type(m) for m in tiny(family).modules()}


@hosts
@both
def test_save_pretrained_stays_loadable(family: str, method: str, tmp_path: Path) -> None:
    model = tiny(family)
    handle = patch(model, method, init="identity", **SMALL[method])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    handle.unpatch()
    assert again.state_dict().keys() == model.state_dict().keys()


@hosts
@both
def test_disabled_is_the_base(family: str, method: str) -> None:
    model = tiny(family)
    out = logits(model)
    handle = patch(model, method, **SMALL[method])
    randomize(handle)
    adapted = logits(model)
    assert not torch.allclose(adapted, out, atol=1e-3)
    parameters = [id(p) for p in model.parameters()]
    with handle.disabled():
        assert torch.equal(logits(model), out)
        with handle.disabled():
            assert torch.equal(logits(model), out)
        assert torch.equal(logits(model), out)
        for refused in (handle.unpatch, lambda: handle.save("/nonexistent"), lambda: handle.load("/nonexistent"), handle.remember_base):
            with pytest.raises(RuntimeError, match="inside"):
                refused()
    assert torch.equal(logits(model), adapted)
    assert parameters == [id(p) for p in model.parameters()]
    with pytest.raises(KeyError), handle.disabled():
        raise KeyError
    assert torch.equal(logits(model), adapted)


@hosts
def test_disabled_between_forward_and_backward(family: str) -> None:
    """As a distillation loss does: no tensor is written, so the gradient outside is that without the block."""
    grads = []
    for peek in (False, True):
        model = tiny(family)
        handle = patch(model, "vlpet", **SMALL["vlpet"])
        randomize(handle)
        loss = model(**batch()).loss
        if peek:
            with handle.disabled():
                loss_base = model(**batch()).loss
            assert not loss_base.requires_grad
        loss.backward()
        grads.append([p.grad for p in handle.trainable_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_disabled_follows_the_model() -> None:
    model = tiny("bart").double()
    out = logits(model)
    handle = patch(model.float(), "vlpet", **SMALL["vlpet"])
    model.double()
    with handle.disabled():
        assert torch.allclose(logits(model), out, atol=1e-12)
    handle.unpatch(restore_base=True)
    assert torch.allclose(logits(model), out, atol=1e-12)


def test_tasks() -> None:
    model = tiny("bart")
    handle = patch(model, "vl_adapter", tasks=["vqa", "gqa"])
    assert handle.active_task is None
    handle.set_task("gqa")
    with handle.task("vqa") as inside:
        assert inside is handle and handle.active_task == "vqa"
    assert handle.active_task == "gqa"
    with pytest.raises(ValueError, match="'nlvr' is unknown; must be one of vqa, gqa"):
        handle.set_task("nlvr")
    with pytest.raises(ValueError, match="nlvr"), handle.task("nlvr"):
        pass
    assert handle.active_task == "gqa"
    handle.unpatch()
    with pytest.raises(ValueError, match="without tasks"):
        patch(model, "vl_adapter").set_task("vqa")


@hosts
@both
def test_report(family: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(family)
    total = sum(p.numel() for p in model.parameters())
    handle = patch(model, method, **SMALL[method])
    report = handle.report
    adapters = sum(s.parameters for s in report.sites)
    assert report.total == total + adapters == sum(p.numel() for p in model.parameters())
    assert report.trainable == sum(p.numel() for p in handle.trainable_parameters()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.percent == 100 * report.trainable / report.total
    assert len(report.sites) == (10 if method == "vl_adapter" else 6)
    assert {s.id for s in report.sites} == handle.sites.keys()
    assert all(model.get_submodule(s.path) is handle.sites[s.id] for s in report.sites)
    assert len(report.skipped) + len(report.sites) == 2 * (4 + 9) and all("puts nothing there" in why for _, why in report.skipped)
    assert {s.backend for s in report.sites} <= {"reference", "cpu"}
    with fastadapt.backend.use("reference"):
        assert {s.backend for s in handle.report.sites} == {"reference"}
    text = str(report)
    assert all(s.id in text for s in report.sites) and f"{report.percent:.4f} %" in text and "left alone" in text
    handle.print_trainable_parameters()
    assert capsys.readouterr().out == f"trainable params: {report.trainable:,} || all params: {report.total:,} || trainable%: {report.percent:.4f}\n"


def test_report_names_the_backend_that_cannot_run() -> None:
    handle = patch(tiny("bart"), "vl_adapter")
    with fastadapt.backend.use("triton"):
        sites = handle.report.sites
    assert {s.backend for s in sites} == {"none"} and "triton" in sites[0].reasons["demanded"][0]


@hosts
@both
def test_deepcopy_and_pickle(family: str, method: str) -> None:
    model = tiny(family)
    handle = patch(model, method, tasks=["vqa"], **SMALL[method])
    randomize(handle)
    out = logits(model)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    base = logits(tiny(family))
    for other in (copied, loaded):
        assert torch.equal(logits(other), out)
        own = Handle.of(other)
        assert own is not handle and own.model is other and own.tasks == ("vqa",)
        randomize(own, seed=5)
        assert torch.equal(logits(model), out)
        with own.disabled():
            assert torch.equal(logits(other), base)
        own.unpatch(restore_base=True)
        assert not any(roles.is_adapted(m) for m in other.modules()) and torch.equal(logits(other), base)
    assert torch.equal(logits(model), out)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize(
    ("family", "method", "options"), [("bart", "vlpet", SMALL["vlpet"]), ("t5", "full", {}), ("t5", "prompt_tuning", {"prompt_mid": 4}), ("t5", "bitfit_t5", {})]
)
def test_a_copy_of_a_disabled_model_is_enabled(family: str, method: str, options: dict[str, Any], copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """It is inside no block that could end. With a tensor of the model itself among those that are trained."""
    model = tiny(family)
    model.own = nn.Parameter(torch.zeros(2))
    base = logits(model)
    handle = patch(model, method, **options)
    randomize(handle)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(0.1)
    adapted, state = logits(model), {name: t.clone() for name, t in model.state_dict().items()}
    with handle.disabled():
        other, held = copied(model), copied(nn.ModuleList([model]))[0]
        assert torch.equal(logits(model), base)
    for got in (other, held):
        own = Handle.of(got)
        assert torch.equal(logits(got), adapted) and all(torch.equal(t, state[name]) for name, t in got.state_dict().items())
        assert {id(p) for p in own.trainable_parameters()}.isdisjoint(id(p) for p in model.parameters())
        own.save(tmp_path)
        with own.disabled():
            assert torch.equal(logits(got), base)
        own.unpatch(restore_base=True)
        assert torch.equal(logits(got), base) and not any(roles.is_adapted(m) for m in got.modules())
    assert torch.equal(logits(model), adapted)


def test_the_handle_of_a_wrapped_model() -> None:
    model = tiny("bart")
    handle = patch(model, "vl_adapter")
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert Handle.of(wrapped) is handle
    handle.unpatch()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        with pytest.raises(ValueError, match=f"model: this {type(wrapped).__name__} is not patched"):
            Handle.of(wrapped)
    with pytest.raises(TypeError, match=r"model: must be an nn.Module, not str"):
        Handle.of("model")  # type: ignore[arg-type]


def test_tensors_that_changed_shape_are_not_restored() -> None:
    model = tiny("bart")
    handle = patch(model, "full")
    randomize(handle)
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.add_(1)
    norm = model.model.decoder.layernorm_embedding
    norm.weight = nn.Parameter(torch.ones(40))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for what, call in (("restore_base", lambda: handle.unpatch(restore_base=True)), ("disabled", lambda: handle.disabled().__enter__())):
        with pytest.raises(RuntimeError, match=rf"{what}: 1 tensors have another shape than before the patch \(decoder.layernorm_embedding.weight \(32,\) -> \(40,\)\)"):
            call()
    assert Handle.of(model) is handle and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    handle.unpatch()


@pytest.mark.parametrize("kind", ["llama", "opt", "mbart"])
def test_an_output_layer_that_transformers_replaced(kind: str, tmp_path: Path) -> None:
    """``resize_token_embeddings`` makes a new one where it is not tied; it is the one that the handle trains, saves, switches and gives back."""
    model = models.tiny(kind, tie_word_embeddings=False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    handle = patch(model, "vl_adapter", reduction_factor=4, lm_head=True, add_biases=kind == "opt")
    model.resize_token_embeddings(104)
    randomize(handle)
    head = model.lm_head.weight
    assert head.shape == (104, 32) and any(p is head for p in handle.trainable_parameters())
    handle.save(tmp_path)
    assert torch.equal(handle._tensors()["base/lm_head.weight"], head) and torch.equal(checkpoint.read(tmp_path)[1]["base/lm_head.weight"], head)
    with pytest.raises(RuntimeError, match=r"disabled: .*lm_head.weight \(99, 32\) -> \(104, 32\).*remember_base"), handle.disabled():
        pass
    handle.remember_base()
    want, trained = head.detach().clone(), logits(model, models.KINDS[kind].batch())
    randomize(handle, seed=3)
    assert not torch.equal(head, want)
    with handle.disabled():
        assert torch.equal(model.lm_head.weight, want) and not model.lm_head.weight.requires_grad
    handle.load(tmp_path)
    assert torch.equal(head, want) and torch.equal(logits(model, models.KINDS[kind].batch()), trained)
    randomize(handle, seed=3)
    handle.unpatch(restore_base=True)
    assert model.lm_head.weight is head and torch.equal(head, want)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {name: flag for name, flag in flags.items() if name in dict(model.named_parameters())}
    assert model.state_dict().keys() <= models.tiny(kind, tie_word_embeddings=False).state_dict().keys()


def test_flags_of_a_replaced_output_layer() -> None:
    model = models.tiny("llama", tie_word_embeddings=False).train()
    handle = patch(model, "vl_adapter", reduction_factor=4)
    model.resize_token_embeddings(104)
    assert not model.lm_head.weight.requires_grad
    model.lm_head.eval()
    handle.unpatch()
    assert model.lm_head.weight.requires_grad and model.lm_head.training


def test_a_replaced_output_layer_starts_again() -> None:
    model = models.tiny("opt", tie_word_embeddings=False)
    handle = patch(model, "lora", rank=2, add_biases=True)
    randomize(handle)
    model.resize_token_embeddings(104)
    assert model.lm_head.bias.any()
    handle.reset_parameters()
    assert not model.lm_head.bias.any()


def test_a_replaced_output_layer_in_a_file_of_peft(tmp_path: Path) -> None:
    model = models.tiny("opt", tie_word_embeddings=False)
    handle = patch(model, "lora", rank=2, add_biases=True)
    randomize(handle)
    model.resize_token_embeddings(104)
    interop.to_peft(handle, tmp_path)
    assert torch.equal(load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lm_head.bias"], model.lm_head.bias) and len(model.lm_head.bias) == 104


@pytest.mark.parametrize(("part", "lost"), [("lm_head", "1 places .* (lm_head.weight)"), ("model.layers.1", "2 places .* (language.1.self_attention, language.1.feed_forward)")])
def test_modules_of_the_patch_that_are_gone(part: str, lost: str, tmp_path: Path) -> None:
    model = models.tiny("llama", tie_word_embeddings=False)
    flags = [p.requires_grad for p in model.parameters()]
    handle = patch(model, "vl_adapter", reduction_factor=4, lm_head=True)
    before, stand_in = model.get_submodule(part), nn.Identity()
    model.set_submodule(part, stand_in)
    for use in (
        lambda: handle.save(tmp_path / "none"),
        lambda: handle.load(tmp_path / "none"),
        lambda: handle.disabled().__enter__(),
        lambda: handle.merged().__enter__(),
        handle.remember_base,
        lambda: handle.unpatch(restore_base=True),
    ):
        with pytest.raises(RuntimeError, match=f": {lost}: other modules stand there; put those of the patch back, or unpatch".replace("(", r"\(").replace(")", r"\)")):
            use()
    assert not (tmp_path / "none").exists() and Handle.of(model) is handle
    assert handle.report.trainable == sum(p.numel() for p in handle.trainable_parameters())
    handle.unpatch()
    assert all(p.requires_grad for p in model.parameters()) and not stand_in._parameters
    model.set_submodule(part, before)
    assert [p.requires_grad for p in model.parameters()] == flags and not any(roles.is_adapted(m) for m in model.modules())


TIED: list[tuple[str, str, dict[str, Any]]] = [
    ("bart", "vl_adapter", {"reduction_factor": 4, "sharing": "up", "tasks": ["vqa", "gqa"]}),
    ("bart", "compacter", {"reduction_factor": 4, "shared_rule": True}),
    ("t5", "full", {}),  # the token table
]
tied = pytest.mark.parametrize(("family", "method", "options"), TIED)


def several_places(handle: Handle) -> list[list[str]]:
    """The names of each tensor that is trained and has several."""
    names: dict[int, list[str]] = {}
    for name, p in handle.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).extend([name] * p.requires_grad)
    return [several for several in names.values() if len(several) > 1]


@tied
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled])
def test_assigned_tensors_are_tied_again(family: str, method: str, options: dict[str, Any], copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    handle = Handle.of(copied((first := patch(tiny(family), method, **options)).model))
    model, places, trainable = handle.model, several_places(first), first.report.trainable
    assert places
    state = {name: t + 1 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert several_places(handle) == places and all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert handle.report.trainable == trainable and handle.report.sites == first.report.sites
    handle.save(tmp_path)
    again = load(tiny(family), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.trainable_parameters(), handle.trainable_parameters(), strict=True))
    handle.unpatch()
    assert not model._load_state_dict_post_hooks and not any(roles.is_adapted(m) for m in model.modules())


@tied
def test_different_values_for_one_tensor(family: str, method: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family)
    handle = patch(model, method, **options)
    places = several_places(handle)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for name in {several[-1] for several in places}:
        state[name] += 1
    message = rf": the patch has one tensor at .*{re.escape(places[0][0])}.*, where different ones stand now \({len(places)} such tensors\); give the places one of equal values"
    with pytest.raises(RuntimeError, match=f"^load_state_dict{message}"):
        model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match=f"^save{message}"):
        handle.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for use in (lambda: handle.disabled().__enter__(), handle.remember_base, lambda: handle.unpatch(restore_base=True)) if method == "full" else ():
        with pytest.raises(RuntimeError, match=message):
            use()
    # Equal again, they are one; the values of the last load.
    model.load_state_dict({**state, **{name: state[several[0]] for several in places for name in several}})
    assert several_places(handle) == places and handle.report.trainable == sum(p.numel() for p in handle.trainable_parameters())
    handle.unpatch()


@tied
def test_tensors_of_the_meta_device_are_tied(family: str, method: str, options: dict[str, Any]) -> None:
    real = patch(tiny(family), method, **options)
    randomize(real)
    want = {name: t.clone() for name, t in real.model.state_dict().items()}
    for assign in (True, False):
        with torch.device("meta"):
            handle = patch(tiny(family), method, **options)
        if not assign:
            handle.model.to_empty(device="cpu")
            # The base alone, while what is in the adapters is nothing yet.
            handle.model.load_state_dict({name: t for name, t in want.items() if name in tiny(family).state_dict()}, strict=False)
            handle.reset_parameters()
            assert several_places(handle) == several_places(real)
            handle.model.to("meta").to_empty(device="cpu")
        handle.model.load_state_dict(want, assign=assign)
        assert several_places(handle) == several_places(real) and len(handle.trainable_parameters()) == len(real.trainable_parameters())
        assert all(torch.equal(a, b) for a, b in zip(handle.trainable_parameters(), real.trainable_parameters(), strict=True))


def test_one_of_several_places_is_assigned(tmp_path: Path) -> None:
    """A part of the model is loaded: the places are apart, and said to be, until the others follow."""
    handle = patch(tiny("bart"), "compacter", reduction_factor=4, shared_rule=True)
    adapter = next(iter(handle.sites.values()))
    adapter.load_state_dict({name: t + 1 for name, t in adapter.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"^save: the patch has one tensor at .*phm_rule"):
        handle.save(tmp_path)
    for other in handle.sites.values():
        other.load_state_dict(adapter.state_dict(), assign=True)
    handle.save(tmp_path)
    assert handle.report.trainable == load(tiny("bart"), tmp_path).report.trainable


def test_what_the_user_took_apart_stays_apart(tmp_path: Path) -> None:
    """Unless it differs: what would be lost is named."""
    model = tiny("t5")
    handle = patch(model, "full")
    own = model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    handle.save(tmp_path)
    assert handle.report.trainable == sum(p.numel() for p in handle.trainable_parameters()) and model.lm_head.weight is own
    with torch.no_grad():
        own += 1
    with pytest.raises(RuntimeError, match=r"^save: the patch has one tensor at .*lm_head.weight"):
        handle.save(tmp_path)
    handle.unpatch()
    assert model.lm_head.weight is own


def test_undefined_numbers_are_equal() -> None:
    model = tiny("t5")
    handle = patch(model, "full")
    places = several_places(handle)
    with torch.no_grad():
        model.shared.weight[0] = float("nan")
    model.load_state_dict(model.state_dict(), assign=True)
    assert several_places(handle) == places


def test_a_trained_tensor_s_first_place_is_gone(tmp_path: Path) -> None:
    """The others have it."""
    model = tiny("bart")
    handle = patch(model, "full")
    model.model.shared = nn.Identity()
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()}, assign=True)
    want = {name: t.clone() for name, t in model.state_dict().items()}
    handle.save(tmp_path)
    assert torch.equal(checkpoint.read(tmp_path)[1]["base/model.shared.weight"], want["lm_head.weight"])
    with handle.disabled():
        pass
    assert all(torch.equal(t, want[name]) for name, t in model.state_dict().items())


def test_a_layer_that_was_deleted_is_no_other(tmp_path: Path) -> None:
    model = models.tiny("llama")
    handle = patch(model, "layer_norm")
    del model.model.layers[0]
    with pytest.raises(RuntimeError, match=r"^save: 2 places of the patch .*language.0"):
        handle.save(tmp_path)


def test_flags_of_a_module_that_was_away() -> None:
    model = models.tiny("llama", tie_word_embeddings=False)
    handle, head = patch(model, "lora", rank=2), model.lm_head
    model.lm_head = nn.Linear(32, 99)
    handle.unpatch()
    model.lm_head = head
    assert all(p.requires_grad for p in model.parameters())


def test_unpickled_in_another_process(tmp_path: Path) -> None:
    model = tiny("bart")
    randomize(patch(model, "vlpet", **SMALL["vlpet"]))
    torch.save(model, tmp_path / "model.pt")
    torch.save((batch(), logits(model)), tmp_path / "expected.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); d = sys.argv[1]; m = torch.load(d + '/model.pt', weights_only=False); b, y = torch.load(d + '/expected.pt')\n"
        "with torch.no_grad(): assert torch.allclose(m(**b).logits, y, atol=1e-6)\n"
        "from fastadapt.patching import Handle; Handle.of(m).unpatch(); print(type(m.model.encoder.layers[0]).__module__)"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "transformers.models.bart.modeling_bart"


@hosts
@both
def test_meta_device(family: str, method: str) -> None:
    """Built and patched without memory, then given memory, weights and starting values."""
    with torch.device("meta"):
        model = tiny(family)
    handle = patch(model, method, **SMALL[method])
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        handle.save("/nonexistent")
    model.to_empty(device="cpu")
    model.tie_weights()
    real = tiny(family)
    missing, unexpected = model.load_state_dict(real.state_dict(), strict=False)
    assert not unexpected and not [k for k in missing if "adapter" not in k]
    for name, buffer in real.named_buffers():
        model.get_buffer(name).copy_(buffer)
    if handle._trained:
        with pytest.raises(RuntimeError, match="remember_base"), handle.disabled():
            pass
        with pytest.raises(RuntimeError, match="remember_base"):
            handle.unpatch(restore_base=True)
    handle.remember_base()
    torch.manual_seed(7)
    handle.reset_parameters()
    real_handle = patch(real, method, **SMALL[method])
    torch.manual_seed(7)
    real_handle.reset_parameters()
    assert torch.equal(logits(model), logits(real))
    with handle.disabled():
        assert torch.equal(logits(model), logits(tiny(family)))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in real.parameters()]


def test_the_base_as_it_is_remembered_is_put_back() -> None:
    handle = patch(tiny("bart"), "vlpet", **SMALL["vlpet"])
    randomize(handle)
    handle.remember_base()
    want = {t.id: t.parameter.detach().clone() for t in handle._trained}
    randomize(handle, seed=3)
    handle.unpatch(restore_base=True)
    assert want and all(torch.equal(t.parameter, want[t.id]) for t in handle._trained)


@pytest.mark.parametrize(
    ("base", "given", "expected"), [("float32", None, "float32"), ("bfloat16", None, "float32"), ("float64", None, "float64"), ("bfloat16", "bfloat16", "bfloat16")]
)
def test_parameter_dtype(base: str, given: str | None, expected: str) -> None:
    model = tiny("bart").to(getattr(torch, base))
    handle = patch(model, "vlpet", dtype=given and getattr(torch, given), **SMALL["vlpet"])
    assert {p.dtype for m in handle.sites.values() for p in m.parameters()} == {getattr(torch, expected)}
    out = model(**batch())
    assert out.logits.dtype == getattr(torch, base)
    out.loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())
    model.to(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and logits(model).dtype == torch.float32


def test_train_and_eval_follow() -> None:
    model = tiny("bart").train()
    handle = patch(model, "vl_adapter")
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())
    handle.unpatch()
    assert all(m.training for m in model.modules())
    model.eval()
    patch(model, "vl_adapter")
    assert not any(m.training for m in model.modules())


# Refusals.


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


def refuses(model: nn.Module, error: type[Exception], match: str, *args: object, **kwargs: object) -> None:
    before = snapshot(model)
    with pytest.raises(error, match=match):
        patch(model, *args, **kwargs)
    assert_same(before, snapshot(model))


def test_unknown_names() -> None:
    model = tiny("bart")
    refuses(model, ValueError, "'vlpat' is unknown; must be one of vl_adapter, vlpet", "vlpat")
    refuses(model, TypeError, "unknown option 'rnk'; known: .*rank", "vlpet", rnk=3)
    refuses(model, ValueError, "init: must be one of repo, identity", "vlpet", init="zero")
    refuses(model, ValueError, "granularity: 'huge' is unknown; must be one of large", "vlpet", granularity="huge")
    refuses(model, ValueError, "activation: 'tanh' is unknown", "vl_adapter", activation="tanh")
    refuses(model, TypeError, "dtype: must be a floating", dtype=torch.int8)
    refuses(model, TypeError, r"dtype: adapters of torch.bfloat16 over a base of torch.float32; must be that or float32", dtype=torch.bfloat16)
    refuses(model, TypeError, "tasks: must be a list of distinct names", tasks="vqa")
    refuses(model, TypeError, "tasks: must be a list of distinct names", tasks=["vqa", "vqa"])
    refuses(model, TypeError, "tasks: must be a list of distinct names, not {'vqa'}", tasks={"vqa"})  # in no order
    refuses(model, TypeError, "tasks: must be a list of distinct names, not 3", tasks=3)
    refuses(model, TypeError, "tasks: must be a list of distinct names", tasks=(task for task in ("vqa", "gqa")))
    refuses(model, TypeError, "name: must be", name="")
    refuses(model, TypeError, "beside a VLPETConfig", VLPETConfig(rank=8), rank=8)
    with pytest.raises(TypeError, match=r"model: must be an nn.Module, not str"):
        patch("model")  # type: ignore[arg-type]


def test_bad_options() -> None:
    model = tiny("bart")
    refuses(model, ValueError, "rank: must be a positive integer, not 0", "vlpet", rank=0)
    refuses(model, ValueError, "heads: 5 must divide rank 8", "vlpet", rank=8, heads=5)
    refuses(model, ValueError, "gate_rank: granularity 'small' has no gate rank", "vlpet", granularity="small", gate_rank=4)
    refuses(model, ValueError, "scale: must be a finite number", "vlpet", scale=float("nan"))
    refuses(model, ValueError, "needs scale=2.0", "vlpet", init="identity", scale=0.3)
    refuses(model, ValueError, "'identity' needs combine='multiply'", "vlpet", init="identity", combine="add")
    refuses(model, ValueError, "reduction_factor: must be an integer from 1 to the width 32, not 33", "vl_adapter", reduction_factor=33)
    refuses(model, ValueError, "layer_norms: must be one of", "vl_adapter", layer_norms="some")
    refuses(model, ValueError, "visual_embedding: must be", "vl_adapter", visual_embedding=1)


@pytest.mark.parametrize("method", ["vl_adapter", "vlpet", "compacter", "low_rank_adapter", "lora", "hyperformer", "base_tuning", "uniadapter", "intrinsic_dimension"])
def test_options_of_the_wrong_type(method: str) -> None:
    """Every option that is a bool or a number; "False" would count as true."""
    fields = {f.name: (f.type, f.default) for f in dataclasses.fields(methods.config(method))}
    seen = {"bool": 0, "int": 0, "float": 0}
    for name, (kind, _) in fields.items():
        plain, _, optional = str(kind).partition(" | ")
        if plain not in seen or optional not in ("", "None"):
            continue
        seen[plain] += 1
        for wrong in ("False", "1", torch.tensor(1), 1 if plain == "bool" else True) + (() if plain != "int" else (1.5,)):
            with pytest.raises(ValueError, match=f"^{name}: must be .* not {re.escape(repr(wrong))}$"):
                patch(tiny("bart"), method, tasks=["vqa"], **{name: wrong})
    assert seen["bool"] >= 5 and seen["int"] >= 3


def test_numbers_of_numpy_are_pythons(tmp_path: Path) -> None:
    model = tiny("bart")
    options = {"biases": np.bool_(True), "rank": np.int64(4), "dropout": np.float32(0.25), "alpha": np.float64(2)}
    handle = patch(model, "lora", fuse_residual=np.bool_(False), **options)  # type: ignore[arg-type]
    assert [type(getattr(handle.config, name)) for name in options] == [bool, int, float, float] and handle.fuse_residual is False
    train_a_step(model, handle)
    handle.save(tmp_path)
    assert fastadapt.load(tiny("bart"), tmp_path).resolved == handle.resolved
    refuses(tiny("bart"), ValueError, "fuse_residual: must be True or False, not 'no'", fuse_residual="no")


def test_layers_and_modules_that_are_nowhere() -> None:
    model = tiny("bart", layers=(2, 3))
    for method in ("vl_adapter", "hyperformer"):
        refuses(model, ValueError, "^layers: no stack has 3, 7; encoder has 0 to 1, decoder has 0 to 2$", method, layers=[0, 3, 7], tasks=["vqa"])
    refuses(model, ValueError, "^layers: no stack has 5, 6, 7, 8, 9, ...; encoder has 0 to 1", "adapterdrop")
    refuses(model, ValueError, "^trained_modules: 'lm_haed' names no module of this BartForConditionalGeneration", "lora", trained_modules=("lm_haed", "fc1"))
    # A stack may have none of them; what the published names lack is no mistake of the caller's.
    handle = patch(model, "hyperformer", layers=[2], tasks=["vqa"], reduction_factor=4)
    assert {name for name in handle.sites if "decoder" not in name} == set() and len(handle.sites) == 4
    with handle.task("vqa"):
        logits(model)
    handle.unpatch()
    handle = patch(tiny("t5", layers=6), "adapterdrop", reduction_factor=4)
    assert {name.split(".")[1] for name in handle.sites} == {"5"}
    assert len(patch(model, "lora", rank=2, biases=False, trained_modules=("fc1",)).report.trained_base) == 10


def test_unknown_hosts() -> None:
    refuses(Odd(), UnknownHostError, r"Odd has no layers of a supported host \(bart, t5, blip, .*\) and no sub-blocks with usual names; name its Linears with sites=")
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    refuses(gpt, ValueError, r"transformer\.h\.0\.attn\.c_proj is known by its name only, so the residual stream around it, which vlpet reads")
    model = tiny("bart")
    base = type(model.model.encoder.layers[0])
    for layers in (model.model.encoder.layers, model.model.decoder.layers):
        for layer in layers:
            layer.__class__ = type("MyLayer", (type(layer),), {})
    refuses(model, UnknownHostError, "MyLayer is a subclass of Bart")
    model.model.encoder.layers[0].__class__ = base
    handle = patch(model, "vl_adapter")
    assert len(handle.sites) == 2 and sum("MyLayer" in why for _, why in handle.skipped) == 3


def test_no_site() -> None:
    decoder = tiny("bart").model.decoder
    refuses(decoder.layers[0].self_attn, UnknownHostError, "BartAttention")
    encoder = tiny("bart").model.encoder

    class Nowhere(VLAdapterConfig):
        def roles(self) -> tuple[str, ...]:
            return ("decoder.feed_forward",)

    refuses(encoder, ValueError, r"and nothing that its options train: encoder\.0\.self_attention and 7 more: vl_adapter puts nothing there$", Nowhere())
    refuses(encoder, ValueError, r"has no site in this BartEncoder and nothing that its options train: ", Nowhere())


def test_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("t5")
    cls = type(model.encoder.block[0].layer[1])

    def forward(self, hidden_states):  # a later release's
        return hidden_states + self.DenseReluDense(self.layer_norm(hidden_states))

    monkeypatch.setattr(cls, "forward", forward)
    import transformers

    refuses(model, UnknownHostError, rf"T5LayerFF.forward of transformers {transformers.__version__} is unknown .* known are those of transformers 5.8, 5.16, 5.22, 5.23")


def test_second_patch() -> None:
    model = tiny("bart")
    handle = patch(model, "vl_adapter", name="mine")
    out = logits(model)
    refuses(model, ValueError, "patched already under the name 'mine', so 'mine' cannot be added", "vlpet", name="mine")
    refuses(model, ValueError, "patched already under the name 'mine', so 'other' cannot be added", "vlpet", name="other")
    refuses(model.model.encoder, ValueError, "part of a model that is patched already")
    holder = nn.ModuleDict({"inner": model})
    refuses(holder, ValueError, "inner is patched already")
    assert torch.equal(logits(model), out)
    handle.unpatch()
    patch(model, "vlpet", name="other")


FIRST: list[tuple[str, dict[str, Any]]] = [
    ("bitfit", {}),
    ("prompt", {"decoder_prompt": 2, "prompt_mid": 4}),
    ("lm_head", {}),
    ("vl_adapter", {"reduction_factor": 4, "decoder": False}),
]


@pytest.mark.parametrize(("method", "options"), FIRST)
@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, pickled])
def test_a_part_of_a_patched_model(method: str, options: dict[str, Any], copied: Callable[[nn.Module], nn.Module]) -> None:
    """Where the first patch has no class of its own there, too."""
    model = copied(patch(tiny("bart"), method, name="mine", **options).model)
    handle = Handle.of(model)
    before, trained = snapshot(model), [id(p) for p in handle.trainable_parameters()]
    other = tiny("bart")
    other.model.decoder = model.model.decoder
    for target in (model.model.decoder, other, nn.ModuleDict({"a": model.model.decoder, "b": tiny("bart")})):
        refuses(target, ValueError, "model: .* is part of a model that is patched already", "vl_adapter", reduction_factor=4, layer_norms="none")
    assert_same(before, snapshot(model))
    assert trained == [id(p) for p in handle.trainable_parameters()]
    handle.unpatch()
    patch(other, "vl_adapter", reduction_factor=4)


def test_a_tensor_of_a_patched_model() -> None:
    model, other = tiny("bart"), tiny("bart", seed=1)
    handle = patch(model, "bitfit", name="mine")
    other.model.encoder.layers[0].fc1.bias = model.model.encoder.layers[0].fc1.bias
    refuses(other, ValueError, r"model: model.encoder.layers.0.fc1.bias is part of a model that is patched already under the name 'mine'; unpatch that first", "vl_adapter")
    handle.unpatch()
    patch(other, "vl_adapter")


def test_parts_that_no_patch_changes_may_be_shared() -> None:
    """As a vision tower that two models hold."""
    model, other = models.tiny("llava"), models.tiny("llava", seed=1)
    other.model.vision_tower = model.model.vision_tower
    for one in (model, other):
        patch(one, "vl_adapter", reduction_factor=4, towers=["text"])
    Handle.of(other).unpatch()
    refuses(other, ValueError, r"model: model.vision_tower\S* is part of a model that is patched already", "vl_adapter", reduction_factor=4, towers=["vision"])


def test_a_part_of_a_model_that_nobody_holds() -> None:
    decoder = patch(tiny("bart"), "bitfit").model.model.decoder
    handle = patch(decoder, "vl_adapter", reduction_factor=4)
    assert handle.report.sites
    # What a patch left in it is named.
    for method, options in (("prompt", {"encoder_prompt": 2, "prompt_mid": 4}), ("vl_adapter", {"reduction_factor": 4})):
        encoder = patch(tiny("bart"), method, **options).model.model.encoder
        gc.collect()
        refuses(encoder, ValueError, "is part of a model that is patched already", "vl_adapter", reduction_factor=4)


def test_no_patched_model_is_kept() -> None:
    model = tiny("bart")
    patch(model, "bitfit")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_wrapped_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bart")
    refuses(torch.compile(model), ValueError, "is compiled")
    refuses(nn.DataParallel(model), ValueError, r"is wrapped \(DataParallel\); patch the model before")
    model.model.encoder.layers[0]._hf_hook = object()
    refuses(model, ValueError, "model.encoder.layers.0 carries a hook of accelerate")
    del model.model.encoder.layers[0]._hf_hook
    model.model.encoder.layers[1].forward = lambda *a: None
    refuses(model, ValueError, "model.encoder.layers.1 has a forward of its own")
    del model.model.encoder.layers[1].forward
    model.peft_config = {}
    refuses(model, ValueError, "carries adapters of PEFT")
    del model.peft_config
    model.model.decoder.layers[0].encoder_attn.v_proj = nn.Identity()
    refuses(model, UnknownHostError, "Identity, neither an nn.Linear nor a Conv1D of transformers")


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_ddp() -> None:
    model = tiny("bart")
    refuses(nn.parallel.DistributedDataParallel(model), ValueError, r"is wrapped \(DistributedDataParallel\)")
    # Patched first, it trains inside: no parameter is without a gradient.
    handle = patch(model, "vlpet", **SMALL["vlpet"])
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(**batch()).loss.backward()
    assert Handle.of(wrapped) is handle
    assert all(p.grad is not None for p in handle.trainable_parameters())


@pytest.mark.usefixtures("one_process")
def test_fsdp2() -> None:
    model, other = tiny("bart"), tiny("bart")
    fully_shard(other)
    with pytest.raises(ValueError, match=r"is wrapped \(FSDPModule\)"):
        patch(other)
    handle = patch(model, "vlpet", **SMALL["vlpet"])
    loss = model(**batch()).loss
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers, model):
        fully_shard(layer)
    sharded = model(**batch()).loss
    sharded.backward()
    assert torch.equal(sharded, loss) and all(p.grad is not None for p in handle.trainable_parameters())
    with pytest.raises(RuntimeError, match=r"BartEncoderLayer has become a .*FSDPBartEncoderLayer; undo that first"):
        handle.unpatch()


@pytest.mark.parametrize("when", [0, 3])
def test_failure_while_patching_rolls_back(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("bart").train()
    before, calls = snapshot(model), 0
    register = nn.Module.register_module

    def failing(self: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal calls
        if name.endswith("_adapter"):
            calls += 1
            if calls > when:
                raise MemoryError("no room")
        register(self, name, module)

    monkeypatch.setattr(nn.Module, "register_module", failing)
    with pytest.raises(MemoryError, match="no room"):
        patch(model, "vlpet", **SMALL["vlpet"])
    assert_same(before, snapshot(model))


def test_layers_changed_by_others() -> None:
    model = tiny("bart")
    handle = patch(model, "vl_adapter")
    layer = model.model.encoder.layers[0]
    ours = type(layer)
    layer.__class__ = type("FSDPLayer", (ours,), {})
    for use in (handle.unpatch, lambda: handle.disabled().__enter__()):
        with pytest.raises(RuntimeError, match=r"has become a .*FSDPLayer"):
            use()
    layer.__class__ = ours
    handle.unpatch()


def test_taken_slot() -> None:
    model = tiny("bart")
    model.model.encoder.layers[1].feed_forward_adapter = nn.Identity()
    refuses(model, ValueError, "model.encoder.layers.1 has a 'feed_forward_adapter' already")


def test_config_object() -> None:
    handle = patch(tiny("bart"), VLAdapterConfig(rank=3))
    assert {m.down_sampler.out_features for m in handle.sites.values()} == {3}
    assert repr(handle).startswith("Handle(config=VLAdapterConfig(") and "rank=3" in repr(handle) and "BartForConditionalGeneration" not in repr(handle)


def test_two_encoders_have_different_ids() -> None:
    pair = nn.ModuleDict({"a": tiny("bart").model, "b": tiny("bart", seed=1).model})
    handle = patch(pair, "vl_adapter")
    assert len(handle.sites) == 20 and "encoder@1.0.self_attention" in handle.sites and "decoder@1.1.feed_forward" in handle.sites
    ids = [t.id for t in handle._trained]
    assert len(set(ids)) == len(ids) == 48 and "encoder@1.layernorm_embedding.weight" in ids
