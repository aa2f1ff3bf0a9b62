"""Patched BART and T5 in ordinary use: generation, checkpointing, compilation, autocast, half precision. Numbers of the methods themselves are in test_golden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastadapt.hosts import ROLES, roles
from fastadapt.hosts import bart as our_bart
from fastadapt.hosts import t5 as our_t5
from fastadapt.hosts.stages import STAGES
from fastadapt.nn import ValueParallelAdapter
from fastadapt.patching import Handle, patch
from tests.hosts.tiny import FAMILIES, METHODS, SMALL, batch, logits, randomize, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
both = pytest.mark.parametrize("method", METHODS)
hosts = pytest.mark.parametrize("family", FAMILIES)


def patched(family: str, method: str, **config: Any) -> tuple[nn.Module, Handle]:
    model = tiny(family, **config)
    handle = patch(model, method, **SMALL[method])
    randomize(handle)
    return model, handle


def gradients(run: Any, handle: Handle) -> list[Tensor]:
    run(**batch(), use_cache=False).loss.backward()
    grads = [p.grad for p in handle.trainable_parameters()]
    for p in handle.trainable_parameters():
        p.grad = None
    assert all(g is not None and g.abs().max() > 0 for g in grads)
    return grads


@hosts
def test_source_hashes_are_those_installed(family: str) -> None:
    module = {"bart": our_bart, "t5": our_t5}[family]
    for host in [h for known in roles._hosts.values() for h in known if h.family == family]:
        assert host.adapted.keys() == host.sources.keys()
        for stock, adapted in host.adapted.items():
            roles.check_source(stock, host.sources[stock])
            assert adapted.__name__ == stock.__name__ and issubclass(adapted, stock) and getattr(module, adapted.__name__) is adapted


@hosts
def test_roles_and_order_of_sites(family: str) -> None:
    model = tiny(family)
    ids = list(patch(model, "vl_adapter").sites)
    layer = ["self_attention", "feed_forward"], ["self_attention", "cross_attention", "feed_forward"]
    assert ids == [f"{stack}.{i}.{name}" for stack, names in zip(("encoder", "decoder"), layer, strict=True) for i in range(2) for name in names]
    model = tiny(family)
    assert list(patch(model, "vlpet").sites) == [*ids[:4], "decoder.0.cross_attention.value", "decoder.1.cross_attention.value"]
    blocks, _ = roles.find(tiny(family))
    wanted = {role for role in ROLES if role.startswith(("encoder.", "decoder.")) and role not in STAGES}
    assert {place.role for _, block, host in blocks for place in host.places(block)} == wanted


@hosts
def test_modules_see_what_their_role_says(family: str) -> None:
    """h is the output of the sub-layer's last projection, x the stream that entered it: BART's first post-norm before the feed-forward network, T5's un-normalised stream."""
    model = tiny(family)
    handle = patch(model, "vlpet", init="identity", **SMALL["vlpet"])
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in handle.sites.items():
        module.register_forward_hook(lambda _m, args, _out, name=name: seen.__setitem__(name, args))
    recorded: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, pick: Any) -> None:
        module.register_forward_hook(lambda _m, args, kwargs, out: recorded.__setitem__(name, pick(args, kwargs, out)), with_kwargs=True)

    def first(args: Any, kwargs: Any, out: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def output(args: Any, kwargs: Any, out: Any) -> Tensor:
        return out

    if family == "bart":
        block, cross = model.model.encoder.layers[1], model.model.decoder.layers[0].encoder_attn
        places = {"attention h": (block.self_attn.out_proj, output), "attention x": (block, first), "ff h": (block.fc2, output), "ff x": (block.self_attn_layer_norm, output)}
        places |= {"kv": (cross.k_proj, first)}
    else:
        block, cross = model.encoder.block[1], model.decoder.block[0].layer[1].EncDecAttention
        places = {"attention h": (block.layer[0].SelfAttention.o, output), "attention x": (block.layer[0].layer_norm, first)}
        places |= {"ff h": (block.layer[1].DenseReluDense.wo, output), "ff x": (block.layer[1].layer_norm, first), "kv": (cross.k, first)}
    for name, (module, pick) in places.items():
        record(name, module, pick)
    logits(model)
    for site, names in (("encoder.1.self_attention", ("attention h", "attention x")), ("encoder.1.feed_forward", ("ff h", "ff x"))):
        assert all(torch.equal(got, recorded[name]) for got, name in zip(seen[site], names, strict=True)), site
    kv, v = seen["decoder.0.cross_attention.value"]
    projection = cross.v_proj if family == "bart" else cross.v
    assert torch.equal(kv, recorded["kv"]) and torch.equal(v, nn.functional.linear(kv, projection.weight, projection.bias))


@hosts
@both
def test_generate(family: str, method: str) -> None:
    # A head of its own and no repeats: a random model says one token for ever.
    model, _ = patched(family, method, tie_word_embeddings=False)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    made = {
        beams: [model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, no_repeat_ngram_size=1, do_sample=False, num_beams=beams, use_cache=cache) for cache in (True, False)]
        for beams in (1, 3)
    }
    for cached, uncached in made.values():
        assert torch.equal(cached, uncached)
    base = tiny(family, tie_word_embeddings=False).generate(**inputs, max_new_tokens=8, min_new_tokens=8, no_repeat_ngram_size=1, do_sample=False)
    assert len(made[1][0].unique()) > 4 and not torch.equal(made[1][0], base)


@hosts
def test_value_adapter_runs_once_per_generation(family: str) -> None:
    model, handle = patched(family, "vlpet")
    calls: list[int] = []
    for module in handle.sites.values():
        if isinstance(module, ValueParallelAdapter):
            module.register_forward_hook(lambda *_: calls.append(1))
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert len(calls) == 2


@hosts
@both
def test_outputs_are_recorded(family: str, method: str) -> None:
    model, _ = patched(family, method, attn_implementation="eager")
    out = model(**batch(), output_attentions=True, output_hidden_states=True)
    stock = tiny(family, attn_implementation="eager")(**batch(), output_attentions=True, output_hidden_states=True)
    for name in ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        ours, theirs = getattr(out, name), getattr(stock, name)
        assert [t.shape for t in ours] == [t.shape for t in theirs], name


@hosts
@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, method: str, reentrant: bool) -> None:
    model, handle = patched(family, method)
    model.train()
    plain = gradients(model, handle)
    calls: list[int] = []
    encoder = model.get_encoder()
    watched = (encoder.layers if family == "bart" else encoder.block)[0]
    (watched.fc2 if family == "bart" else watched.layer[1].DenseReluDense.wo).register_forward_hook(lambda *_: calls.append(1))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = gradients(model, handle)
    assert len(calls) == 2, "the layer was not recomputed"
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@hosts
@both
def test_compiled(family: str, method: str) -> None:
    """One graph, and the same numbers."""
    model, handle = patched(family, method, layers=1)
    plain = gradients(model, handle)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    for a, b in zip(plain, gradients(compiled, handle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_switching_after_compilation_is_noticed() -> None:
    layer = tiny("bart").model.encoder.layers[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    torch._dynamo.reset()
    with torch.no_grad():
        base = layer(x, None)
        handle = patch(layer, "vlpet", **SMALL["vlpet"])
        randomize(handle)
        adapted = layer(x, None)
        assert not torch.allclose(adapted, base, atol=1e-3)
        compiled = torch.compile(lambda x: layer(x, None), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), adapted)
        with handle.disabled():
            torch.testing.assert_close(compiled(x), base)
        torch.testing.assert_close(compiled(x), adapted)
        handle.unpatch(restore_base=True)
        torch.testing.assert_close(compiled(x), base)


@hosts
@both
def test_autocast(family: str, method: str) -> None:
    model, handle = patched(family, method)
    plain = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch()).loss
        half = logits(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in handle.trainable_parameters())
    assert (half - plain).norm() / plain.norm() < 0.05


def test_fp16_clamp_of_barts_encoder_is_the_stocks() -> None:
    """An overflow is clamped to fp16's largest number less 1000, everything with it; without one nothing is, not even numbers beyond that limit."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3)).half()
    with torch.no_grad():
        largest_normed = tiny("bart").model.encoder.layers[0].half()(x, None).abs().max().item()
    for largest, expected_largest in ((3.0, 3.0), (65000.0, 65000.0), (1e5, 64512.0)):
        stock, ours = (tiny("bart").model.encoder.layers[0].half() for _ in range(2))
        handle = patch(ours, "vl_adapter", init="identity", reduction_factor=4)
        for layer in (stock, ours):
            layer.final_layer_norm.weight.data.fill_(largest / largest_normed)
        with torch.no_grad():
            expected, got = stock(x, None), ours(x, None)
        assert torch.equal(expected, got) and torch.isfinite(got).all()
        assert abs(expected.abs().max().item() / expected_largest - 1) < 2e-3 and (expected.abs() == 64512).any() == (largest == 1e5)
        handle.unpatch()


@both
def test_t5_in_fp16_keeps_wo_in_fp32(method: str) -> None:
    """As checkpoints load: the feed-forward network's output and the stream are fp32 then, attention's output fp16."""
    models = [tiny("t5").half() for _ in range(2)]
    for model in models:
        for stack in (model.encoder, model.decoder):
            for block in stack.block:
                block.layer[-1].DenseReluDense.wo.float()
    stock, ours = models
    handle = patch(ours, method, init="identity", **SMALL[method])
    assert {p.dtype for m in handle.sites.values() for p in m.parameters()} == {torch.float32}
    assert torch.equal(logits(stock), logits(ours))
    ours(**batch()).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


@hosts
def test_training_drops_what_the_stock_model_drops(family: str) -> None:
    """With one seed, the same elements."""
    model = tiny(family, dropout=0.3).train()
    torch.manual_seed(3)
    want = logits(model)
    patch(model, "vl_adapter", init="identity", fuse_residual=False, **SMALL["vl_adapter"])
    torch.manual_seed(3)
    assert torch.equal(logits(model), want)


@hosts
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_prompts_of_a_bfloat16_base(family: str, side: str) -> None:
    model = tiny(family).bfloat16()
    patch(model, "prompt", **{"encoder_prompt": 0, "prompt_mid": None, f"{side}_prompt": 3})
    assert logits(model).dtype == torch.bfloat16


def test_positions_of_a_prompted_text_start_at_zero() -> None:
    model = tiny("bart")
    positions, seen = model.model.encoder.embed_positions, []
    own = positions(batch()["input_ids"])
    patch(model, "prompt", encoder_prompt=3, prompt_mid=None)
    positions.register_forward_hook(lambda _m, _args, out: seen.append(out))
    logits(model)
    assert not seen[0][:, :3].any() and torch.equal(seen[0][:, 3:], own)


def test_rectangular_value_projection_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match=r"EncDecAttention.v maps 16 to 32; an adapter beside it needs one width on both sides"):
        patch(model, "vlpet")
    assert len(patch(model, "vl_adapter").sites) == 5


def test_a_subclass_of_linear_keeps_its_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = tiny("bart")
    v = model.model.decoder.layers[0].encoder_attn.v_proj
    v.__class__ = Doubled
    expected = logits(model)
    handle = patch(model, "vlpet", init="identity", **SMALL["vlpet"])
    assert type(v).__name__ == "Doubled" and isinstance(v, Doubled) and torch.equal(logits(model), expected)
    handle.unpatch()
    assert type(v) is Doubled
