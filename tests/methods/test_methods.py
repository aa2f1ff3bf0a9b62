"""Starting values, identity, unfreezing and prompts of the methods."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadapt import methods
from fastadapt.methods import BaseTuningConfig, VLAdapterConfig, VLPETConfig
from fastadapt.nn import GatedBottleneck
from fastadapt.patching import patch
from tests.hosts.tiny import FAMILIES, SMALL, logits, randomize, tiny

hosts = pytest.mark.parametrize("family", FAMILIES)
GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small")


def wide(family: str) -> nn.Module:
    """One layer of width 256 each: enough numbers for statistics."""
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    if family == "bart":
        sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 64))}
        return BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=256, **sizes, max_position_embeddings=16)).eval()
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=256, d_kv=64, d_ff=64, num_layers=1, num_heads=4)).eval()


def tensors(model: nn.Module, method: str, **options: object) -> dict[str, Tensor]:
    handle = patch(model, method, **options)  # type: ignore[arg-type]
    return {f"{site}/{name}": p.detach() for site, module in handle.sites.items() for name, p in module.named_parameters()}


def assert_normal(t: Tensor, std: float) -> None:
    assert abs(t.std().item() / std - 1) < 4 / math.sqrt(2 * t.numel()) and abs(t.mean().item()) < 4 * std / math.sqrt(t.numel())


def assert_uniform(t: Tensor, bound: float) -> None:
    assert t.abs().max().item() <= bound and t.abs().max().item() > 0.9 * bound
    assert abs(t.std().item() * math.sqrt(3) / bound - 1) < 4 / math.sqrt(t.numel()) and abs(t.mean().item()) < 4 * bound / math.sqrt(3 * t.numel())


def test_published_start_of_bart() -> None:
    """N(0, 0.02) and zero biases, everywhere; middleY's vector too."""
    for method, options in [("vl_adapter", {}), *(("vlpet", {"granularity": g}) for g in GRANULARITIES)]:
        for name, t in tensors(wide("bart"), method, **options).items():
            if name.endswith("bias"):
                assert not t.any(), name
            else:
                assert_normal(t, 0.02)


def test_bart_takes_the_configs_std() -> None:
    model = tiny("bart", init_std=0.1)
    assert_normal(torch.cat([t.flatten() for n, t in tensors(model, "vl_adapter", reduction_factor=1).items() if n.endswith("weight")]), 0.1)


def test_published_start_of_t5() -> None:
    """torch's default for VL-Adapter; VL-PET's zero up-projections and gate ends."""
    for name, t in tensors(wide("t5"), "vl_adapter", reduction_factor=4).items():
        assert_uniform(t, 1 / math.sqrt(256 if "down_sampler" in name else 64))
    for granularity in GRANULARITIES:
        for name, t in tensors(wide("t5"), "vlpet", granularity=granularity).items():
            if any(part in name for part in ("up_sampler", "gate_up", "/gate.", "gate_vector")):
                assert not t.any(), name
            else:
                assert_uniform(t, 1 / math.sqrt(256))


@hosts
def test_starting_values_follow_torchs_seed(family: str) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = tiny(family)
        torch.manual_seed(seed)
        drawn.append(torch.cat([t.flatten() for t in tensors(model, "vlpet", **SMALL["vlpet"]).values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@hosts
@pytest.mark.parametrize("options", [{}, {"layer_norm_before": True}, {"layer_norm_after": True}, {"activation": "relu"}, {"cross_attention": False}])
def test_identity_of_vl_adapter(family: str, options: dict[str, object]) -> None:
    model = tiny(family)
    out = logits(model)
    handle = patch(model, "vl_adapter", init="identity", reduction_factor=4, **options)
    assert torch.equal(logits(model), out)
    down = [m.down_sampler.weight for m in handle.sites.values()]
    assert all(w.abs().max() > 0 for w in down), "nothing would train from zeros on both sides"
    randomize(handle)
    assert not torch.allclose(logits(model), out, atol=1e-3)


@hosts
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_identity_of_vlpet(family: str, granularity: str) -> None:
    model = tiny(family)
    out = logits(model)
    options = {k: v for k, v in SMALL["vlpet"].items() if k != "gate_rank"}
    handle = patch(model, "vlpet", init="identity", granularity=granularity, **options)
    assert torch.equal(logits(model), out)
    assert {m.scale for m in handle.sites.values() if isinstance(m, GatedBottleneck)} == {1.0 if granularity == "middleY" else 2.0}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_t5_starts_at_an_exact_multiple(granularity: str) -> None:
    """0.3 times a gate of 1/2, or of 1 + 0 for middleY; the value adapter adds exactly nothing."""
    handle = patch(tiny("t5").double(), "vlpet", granularity=granularity)
    h, x = (torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for name, module in handle.sites.items():
        if name.endswith(".value"):
            assert torch.equal(module(h, x), x)
        elif granularity == "middleY":
            assert torch.equal(module(h, x), 0.3 * h)
        else:
            torch.testing.assert_close(module(h, x), 0.15 * h, rtol=4e-16, atol=0)


def test_bart_starts_near_half() -> None:
    handle = patch(wide("bart"), "vlpet")
    h, x = (torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    module = handle.sites["encoder.0.self_attention"]
    assert (module(h, x) / h).median().sub(0.5).abs() < 0.02


@hosts
@pytest.mark.parametrize(
    ("method", "layer_norms", "expected"),
    [
        ("vl_adapter", None, {"bart": 24, "t5": 0}),
        ("vl_adapter", "encoder", {"bart": 10, "t5": 5}),
        ("vl_adapter", "all", {"bart": 24, "t5": 12}),
        ("vlpet", None, {"bart": 10, "t5": 5}),
        ("vlpet", "none", {"bart": 0, "t5": 0}),
    ],
)
def test_layer_norms(family: str, method: str, layer_norms: str | None, expected: dict[str, int]) -> None:
    """2 + 2 layers: 12 layer norms each; BART's have a bias. None is what was published."""
    model = tiny(family)
    handle = patch(model, method, layer_norms=layer_norms, **SMALL[method])
    adapters = {id(p) for m in handle.sites.values() for p in m.parameters()}
    base = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    assert len(base) == len(handle.report.trained_base) == expected[family]
    assert all("norm" in name for name in base) and (layer_norms != "encoder" or all("encoder" in name for name in base))
    assert all(p.requires_grad for m in handle.sites.values() for p in m.parameters())


def test_an_untied_output_layer_is_trained_beside_the_token_table() -> None:
    handle = patch(tiny("bart", tie_word_embeddings=False), "lm_head")
    assert {t.id for t in handle._trained} == {"model.shared.weight", "lm_head.weight"}


BARE = {"granularity": "none", "adapter": "none"}
# Method, options, and which attribute has which value then in all modules that have it.
OPTIONS: list[tuple[str, dict[str, Any], str, Any]] = [
    ("lora", {"alpha": 8.0}, "alpha", 8.0),
    ("lora", {"dropout": 0.3}, "dropout", 0.3),
    ("compacter", {"weight_init": "normal"}, "weight_init", "normal"),
    ("compacter", {"rule_init": "uniform"}, "rule_init", "uniform"),
    ("compacter", {"init_range": 0.5}, "init_range", 0.5),
    ("low_rank_adapter", {"weight_init": "glorot-normal"}, "weight_init", "glorot-normal"),
    ("hyperformer", {"activation": "relu"}, "activation", "relu"),
    ("vlpet", {"adapter": "lora", "granularity": "none", "decoder": (), "adapter_options": {"rank": 3, "alpha": 8.0}}, "alpha", 8.0),
    ("vlpet", {"adapter": "lora", "granularity": "none", "decoder": (), "adapter_options": {"rank": 3, "dropout": 0.3}}, "dropout", 0.3),
    ("vlpet", {"activation": "relu"}, "activation", "relu"),
    ("vlpet", {"activation": "relu", "adapter": "none"}, "activation", "relu"),
    ("vlpet", {"activation": "relu", "gating_rank": 3}, "activation", "relu"),
    ("vlpet", {"activation": "relu", "decoder": "value_parallel", "value_residual": True, "value_gate_rank": 3}, "activation", "relu"),
    ("vlpet", {"activation": "relu", "granularity": "middleY", "sharing": "multiple", "decoder": "cross_attention", "cross_gate_rank": 3}, "activation", "relu"),
    ("vlpet", {**BARE, "decoder": "value_sequential", "value_scale": 0.5}, "scale", 0.5),
    ("vlpet", {**BARE, "decoder": "multihead", "rank": 8, "heads": 4, "pair": True}, "pair", True),
]


@pytest.mark.parametrize(("method", "options", "name", "value"), OPTIONS)
def test_options_reach_the_modules(method: str, options: dict[str, Any], name: str, value: Any) -> None:
    handle = patch(tiny("bart"), method, tasks=["vqa"], **options)
    found = [part.__dict__[name] for site in handle.sites.values() for part in site.modules() if part.__dict__.get(name) is not None]
    assert found and set(found) == {value}


def test_options_reach_the_hypernetworks() -> None:
    def network(**options: Any) -> Any:
        return patch(tiny("bart"), "hyperformer", tasks=["vqa"], **options).sites["encoder.hypernetwork"]

    assert network(hypernet_layer_norm=False).LayerNorm is None and network(layer_norm_after=True).norms == ("post",)
    assert network(hidden_dim=10).task_hypernet["task_embeding_generator"][0].out_features == 10


def test_visual_embedding_is_trained_and_the_token_table_it_borrows_is_not() -> None:
    class Front(nn.Module):
        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.feat_embedding, self.obj_order_embedding = nn.Linear(6, 32), table

    bart, model = tiny("bart"), tiny("bart")
    first = nn.ModuleDict({"visual_embedding": Front(bart.model.shared), "language_model": bart})
    model.model.encoder.visual_embedding = Front(model.model.shared)
    for host, table in ((first, bart.model.shared), (model, model.model.shared)):
        handle = patch(host, "vlpet", **SMALL["vlpet"])
        assert {name for name in handle.report.trained_base if name.startswith("visual")} == {"visual_embedding.feat_embedding.weight", "visual_embedding.feat_embedding.bias"}
        assert not table.weight.requires_grad
        handle.unpatch()
    assert not any("visual" in name for name in patch(model, "vlpet", visual_embedding=False, **SMALL["vlpet"]).report.trained_base)


def test_published_values() -> None:
    bart, t5 = (VLPETConfig().resolved(family, "repo") for family in FAMILIES)
    assert (bart.rank, bart.heads, bart.gate_rank, bart.value_rank, bart.scale) == (96, 4, 96, 96, 1.0)
    assert (t5.rank, t5.heads, t5.gate_rank, t5.value_rank, t5.scale) == (192, 4, 192, 96, 0.3)
    assert VLPETConfig(granularity="small").resolved("t5", "repo").gate_rank is None
    assert VLPETConfig(rank=8).resolved("bart", "repo").rank == 8
    with pytest.raises(ValueError, match="no published values for 'blip'; known: bart, t5"):
        VLPETConfig().resolved("blip", "repo")


def test_registry() -> None:
    assert methods.available() == (
        "vl_adapter", "vlpet", "compacter", "low_rank_adapter", "lora", "hyperformer", "base_tuning", "uniadapter", "intrinsic_dimension",
        "visual_projection", "bitfit", "layer_norm", "lm_head", "full", "prompt",
        "houlsby", "pfeiffer", "adapterdrop", "low_rank", "phm_adapter", "compacter_t5", "compacter++", "bitfit_t5", "prompt_tuning", "prompt_tuning_tokens", "said", "said_dense",
    )  # fmt: skip
    assert methods.config("bitfit", layer_norms="all") == BaseTuningConfig(biases=True, layer_norms="all")
    assert methods.config("vlpet", rank=3) == VLPETConfig(rank=3)


def test_recipes() -> None:
    vlpet = methods.recipe("vlpet", "t5")
    assert (vlpet.learning_rate, vlpet.epochs, vlpet.batch_size, vlpet.task_prompts) == (3e-4, 20, 300, True)
    assert methods.recipe("vl_adapter", "bart").learning_rate == 1e-3 and methods.recipe("full", "bart", "video").epochs == 7
    assert [methods.recipe(method, "bart", "video").epochs for method in ("vl_adapter", "vlpet")] == [7, 20]
    assert not methods.recipe("hyperformer", "bart").task_prompts and methods.recipe("vlpet", "bart", "video").learning_rate == 7e-4
    with pytest.raises(ValueError, match="method: no run of 'compacter' on t5 with video tasks was published; known: full"):
        methods.recipe("compacter", "t5", "video")
    with pytest.raises(ValueError, match="host, kind: nothing is published for 'blip' and 'image'"):
        methods.recipe("vlpet", "blip")


def test_prompts() -> None:
    assert methods.task_prompt("vqa") == "vqa: " and methods.task_prompt("nlvr") == "nlvr: " and methods.task_prompt("caption") == "caption: "
    assert methods.task_prompt("gqa") == "gpa: ", "the published spelling"
    with pytest.raises(ValueError, match="no prompt is published for 'snli'; known: vqa, gqa"):
        methods.task_prompt("snli")


def test_what_bottlenecks_read() -> None:
    """By hand: beside and behind the sums of T5's pre-norm and BART's post-norm feed-forward sub-layers; the host's norm gets its gradient from both."""
    for family, reads in itertools.product(("t5", "bart"), ("stream", "sum")):
        model = tiny(family).double()
        handle = patch(model, "vl_adapter", reads=reads, scale=0.5, rank=5, layer_norms="all")
        randomize(handle)
        adapter, encoder = handle.sites["encoder.0.feed_forward"], model.get_encoder()
        x = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def f(inside: torch.Tensor, adapter: Any = adapter) -> torch.Tensor:
            return 0.5 * adapter.up_sampler(torch.nn.functional.gelu(adapter.down_sampler(inside), approximate="tanh"))

        if family == "t5":
            layer = encoder.block[0].layer[1]
            h = layer.DenseReluDense(layer.layer_norm(x))
            got, want = layer(x), x + h + f(x if reads == "stream" else h + x)
        else:
            layer = encoder.layers[0]
            got = layer(x, None)
            attended = layer.self_attn(x)[0]
            own = handle.sites["encoder.0.self_attention"]
            x = layer.self_attn_layer_norm(x + attended + f(x if reads == "stream" else layer.self_attn_layer_norm(x + attended), own))
            h = layer.fc2(layer.activation_fn(layer.fc1(x)))
            want = layer.final_layer_norm(x + h + f(x if reads == "stream" else layer.final_layer_norm(x + h)))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        norm = layer.layer_norm if family == "t5" else layer.final_layer_norm
        grads = [torch.autograd.grad(out.square().sum(), norm.weight, retain_graph=True)[0] for out in (got, want)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reads": "input"}, "reads: must be one of output, stream, sum, not 'input'"), ({"scale": float("nan")}, "scale: must be a finite number")],
)
def test_what_bottlenecks_cannot_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch(tiny("bart"), "vl_adapter", **options)
    with pytest.raises(ValueError, match="reads: 'sum' is known on BART- and T5-like hosts, not on other hosts"):
        VLAdapterConfig(reads="sum").resolved("other hosts", "repo")
