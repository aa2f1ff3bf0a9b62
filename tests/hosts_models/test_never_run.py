"""Models that never go through a part of theirs: nothing is trained there, the report says why, and DDP finds a gradient for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from fastadapt.patching import patch
from tests.hosts_models.models import TEXT, VISION, ids, pixels, siglip2_batch, stock

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"} | {"encoder_hidden_size": 32, "projection_dim": 16, "sep_token_id": 2, **STILL}
DECODER = {"vocab_size": 99, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 64}


def image() -> dict[str, Any]:
    return {"pixel_values": pixels(2, 3, 8, 8)}


def text() -> dict[str, Any]:
    return {"input_ids": ids(9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def patches() -> dict[str, Any]:
    return {name: value for name, value in siglip2_batch().items() if name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")}


class Alone(NamedTuple):
    """A class, its config's class and options, its batch, and one part that never runs with the reason; "": all of it does."""

    where: str
    name: str
    config: str
    options: dict[str, Any]
    batch: Callable[[], dict[str, Any]]
    part: str
    why: str


VISION32 = {**VISION, "hidden_size": 32}
TOWERS: dict[str, Any] = {"vision_config": VISION32, "text_config": BERT}
BLIP2 = {"vision_config": VISION32, "qformer_config": {**BERT, "use_qformer_text_input": True}, "num_query_tokens": 3, "image_text_hidden_size": 16}
QFORMER = "qformer.encoder.layer.0."
MODELS = (
    Alone("bart", "BartForCausalLM", "BartConfig", DECODER, text, "model.decoder.layers.1.encoder_attn_layer_norm", "a decoder by itself is given no encoder's output"),
    Alone("mbart", "MBartForCausalLM", "MBartConfig", DECODER, text, "model.decoder.layers.1.encoder_attn", "a decoder by itself is given no encoder's output"),
    Alone(
        "blip", "BlipModel", "BlipConfig", {**TOWERS, "projection_dim": 16}, lambda: text() | image(),
        "text_model.encoder.layer.1.crossattention", "BlipModel's text does not attend to the image",
    ),
    Alone("blip", "BlipTextModel", "BlipTextConfig", {**BERT, "is_decoder": False}, text, "", ""),
    Alone("blip", "BlipForImageTextRetrieval", "BlipConfig", {**TOWERS, "image_text_hidden_size": 16}, lambda: text() | image(), "", ""),
    Alone("clip", "CLIPForImageClassification", "CLIPConfig", TOWERS, image, "vision_model.post_layernorm", "the classifier reads the tokens' mean, not the normed pooled one"),
    Alone(
        "metaclip_2", "MetaClip2ForImageClassification", "MetaClip2Config", TOWERS, image,
        "vision_model.post_layernorm", "the classifier reads the tokens' mean, not the normed pooled one",
    ),
    Alone("siglip", "SiglipForImageClassification", "SiglipConfig", TOWERS, image, "vision_model.head", "the classifier reads the tokens' mean, not the pooled ones"),
    Alone(
        "siglip2", "Siglip2ForImageClassification", "Siglip2Config", {**TOWERS, "vision_config": {**VISION32, "num_patches": 4}}, patches,
        "vision_model.head", "the classifier reads the tokens' mean, not the pooled ones",
    ),
    Alone("blip_2", "Blip2TextModelWithProjection", "Blip2Config", BLIP2, text, QFORMER + "output_query", "the Q-Former is given text alone, no queries"),
    Alone("blip_2", "Blip2VisionModelWithProjection", "Blip2Config", BLIP2, image, QFORMER + "intermediate", "the Q-Former is given queries alone, no text"),
    Alone("blip_2", "Blip2ForImageTextRetrieval", "Blip2Config", BLIP2, lambda: text() | image(), "", ""),
)  # fmt: skip
ALONE = {model.name: model for model in MODELS}
DEPENDS = {
    "BlipForImageTextRetrieval": {"vision_proj.bias", "text_proj.bias", "vision_proj.weight", "text_proj.weight"},
    "Blip2ForImageTextRetrieval": {"itm_head.bias", "itm_head.weight"},
}
"""What an argument of the call decides."""


def build(name: str) -> Any:
    torch.manual_seed(0)
    alone = ALONE[name]
    model: Any = stock(alone.where, name)(stock(alone.where, alone.config)(**alone.options))
    if "query_tokens" in dict(model.named_parameters()):
        model.query_tokens.data.normal_()  # a new model's are zero
    return model


def run(model: Any, batch: dict[str, Any]) -> None:
    """Forward, and backward from what an output of the class holds, whatever it is called."""
    model.train()
    out = model(**batch)
    read = next(out[key] for key in ("logits_per_text", "logits", "itm_score", "text_embeds", "image_embeds", "pooler_output") if key in out)
    (read * torch.randn(read.shape, generator=torch.Generator().manual_seed(3))).sum().backward()


NO_SITE = ("BartForCausalLM", "MBartForCausalLM", "Blip2TextModelWithProjection")
"""Where VL-PET would be in cross-attention alone."""
OPTIONS: dict[str, dict[str, Any]] = {
    "vlpet": {"rank": 4, "gate_rank": 4, "value_rank": 4},
    "compacter": {},
    "vl_adapter": {},
    "lora": {},
    "bitfit": {},
    "layer_norm": {},
    "full": {},
}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("name", ALONE)
def test_every_trained_tensor_gets_a_gradient(name: str, method: str) -> None:
    model, alone = build(name), ALONE[name]
    if method == "vlpet" and name in NO_SITE:
        with pytest.raises(ValueError, match=rf"model: vlpet has no site in this {name} and nothing that its options train: .*{alone.why}"):
            patch(model, method, **OPTIONS[method])
        return
    handle = patch(model, method, **OPTIONS[method])
    run(model, alone.batch())
    without = {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without <= DEPENDS.get(name, set()) and len(handle.trainable_parameters()) > len(without)


@pytest.mark.parametrize("name", [model.name for model in MODELS if model.part])
def test_nothing_is_trained_in_a_part_that_never_runs(name: str) -> None:
    """The part is there, and what a site would be there for is in the report."""
    model, alone = build(name), ALONE[name]
    inside = {id(p) for p in model.get_submodule(alone.part).parameters()}
    run(model, alone.batch())
    assert inside and all(p.grad is None for p in model.parameters() if id(p) in inside)
    model.zero_grad()
    handle = patch(model, "vl_adapter")
    assert not any(site.path.startswith(alone.part) for site in handle.report.sites)
    handle.unpatch(restore_base=True)
    patch(model, "full")
    assert not any(p.requires_grad for p in model.get_submodule(alone.part).parameters())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("BartForCausalLM", "decoder.0.cross_attention"),
        ("BartForCausalLM", "decoder.0.cross_attention.key_value"),
        ("BartForCausalLM", "decoder.0.cross_attention.value"),
        ("MBartForCausalLM", "decoder.1.cross_attention"),
        ("BlipModel", "text.1.cross_attention"),
        ("Blip2TextModelWithProjection", "qformer.1.feed_forward"),
        ("Blip2TextModelWithProjection", "qformer.0.cross_attention"),
        ("Blip2VisionModelWithProjection", "qformer.1.feed_forward.text"),
    ],
)
def test_the_report_says_why(name: str, place: str) -> None:
    assert (place, ALONE[name].why) in patch(build(name), "vl_adapter").skipped


def test_places_that_somebody_names_are_places() -> None:
    """A decoder by itself can be given an encoder's output."""
    model = build("BartForCausalLM")
    handle = patch(model, "lora", biases=False, sites={"decoder.cross_attention.value": r".*encoder_attn\.v_proj"})
    assert len(handle.report.sites) == len(model.model.decoder.layers)
    model.train()(input_ids=ids(5), encoder_hidden_states=torch.randn(2, 3, model.config.d_model)).logits.square().sum().backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())


def test_uniadapter_puts_nothing_behind_cross_attention_that_never_runs() -> None:
    model = build("BlipModel")
    handle = patch(model, "uniadapter")
    assert ("text.0.cross_attention", ALONE["BlipModel"].why) in handle.skipped
    assert not any("cross_attention" in site for site in handle.sites)


def test_inside_another_model_a_decoder_is_given_an_encoders_output() -> None:
    torch.manual_seed(0)
    encoder = stock("clip", "CLIPVisionModel")(stock("clip", "CLIPVisionConfig")(**VISION32))
    config = stock("bart", "BartConfig")(**DECODER, add_cross_attention=True)
    decoder = stock("bart", "BartForCausalLM")(config)
    model: Any = stock("vision_encoder_decoder", "VisionEncoderDecoderModel")(encoder=encoder, decoder=decoder)
    handle = patch(model, "vl_adapter")
    assert "decoder.0.cross_attention" in handle.sites
    model.train()(pixel_values=pixels(2, 3, 8, 8), decoder_input_ids=ids(5)).logits.square().sum().backward()
    assert all(p.grad is not None for p in handle.sites["decoder.0.cross_attention"].parameters())
