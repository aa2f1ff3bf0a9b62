"""Layers without a host: sub-blocks known by their names, and Linears that the user names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, DeiTConfig, DeiTModel

from fastadapt import patching
from fastadapt.hosts import generic
from fastadapt.nn import LoRA
from fastadapt.patching import UnknownHostError, patch
from tests.hosts.tiny import assert_same, randomize, snapshot

R4: dict[str, Any] = {"reduction_factor": 4}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(torch.sigmoid(self.q_proj(x)) * self.v_proj(x).mean(1, keepdim=True))


class Layer(nn.Module):
    """A decoder's layer of nobody's library, whose feed-forward network sees (B L, D) and adds in place to what it gave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = Attention(width), Attention(width)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 2 * width), "down_proj": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        x = x + self.cross_attn(x)
        out = self.mlp["down_proj"](F.gelu(self.mlp["up_proj"](x.flatten(0, 1))))
        return x + out.add_(1.0).view(x.shape)


class PatchLayer(nn.Module):
    """torch's MultiheadAttention reads its out_proj's weight and never calls it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x, x, x, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(x)))


class Model(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(2))
        self.vision_blocks = nn.ModuleList(PatchLayer(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.vision_blocks:
            x = block(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def evaluate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def test_life_of_a_model_without_a_host(tmp_path: Path) -> None:
    model = Model().eval().requires_grad_(False)
    before, out = snapshot(model), evaluate(model)
    handle = patch(model, "vl_adapter", init="identity", **R4)
    assert list(handle.sites) == [
        *(f"text.{i}.{part}" for i in range(2) for part in ("self_attention", "cross_attention", "feed_forward")),
        *(f"vision.{i}.feed_forward" for i in range(2)),
    ]
    assert type(model.blocks[0].self_attn.out_proj).__name__ == "Linear" and isinstance(model.blocks[0].self_attn.out_proj, nn.Linear)
    assert torch.equal(evaluate(model), out)
    randomize(handle)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for site in handle.sites.values() for p in site.parameters())
    handle.save(tmp_path)
    fresh = Model().eval()
    patching.load(fresh, tmp_path)
    assert torch.equal(evaluate(fresh), evaluate(model)) and not torch.equal(evaluate(model), out)
    handle.unpatch()
    assert_same(before, snapshot(model))


def test_gradients_are_those_of_an_adapter_behind_the_projection() -> None:
    model = Model().double().eval()
    handle = patch(model, "vl_adapter", layers=range(1, 2), **R4)
    randomize(handle)
    assert {name.split(".")[1] for name in handle.sites} == {"1"}
    layer = model.blocks[1]
    x = X.double()
    y = layer(x)
    with handle.disabled():
        stock = layer.self_attn.out_proj(torch.sigmoid(layer.self_attn.q_proj(x)) * layer.self_attn.v_proj(x).mean(1, keepdim=True))
    h = x + handle.sites["text.1.self_attention"](stock)
    with handle.disabled():
        cross = layer.cross_attn(h)
    h = h + handle.sites["text.1.cross_attention"](cross)
    with handle.disabled():
        ffn = layer.mlp["down_proj"](F.gelu(layer.mlp["up_proj"](h)))
    torch.testing.assert_close(y, h + handle.sites["text.1.feed_forward"](ffn) + 1.0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "deit"])
def test_transformers_models_without_a_host(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(BertConfig(vocab_size=99, **SIZES)) if kind == "bert" else DeiTModel(DeiTConfig(**SIZES, image_size=8, patch_size=4))
    model.eval().requires_grad_(False)
    x = torch.arange(10).view(2, 5) if kind == "bert" else torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        out = model(x)[0]
        handle = patch(model, "compacter", init="identity", towers=["text" if kind == "bert" else "vision"], **R4)
        assert len(handle.sites) == 4 and torch.equal(model(x)[0], out)
    randomize(handle)
    model(x)[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.trainable_parameters())


def test_gates_are_refused_by_name() -> None:
    model = Model()
    before = snapshot(model)
    why = r"model: vision_blocks.0.fc2 is known by its name only, so the residual stream around it, which vlpet reads at encoder.feed_forward, is out of sight"
    with pytest.raises(ValueError, match=why):
        patch(model, "vlpet", rank=8, decoder=(), towers=("vision",))
    with pytest.raises(ValueError, match=r"which vl_adapter reads at encoder.feed_forward, is out of sight; .* \(vl_adapter with reads='output', or"):
        patch(model, "vl_adapter", reads="stream", reduction_factor=2, towers=("vision",))
    assert_same(before, snapshot(model))
    handle = patch(model, "vlpet", rank=8, granularity="middleY", decoder=(), towers=("vision",))
    assert list(handle.sites) == ["vision.0.feed_forward", "vision.1.feed_forward"]
    assert model(X).shape == (2, 5, 3)


def test_sites_that_the_user_names(tmp_path: Path) -> None:
    model = Model()
    before = snapshot(model)
    sites = {"encoder.self_attention": r"blocks\.\d+\.self_attn\.out_proj", "encoder.feed_forward": r"head|blocks\.1\.mlp\..*"}
    handle = patch(model, "vl_adapter", sites=sites, rank=2)
    # Two of one role in a layer are told apart.
    assert list(handle.sites) == [
        "text.0.self_attention",
        "text.1.self_attention",
        "text.1.feed_forward.mlp.up_proj",
        "text.1.feed_forward.mlp.down_proj",
        "text@1.0.feed_forward",
    ]
    assert handle.sites["text.1.feed_forward.mlp.up_proj"].up_sampler.out_features == 32
    randomize(handle)
    handle.save(tmp_path)
    fresh = Model()
    assert patching.load(fresh, tmp_path).config.sites == sites and torch.equal(fresh(X), model(X))
    handle.unpatch()
    assert_same(before, snapshot(model))


def test_lora_beside_linears_that_the_user_names() -> None:
    model = Model()
    sites = {"encoder.self_attention.query": r"blocks\..*\.self_attn\.q_proj", "decoder.cross_attention.value": r"blocks\..*\.cross_attn\.v_proj"}
    handle = patch(model, "lora", sites=sites, rank=2, biases=False)
    assert len(handle.sites) == 4 and all(isinstance(site, LoRA) for site in handle.sites.values())
    model(X).square().mean().backward()


def test_bad_sites() -> None:
    model = Model()
    before = snapshot(model)

    def refused(match: str, sites: Any, method: str = "vl_adapter", error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            patch(model, method, sites=sites, **options)
        assert_same(before, snapshot(model))

    refused(r"sites: 'encoder.attention' is no role that a pattern can have; must be of encoder.self_attention, encoder.feed_forward", {"encoder.attention": ".*"})
    refused(r"sites: vl_adapter puts nothing at encoder.self_attention.query; it has encoder.self_attention, ", {"encoder.self_attention.query": ".*"})
    refused(r"sites: 'nowhere' for encoder.feed_forward matches no module of this Model; it must match whole paths, such as 'blocks.0.self_", {"encoder.feed_forward": "nowhere"})
    refused(r"sites: blocks.0, which 'blocks.*0' matches, is a Layer; must be an nn.Linear", {"encoder.feed_forward": r"blocks\.0"})
    inside = {"encoder.self_attention": r"vision_blocks\.0\.self_attn\.out_proj"}
    refused(r"sites: vision_blocks.0.self_attn.out_proj belongs to an nn.MultiheadAttention, which reads its weight without calling it", inside)
    refused(r"sites: head cannot be both encoder.self_attention and encoder.feed_forward", {"encoder.self_attention": "head", "encoder.feed_forward": "head"})
    refused(r"sites: must be \{role: pattern of module paths\}, not 'head'", "head", error=ValueError)
    refused(r"sites: 'head\(' for encoder.feed_forward is no pattern", {"encoder.feed_forward": "head("})


def test_a_forward_on_the_instance_would_hide_the_adapter() -> None:
    model = Model()
    model.blocks[0].mlp["down_proj"].forward = lambda x: x  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"blocks.0.mlp.down_proj has a forward of its own on the instance"):
        patch(model, "vl_adapter", **R4)
    model = Model()
    model.blocks[0]._hf_hook = object()
    with pytest.raises(ValueError, match=r"blocks.0 carries a hook of accelerate"):
        patch(model, "vl_adapter", **R4)


def test_packed_weights() -> None:
    """A quantised projection packs its weight: widths come from its features."""

    class Packed(nn.Linear):
        def __init__(self, other: nn.Linear) -> None:
            super().__init__(other.in_features, other.out_features)
            self.weight = nn.Parameter(other.weight.detach().reshape(-1, 1), requires_grad=False)
            self.bias = other.bias

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.view(self.out_features, self.in_features), self.bias)

    model = Model().eval().requires_grad_(False)
    out = evaluate(model)
    model.blocks[0].mlp["down_proj"] = Packed(model.blocks[0].mlp["down_proj"])  # type: ignore[union-attr, index, operator, arg-type]
    handle = patch(model, "vl_adapter", init="identity", **R4)
    assert handle.sites["text.0.feed_forward"].down_sampler.in_features == 16 and torch.equal(evaluate(model), out)
    assert isinstance(model.blocks[0].mlp["down_proj"], Packed)  # type: ignore[union-attr, index]


def test_nothing_is_recognised() -> None:
    # The last one's fast path, in evaluation, reads its Linears' weights.
    for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2), nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 4)])):
        with pytest.raises(UnknownHostError, match=r"no sub-blocks with usual names; name its Linears with sites=\{role: pattern\}"):
            patch(model, "vl_adapter")


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("encoder.layer.0.attention.output.dense", "self_attention"),
        ("encoder.layer.0.crossattention.output.dense", "cross_attention"),
        ("encoder.layer.0.output.dense", "feed_forward"),
        ("h.3.attn.c_proj", "self_attention"),
        ("h.3.mlp.c_proj", "feed_forward"),
        ("layers.1.attention.wo", "self_attention"),
        ("layers.1.feed_forward.w2", "feed_forward"),
        ("layers.1.encoder_attn.out_proj", "cross_attention"),
        ("layer.1.encoder_decoder_attention.attention.output", "cross_attention"),
        ("encoder.block.0.layer.0.SelfAttention.o", "self_attention"),
        ("encoder.block.0.layer.1.DenseReluDense.wo", "feed_forward"),
        ("layers.1.fc2", "feed_forward"),
        ("blocks.0.attn.proj", "self_attention"),
        ("down.0.attn1.to_out.0", "self_attention"),
        ("layers.0.linear2", None),
        ("layers.0.self_attn.q_proj", None),
        ("layers.0.mlp.up_proj", None),
        ("layers.0.fc1", None),
        ("lm_head", None),
        ("encoder.attn.out_proj", None),
    ],
)
def test_usual_names(path: str, role: str | None) -> None:
    root = nn.Module()
    module = root
    *parents, last = path.split(".")
    for name in parents:
        module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    module.add_module(last, nn.Linear(2, 2))
    found = generic.recognised(root, [])
    places = [place for _, block, host in found for place in host.places(block)]
    assert [place.role.partition(".")[2] for place in places] == ([] if role is None else [role])
    assert generic.recognised(root, [path.split(".")[0]]) == []
