"""The demo's base: a tiny VL-BART, pretrained by `fastadapt.training.demo.pretrain`; its weights lie beside this file (see ``MODEL_CARD.md``)."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastadapt.hosts.vlbart import VLBart, VLBartConfig
from fastadapt.training.demo.digits import PATCH
from fastadapt.training.demo.tasks import BOS, EOS, PAD, VOCABULARY

WEIGHTS = Path(__file__).parent / "base.safetensors"


def config() -> VLBartConfig:
    return VLBartConfig(
        vocab_size=len(VOCABULARY),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_position_embeddings=32,
        dropout=0.0,
        feat_dim=PATCH * PATCH,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=None,
    )


def fresh(seed: int = 0) -> VLBart:
    """The base before pretraining."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VLBart(config())
    model.generation_config.forced_eos_token_id = None
    return model


def load_base() -> VLBart:
    """The pretrained base in fp32, in eval mode.

    Raises:
        RuntimeError: the weights do not fit the model.
    """
    model = fresh()
    tensors = load_file(WEIGHTS)
    tied = {name for name in ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")}
    model.load_state_dict(tensors | {name: tensors["model.shared.weight"] for name in tied})
    return model.eval()


def save_base(model: VLBart, path: Path) -> None:
    """fp16, each tied tensor once."""
    seen: dict[int, str] = {}
    tensors = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] != "model.shared.weight"):
        if seen.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor.half().contiguous()
    save_file(tensors, path)
