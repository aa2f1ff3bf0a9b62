"""VL-BART and VL-T5 as transformers models: the stock model without vision, checkpoints, generation, checkpointing, masks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config
from tests.methods.test_methods import assert_normal

SIZES = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}
BART = {"vocab_size": 97, "d_model": 32, "max_position_embeddings": 32, "forced_eos_token_id": None, **SIZES}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 2, "decoder_start_token_id": 0}
STOCK = {VLBart: BartForConditionalGeneration, VLT5: T5ForConditionalGeneration}
both = pytest.mark.parametrize("kind", [VLBart, VLT5])


def make(kind: type, **options: Any) -> VLBart | VLT5:
    torch.manual_seed(0)
    config = VLBartConfig(**BART, feat_dim=24, **options) if kind is VLBart else VLT5Config(**T5, feat_dim=24, **options)
    model = kind(config).eval()
    for p in model.parameters():  # larger than the init, so that attention and order matter
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.2)
    return model


def inputs(grid: int = 9) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, 90, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "vis_inputs": (torch.randn(2, grid, 24), torch.rand(2, grid, 4))}


@both
def test_without_vision_it_is_the_stock_model(kind: type) -> None:
    model, call = make(kind), inputs()
    stock = STOCK[kind](model.config).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing and unexpected and all("visual_embedding." in name for name in unexpected)
    labels = torch.randint(3, 90, (2, 4))
    text = {"input_ids": call["input_ids"], "attention_mask": call["attention_mask"], "labels": labels}
    want = stock(**text)
    nothing = tuple(t[:, :0] for t in call["vis_inputs"])
    for got in (model(**text), model(**text, vis_inputs=nothing)):
        assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    for more in ({}, {"vis_inputs": nothing}):
        generated = model.generate(call["input_ids"], attention_mask=call["attention_mask"], max_new_tokens=5, do_sample=False, **more)
        assert torch.equal(generated, stock.generate(call["input_ids"], attention_mask=call["attention_mask"], max_new_tokens=5, do_sample=False))


@both
def test_training_drops_what_the_stock_model_drops(kind: type) -> None:
    """With one seed, the same elements, and the same layers in some seeds of the eight."""
    rates = {"dropout": 0.3, "encoder_layerdrop": 0.5} if kind is VLBart else {"dropout_rate": 0.3}
    model, call = make(kind, **rates).train(), inputs()
    stock = STOCK[kind](model.config).train()
    stock.load_state_dict(model.state_dict(), strict=False)
    text = {"input_ids": call["input_ids"], "attention_mask": call["attention_mask"], "labels": call["input_ids"]}
    nothing = tuple(t[:, :0] for t in call["vis_inputs"])
    for seed in range(8):
        torch.manual_seed(seed)
        want = stock(**text).logits
        torch.manual_seed(seed)
        assert torch.equal(model(**text, vis_inputs=nothing).logits, want)


@both
def test_loads_a_stock_checkpoint(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(3)
    stock = STOCK[kind](BartConfig(**BART) if kind is VLBart else VLT5Config(**T5))
    stock.save_pretrained(tmp_path)
    model, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all("visual_embedding." in name for name in info["missing_keys"]) and not info["unexpected_keys"]
    own = model.state_dict()
    assert all(torch.equal(own[name], p) for name, p in stock.state_dict().items())
    assert model.config.feat_dim == 2048 and all(torch.isfinite(p).all() for p in model.parameters())


@both
def test_round_trip(kind: type, tmp_path: Path) -> None:
    model, call = make(kind, n_boxes=4), inputs()
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path).eval()
    assert again.config.n_boxes == 4 and again.get_encoder().embed_tokens.weight is again.get_input_embeddings().weight
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(**call, labels=call["input_ids"]).logits, model(**call, labels=call["input_ids"]).logits)


@both
def test_generate(kind: type) -> None:
    model, call = make(kind), inputs()
    cached = model.generate(**call, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(**call, max_new_tokens=8, do_sample=False, use_cache=False))
    other = call | {"vis_inputs": tuple(3 * t for t in call["vis_inputs"])}
    assert not torch.equal(cached, model.generate(**other, max_new_tokens=8, do_sample=False))
    beams = model.generate(call["input_ids"], **{k: call[k] for k in ("attention_mask", "vis_inputs")}, max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 4

    def score(ids: torch.Tensor) -> torch.Tensor:
        """Mean log-probability of what was generated, as beam search ranks it."""
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == model.config.pad_token_id, -100)
        logits = model(**call, labels=labels).logits.log_softmax(-1)
        return -F.nll_loss(logits.transpose(1, 2), labels, reduction="none").sum(1) / (labels != -100).sum(1)

    assert (score(beams[::2]) >= score(cached) - 1e-5).all()
    with pytest.raises(ValueError, match="'nonsense'"):
        model.generate(**call, nonsense=1)


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(kind: type, reentrant: bool) -> None:
    model, call = make(kind).train(), inputs()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**call, labels=call["input_ids"]).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(model.named_parameters()).keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


@both
def test_masked_tokens_do_not_matter(kind: type) -> None:
    model, call = make(kind), inputs()
    hidden = torch.ones(2, 9, dtype=torch.long)
    hidden[:, 6:] = 0
    ids, feats = call["input_ids"].clone(), call["vis_inputs"][0].clone()
    want = model(**call, vis_attention_mask=hidden, decoder_input_ids=ids[:, :3]).logits
    ids[1, 5:], feats[:, 6:] = 50, 9.0
    changed = call | {"input_ids": ids, "vis_inputs": (feats, call["vis_inputs"][1])}
    torch.testing.assert_close(model(**changed, vis_attention_mask=hidden, decoder_input_ids=call["input_ids"][:, :3]).logits, want)
    assert not torch.allclose(model(**changed, decoder_input_ids=call["input_ids"][:, :3]).logits, want)
    padded = call["input_ids"].masked_fill(call["attention_mask"] == 0, model.config.pad_token_id)
    by_padding = model(input_ids=padded, vis_inputs=call["vis_inputs"], vis_attention_mask=hidden, decoder_input_ids=call["input_ids"][:, :3])
    torch.testing.assert_close(by_padding.logits, want)


@both
def test_masked_boxes_do_not_matter_in_generation(kind: type) -> None:
    model, call = make(kind), inputs()
    hidden = torch.ones(2, 9, dtype=torch.long)
    hidden[:, 6:] = 0
    feats, boxes = call["vis_inputs"]
    options = {"vis_attention_mask": hidden, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first, second = (model.generate(**call | {"vis_inputs": (f, boxes)}, **options).logits for f in (feats, feats.masked_fill(hidden[..., None] == 0, 9.0)))
    torch.testing.assert_close(first, second)


@both
def test_options_reach_the_visual_embedding(kind: type) -> None:
    assert make(kind, pos_dim=5).get_encoder().visual_embedding.absolute_vis_pos_embedding[0].in_features == 6
    assert make(kind, use_vis_order_embedding=False).get_encoder().visual_embedding.img_order_embedding is None


def test_published_start_of_vlt5s_order_embedding() -> None:
    torch.manual_seed(0)
    model = VLT5(VLT5Config(**{**T5, "d_model": 128}, feat_dim=24, n_images=16))
    assert_normal(model.get_encoder().visual_embedding.img_order_embedding.weight, 1.0)


def test_visual_tokens_know_no_position() -> None:
    """T5 gives pairs with vision no relative bias and BART gives visual tokens no position: with equal order ids, their order does not matter."""
    order = torch.tensor([2, 0, 1, 3, 8, 7, 6, 5, 4])
    for kind in (VLBart, VLT5):
        model, call = make(kind), inputs()
        zeros = torch.zeros(1, 9, dtype=torch.long)
        feats, boxes = call["vis_inputs"]
        call["decoder_input_ids"] = call["input_ids"][:, :3]
        want = model(**call | {"vis_inputs": (feats, boxes, zeros, zeros)}).logits
        torch.testing.assert_close(model(**call | {"vis_inputs": (feats[:, order], boxes[:, order], zeros, zeros)}).logits, want)
        assert not torch.allclose(model(**call | {"vis_inputs": (feats[:, order], boxes[:, order])}).logits, want)


def test_share_vis_lang_layer_norm() -> None:
    plain, call = make(VLBart), inputs()
    shared = make(VLBart, share_vis_lang_layer_norm=True)
    shared.load_state_dict(plain.state_dict())
    assert not torch.allclose(shared.encode(**call)[0].last_hidden_state, plain.encode(**call)[0].last_hidden_state)
    encoder = shared.get_encoder()
    # The stock encoder over embeddings whose positions cancel for the visual slots is the same function.
    visual = encoder.visual_embedding(*call["vis_inputs"], encoder.embed_tokens.weight)
    position = encoder.embed_positions(torch.empty(2, 16))
    stacked = torch.cat([encoder.embed_tokens(call["input_ids"]), visual - position[:, 7:]], 1)
    joint, mask = shared.encode(**call)
    torch.testing.assert_close(encoder(inputs_embeds=stacked, attention_mask=mask).last_hidden_state, joint.last_hidden_state)


@both
def test_two_images_are_pooled_apart(kind: type) -> None:
    model = make(kind, n_boxes=4)
    call = inputs(grid=18)
    order = torch.arange(18)
    call["vis_inputs"] = (*call["vis_inputs"], (order // 9)[None], (order % 9)[None])
    joint, mask = model.encode(**call)
    assert joint.last_hidden_state.shape[1] == mask.shape[1] == 7 + 8
    second = call | {"vis_inputs": (call["vis_inputs"][0].roll(9, 1), *call["vis_inputs"][1:])}
    assert not torch.allclose(model.encode(**second)[0].last_hidden_state[:, 7:], joint.last_hidden_state[:, 7:])


@both
def test_attentions_and_hidden_states(kind: type) -> None:
    model, call = make(kind), inputs()
    model.set_attn_implementation("eager")
    out = model(**call, labels=call["input_ids"], output_attentions=True, output_hidden_states=True)
    assert len(out.encoder_hidden_states) == 3 and [tuple(a.shape) for a in out.encoder_attentions] == [(2, 4, 16, 16)] * 2
    assert isinstance(model(**call, labels=call["input_ids"], return_dict=False), tuple)


@both
@pytest.mark.parametrize(
    "change, message",
    [
        ({"vis_attention_mask": torch.ones(2, 8)}, r"vis_attention_mask: shape \(2, 8\) must be \(2, 9\)"),
        ({"attention_mask": torch.ones(2, 16)}, r"attention_mask: shape \(2, 16\) must be \(2, 7\)"),
        ({"vis_inputs": (torch.zeros(2, 9, 24),)}, "vis_inputs: 1 tensors"),
        ({"input_ids": None, "attention_mask": None}, "exactly one"),
    ],
)
def test_errors(kind: type, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind)(**inputs() | change, decoder_input_ids=torch.zeros(2, 1, dtype=torch.long))


def test_a_stock_config_is_refused() -> None:
    with pytest.raises(TypeError, match="config: must be a VLBartConfig, not BartConfig"):
        VLBart(BartConfig(**BART))
