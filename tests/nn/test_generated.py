"""Prompts and hypernetworks against recorded tensors of the published code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.nn import GeneratedBottleneck, HyperNetwork, Init, Prompt, TaskEmbeddings
from fastadapt.nn.hypernetwork import Generated
from tests import golden
from tests.methods.test_methods import assert_normal
from tests.tolerance import assert_matches_recorded

HYPER = golden.case_ids("vla_hyperformer")
PARTS = {"down.weight": "w_down", "down.bias": "b_down", "up.weight": "w_up", "up.bias": "b_up"}


def hypernetwork(case: golden.Case) -> HyperNetwork:
    o = case.options
    embeddings = TaskEmbeddings(o["tasks"], o["task_embedding_dim"], dtype=torch.float64)
    blocks = ("feed_forward", "self_attention", *(["cross_attention"] if o["include_cross_attention"] else []))
    network = HyperNetwork(
        o["d_model"], o["bottleneck"], o["num_layers"], blocks, embeddings, task_dim=o["task_embedding_dim"], hidden=o["task_hidden_dim"],
        projected=o["projected_task_embedding_dim"], layer_norm=o["unique_hyper_net_layer_norm"], norm_before=o["pre_layer_norm"], norm_after=o["post_layer_norm"],
        dtype=torch.float64,
    )  # fmt: skip
    params = golden.to(case.params, torch.float64)
    own = {name.removeprefix("adapter_layers_hyper_net."): t for name, t in params.items() if name.startswith("adapter_layers_hyper_net.")}
    # The encoder builds layer-norm generators for cross-attention that it never uses.
    own = {name: t for name, t in own.items() if "cross_attention" not in name or "cross_attention" in blocks}
    own |= {name.replace("shared_task_embed", "task_embeddings"): t for name, t in params.items() if name.startswith("shared_task_embed.")}
    network.load_state_dict(own, strict=True)
    return network


@pytest.mark.parametrize("case_id", HYPER)
def test_hypernetwork_recorded(case_id: str) -> None:
    case = golden.load_case(case_id)
    network = hypernetwork(case)
    x = case.inputs["x"].double().requires_grad_()
    outputs: dict[str, Tensor] = {}
    for name in case.outputs:
        task, layer, block, part = name.split(".", 3)
        network.set_task(task)
        generated: Generated = network()[block][int(layer)]
        if part in PARTS:
            outputs[name] = getattr(generated, PARTS[part])
        elif part == "y":
            site = GeneratedBottleneck(case.options["d_model"], case.options["bottleneck"])
            site.weights = generated
            outputs[name] = site(x)
        else:
            norm, kind = part.split(".")
            outputs[name] = {"pre_norm": generated.norm_before, "post_norm": generated.norm_after}[norm][kind == "bias"]  # type: ignore[index]
    torch.autograd.backward(list(outputs.values()), [case.cotangents[name].double() for name in outputs])
    for name, want in case.outputs.items():
        assert_matches_recorded(name, outputs[name], want)
    assert_matches_recorded("x", x.grad, case.input_grads["x"])  # type: ignore[arg-type]
    found = {f"adapter_layers_hyper_net.{n}".replace("adapter_layers_hyper_net.task_embeddings", "shared_task_embed"): p.grad for n, p in network.named_parameters()}
    assert case.param_grads.keys() <= found.keys()
    for name, want in case.param_grads.items():
        assert_matches_recorded(name, found[name], want)  # type: ignore[arg-type]


def test_prompt_recorded() -> None:
    case = golden.load_case("vla_prompt_len4")
    o = case.options
    prompt = Prompt(o["prompt_len"], o["input_dim"], o["mid_dim"], dtype=torch.float64)
    prompt.load_state_dict({n.removeprefix("prompts.vqa."): t.double() for n, t in case.params.items() if ".vqa." in n}, strict=True)
    out = prompt().expand(o["batch"], -1, -1)
    out.backward(case.cotangents["prompt_vqa"].double())
    assert_matches_recorded("prompt_vqa", out, case.outputs["prompt_vqa"])
    for name, p in prompt.named_parameters():
        assert_matches_recorded(name, p.grad, case.param_grads[f"prompts.vqa.{name}"])  # type: ignore[arg-type]


def test_generated_once_without_gradients() -> None:
    """As ``generate`` runs: the same weights until a parameter or the task changes; with gradients, new ones each time."""
    network = HyperNetwork(8, 4, 2, ("feed_forward",), TaskEmbeddings(["a", "b"], 6), task_dim=6, hidden=5, projected=3)
    site = GeneratedBottleneck(8, 4)
    network.sites = [("feed_forward", 1, site)]
    network.set_task("a")
    with torch.no_grad():
        network.hand_out()
        first = site.weights
        network.hand_out()
        assert site.weights is first
        network.set_task("b")
        network.hand_out()
        second = site.weights
        assert second is not first
        network.layer_id_embeddings.weight.add_(1.0)
        network.hand_out()
        assert site.weights is not second
        # Moved parameters, too.
        network.double()
        network.hand_out()
        assert site.weights.w_up.dtype == torch.float64
        network.float()
        network.hand_out()
        # A write through .data leaves no trace.
        second = site.weights
        network.layer_id_embeddings.weight.data.add_(1.0)
        network.eval()
        network.hand_out()
        assert site.weights is not second and not torch.equal(site.weights.w_up, second.w_up)
        network.train()
        # Autocast rounds nothing, before or after.
        with torch.autocast("cpu", torch.bfloat16):
            network.hand_out()
        second = site.weights
        network.hand_out()
        assert site.weights is second and second.w_up.dtype == torch.float32
    without = site.weights
    network.hand_out()
    assert site.weights is not without and site.weights.w_up.requires_grad
    with torch.no_grad():
        network.hand_out()
    assert not site.weights.w_up.requires_grad


def test_reentrant_checkpointing_is_refused() -> None:
    """Another kind gives the gradients that there are without."""
    network = HyperNetwork(8, 2, 2, ("feed_forward",), TaskEmbeddings(["a"], 4), task_dim=4, hidden=4, projected=4)
    network.set_task("a")
    sites = [GeneratedBottleneck(8, 2) for _ in range(2)]
    network.sites = [("feed_forward", layer, site) for layer, site in enumerate(sites)]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradients(**kind: bool) -> tuple[Tensor, ...]:
        network.hand_out()
        y = x
        for site in sites:
            y = checkpoint(site, y, **kind) if kind else site(y)
        return torch.autograd.grad(y.square().sum(), [x, *network.parameters()])

    for plain, again in zip(gradients(), gradients(use_reentrant=False), strict=True):
        assert torch.equal(plain, again)
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing: use"):
        gradients(use_reentrant=True)


def test_inference_mode() -> None:
    """Parameters made in it have no versions: weights are generated each time."""
    with torch.inference_mode():
        network = HyperNetwork(8, 4, 2, ("feed_forward",), TaskEmbeddings(["a"], 6), task_dim=6, hidden=5, projected=3)
        site = GeneratedBottleneck(8, 4)
        network.sites = [("feed_forward", 0, site)]
        network.set_task("a")
        network.hand_out()
        before = site(torch.ones(2, 8))
        network.task_embeddings.task_to_embeddings["a"].add_(1.0)
        network.hand_out()
        assert not torch.equal(site(torch.ones(2, 8)), before)


def test_one_backward_through_checkpointed_forwards_of_two_tasks() -> None:
    network = HyperNetwork(8, 2, 1, ("feed_forward",), TaskEmbeddings(["a", "b"], 4), task_dim=4, hidden=4, projected=4)
    network.sites = [("feed_forward", 0, GeneratedBottleneck(8, 2))]

    def loss(task: str) -> Tensor:
        network.set_task(task)
        network.hand_out()
        return checkpoint(network.sites[0][2], torch.ones(3, 8), use_reentrant=False).square().sum()

    for task in ("a", "b"):
        loss(task).backward()
    with pytest.raises(RuntimeError, match="another task is selected than in forward: call backward before"):
        (loss("a") + loss("b")).backward()


def test_starting_values() -> None:
    torch.manual_seed(0)
    network = HyperNetwork(64, 8, 4, ("feed_forward", "self_attention"), TaskEmbeddings(["a"], 512))
    assert abs(network.layer_id_embeddings.weight.std().item() - 1) < 0.1
    weights = torch.cat([m.weight.flatten() for n, m in network.named_modules() if n.endswith("generator.0")])
    assert abs(weights.std().item() / 0.01 - 1) < 0.05 and not any(m.bias.any() for n, m in network.named_modules() if n.endswith("generator.0"))
    network = HyperNetwork(64, 8, 4, ("feed_forward",), TaskEmbeddings(["a"], 16), task_dim=16, init=Init(std=0.02, zero=("up_sampler",)))
    network.set_task("a")
    adapter = network()["feed_forward"][0]
    assert not adapter.w_up.any() and not adapter.b_up.any() and adapter.w_down.any()
    raw = Prompt(100, 64)
    assert 0.49 < raw().abs().max().item() <= 0.5 and len(list(raw.parameters())) == 1


def test_prompts_through_an_mlp_start_as_torchs_layers_or_as_init_says() -> None:
    torch.manual_seed(0)
    table, down, _, up = Prompt(100, 64, 40).prefix_embedding
    assert_normal(table.weight, 1.0)
    assert down.bias.any() and up.bias.any()
    table, down, _, up = Prompt(100, 64, 40, init=Init(std=0.02)).prefix_embedding
    assert_normal(table.weight, 0.02)
    assert not down.bias.any() and not up.bias.any()


def test_errors() -> None:
    embeddings = TaskEmbeddings(["a"], 6)
    with pytest.raises(ValueError, match=r"blocks: must be some of feed_forward, self_attention, cross_attention, not \('mlp',\)"):
        HyperNetwork(8, 4, 2, ("mlp",), embeddings)
    with pytest.raises(ValueError, match="one: the shared generator makes no layer norms"):
        HyperNetwork(8, 4, 2, ("feed_forward",), embeddings, one=True, norm_before=True)
    with pytest.raises(ValueError, match="task_dim: must be the width of the embeddings, not 512"):
        HyperNetwork(8, 4, 2, ("feed_forward",), embeddings)
    with pytest.raises(ValueError, match="dim: must be a positive integer, not 0"):
        TaskEmbeddings(["a"], 0)
    network = HyperNetwork(8, 4, 2, ("feed_forward",), embeddings, task_dim=6)
    with pytest.raises(RuntimeError, match="no task is selected"):
        network()
    with pytest.raises(ValueError, match="task: 'b' has no embedding here; must be one of a"):
        network.set_task("b")
    with pytest.raises(ValueError, match="tasks: must name the tasks"):
        TaskEmbeddings([])
    for name in ("training", "a.b", "keys", ""):
        with pytest.raises(ValueError, match=f"tasks: '{name}' cannot name a module; it must hold no dot and be no attribute of nn.ParameterDict"):
            TaskEmbeddings(["a", name])
    with pytest.raises(RuntimeError, match="has not generated weights"):
        GeneratedBottleneck(8, 4)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="length: must be a positive integer, not 0"):
        Prompt(0, 8)
