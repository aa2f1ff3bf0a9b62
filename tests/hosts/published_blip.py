"""From UniAdapter's published state dicts to patched stock BLIP: names, and tiny models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip_text import BlipTextAttention

from tests import golden
from tests.tolerance import SMALL, assert_close_to_f64, assert_matches_recorded

MODELS: dict[str, type[nn.Module]] = {"retrieval": BlipForImageTextRetrieval, "vqa": BlipForQuestionAnswering, "caption": BlipForConditionalGeneration}

_NAMES = [
    (r"^layer\.(?!\d)", ""),
    (r"(^|\.)video_(key|value)_adapter\.", r"\1layer.0.crossattention.self.\2.parallel_adapter."),
    (r"^time_embed$", "temporal_embedding.time_embed"),
    (r"^(?:visual_encoder\.)?adapters\.(\d+)\.", r"vision_model.encoder.layers.\1.adapter."),
    (r"^visual_encoder\.", "vision_model."),
    (r"\bblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\bcls_token$", "embeddings.class_embedding"),
    (r"\bpos_embed$", "embeddings.position_embedding"),
    (r"\bpatch_embed\.proj\b", "embeddings.patch_embedding"),
    (r"^vision_model\.norm\.", "vision_model.post_layernorm."),
    (r"\battn\.qkv\b", "self_attn.qkv"),
    (r"\battn\.proj\b", "self_attn.projection"),
    (r"\bnorm(\d)\.", r"layer_norm\1."),
]


def converted(tensors: dict[str, Tensor], *, layer: bool = False) -> dict[str, Tensor]:
    """Published parameters, or their gradients, under the names that they have in a patched model. ``layer``: the model is one text layer."""
    result = {}
    for key, tensor in tensors.items():
        for pattern, replacement in _NAMES:
            key = re.sub(pattern, replacement, key)
        result[key.replace("layer.0.", "", 1) if layer else key] = tensor
    return result


def fill(model: nn.Module, params: dict[str, Tensor], unused: str = r"$^") -> None:
    """Loads every parameter of the model except those whose names match ``unused``; refuses parameters that the model does not have."""
    own = {name: p for name, p in model.named_parameters() if not re.match(unused, name)}
    every = dict(model.named_parameters(remove_duplicate=False))
    given = {name: t for name, t in params.items() if not name.endswith("position_ids")}
    assert own.keys() <= given.keys(), sorted(own.keys() - given.keys())
    assert given.keys() <= every.keys(), sorted(given.keys() - every.keys())
    with torch.no_grad():
        for name, tensor in given.items():
            if name in own:
                own[name].copy_(tensor)
            else:
                assert torch.equal(every[name], tensor.to(every[name])), f"{name}: another name of this parameter has other values"


def text_config(o: dict[str, Any], **more: Any) -> BlipTextConfig:
    width = o.get("hidden_size", o.get("width"))
    return BlipTextConfig(
        vocab_size=o.get("vocab", 97),
        hidden_size=width,
        encoder_hidden_size=width,
        intermediate_size=o.get("intermediate_size", 2 * width),
        num_hidden_layers=o.get("layers", 1),
        num_attention_heads=o["heads"],
        max_position_embeddings=24,
        layer_norm_eps=1e-12,
        **more,
    )


def tiny_blip(
    kind: str, *, seed: int = 0, width: int = 32, layers: int = 2, depth: int | None = None, heads: int = 4, text: dict[str, Any] | None = None, **more: Any
) -> nn.Module:
    """A random BLIP for 16 x 16 images in 8 x 8 patches, in eval mode. ``depth`` is the number of image blocks, by default that of the text layers."""
    torch.manual_seed(seed)
    config = BlipConfig(
        text_config={
            "vocab_size": 97,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 24,
            "bos_token_id": 94,
            "sep_token_id": 95,
            "eos_token_id": 95,
            "pad_token_id": 0,
            **(text or {}),
        },
        vision_config=BlipVisionConfig(
            hidden_size=more.pop("vision_width", width),
            intermediate_size=2 * width,
            num_hidden_layers=depth or layers,
            num_attention_heads=heads,
            image_size=16,
            patch_size=8,
            layer_norm_eps=1e-6,
            initializer_range=0.02,
        ).to_dict(),
        image_text_hidden_size=16,
        **more,
    )
    return MODELS[kind](config).eval()


def batch(kind: str, seed: int = 1) -> dict[str, Tensor]:
    """Two images with two texts, the second one padded, and labels where the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "input_ids": ids, "attention_mask": mask}
    return inputs if kind == "retrieval" else {**inputs, "labels": torch.randint(3, 90, (2, 5), generator=generator) if kind == "vqa" else ids}


def check_fp64(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    for name, tensor in want.items():
        assert got[name] is not None, f"{name}: no gradient"
        assert_matches_recorded(name, got[name].reshape(tensor.shape), tensor)


def check_fp32(case: golden.Case, got: dict[str, Tensor], want: dict[str, Tensor], eager: dict[str, Tensor], *, gradient: bool) -> None:
    """The rule of `tests.tolerance` beside eager, and the recordings' own: ten times the largest error of the published code in fp32, at least 2e-6, of the magnitude or 1."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    recorded = max(case.entry["fp32_run_max_rel_diff"].values())
    for name, exact in want.items():
        mine = got[name].detach().cpu().reshape(exact.shape)
        if exact.numel() >= SMALL:
            assert_close_to_f64(name, mine, exact, eager[name].detach().cpu().reshape(exact.shape), gradient=gradient)
        limit = max(10 * recorded, 2e-6) * max(1.0, exact.abs().max().item())
        error = (mine.double() - exact).abs().max().item()
        assert error <= limit, f"{name}: {error:.3g} > {limit:.3g}"


@pytest.fixture
def masked_cross_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recordings heed the mask of encoder states in cross-attention. Stock BlipTextAttention of 5.23 gives it to its inner module under a name that is not read there."""

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        masks = {"attention_mask": attention_mask, "encoder_attention_mask": attention_mask}
        context, probabilities = self.self(hidden_states, **masks, encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values)
        return self.output(context, hidden_states), probabilities

    monkeypatch.setattr(BlipTextAttention, "forward", forward)
    yield
