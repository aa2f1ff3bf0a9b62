"""Patches and trains a tiny random model of each family of hosts: `python examples/hosts.py [family ...]`.

Real models come from ``from_pretrained``; the rest is the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)

import fastadapt

IMAGE = 98  # the token in whose places image features go
TEXT = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}


def bart() -> nn.Module:
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}
    return BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=64, **sizes))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0))


def llava() -> nn.Module:
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE))


def siglip() -> nn.Module:
    return SiglipModel(SiglipConfig(text_config={**TEXT, "projection_size": 48}, vision_config=VISION))


def seq2seq_batch() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 98, (8, 12)), "labels": torch.randint(3, 98, (8, 5))}


def llava_batch() -> dict[str, Any]:
    tokens = torch.randint(3, 98, (8, 12))
    tokens[:, 1:5] = IMAGE  # 2 x 2 patches
    return {"input_ids": tokens, "labels": tokens.masked_fill(tokens == IMAGE, -100), "pixel_values": torch.randn(8, 3, 16, 16)}


def contrastive_batch() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, 98, (8, 12)), "pixel_values": torch.randn(8, 3, 16, 16), "return_loss": True}


# What is made, its batch, and how it is patched.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], str, dict[str, Any]]] = {
    "bart": (bart, seq2seq_batch, "vlpet", {"rank": 16, "heads": 4, "gate_rank": 16, "value_rank": 16}),
    "t5": (t5, seq2seq_batch, "compacter", {"reduction_factor": 4, "division": 4, "phm_rank": 1}),
    "llava": (llava, llava_batch, "vl_adapter", {"reduction_factor": 4, "towers": ["text", "projector"]}),
    "siglip": (siglip, contrastive_batch, "lora", {"rank": 8}),
}


def train(family: str, steps: int = 20) -> tuple[float, float]:
    """The first and the last loss on one batch."""
    make, make_batch, method, options = FAMILIES[family]
    torch.manual_seed(0)
    model, batch = make(), make_batch()
    handle = fastadapt.patch(model, method, **options)
    model.train()
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    trained, total = handle.parameter_counts()
    print(f"{family}: {method}, {len(handle.sites)} sites, {trained} of {total} parameters trained, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    handle.unpatch(restore_base=True)
    return losses[0], losses[-1]


if __name__ == "__main__":
    for family in sys.argv[1:] or FAMILIES:
        train(family)
