"""Tiny random models of every host, with a batch for each, made from stock configs. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = 97
"""The token in whose places image features go."""
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Kind:
    """A kind of model: how to make one, its batch, and what the tests expect of it."""

    make: Callable[..., nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    stacks: tuple[str, ...]
    """What the stacks with sites of "vl_adapter" are called."""
    sites: int
    """Number of them."""
    generates: bool = True


def stock(model: str, name: str) -> Any:
    return getattr(import_module(f"transformers.models.{model}"), name)


def ids(length: int, image: int = 0) -> Tensor:
    """Two rows of token ids, ``image`` image tokens behind the first."""
    tokens = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))
    tokens[:, 1 : 1 + image] = IMAGE
    return tokens


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def text_batch(length: int = 9) -> dict[str, Tensor]:
    tokens = ids(length)
    mask = torch.ones_like(tokens)
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def seq2seq_batch() -> dict[str, Tensor]:
    tokens = ids(9)
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": ids(5)}


def image_batch(image: int, length: int = 12, shape: tuple[int, ...] = (2, 3, 8, 8), **more: Tensor) -> dict[str, Tensor]:
    tokens = ids(length, image)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.masked_fill(tokens == IMAGE, -100), "pixel_values": pixels(*shape), **more}


def causal(model: str, prefix: str, **options: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        return stock(model, f"{prefix}ForCausalLM")(stock(model, f"{prefix}Config")(**{**TEXT, **options, **more}))

    return make


def mbart(**more: Any) -> nn.Module:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = stock("mbart", "MBartConfig")(vocab_size=99, d_model=32, **sizes, **still, max_position_embeddings=64, forced_eos_token_id=None, decoder_start_token_id=2, **more)
    return stock("mbart", "MBartForConditionalGeneration")(config)


def mt5(**more: Any) -> nn.Module:
    config = stock("mt5", "MT5Config")(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0, dropout_rate=0.0, **more)
    return stock("mt5", "MT5ForConditionalGeneration")(config)


def dual(model: str, prefix: str, **vision: Any) -> Callable[..., nn.Module]:
    """CLIP and its like: a text and a vision tower, trained by their contrast."""

    def make(**more: Any) -> nn.Module:
        text = {name: value for name, value in TEXT.items() if name != "num_key_value_heads"} | {"hidden_size": 24, "projection_size": 24}
        config = stock(model, f"{prefix}Config")(text_config=text, vision_config={**VISION, **vision}, projection_dim=16, **more)
        return stock(model, f"{prefix}Model")(config)

    return make


def dual_batch(**more: Tensor) -> dict[str, Any]:
    tokens = ids(9)
    tokens[:, -1] = 2
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels(2, 3, 8, 8), "return_loss": True, **more}


def siglip2_batch() -> dict[str, Any]:
    shapes, mask = torch.tensor([[2, 2], [2, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return dual_batch(pixel_values=pixels(2, 4, 48), pixel_attention_mask=mask, spatial_shapes=shapes)


def llava(model: str = "llava", prefix: str = "Llava", language: tuple[str, str] = ("llama", "LlamaConfig"), **options: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        config = stock(model, f"{prefix}Config")(
            vision_config=stock("clip", "CLIPVisionConfig")(**{**VISION, "num_hidden_layers": 3}),
            text_config=stock(*language)(**TEXT),
            image_token_index=IMAGE,
            image_token_id=IMAGE,
            **{"vision_feature_layer": -2, **options, **more},
        )
        return stock(model, f"{prefix}ForConditionalGeneration")(config)

    return make


def paligemma(**more: Any) -> nn.Module:
    config = stock("paligemma", "PaliGemmaConfig")(
        vision_config={"model_type": "siglip_vision_model", **VISION, "projection_dim": 32},
        text_config={"model_type": "gemma", **TEXT, "head_dim": 8},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
        **more,
    )
    return stock("paligemma", "PaliGemmaForConditionalGeneration")(config)


def gemma3(**more: Any) -> nn.Module:
    config = stock("gemma3", "Gemma3Config")(
        vision_config={"model_type": "siglip_vision_model", **VISION},
        text_config={**TEXT, "head_dim": 8, "sliding_window": 8},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        **more,
    )
    model = stock("gemma3", "Gemma3ForConditionalGeneration")(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0.0, 0.1)  # a new model's is zero
    return model


def gemma_batch(**more: Tensor) -> dict[str, Tensor]:
    inputs = image_batch(4, **more)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def idefics(model: str, prefix: str) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        config = stock(model, f"{prefix}Config")(vision_config=VISION, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE, scale_factor=2, pad_token_id=0, **more)
        return stock(model, f"{prefix}ForConditionalGeneration")(config)

    return make


def idefics2(**more: Any) -> nn.Module:
    perceiver = {"resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8, "num_key_value_heads": 2}
    config = stock("idefics2", "Idefics2Config")(vision_config=VISION, perceiver_config=perceiver, text_config={"model_type": "mistral", **TEXT}, image_token_id=IMAGE, **more)
    return stock("idefics2", "Idefics2ForConditionalGeneration")(config)


def internvl(**more: Any) -> nn.Module:
    config = stock("internvl", "InternVLConfig")(
        vision_config={**VISION, "image_size": [8, 8], "patch_size": [4, 4], "hidden_dropout_prob": 0.0, "layer_scale_init_value": 0.5, "use_qk_norm": True},
        text_config={"model_type": "qwen2", **TEXT},
        image_token_id=IMAGE,
        downsample_ratio=0.5,
        **more,
    )
    return stock("internvl", "InternVLForConditionalGeneration")(config)


def qwen2_vl(model: str, prefix: str, **vision: Any) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        config = stock(model, f"{prefix}Config")(
            text_config={**TEXT, "rope_parameters": ROPE, "head_dim": 8},
            vision_config={"depth": 2, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, **vision},
            image_token_id=IMAGE,
            video_token_id=96,
            vision_start_token_id=95,
            vision_end_token_id=94,
            **more,
        )
        return stock(model, f"{prefix}ForConditionalGeneration")(config)

    return make


def qwen_batch() -> dict[str, Tensor]:
    # Two images of 4 x 4 patches, merged by four.
    inputs = image_batch(4, pixel_values=pixels(32, 96), image_grid_thw=torch.tensor([[1, 4, 4], [1, 4, 4]]))
    inputs["input_ids"][:, 0] = 95
    return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def blip2(model: str, prefix: str, language: str) -> Callable[..., nn.Module]:
    def make(**more: Any) -> nn.Module:
        text: dict[str, Any] = {"model_type": "opt", **TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
        if language == "t5":
            text = {"model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0}
            text |= {"decoder_start_token_id": 0, "pad_token_id": 0}
        qformer = {"hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
        config = stock(model, f"{prefix}Config")(
            vision_config=VISION,
            qformer_config={**qformer, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
            text_config=text,
            num_query_tokens=3,
            image_token_index=IMAGE,
            **more,
        )
        blip = stock(model, f"{prefix}ForConditionalGeneration")(config)
        blip.query_tokens.data.normal_()  # a new model's are zero
        return blip

    return make


def blip(**more: Any) -> nn.Module:
    text = {**{name: value for name, value in TEXT.items() if name != "num_key_value_heads"}, "hidden_size": 24, "projection_dim": 16, "encoder_hidden_size": 24}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "sep_token_id": 2, "label_smoothing": 0.0}
    config = stock("blip", "BlipConfig")(text_config={**text, **still}, vision_config=VISION, projection_dim=16, image_text_hidden_size=16, **more)
    return stock("blip", "BlipForConditionalGeneration")(config)


def instruct_batch() -> dict[str, Tensor]:
    question = ids(5)
    return image_batch(3, qformer_input_ids=question, qformer_attention_mask=torch.ones_like(question))


def florence2(**more: Any) -> nn.Module:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "forced_eos_token_id": None, "forced_bos_token_id": None}
    text = {"model_type": "bart", "vocab_size": 99, "d_model": 32, "max_position_embeddings": 64, **sizes, **still}
    patches = {"patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    vision = {"depths": [1, 1], "embed_dim": [16, 24], "num_heads": [4, 4], "num_groups": [4, 4], **patches, "window_size": 2, "projection_dim": 32, "drop_path_rate": 0.0}
    config = stock("florence2", "Florence2Config")(vision_config=vision, text_config=text, image_token_id=IMAGE, **more)
    return stock("florence2", "Florence2ForConditionalGeneration")(config)


def mllama(**more: Any) -> nn.Module:
    config = stock("mllama", "MllamaConfig")(
        vision_config={
            "hidden_size": 24, "attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 8, "patch_size": 4, "max_num_tiles": 1,
            "intermediate_layers_indices": [0], "vision_output_dim": 48, "supported_aspect_ratios": [[1, 1]],
        },
        text_config={**TEXT, "cross_attention_layers": [1], "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        image_token_index=IMAGE,
        **more,
    )  # fmt: skip
    model = stock("mllama", "MllamaForConditionalGeneration")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_gate", "mlp_gate")):
            parameter.data.fill_(0.5)  # a new model's are zero, which shuts its cross-attention off
    return model


def mllama_batch() -> dict[str, Tensor]:
    shape = {"aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long), "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long)}
    return image_batch(1, shape=(2, 1, 1, 3, 8, 8), cross_attention_mask=torch.ones(2, 12, 1, 1, dtype=torch.long), **shape)


LM = ("vision", "language", "projector")
KINDS: dict[str, Kind] = {
    "mbart": Kind(mbart, seq2seq_batch, ("encoder", "decoder"), 10),
    "mt5": Kind(mt5, seq2seq_batch, ("encoder", "decoder"), 10),
    "clip": Kind(dual("clip", "CLIP"), dual_batch, ("text", "vision"), 8, generates=False),
    "siglip": Kind(dual("siglip", "Siglip"), dual_batch, ("text", "vision"), 8, generates=False),
    "siglip2": Kind(dual("siglip2", "Siglip2", num_patches=4), siglip2_batch, ("text", "vision"), 8, generates=False),
    "metaclip2": Kind(dual("metaclip_2", "MetaClip2"), dual_batch, ("text", "vision"), 8, generates=False),
    "llama": Kind(causal("llama", "Llama"), text_batch, ("language",), 4),
    "mistral": Kind(causal("mistral", "Mistral"), text_batch, ("language",), 4),
    "gemma": Kind(causal("gemma", "Gemma", head_dim=8), text_batch, ("language",), 4),
    "gemma2": Kind(causal("gemma2", "Gemma2", head_dim=8, sliding_window=8), text_batch, ("language",), 4),
    "qwen2": Kind(causal("qwen2", "Qwen2"), text_batch, ("language",), 4),
    "qwen3": Kind(causal("qwen3", "Qwen3", head_dim=8), text_batch, ("language",), 4),
    "opt": Kind(causal("opt", "OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0), text_batch, ("language",), 4),
    "opt_post_norm": Kind(causal("opt", "OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, do_layer_norm_before=False), text_batch, ("language",), 4),
    "llava": Kind(llava(), lambda: image_batch(4), LM, 9),
    "llava_next": Kind(
        llava("llava_next", "LlavaNext", ("mistral", "MistralConfig"), image_grid_pinpoints=[[8, 8]]),
        lambda: image_batch(10, 16, (2, 2, 3, 8, 8), image_sizes=torch.tensor([[8, 8], [8, 8]])),
        LM,
        9,
    ),
    "paligemma": Kind(paligemma, gemma_batch, LM, 9),
    "gemma3": Kind(gemma3, gemma_batch, LM, 9),
    "idefics2": Kind(idefics2, lambda: image_batch(3, shape=(2, 1, 3, 8, 8)), LM, 10),
    "idefics3": Kind(idefics("idefics3", "Idefics3"), lambda: image_batch(1, shape=(2, 1, 3, 8, 8)), LM, 9),
    "smolvlm": Kind(idefics("smolvlm", "SmolVLM"), lambda: image_batch(1, shape=(2, 1, 3, 8, 8)), LM, 9),
    "internvl": Kind(internvl, lambda: image_batch(1), LM, 9),
    "qwen2_vl": Kind(qwen2_vl("qwen2_vl", "Qwen2VL", embed_dim=32, hidden_size=32, mlp_ratio=2), qwen_batch, LM, 9),
    "qwen2_5_vl": Kind(
        qwen2_vl("qwen2_5_vl", "Qwen2_5_VL", hidden_size=32, intermediate_size=40, out_hidden_size=32, fullatt_block_indexes=[1], window_size=16), qwen_batch, LM, 9
    ),
    "qwen3_vl": Kind(
        qwen2_vl("qwen3_vl", "Qwen3VL", hidden_size=32, intermediate_size=40, out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0]), qwen_batch, LM, 10
    ),
    "blip": Kind(blip, lambda: {**text_batch(), "pixel_values": pixels(2, 3, 8, 8)}, ("vision", "text"), 10),
    "blip2_opt": Kind(blip2("blip_2", "Blip2", "opt"), lambda: image_batch(3), ("vision", "qformer", "language", "projector"), 14),
    "blip2_t5": Kind(blip2("blip_2", "Blip2", "t5"), lambda: image_batch(3), ("vision", "qformer", "encoder", "decoder", "projector"), 15),
    "instructblip": Kind(blip2("instructblip", "InstructBlip", "opt"), instruct_batch, ("vision", "qformer", "language", "projector"), 15),
    "florence2": Kind(florence2, lambda: image_batch(2), ("vision", "encoder", "decoder", "projector"), 14),
    "mllama": Kind(mllama, mllama_batch, LM, 13),
}


def tiny(kind: str, seed: int = 0, **config: Any) -> nn.Module:
    """A random model, in eval mode."""
    torch.manual_seed(seed)
    return KINDS[kind].make(**config).eval()


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The logits (of texts by images, in the dual encoders)."""
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.logits_per_text
