"""VL-PET's options: what they put where, starting values, scales, and what is refused."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt.methods import VLPETConfig
from fastadapt.methods.vlpet import ADAPTERS, DECODER, GRANULARITIES
from fastadapt.nn import IA3, Bottleneck, Gate, GatedBottleneck, GatingOnly, InTurn, LoRA, PHMLinear, ValueParallelAdapter
from fastadapt.patching import patch
from tests.hosts.tiny import FAMILIES, assert_same, batch, logits, randomize, snapshot, tiny
from tests.methods.test_methods import assert_normal, assert_uniform, tensors, wide

hosts = pytest.mark.parametrize("family", FAMILIES)
SITE, FF, VALUE = "encoder.0.self_attention", "encoder.0.feed_forward", "decoder.0.cross_attention.value"


def sites(family: str = "bart", **options: Any) -> dict[str, Any]:
    return patch(tiny(family), "vlpet", **{"rank": 8, "heads": 2, "value_rank": 4, **{"gate_rank": 3 if options.get("granularity", "large") == "large" else None}, **options}).sites


def test_what_goes_where() -> None:
    plain = sites(granularity="none")
    assert type(plain[SITE]) is Bottleneck and type(plain[VALUE]) is ValueParallelAdapter
    chain = sites(granularity="small", gating_rank=3, scale=0.25)[SITE]
    assert isinstance(chain, InTurn) and [type(m) for m in chain.children()] == [GatedBottleneck, GatingOnly]
    assert (chain.adapter.scale, chain.gating.scale) == (1.0, 0.25), "the scale is behind the last module"
    chain = sites(granularity="layernorm")[SITE]
    assert [type(m) for m in chain.children()] == [Bottleneck, Gate]
    own = sites(adapter="lora", rank=None, heads=None)
    assert type(own[SITE]) is Gate and {s.rpartition(".")[2] for s, m in own.items() if isinstance(m, LoRA)} == {"query", "value"}
    phm = sites(adapter="compacter", adapter_options={"shared_rule": True}, decoder=["value_parallel", "cross_attention"], decoder_ranks=6, cross_gate_rank=3)
    places = [phm[SITE], phm[VALUE], phm["decoder.0.cross_attention"]]
    assert [type(m) for m in places] == [GatedBottleneck, ValueParallelAdapter, GatedBottleneck]
    assert all(isinstance(p, PHMLinear) for m in places for p in (m.down_sampler, m.up_sampler))
    assert len({id(m.down_sampler.phm_rule) for m in phm.values()} | {id(m.up_sampler.phm_rule) for m in phm.values()}) == 1
    assert sites(decoder=(), value_rank=None).keys() == {f"encoder.{i}.{name}" for i in (0, 1) for name in ("self_attention", "feed_forward")}
    assert sites(granularity="none", adapter="none", rank=None, heads=None).keys() == {f"decoder.{i}.cross_attention.value" for i in (0, 1)}


def test_gated_operation_runs_over_kronecker_weights() -> None:
    model = tiny("bart")
    patch(model, "vlpet", adapter="compacter", rank=8, gate_rank=3, value_rank=4)
    fastadapt.backend.ran(reset=True)
    model(**batch()).loss.backward()
    calls = {(op, direction): n for (op, direction, _), n in fastadapt.backend.ran().items()}
    assert calls == {(op, d): n for op, n in (("gated_bottleneck", 4), ("bottleneck", 2)) for d in ("forward", "backward")}


def test_scales() -> None:
    """y = s (c h + s_a adapter(h)), without a gate too; ``adapter_scale`` may differ between the sub-layers."""
    both = sites(granularity="none", scale=0.5, input_scale=0.25, adapter_scale=(2.0, 3.0))
    h = torch.randn(2, 3, 32)
    for site, factor in ((SITE, 2.0), (FF, 3.0)):
        module = both[site]
        plain = Bottleneck(32, 8, residual=False)
        plain.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(h, h), 0.5 * (0.25 * h + factor * plain(h)))
    gated = sites(granularity="small", scale=0.5, input_scale=0.25, adapter_scale=[2.0, 3.0])
    assert [(m.scale, m.input_scale, m.adapter_scale) for m in (gated[SITE], gated[FF])] == [(0.5, 0.25, 2.0), (0.5, 0.25, 3.0)]


@hosts
def test_encoder_states_are_adapted_once_a_generation(family: str) -> None:
    model = tiny(family)
    handle = patch(model, "vlpet", granularity="none", adapter="none", decoder="key_value", value_rank=4)
    randomize(handle)
    seen: list[str] = []
    for site, module in handle.sites.items():
        module.register_forward_hook(lambda *_, site=site: seen.append(site))
    inputs = {name: t for name, t in batch().items() if name != "labels"}
    model.generate(**inputs, max_new_tokens=6, num_beams=1, do_sample=False)  # type: ignore[operator]
    assert seen == ["decoder.0.cross_attention.key_value", "decoder.1.cross_attention.key_value"]


@hosts
def test_pickled(family: str) -> None:
    """The layer whose input is adapted is found by its qualified name, like the others."""
    model = tiny(family)
    patch(model, "vlpet", granularity="none", adapter="none", decoder=["feed_forward_ia3", "key_value"], value_rank=4)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model)) and len(fastadapt.patching.Handle.of(again).sites) == 4


@hosts
def test_one_graph_and_half_precision(family: str) -> None:
    """Every kind of place of the decoder at once: compiled without a break; and a bfloat16 base with checkpointed layers trains."""
    options: dict[str, Any] = {"granularity": "layernorm", "gating_rank": 3, "value_residual": True, "value_gate_rank": 3, "rank": 8, "heads": 2, "value_rank": 4}
    options |= {"decoder": ["key_value", "value_ia3", "feed_forward_ia3", "cross_attention"], "decoder_ranks": 4, "cross_gate_rank": 3}
    model = tiny(family, layers=1)
    handle = patch(model, "vlpet", **options)
    block = model.model.decoder.layers[0] if family == "bart" else model.decoder.block[0]  # type: ignore[union-attr]
    states = {name: torch.randn(2, n, 32, generator=torch.Generator().manual_seed(n)) for name, n in (("hidden_states", 3), ("encoder_hidden_states", 5))}
    torch._dynamo.reset()
    with torch.no_grad():
        compiled, plain = torch.compile(block, fullgraph=True, backend="aot_eager")(**states), block(**states)
    torch.testing.assert_close(compiled if family == "bart" else compiled[0], plain if family == "bart" else plain[0])
    handle.unpatch()
    handle = patch(model.bfloat16().train(), "vlpet", **options)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model(**batch()).loss.backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for m in handle.sites.values() for p in m.parameters())


PUBLISHED: dict[str, dict[str, Any]] = {
    "gating": {"granularity": "none", "gating_rank": 96},
    "sequential": {"granularity": "none", "decoder": ["self_attention", "cross_attention", "feed_forward"], "cross_gate_rank": 96},
    "values": {"granularity": "none", "decoder": "value_sequential", "value_residual": True, "value_gate_rank": 96},
    "key_value": {"granularity": "layernorm", "decoder": ["key_value", "multihead"]},
    "vectors": {"granularity": "middleY", "decoder": ["value_ia3", "feed_forward_ia3"]},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_start(name: str) -> None:
    """BART: N(0, 0.02) and zero biases everywhere, vectors too. T5: what is published of it (adapters of the encoder, VPA) ends in zeros, the rest starts as torch's Linears do."""
    for site, t in tensors(wide("bart"), "vlpet", **PUBLISHED[name]).items():
        if "layer_norm" in site:
            assert t.eq(1).all() if site.endswith("weight") else not t.any()
        elif site.endswith("bias"):
            assert not t.any(), site
        elif t.numel() > 100:
            assert_normal(t, 0.02)
    for site, t in tensors(wide("t5"), "vlpet", **PUBLISHED[name]).items():
        if "layer_norm" in site or t.ndim < 2:
            continue
        if "up_sampler" in site and (site.startswith("encoder") or PUBLISHED[name].get("decoder") is None):
            assert not t.any(), site
        else:
            assert_uniform(t, 1 / math.sqrt(t.shape[1]))


def test_vectors_of_ones() -> None:
    """``ia3_one``: IA3 and middleY's vector."""
    made = sites(granularity="middleY", decoder=["value_ia3", "feed_forward_ia3"], value_rank=None, ia3_one=True)
    assert all(m.ia3.eq(1).all() for m in made.values() if isinstance(m, IA3)) and made[SITE].gate_vector.eq(1).all()
    assert sum(isinstance(m, IA3) for m in made.values()) == 4 and made["decoder.0.feed_forward.inner"].ia3.shape == (64,)


def test_compacters_start_is_its_own() -> None:
    """Kronecker factors keep their rule under BART's; the gate follows BART's."""
    made = tensors(wide("bart"), "vlpet", adapter="compacter")
    for name, t in made.items():
        if name.endswith("phm_rule"):
            assert t.abs().max() < 0.06
        elif name.endswith(".W"):
            assert_uniform(t, math.sqrt(2) * math.sqrt(6 / (t.shape[1] + t.shape[2])))
        elif "gate" in name and name.endswith("weight"):
            assert_normal(t, 0.02)


@hosts
@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"granularity": "none"}, 1.0),
        ({"granularity": "none", "gating_rank": 3}, 2.0),
        ({"granularity": "middleY", "gating_rank": 3}, 2.0),
        ({"granularity": "small", "gating_rank": 3, "gating_add_first": True}, 4.0),
        ({"granularity": "large_full", "adapter": "none", "rank": None, "heads": None}, 2.0),
    ],
)
def test_identity(family: str, options: dict[str, Any], scale: float) -> None:
    model = tiny(family)
    out = logits(model)
    handle = patch(model, "vlpet", init="identity", **{"rank": 8, "heads": 2, "value_rank": 4, **options})
    assert torch.equal(logits(model), out) and handle.resolved[family].scale == scale
    assert handle.report.no_identity is None
    randomize(handle)
    assert not torch.allclose(logits(model), out, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"granularity": "layernorm"}, "granularity='layernorm'"),
        ({"granularity": "l2norm"}, "granularity='l2norm'"),
        ({"value_residual": True}, "value_residual=True"),
        ({"decoder": "value_sequential"}, "decoder='value_sequential'"),
        ({"combine": "add"}, "combine='add'"),
        ({"input_scale": 0.5}, "input_scale=0.5"),
    ],
)
def test_no_identity(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=f"init: 'identity' needs .*; not {what}"):
        patch(tiny("bart"), "vlpet", init="identity", **options)
    assert what in str(patch(tiny("bart"), "vlpet", **options).report.no_identity)


def test_resolved() -> None:
    """What a config does not use is None; resolving again changes nothing; sequences become tuples in the published order."""
    config = VLPETConfig(adapter="none", granularity="none", decoder=["feed_forward", "self_attention"]).resolved("bart", "repo")
    assert config.decoder == ("self_attention", "feed_forward") and config.decoder_ranks == (96, 96)
    assert (config.rank, config.heads, config.gate_rank, config.value_rank) == (None,) * 4
    for one in (config, VLPETConfig(adapter="compacter", adapter_options={"division": 4}, adapter_scale=[1, 2]).resolved("t5", "repo")):
        assert one.resolved("bart", "repo") == one and VLPETConfig(**{**one.stored(), "save_gate": None}).resolved("bart", "repo") == one
    assert VLPETConfig(decoder=()).resolved("bart", "repo").decoder == () and VLPETConfig().resolved("bart", "repo").decoder_ranks is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": "huge"}, f"granularity: 'huge' is unknown; must be one of {', '.join(GRANULARITIES)}"),
        ({"adapter": "prefix"}, f"adapter: 'prefix' is unknown; must be one of {', '.join(ADAPTERS)}"),
        ({"combine": "max"}, "combine: 'max' is unknown; must be one of multiply, add"),
        ({"sharing": "up"}, "sharing: 'up' is unknown; must be one of single, multiple"),
        ({"decoder": 3}, f"decoder: 3 is unknown; must be of {', '.join(DECODER)}"),
        ({"adapter": "lora", "adapter_options": ["alpha"]}, r"adapter_options: must be \{option: value\}, not \['alpha'\]"),
        ({"trained_modules": 3}, "trained_modules: must be a list of names, not 3"),
        ({"towers": 3}, "towers: must be some of text, vision, projector, or None for all, not 3"),
        ({"decoder": ["key_value", "key_parallel"]}, f"decoder: 'key_parallel' is unknown; must be of {', '.join(DECODER)}"),
        ({"decoder": ["value_parallel", "value_ia3"]}, "decoder: value_parallel and value_ia3 exclude each other"),
        ({"decoder": ["multihead", "feed_forward"]}, "decoder: multihead and feed_forward exclude each other"),
        ({"decoder": "key_value", "decoder_ranks": 4}, r"decoder_ranks: decoder=\['key_value'\] has no adapter with a rank of its own"),
        ({"decoder": "feed_forward", "decoder_ranks": [4, 5]}, "decoder_ranks: 2 numbers for 1 adapters, feed_forward"),
        ({"decoder": "feed_forward", "decoder_ranks": 0}, "decoder_ranks: must be a positive integer, not 0"),
        ({"decoder": (), "value_rank": 4}, r"value_rank: decoder=\[\] has no adapter of the encoder's output"),
        ({"adapter": "none", "rank": 4}, "rank: adapter='none' and decoder=.* have no multi-head adapter"),
        ({"adapter": "none", "adapter_scale": 0.5}, "input_scale, adapter_scale: adapter='none' puts no bottleneck behind a sub-layer"),
        ({"adapter_scale": (1.0, 2.0, 3.0)}, "adapter_scale: must be a number or one for self-attention and one for feed-forward"),
        ({"granularity": "none", "gate_rank": 3}, "gate_rank: granularity 'none' has no gate rank"),
        ({"granularity": "none", "combine": "add"}, "combine: 'add' needs a gate to add"),
        ({"value_gate_rank": 3}, "value_gate_rank: 3 needs value_residual=True"),
        ({"cross_gate_rank": 3}, "cross_gate_rank: 3 needs 'cross_attention' in decoder"),
        ({"gating_add_first": True}, "gating_add_first: True needs a gating_rank"),
        ({"ia3_add": True}, "ia3_add: True needs an IA3 in decoder"),
        ({"ia3_one": True}, "ia3_one: True needs an IA3 in decoder, or granularity='middleY'"),
        ({"adapter_options": {"division": 2}}, "adapter_options: adapter='bottleneck' has no option 'division'; known: none"),
        ({"adapter": "lora", "adapter_options": {"r": 2}}, "adapter_options: adapter='lora' has no option 'r'; known: rank, alpha, dropout"),
        ({"adapter": "compacter", "adapter_options": {"rank": 2}}, "adapter_options: adapter='compacter' has no option 'rank'; known: division, phm_rank, shared_rule, factorized"),
        ({"adapter": "compacter", "adapter_options": {"division": 3}}, "division: 3 must divide both widths"),
        ({"value_rank": 0}, "^value_rank: must be a positive integer, not 0"),
        ({"gating_rank": 0}, "^gating_rank: must be a positive integer, not 0"),
        ({"value_residual": True, "value_gate_rank": 0}, "^value_gate_rank: must be a positive integer, not 0"),
        ({"value_scale": float("nan")}, "^value_scale: must be a finite number, not nan"),
        ({"adapter_scale": (1.0, True)}, "^adapter_scale: must be a finite number, not True"),
        ({"save_gate": "no"}, "^save_gate: must be True or False or None, not 'no'"),
        ({"adapter": "compacter", "adapter_options": {"shared_rule": "no"}}, "shared_rule: must be True or False, not 'no'"),
        ({"adapter": "compacter", "pair": True}, r"projection: only Linears can be block diagonal \(pair=True\)"),
        ({"sharing": "multiple"}, "tasks: must name the tasks, since sharing='multiple'"),
    ],
)
def test_errors(options: dict[str, Any], match: str) -> None:
    before = snapshot(model := tiny("bart"))
    with pytest.raises(ValueError, match=match):
        patch(model, "vlpet", **options)
    assert_same(before, snapshot(model))
