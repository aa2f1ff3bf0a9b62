"""Tiny random host models and inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from fastadapt.patching import Handle

FAMILIES = ("bart", "t5")
METHODS = ("vl_adapter", "vlpet")
# Ranks that a width of 32 deserves; T5's published ranks would make most of the model adapters.
SMALL: dict[str, dict[str, Any]] = {"vl_adapter": {"reduction_factor": 4}, "vlpet": {"rank": 8, "heads": 4, "gate_rank": 6, "value_rank": 5}}


def tiny(family: str, *, seed: int = 0, layers: int | tuple[int, int] = 2, dropout: float = 0.0, **config: Any) -> nn.Module:
    """A random model of width 32, ``layers`` layers in the encoder and in the decoder (or one number each) and 99 tokens, in eval mode."""
    torch.manual_seed(seed)
    deep = layers if isinstance(layers, tuple) else (layers, layers)
    if family == "bart":
        sizes = {f"{side}_{name}": value for side, n in zip(("encoder", "decoder"), deep, strict=True) for name, value in (("layers", n), ("attention_heads", 4), ("ffn_dim", 64))}
        model: nn.Module = BartForConditionalGeneration(
            BartConfig(
                vocab_size=99,
                d_model=32,
                **sizes,
                max_position_embeddings=64,
                dropout=dropout,
                attention_dropout=dropout,
                activation_dropout=dropout,
                forced_eos_token_id=None,
                **config,
            )
        )
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=99,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=deep[0],
                num_decoder_layers=deep[1],
                num_heads=4,
                decoder_start_token_id=0,
                pad_token_id=0,
                dropout_rate=dropout,
                **config,
            )
        )
    return model.eval()


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Two rows, the second one padded, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(3, 90, (2, 5), generator=generator)}


def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    # Without gradients: torch chooses another attention kernel when the mask's position bias needs one, so a frozen T5 differs from a trainable one in the last digit.
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def randomize(handle: Handle, seed: int = 2, std: float = 0.2) -> None:
    """Adapters and trained base tensors away from their starting values, so that nothing hides behind zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p) * std)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that `unpatch` must put back, and the values of its tensors."""
    return {
        "classes": [(name, type(m)) for name, m in model.named_modules()],
        "dicts": [(name, sorted(m.__dict__)) for name, m in model.named_modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._load_state_dict_post_hooks) for m in model.modules()],
        "training": [m.training for m in model.modules()],
        "requires_grad": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "values": {name: t.clone() for name, t in model.state_dict().items()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for part in ("classes", "dicts", "hooks", "training", "requires_grad"):
        assert before[part] == after[part], part
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name
