"""UniAdapter in stock BLIP: the recorded layers, encoders and models of the published code; patched models in ordinary use."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.blip import modeling_blip, modeling_blip_text

import fastadapt
from fastadapt.hosts import ROLES, roles
from fastadapt.hosts import blip as our_blip
from fastadapt.hosts.stages import STAGES
from fastadapt.nn import KeyValueAdapter, UniAdapter, frame_scores, frame_weights
from fastadapt.patching import Handle, UnknownHostError, patch
from tests import eager, golden
from tests.hosts.published_blip import MODELS, batch, check_fp32, check_fp64, converted, fill, masked_cross_attention, text_config, tiny_blip  # noqa: F401
from tests.hosts.tiny import assert_same, randomize, snapshot
from tests.ops import checks

pytestmark = pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad", "ignore:`gradient_checkpointing_enable`:FutureWarning")
kinds = pytest.mark.parametrize("kind", MODELS)
CASES = [name for name in golden.case_ids("uni_") if not name.startswith("uni_adapter_")]
SMALL = {"rank": 8, "key_value_rank": 4}
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Ran:
    """Outputs and gradients of one run of a case, under the case's names."""

    def __init__(self, case: golden.Case, model: nn.Module, handle: Handle, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
        layer = isinstance(model, our_blip.BlipTextLayer)
        names = {new: old for old, new in zip(case.param_grads, converted(case.param_grads, layer=layer), strict=True)}
        without = set(converted(dict.fromkeys(case.entry["parameters_without_gradient"], torch.empty(0)), layer=layer))
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and name not in without}
        assert all(model.get_parameter(name).grad is None for name in without)
        self.handle, self.outputs = handle, outputs
        self.input_grads = {name: inputs[name].grad for name in case.input_grads}
        self.param_grads = {names.get(name, name): grad for name, grad in grads.items()}


def run_case(case: golden.Case, dtype: torch.dtype, device: str = "cpu") -> Ran:
    model, handle = patched_case(case, dtype)
    model.to(device)
    x = {name: t.to(device).clone().requires_grad_(name in case.input_grads) for name, t in golden.to(case.inputs, dtype).items()}
    out = _call(case, model, x)
    if case.id == "uni_vqa_loss_and_ranking":
        out["loss"].backward()
    else:
        torch.autograd.backward(list(out.values()), [case.cotangents[name].to(device, dtype) for name in out])
    return Ran(case, model, handle, out, x)


def patched_case(case: golden.Case, dtype: torch.dtype) -> tuple[nn.Module, Handle]:
    o = case.options
    key_value = o.get("key_value_lora")
    if o.get("adapter_flags", {}).get("video_key_adapter"):
        key_value = o["adapter_flags"]["video_key_adapter_dim"]
    options: dict[str, Any] = {"rank": o["bottleneck"], "key_value_rank": key_value, "train_cross_norm": True, "trained_modules": ()}
    if o.get("adapter_flags", {}).get("temporal_embed"):
        options["frames"] = o["frames"]
    unused = r"$^"
    if case.id == "uni_vit_block_visual":
        config = tiny_blip("retrieval", width=o["dim"], heads=o["heads"]).config.vision_config
        model: nn.Module = modeling_blip.BlipEncoderLayer(config)
    elif case.id == "uni_vit_bert_pair":
        model = tiny_blip("retrieval", width=o["width"], layers=o["layers"], heads=o["heads"], text={"layer_norm_eps": 1e-12})
        unused = "vision_proj|text_proj|itm_head"
    elif case.id == "uni_vqa_loss_and_ranking":
        model = tiny_blip("vqa", width=o["hidden_size"], layers=o["layers"], heads=o["heads"], text={"label_smoothing": o["label_smoothing"]})
        unused = r"vision_model\.(?!.*adapter)"
    elif "encoder" in case.id:
        model = modeling_blip_text.BlipTextModel(text_config(o), add_pooling_layer=False)
        unused = "embeddings"
    else:
        model = modeling_blip_text.BlipTextLayer(text_config(o), 0)
    model = model.to(dtype).eval()
    handle = patch(model, "uniadapter", **options)
    if isinstance(model, modeling_blip_text.BlipTextModel):
        model = model.encoder
    fill(model, converted(golden.to(case.params, dtype), layer=isinstance(model, our_blip.BlipTextLayer)), unused)
    return model, handle


def _call(case: golden.Case, model: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    if case.id == "uni_vit_block_visual":
        return {"x": model(x["x"])}
    if case.id == "uni_vit_bert_pair":
        image = model.vision_model(x["image"]).last_hidden_state
        text = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
        cross = model.text_encoder(**text, encoder_hidden_states=image, encoder_attention_mask=torch.ones(image.shape[:2], device=image.device))
        return {"image_embeds": image, "text_embeds": model.text_encoder(**text).last_hidden_state, "multimodal_embeds": cross.last_hidden_state}
    if case.id == "uni_vqa_loss_and_ranking":
        return _vqa(case, model, x)
    out = model(**x)
    return {"hidden_states": out if isinstance(out, Tensor) else out.last_hidden_state}


def _vqa(case: golden.Case, model: Any, x: dict[str, Tensor]) -> dict[str, Tensor]:
    o = case.options
    question = model.text_encoder(
        x["question_ids"], attention_mask=x["question_mask"], encoder_hidden_states=x["image_embeds"], encoder_attention_mask=torch.ones(x["image_embeds"].shape[:2])
    ).last_hidden_state
    times = torch.tensor(o["answers_per_question"])

    def answer(ids: Tensor, mask: Tensor, times: Tensor) -> Any:
        states, states_mask = (t.repeat_interleave(times, 0) for t in (question, x["question_mask"]))
        labels = ids.masked_fill(ids == o["pad"], -100)
        return model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=states, encoder_attention_mask=states_mask, labels=labels, reduction="none")

    out = answer(x["answer_ids"], x["answer_mask"], times)
    with torch.no_grad():
        _ranks(case, model, x, question, answer)
    return {"logits": out.logits, "answer_loss": out.loss, "loss": ((x["weights"] * out.loss).sum() / len(question)).reshape(1)}


def _ranks(case: golden.Case, model: Any, x: dict[str, Tensor], question: Tensor, answer: Any) -> None:
    """The published rank_answer: the candidates whose first token is likeliest, judged by the likelihood of the whole answer."""
    k, ids, n = case.options["k_test"], x["candidate_ids"], len(question)
    start = model.text_decoder(ids[:1, :1].repeat(n, 1), encoder_hidden_states=question, encoder_attention_mask=x["question_mask"]).logits[:, 0]
    likeliest = start.softmax(-1)[:, ids[:, 1]].topk(k, -1).indices
    losses = answer(ids[likeliest.flatten()], x["candidate_mask"][likeliest.flatten()], torch.full((n,), k)).loss.reshape(n, k)
    assert torch.equal(likeliest.gather(1, losses.argmin(1, keepdim=True))[:, 0], case.extra["rank_max_ids"])
    if question.dtype == torch.float64:
        check_fp64({"rank_log_probs": -losses, "question_states": question}, {name: case.extra[name] for name in ("rank_log_probs", "question_states")})


@pytest.mark.usefixtures("masked_cross_attention")
@pytest.mark.parametrize("case_id", CASES)
def test_recorded_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    ran = run_case(case, torch.float64)
    for part in ("outputs", "input_grads", "param_grads"):
        check_fp64(getattr(ran, part), getattr(case, part))
    assert {backend for _, _, backend in fastadapt.backend.ran()} == {"reference"}


@pytest.mark.parametrize("backend", checks.every_name)
@pytest.mark.usefixtures("masked_cross_attention")
@pytest.mark.parametrize("case_id", CASES)
def test_recorded_fp32(case_id: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = golden.load_case(case_id), "cuda" if backend == "triton" else "cpu"
    for module in patched_case(case, torch.float32)[1].sites.values():
        if hasattr(module, "call") and (why := fastadapt.backend.explain(rows=8, dtype=torch.float32, device=device, **module.call()).reasons.get(backend)):
            pytest.skip("; ".join(why))
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use(backend):
        ran = run_case(case, torch.float32, device)
    assert set(checks.ran()) == {("bottleneck", direction, backend) for direction in ("forward", "backward")}
    monkeypatch.setattr(fastadapt.functional, "bottleneck", eager.bottleneck)
    rival = run_case(case, torch.float32, device)
    for part in ("outputs", "input_grads", "param_grads"):
        check_fp32(case, getattr(ran, part), getattr(case, part), getattr(rival, part), gradient=part != "outputs")


def patched(kind: str, *, options: dict[str, Any] | None = None, **model: Any) -> tuple[Any, Handle]:
    m = tiny_blip(kind, **model)
    handle = patch(m, "uniadapter", **{**SMALL, **(options or {})})
    randomize(handle)
    return m, handle


def outputs(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        out = model(**batch(kind))
    return out.itm_score if kind == "retrieval" else torch.cat([out.image_embeds.flatten(), out.loss.flatten()])


def objective(model: Any, kind: str) -> Tensor:
    if kind != "retrieval":
        return model(**batch(kind)).loss
    inputs = batch(kind)
    return sum(torch.nn.functional.cross_entropy(model(**inputs, use_itm_head=head).itm_score, torch.tensor([0, 1])) for head in (True, False))  # type: ignore[return-value]


def test_sources_are_those_installed() -> None:
    hosts = [h for known in roles._hosts.values() for h in known if h.family == "blip"]
    assert len(hosts) == 2 and not our_blip._UNKNOWN_ATTENTION
    for host in hosts:
        for stock, adapted in host.adapted.items():
            roles.check_source(stock, host.sources[stock])
            assert adapted.__name__ == stock.__name__ and issubclass(adapted, stock) and getattr(our_blip, adapted.__name__) is adapted
    assert {place.role for _, block, host in roles.find(tiny_blip("vqa"))[0] for place in host.places(block)} == {
        role for role in ROLES if role.startswith(("vision.", "text.")) and role not in STAGES
    }


@kinds
def test_sites_and_what_they_share(kind: str) -> None:
    """Image block i and text layer i of every text stack hold one UniAdapter; each text stack has its own key and value adapter."""
    model, handle = patched(kind)
    texts = {"retrieval": ["text"], "vqa": ["text", "text@1"], "caption": ["text"]}[kind]
    layer = ["self_attention", "cross_attention", "cross_attention.key", "cross_attention.value"]
    assert list(handle.sites) == [f"vision.{i}.block" for i in range(2)] + [f"{text}.{i}.{name}" for text in texts for i in range(2) for name in layer]
    for i in range(2):
        first = handle.sites[f"vision.{i}.block"]
        assert isinstance(first, UniAdapter) and all(handle.sites[f"{text}.{i}.{name}"] is first for text in texts for name in layer[:2])
    shared = {(text, name): {id(handle.sites[f"{text}.{i}.{name}"]) for i in range(2)} for text in texts for name in layer[2:]}
    assert all(len(ids) == 1 for ids in shared.values()) and len(set().union(*shared.values())) == 2 * len(texts)
    assert handle.sites["vision.0.block"] is not handle.sites["vision.1.block"]
    paths = {site.path for site in handle.report.sites}
    text = {"retrieval": "text_encoder.encoder", "vqa": "text_decoder.bert.encoder", "caption": "text_decoder.bert.encoder"}[kind]
    assert {"vision_model.encoder.layers.1.adapter", f"{text}.layer.1.adapter", f"{text}.layer.1.crossattention.self.key.parallel_adapter"} <= paths
    keys = model.state_dict().keys() - tiny_blip(kind).state_dict().keys()
    assert keys == {f"{s.path}.{n}" for s in handle.report.sites for n, _ in handle.sites[s.id].named_parameters()}


@kinds
def test_train_save_load_unpatch(kind: str, tmp_path: Path) -> None:
    model = tiny_blip(kind)
    before, base = snapshot(model), outputs(model, kind)
    handle = patch(model, "uniadapter", **SMALL)
    model.train()
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(objective(model, kind))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.trainable_parameters())
    model.eval()
    out = outputs(model, kind)
    handle.save(tmp_path)
    again = tiny_blip(kind)
    loaded = fastadapt.load(again, tmp_path)
    assert torch.equal(outputs(again, kind), out) and loaded.config.method == "uniadapter"
    with handle.disabled():
        assert torch.equal(outputs(model, kind), base)
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))
    assert torch.equal(outputs(model, kind), base)


@kinds
def test_shared_weights_get_gradients_from_both_modalities(kind: str) -> None:
    """The gradient of a shared adapter is the sum of what its image block and its text layers give, each by itself."""
    model, handle = patched(kind)
    model.double()
    sites = {name: module for name, module in handle.sites.items() if isinstance(module, UniAdapter)}
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in batch(kind).items()}

    def run() -> None:
        out = model(**inputs)
        (out.itm_score.square().sum() if kind == "retrieval" else out.loss).backward()

    run()
    together = {name: p.grad.clone() for name, p in sites["vision.0.block"].named_parameters() if p.requires_grad}
    swaps = {(swap.owner, slot): module for swap in handle._swaps for slot, module in swap.slots.items() if isinstance(module, UniAdapter)}
    alone: dict[str, Tensor] = {}
    for (owner, slot), module in swaps.items():
        if module is not sites["vision.0.block"]:
            continue
        setattr(owner, slot, copy.deepcopy(module))
        getattr(owner, slot).zero_grad()
        run()
        grads = {name: p.grad for name, p in getattr(owner, slot).named_parameters() if p.grad is not None}
        assert grads["down_proj.weight"].abs().max() > 0
        for name, grad in grads.items():
            alone[name] = alone.get(name, torch.zeros_like(grad)) + grad
        setattr(owner, slot, module)
    assert alone.keys() == together.keys()
    for name, grad in together.items():
        torch.testing.assert_close(alone[name], grad, **TOLERANCE)


@pytest.mark.parametrize("off", ["visual", "textual", "multimodal"])
def test_a_mode_can_be_left_out(off: str) -> None:
    model, handle = patched("retrieval", options={off: False})
    gone = {"visual": "block", "textual": "self_attention", "multimodal": "cross_attention"}[off]
    assert {name.split(".")[-1] for name in handle.sites} == {"block", "self_attention", "cross_attention", "key", "value"} - {gone}
    objective(model, "retrieval").backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "an up-projection of a mode that does not run is frozen"
    assert handle.parameter_counts()[0] < patched("retrieval")[1].parameter_counts()[0] or off == "textual"


def test_one_mode_alone() -> None:
    for mode in ("visual", "textual", "multimodal"):
        options = {**dict.fromkeys(("visual", "textual", "multimodal"), False), mode: True, "key_value_rank": None}
        model, handle = patched("retrieval", options=options)
        assert len(handle.sites) == 2
        objective(model, "retrieval").backward()
        assert all(p.grad is not None for p in handle.trainable_parameters())


@kinds
def test_save_pretrained_gives_the_stock_model(kind: str, tmp_path: Path) -> None:
    """The file holds each shared tensor once, and the stock class loads it."""
    model, handle = patched(kind)
    model.save_pretrained(tmp_path)
    stock = MODELS[kind].from_pretrained(tmp_path).eval()
    model.eval()
    handle.unpatch()
    assert torch.equal(outputs(stock, kind), outputs(model, kind))


@pytest.mark.parametrize("kind", ["vqa", "caption"])
def test_generate(kind: str) -> None:
    model, _ = patched(kind)
    inputs = {name: t for name, t in batch(kind).items() if name != "labels"}
    if kind == "caption":
        inputs = {"pixel_values": inputs["pixel_values"]}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "no_repeat_ngram_size": 1}
    for beams in (1, 2):
        cached, uncached = (model.generate(**inputs, **options, num_beams=beams, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, uncached)
    assert not torch.equal(cached, tiny_blip(kind).generate(**inputs, **options, num_beams=2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """With the key adapters and the frame scores, which the published checkpointed branch forgets."""
    model, handle = patched("retrieval")
    model.train()
    frames = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = torch.tensor([[0.5, -1.0], [2.0, 1.0]])

    def grads() -> list[Tensor | None]:
        model.zero_grad()
        out = model.text_encoder(batch("retrieval")["input_ids"], encoder_hidden_states=frames, frame_aware_attention_weight=scores).last_hidden_state.square().sum()
        # Reentrant checkpoints need an input with a gradient, which the first image block of a frozen model lacks.
        (out if reentrant else out + objective(model, "retrieval")).backward()
        return [p.grad for p in handle.trainable_parameters()]

    plain = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    # Stock BLIP adds positions to its token embeddings in place, which a leaf that requires a gradient forbids.
    model.disable_input_require_grads()
    assert model.text_encoder.encoder.layer[0].gradient_checkpointing
    for a, b in zip(plain, grads(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_compiles() -> None:
    model, _ = patched("retrieval")
    x, video, scores = torch.randn(2, 5, 32), torch.randn(2, 6, 32), torch.randn(2, 3)
    text = {"encoder_hidden_states": video, "frame_aware_attention_weight": scores}
    for layer, inputs in ((model.vision_model.encoder.layers[0], {}), (model.text_encoder.encoder.layer[0], text)):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x, **inputs), layer(x, **inputs))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    """Adapters keep float32 over a half-precision base; under autocast the image stream, in float32 in the stock model, stays so."""
    model = tiny_blip("retrieval")
    model = model if autocast else model.bfloat16()
    handle = patch(model, "uniadapter", **SMALL)
    randomize(handle, std=0.02)
    assert all(p.dtype == torch.float32 for m in handle.sites.values() for p in m.parameters())
    inputs = {name: t.bfloat16() if t.is_floating_point() and not autocast else t for name, t in batch("retrieval").items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stream = model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[1]
        score = model(**inputs).itm_score
    assert stream.dtype == (torch.float32 if autocast else torch.bfloat16)
    score.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for m in handle.sites.values() for p in m.parameters() if p.requires_grad)


def test_records_hidden_states_and_pickles() -> None:
    model, handle = patched("retrieval")
    text = model.text_encoder(batch("retrieval")["input_ids"], encoder_hidden_states=torch.randn(2, 5, 32), output_hidden_states=True, output_attentions=True)
    assert len(text.hidden_states) == 3 and len(text.attentions) == 2 and len(text.cross_attentions) == 2
    clone = copy.deepcopy(model)
    other = Handle.of(clone)
    assert other.sites["vision.0.block"] is other.sites["text.0.self_attention"] is not handle.sites["vision.0.block"]
    assert torch.equal(outputs(clone, "retrieval"), outputs(model, "retrieval"))
    fresh, handle = patched("retrieval")
    stream = io.BytesIO()
    torch.save(fresh, stream)
    stream.seek(0)
    assert torch.equal(outputs(torch.load(stream, weights_only=False), "retrieval"), outputs(fresh, "retrieval"))


def test_frame_aware_attention() -> None:
    """Equal scores change nothing; otherwise the layer's keys are scaled, class tokens excepted, and the key adapter's part with them."""
    model, _ = patched("retrieval", options={"frames": 3})
    model.double()
    layer: Any = model.text_encoder.encoder.layer[0]
    x, video = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 12, 32, dtype=torch.float64)
    mask = torch.zeros(2, 1, 1, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, video, encoder_attention_mask=mask, frame_aware_attention_weight=torch.zeros(2, 3)), layer(x, video), **TOLERANCE)
    scores = frame_scores(torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64))
    got = layer(x, video, frame_aware_attention_weight=scores)
    assert not torch.allclose(got, layer(x, video))
    w = frame_weights(scores, 12)
    layer.crossattention.self.key.register_forward_hook(lambda _m, _args, out: out * w)
    torch.testing.assert_close(layer(x, video), got, **TOLERANCE)
    # What the stock models pass on reaches every layer.
    ids = batch("retrieval")["input_ids"]
    model, _ = patched("retrieval", options={"frames": 3})
    with_scores = model.text_encoder(ids, encoder_hidden_states=video.float(), frame_aware_attention_weight=scores.float()).last_hidden_state
    assert not torch.allclose(with_scores, model.text_encoder(ids, encoder_hidden_states=video.float()).last_hidden_state)
    with pytest.raises(ValueError, match="10 tokens are no multiple of 3 frames"):
        model.text_encoder(ids, encoder_hidden_states=video[:, :10].float(), frame_aware_attention_weight=scores.float())


def test_frame_aware_attention_heeds_the_mask() -> None:
    model, _ = patched("retrieval", options={"frames": 3})
    layer: Any = model.double().text_encoder.encoder.layer[0]
    x, video = torch.randn(2, 5, 32, dtype=torch.float64), torch.randn(2, 12, 32, dtype=torch.float64)
    mask = torch.zeros(2, 1, 1, 12, dtype=torch.float64)
    mask[..., 8:] = torch.finfo(torch.float64).min
    given = {"encoder_attention_mask": mask, "frame_aware_attention_weight": torch.zeros(2, 3)}
    assert torch.equal(layer(x, video, **given), layer(x, torch.cat((video[:, :8], torch.randn_like(video[:, 8:])), 1), **given))


def test_frame_aware_attention_drops_in_training() -> None:
    model, _ = patched("retrieval", options={"frames": 3})
    layer: Any = model.text_encoder.encoder.layer[0].train()
    for module in layer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5 if module is layer.crossattention.self.dropout else 0.0
    x, video, scores = torch.randn(2, 5, 32), torch.randn(2, 12, 32), torch.zeros(2, 3)
    assert not torch.equal(*(layer(x, video, frame_aware_attention_weight=scores) for _ in range(2)))


def test_frame_aware_attention_wants_the_known_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_blip_text.BlipTextSelfAttention, "forward", lambda self: None)
    assert "BlipTextSelfAttention.forward of transformers" in our_blip._unknown_attention()
    monkeypatch.setattr(our_blip, "_UNKNOWN_ATTENTION", "why")
    with pytest.raises(UnknownHostError, match="why"):
        our_blip.frame_aware_attention(None, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), None, torch.zeros(1, 1))


def test_temporal_embedding_is_added_once_for_all_layers() -> None:
    model, handle = patched("vqa", options={"frames": 2})
    time = [name for name in handle.sites if name.endswith("temporal_embedding")]
    assert time == ["text.temporal_embedding", "text@1.temporal_embedding"]
    assert [site.backend for site in handle.report.sites if site.id in time] == ["torch", "torch"] and "text.temporal_embedding" in str(handle.report)
    seen: list[Tensor] = []
    for layer in model.text_encoder.encoder.layer:
        layer.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    video = torch.randn(2, 8, 32)
    model.text_encoder(batch("vqa")["input_ids"], encoder_hidden_states=video)
    assert torch.equal(seen[0], handle.sites[time[0]](video)) and torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], video)
    out = model.text_encoder(batch("vqa")["input_ids"]).last_hidden_state
    with handle.disabled():
        model.text_encoder(batch("vqa")["input_ids"], encoder_hidden_states=video)
        assert torch.equal(seen[-1], video)
    handle.unpatch()
    assert not model.text_encoder.encoder._forward_pre_hooks and not torch.equal(model.text_encoder(batch("vqa")["input_ids"]).last_hidden_state, out)
    layer = modeling_blip_text.BlipTextLayer(model.config.text_config, 0)
    with pytest.raises(ValueError, match=r"the model is no whole text, so text.temporal_embedding has no place"):
        patch(layer, "uniadapter", frames=2, **SMALL)


def test_text_layers_without_cross_attention() -> None:
    model, handle = patched("retrieval", text={"is_decoder": False})
    assert [name for name in handle.sites if name.startswith("text")] == ["text.0.self_attention", "text.1.self_attention"]
    model(**batch("retrieval"), use_itm_head=False).itm_score.sum().backward()


def test_more_image_blocks_than_text_layers() -> None:
    _, handle = patched("retrieval", depth=3)
    assert handle.sites["vision.1.block"] is handle.sites["text.1.self_attention"] and len({id(m) for m in handle.sites.values()}) == 3 + 2


def test_widths_that_differ() -> None:
    model = tiny_blip("retrieval", vision_width=48)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"text_encoder.encoder.layer.0 needs an adapter of width 32 on cpu, but that of layer 0, which it shares, has width 48"):
        patch(model, "uniadapter", **SMALL)
    assert_same(before, snapshot(model))
    handle = patch(model, "uniadapter", visual=False, **SMALL)
    key = handle.sites["text.0.cross_attention.key"]
    assert isinstance(key, KeyValueAdapter) and (key.down_proj.in_features, key.up_proj.out_features) == (48, 32)
    objective(model, "retrieval").backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


def test_hosts_without_published_values_are_refused() -> None:
    from tests.hosts.tiny import tiny

    with pytest.raises(ValueError, match="uniadapter: no published values for 'bart'"):
        patch(tiny("bart"), "uniadapter")
