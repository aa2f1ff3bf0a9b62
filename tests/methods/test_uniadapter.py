"""UniAdapter as a method: counts of the published code, trained set, starting values, momentum, options."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipVisionConfig

from fastadapt import methods
from fastadapt.nn import KeyValueAdapter, UniAdapter
from fastadapt.patching import Handle, patch
from fastadapt.training import momentum_update
from tests.hosts.published_blip import MODELS, batch, tiny_blip
from tests.hosts.tiny import randomize

kinds = pytest.mark.parametrize("kind", MODELS)
SMALL = {"rank": 8, "key_value_rank": 4}
ADAPTER, CROSS_NORM, KEY_VALUE, TEMPERATURE, MODALITIES = 1_578_752, 1_536, 99_137, 1, 12


@pytest.fixture(scope="module")
def real() -> dict[str, nn.Module]:
    """BLIP-base at the published image sizes, without values."""
    with torch.device("meta"):
        retrieval = BlipForImageTextRetrieval(BlipConfig())
        return {"retrieval": retrieval, "vqa": BlipForQuestionAnswering(BlipConfig(vision_config=BlipVisionConfig(image_size=480).to_dict()))}


def counts(model: nn.Module, **options: Any) -> tuple[int, int]:
    handle = patch(model, "uniadapter", **options)
    found = handle.parameter_counts()
    handle.unpatch()
    return found


@pytest.mark.parametrize(("rank", "adapters"), [(512, 18_926_592), (256, 9_486_336), (128, 4_766_208), (64, 2_406_144)])
def test_counts_of_retrieval(real: dict[str, nn.Module], rank: int, adapters: int) -> None:
    """The published numbers; the stock model lacks the temperature, one number that the published base of 223,744,259 has."""
    trainable, total = counts(real["retrieval"], rank=rank)
    heads = 196_864 + 196_864 + 1_538
    assert trainable == adapters + 2 * KEY_VALUE + heads
    assert total - trainable == 223_744_259 - TEMPERATURE - heads + MODALITIES * CROSS_NORM
    if rank == 512:
        assert trainable == 19_520_132 and total == 242_887_557 - TEMPERATURE and round(100 * trainable / total, 2) == 8.04
        assert adapters == MODALITIES * (ADAPTER - CROSS_NORM) and round(100 * trainable / 223_744_259, 2) == 8.72


def test_counts_of_vqa(real: dict[str, nn.Module]) -> None:
    """As published, less the twelve UniAdapters of ``adapters_dec``, which no forward of the published code runs."""
    trainable, total = counts(real["vqa"])
    assert trainable == 38_249_732 - MODALITIES * (ADAPTER - CROSS_NORM)
    assert total == 399_765_568 - MODALITIES * ADAPTER


def test_counts_of_options(real: dict[str, nn.Module]) -> None:
    published, model = counts(real["retrieval"])[0], real["retrieval"]
    up = 768 * 512 + 768
    assert counts(model, train_cross_norm=True)[0] == published + MODALITIES * CROSS_NORM
    assert counts(model, key_value_rank=None)[0] == published - 2 * KEY_VALUE
    assert counts(model, learnable_scale=True)[0] == published + MODALITIES
    assert counts(model, layer_norm="none")[0] == published - MODALITIES * CROSS_NORM
    assert counts(model, visual=False)[0] == counts(model, multimodal=False)[0] == published - MODALITIES * up
    assert counts(model, textual=False)[0] == published
    assert counts(model, frames=8)[0] == published + 8 * 768
    assert counts(model, trained_modules=())[0] == published - 395_266


@kinds
def test_trained_set(kind: str) -> None:
    """Names with "adapter" but not "_m", and the heads of retrieval; LN_cross by choice."""
    model = tiny_blip(kind)
    handle = patch(model, "uniadapter", **SMALL)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if "adapter" in name and "cross_modal" not in name}
    assert names == wanted | {name for name, _ in model.named_parameters() if name.startswith(("vision_proj", "text_proj", "itm_head"))}
    assert len(handle.report.trained_base) == (6 if kind == "retrieval" else 0)
    handle.unpatch()
    handle = patch(model, "uniadapter", train_cross_norm=True, **SMALL)
    assert all(p.requires_grad for m in handle.sites.values() for p in m.parameters())
    handle.unpatch()
    handle = patch(model, "uniadapter", layer_norms="all", **SMALL)
    assert all("norm" in name.lower() or name.startswith(("vision_proj", "text_proj", "itm_head")) for name in handle.report.trained_base)
    assert len(handle.report.trained_base) > 20


def tensors(**options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    handle = patch(tiny_blip("retrieval", width=128, layers=1), "uniadapter", rank=96, key_value_rank=64, **options)
    return {f"{site.split('.')[-1]}/{name}": p.detach() for site, module in handle.sites.items() for name, p in module.named_parameters()}


def assert_normal(t: Tensor, std: float) -> None:
    assert abs(t.std().item() / std - 1) < 4 / math.sqrt(2 * t.numel()) and abs(t.mean().item()) < 4 * std / math.sqrt(t.numel())


@pytest.mark.parametrize("retrieval", [True, False])
def test_published_start(retrieval: bool) -> None:
    """Section 4.3: in retrieval init_adapter_weights() comes last; in VQA BLIP's own rule does."""
    for name, t in tensors(init_adapter_weights=retrieval, learnable_scale=True).items():
        if "layer_norm" in name:
            assert torch.equal(t, torch.full_like(t, float(name.endswith("weight")))), name
        elif name.endswith("scale"):
            assert t.item() == pytest.approx(1.0 if name.startswith(("key", "value")) else 0.1)
        elif name.endswith("bias") or (retrieval and name.endswith("/up_proj.weight") and not name.startswith(("key", "value"))):
            assert not t.any(), name
        elif retrieval and name.endswith("down_proj.weight") and not name.startswith(("key", "value")):
            assert 0.98 / math.sqrt(128) < t.abs().max() <= 1 / math.sqrt(128)
            assert_normal(t, 1 / math.sqrt(3 * 128))
        else:
            assert_normal(t, 0.02)


def test_text_mode_starts_at_nothing_and_the_others_do_not() -> None:
    handle = patch(tiny_blip("retrieval"), "uniadapter", **SMALL)
    module, x = handle.sites["vision.0.block"], torch.randn(2, 3, 32)
    assert isinstance(module, UniAdapter)
    assert not module(x, False, "text").any() and module(x, False, "visual").any()
    assert module(x, False, "multimodal").std().item() == pytest.approx(0.1, rel=0.1)


@kinds
@pytest.mark.parametrize("layer_norm", ["in", "out", "none"])
def test_identity(kind: str, layer_norm: str) -> None:
    model = tiny_blip(kind)
    inputs = batch(kind)

    def out() -> Tensor:
        with torch.no_grad():
            found = model(**inputs)
        return found.itm_score if kind == "retrieval" else torch.cat([found.image_embeds.flatten(), found.loss.flatten()])

    before = out()
    handle = patch(model, "uniadapter", init="identity", layer_norm=layer_norm, learnable_scale=True, **SMALL)
    assert torch.equal(out(), before)
    loss = model(**inputs).itm_score.square().sum() if kind == "retrieval" else model(**inputs).loss
    loss.backward()
    for site, module in handle.sites.items():
        ups = [p for name, p in module.named_parameters() if "up_proj.weight" in name]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in ups), f"{site}: nothing would train"
    randomize(handle)
    assert not torch.allclose(out(), before, atol=1e-3)


def test_identity_of_the_temporal_embedding() -> None:
    model = tiny_blip("retrieval")
    ids, video = batch("retrieval")["input_ids"], torch.randn(2, 8, 32)
    before = model.text_encoder(ids, encoder_hidden_states=video).last_hidden_state
    patch(model, "uniadapter", init="identity", frames=4, **SMALL)
    assert torch.equal(model.text_encoder(ids, encoder_hidden_states=video).last_hidden_state, before)


def test_options_reach_the_modules() -> None:
    options = {"scale": 2.0, "dropout": 0.25, "layer_norm": "out", "learnable_scale": True}
    handle = patch(tiny_blip("caption"), "uniadapter", rank=5, key_value_rank=3, **options)
    module, key = handle.sites["text.1.cross_attention"], handle.sites["text.1.cross_attention.key"]
    assert isinstance(module, UniAdapter) and isinstance(key, KeyValueAdapter)
    assert (module.down_proj.out_features, module.dropout, module.layer_norm, module.scale.item()) == (5, 0.25, "out", 2.0)
    assert key.down_proj.out_features == 3
    handle.unpatch()
    key = patch(handle.model, "uniadapter", **SMALL).sites
    assert list(key) == list(handle.sites)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layer_norms": "encoder"}, "layer_norms: must be 'all' or 'none'"),
        ({"encoder_prompt": 4}, "encoder_prompt, decoder_prompt: must be 0"),
        ({"visual": 1}, "visual: must be True or False"),
        ({"train_cross_norm": "yes"}, "train_cross_norm: must be True or False"),
        ({"init_adapter_weights": None}, "init_adapter_weights: must be True or False"),
        ({"layer_norm": "middle"}, "layer_norm: must be one of in, out, none"),
        ({"rank": 0}, "rank: must be a positive integer"),
        ({"key_value_rank": 0}, "key_value_rank: must be a positive integer"),
        ({"dropout": -0.1}, "dropout: must be from 0"),
        ({"frames": 0}, "frames: must be a positive integer"),
        ({"visual": False, "textual": False, "multimodal": False, "key_value_rank": None}, "has no site"),
    ],
)
def test_refusals(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        patch(tiny_blip("retrieval", layers=1), "uniadapter", trained_modules=(), **options)


def test_no_site_is_said_even_where_heads_are_trained() -> None:
    with pytest.raises(TypeError, match="unknown option 'adapters_dec'"):
        patch(tiny_blip("vqa", layers=1), "uniadapter", adapters_dec=True)
    assert "uniadapter" in methods.available()


def moved(kind: str, adapters: str, m: float = 0.995) -> tuple[Handle, dict[str, float]]:
    """How far a parameter moves from 0 towards 1, by name."""
    model = tiny_blip(kind)
    handle = patch(model, "uniadapter", **SMALL)
    momentum = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
        for p in momentum.parameters():
            p.zero_()
    momentum_update(model, momentum, m, adapters=adapters)  # type: ignore[arg-type]
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters())
    found = {name: p.unique() for name, p in momentum.named_parameters()}
    assert all(len(values) == 1 for values in found.values())
    return handle, {name: values.item() for name, values in found.items()}


@kinds
def test_momentum_averages_every_tensor_once(kind: str) -> None:
    _, found = moved(kind, "once")
    assert list(found.values()) == pytest.approx([0.005] * len(found), rel=1e-5)


@pytest.mark.parametrize(("kind", "times"), [("retrieval", 2), ("vqa", 3)])
def test_momentum_as_published(kind: str, times: int) -> None:
    """Section 4.9: from 0 to 1 a shared adapter moves by 0.009975 in retrieval; key and value adapters are in one text encoder only."""
    handle, found = moved(kind, "twice")
    assert times != 2 or 1 - 0.995**times == pytest.approx(0.009975)
    for name, value in found.items():
        shared = name.startswith("vision_model") and "adapter" in name
        assert value == pytest.approx(1 - 0.995 ** (times if shared else 1), rel=1e-5), name
    assert any("parallel_adapter" in name for name in found) and handle.sites


def test_momentum_leaves_equal_tensors_alone() -> None:
    model = tiny_blip("caption")
    patch(model, "uniadapter", **SMALL)
    momentum = copy.deepcopy(model)
    for _ in range(3):
        momentum_update(model, momentum)
    for a, b in zip(model.parameters(), momentum.parameters(), strict=True):
        assert torch.equal(a, b)
    momentum_update(model, momentum, 0.0)
    momentum_update(model, momentum, 1)


def test_momentum_in_float32_of_a_bfloat16_model() -> None:
    torch.manual_seed(0)
    model, momentum = nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3)
    want = momentum.weight.detach().lerp(model.weight.detach().float(), 0.5)
    momentum_update(model, momentum, 0.5)
    assert torch.equal(momentum.weight, want)


def quantised(value: int) -> nn.Module:
    module = nn.Module()
    module.a = nn.Parameter(torch.full((2,), float(value)))
    module.q = nn.Parameter(torch.full((2,), value, dtype=torch.int8), requires_grad=False)
    return module


def test_momentum_of_compiled_models() -> None:
    ours, theirs = (nn.ModuleList([nn.Linear(2, 2)] * 2) for _ in range(2))
    want = copy.deepcopy(theirs)
    momentum_update(ours, want, 0.9, adapters="twice")
    momentum_update(torch.compile(ours), torch.compile(theirs), 0.9, adapters="twice")
    assert torch.equal(theirs[0].weight, want[0].weight) and not torch.equal(want[0].weight, ours[0].weight)


def test_momentum_refuses_other_models() -> None:
    model = tiny_blip("retrieval")
    other = copy.deepcopy(model)
    handle = patch(model, "uniadapter", **SMALL)
    with pytest.raises(ValueError, match="momentum_model: its parameters are not those of the model: "):
        momentum_update(model, other)
    other = copy.deepcopy(model)
    other.itm_head = nn.Linear(32, 3)
    with pytest.raises(ValueError, match=r"momentum_model: itm_head.weight is \(3, 32\), in the model \(2, 32\)"):
        momentum_update(model, other)
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="momentum_model: it shares other parameters among its modules than the model"):
        momentum_update(nn.ModuleList([one, two, one]), nn.ModuleList([one, two, two]))
    with pytest.raises(ValueError, match="momentum_model: q holds integers, which have no average, and other ones than in the model"):
        momentum_update(quantised(1), before := quantised(2))
    assert torch.equal(before.a, quantised(2).a)
    momentum_update(quantised(1), same := quantised(1), 0.5)
    assert torch.equal(same.q, quantised(1).q)
    for m in (1.5, -0.1, True, "x"):
        with pytest.raises(ValueError, match="m: must be a number from 0 to 1"):
            momentum_update(model, model, m)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="adapters: must be 'once' or 'twice', not 'thrice'"):
        momentum_update(model, model, adapters="thrice")  # type: ignore[arg-type]
    assert handle.sites
