"""`Handle.route`: batches that mix tasks give, sample for sample, what batches of one task give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadapt import backend
from fastadapt.nn import HyperNetwork, PerTask
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import FAMILIES, randomize, tiny
from tests.methods.test_every_method import PET, R4, VARIANTS
from tests.ops import checks
from tests.tolerance import assert_matches_recorded

NAME = "reference" if checks._NO_CPU else "cpu"
TASKS = ("vqa", "gqa", "nlvr", "caption")
MIX = ("gqa", "vqa", "nlvr", "gqa", "vqa", "vqa")  # nobody captions
hosts = pytest.mark.parametrize("family", FAMILIES)
# The variants whose parts differ between tasks, the hypernetworks with and without layer norms, and LoRA with dropout off, which is a bottleneck, beside one that is none.
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: VARIANTS[name] for name in ("multiple", "half-shared", "lora, multiple", "hyperformer", "hyperformer, one", "vl-pet, multiple")},
    "multiple, plain": ("vl_adapter", {"sharing": "multiple", **R4}),
    "half-shared down": ("vl_adapter", {"sharing": "down", **R4}),
    "compacter, rules over tasks": VARIANTS["compacter, rules over tasks"],
    "compacter of rank 1": ("compacter", {"sharing": "multiple", "division": 4, "phm_rank": 1, "shared_rule": True, **R4}),
    "adapters and prompts": ("vl_adapter", {**VARIANTS["adapters and prompts"][1], "prompt_sharing": "multiple"}),
    "lora on the feed-forward": ("lora", {"rank": 4, "sharing": "multiple", "sites": {"encoder.self_attention.value": r".*\.(fc1|fc2|wi|wo)"}}),
    "single": ("vl_adapter", R4),
    "vl-pet": ("vlpet", PET),
}
FUSED = (
    "multiple", "multiple, plain", "half-shared", "half-shared down", "lora, multiple", "lora on the feed-forward", "compacter, rules over tasks", "compacter of rank 1",
    "hyperformer", "hyperformer, one",
)  # fmt: skip
variants = pytest.mark.parametrize("variant", ROUTED)


def patched(family: str, variant: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Handle]:
    method, options = ROUTED[variant]
    model = tiny(family).to(dtype)
    handle = patch(model, method, tasks=TASKS, **options)
    randomize(handle)
    return model, handle


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    ids, mask = torch.randint(3, 90, (len(MIX), 9), generator=g), torch.ones(len(MIX), 9, dtype=torch.int64)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 90, (len(MIX), 5), generator=g)}


def gradients(handle: Handle, model: nn.Module, out: Tensor, of: Tensor) -> dict[str, Tensor]:
    """Of the trained tensors; absent ones as zeros."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in named.values()} == {id(p) for p in handle.trainable_parameters()}
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), of, allow_unused=True, materialize_grads=True), strict=True))


@hosts
@variants
def test_a_mixed_batch_is_its_samples_in_batches_of_one_task(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    inputs = batch()
    with handle.route(MIX):
        mixed = model(**inputs).logits
        cotangent = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(6), dtype=mixed.dtype)
        together = gradients(handle, model, mixed, cotangent)
    separate: dict[str, Any] = dict.fromkeys(together, 0)
    for task in TASKS:
        own = torch.tensor([name == task for name in MIX])
        handle.set_task(task)
        if own.any():
            out = model(**{name: t[own] for name, t in inputs.items()}).logits
            assert_matches_recorded(task, mixed[own].detach(), out.detach())
            separate = {name: separate[name] + g for name, g in gradients(handle, model, out, cotangent[own]).items()}
    for name, g in together.items():
        if separate[name].any():
            assert_matches_recorded(name, g, separate[name])
        else:
            assert not g.any(), name


@hosts
@pytest.mark.parametrize("variant", [v for v in ROUTED if v not in ("single", "vl-pet")])
def test_no_parameter_is_left_without_a_gradient(family: str, variant: str) -> None:
    """DDP waits for every parameter: an absent task's gradients are zeros, not None."""
    model, handle = patched(family, variant)
    with handle.route(MIX):
        model(**batch()).logits.sum().backward()
    for site in handle.sites.values():
        if isinstance(site, (PerTask, HyperNetwork)):
            assert [name for name, p in site.named_parameters() if p.grad is None] == []


@hosts
@pytest.mark.parametrize("variant", FUSED)
def test_plain_bottlenecks_are_one_op_a_site(family: str, variant: str) -> None:
    model, handle = patched(family, variant, torch.float32)
    sites = sum(s.backend != "torch" for s in handle.report.sites)
    with checks.runs_on("routed_bottleneck", NAME, counts=(sites, 0)), torch.no_grad(), handle.route(MIX):
        model(**batch())


@hosts
@pytest.mark.parametrize("variant", ["multiple, plain", "hyperformer", "adapters and prompts"])
def test_beams_follow_their_samples(family: str, variant: str) -> None:
    model, handle = patched(family, variant)
    inputs = {name: t for name, t in batch().items() if "decoder" not in name}
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False}
    with handle.route(MIX):
        mixed = model.generate(**inputs, **options)  # type: ignore[operator]
    for task in set(MIX):
        own = torch.tensor([name == task for name in MIX])
        with handle.task(task):
            alone = model.generate(**{name: t[own] for name, t in inputs.items()}, **options)  # type: ignore[operator]
        assert torch.equal(mixed[own][:, : alone.shape[1]], alone)


@hosts
@pytest.mark.parametrize("variant", ["multiple, plain", "multiple"])
def test_one_graph_for_all_mixes(family: str, variant: str) -> None:
    model, handle = patched(family, variant, torch.float32)
    model.config.use_cache = False  # type: ignore[union-attr]
    torch._dynamo.reset()
    graphs: list[Any] = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled, inputs = torch.compile(model, backend=counted, fullgraph=True), batch()
    for places in ([0, 1, 2, 3, 0, 1], [3, 3, 3, 3, 3, 3], [1, 0, 0, 2, 2, 2]):
        with handle.route(torch.tensor(places)), torch.no_grad():
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
    assert len(graphs) == 1


def test_checkpointed_layers_route_again_in_backward() -> None:
    gradient = []
    for checkpointing in (False, True):
        model, handle = patched("t5", "multiple, plain")
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        with handle.route(MIX):
            model(**batch()).logits.sum().backward()
        gradient.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, g in gradient[0].items():
        assert_matches_recorded(name, gradient[1][name], g)


def test_what_a_batch_may_be_routed_by() -> None:
    model, handle = patched("bart", "multiple, plain")
    with handle.task("nlvr"):
        before = model(**batch()).logits
        with handle.route(torch.tensor([2] * len(MIX))) as inside:
            assert inside is handle
            assert_matches_recorded("logits", model(**batch()).logits, before)
            with handle.route(MIX):
                assert not torch.equal(model(**batch()).logits, before)
            assert_matches_recorded("logits", model(**batch()).logits, before)
        assert torch.equal(model(**batch()).logits, before)
    for wrong, kind, says in (
        (["vqa", "snli"], ValueError, "'snli' is unknown; must be one of vqa, gqa, nlvr, caption"),
        ("vqa", TypeError, "a task's name for each sample"),
        ([0, 1], TypeError, "a task's name for each sample"),
        (torch.tensor([0, 4]), ValueError, "places from 0 to 3"),
        (torch.tensor([-1, 0]), ValueError, "places from 0 to 3"),
        (torch.tensor([0.0]), TypeError, "int64 tensor of one dimension"),
        (torch.tensor([[0, 1]]), TypeError, "int64 tensor of one dimension"),
    ):
        with pytest.raises(kind, match=says), handle.route(wrong):
            pass
    with handle.route(["vqa"] * 4), pytest.raises(ValueError, match="task_ids: 4 ids do not divide a batch of 6"):
        model(**batch())
    with pytest.raises(ValueError, match="without tasks"), patch(tiny("bart"), "vl_adapter", **R4).route(["vqa"]):
        pass
    assert all(part.task_ids is None for part in model.modules() if isinstance(part, PerTask))


def test_a_route_inside_another_ends_with_it() -> None:
    model, handle = patched("bart", "multiple")
    with handle.route(MIX):
        want = model(**batch()).logits
        with handle.route(MIX[::-1]):
            assert not torch.equal(model(**batch()).logits, want)
        assert torch.equal(model(**batch()).logits, want)


def test_a_demanded_backend_runs_or_says_why() -> None:
    model, handle = patched("bart", "multiple, plain", torch.float32)
    with backend.use("triton"), handle.route(MIX), pytest.raises(backend.BackendError, match="routed_bottleneck"):
        model(**batch())


@pytest.mark.parametrize("variant", ["multiple, plain", "hyperformer"])
def test_one_task_inside_a_route(variant: str) -> None:
    """A selected task would change nothing there, so it is refused; a copy is inside no route."""
    model, handle = patched("bart", variant)
    handle.set_task(TASKS[0])
    alone = model(**batch()).logits
    with handle.route(MIX):
        mixed, copied = model(**batch()).logits, copy.deepcopy(model)
        for select in (handle.set_task, lambda task: handle.task(task).__enter__()):
            with pytest.raises(RuntimeError, match=r"task: not inside `with handle.route\(...\)`, where every sample has a task of its own"):
                select(TASKS[1])
        assert torch.equal(model(**batch()).logits, mixed)
    assert not torch.equal(mixed, alone)
    assert handle.active_task == TASKS[0] and torch.equal(model(**batch()).logits, alone) and torch.equal(copied(**batch()).logits, alone)
