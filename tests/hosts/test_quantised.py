"""Adapters on bases whose projections are quantised, by bitsandbytes (8 and 4 bits) and torchao (int8 weights): such a projection runs its own matmul."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from fastadapt import patching
from fastadapt.patching import NotMergeableError, patch
from tests.hosts.tiny import SMALL, batch, randomize

METHODS: dict[str, dict[str, Any]] = {"lora": {"rank": 4, "biases": False, "dropout": 0.0}, **SMALL}


def bitsandbytes(linear: nn.Linear, bits: int) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind, how = (Linear4bit, {"compute_dtype": torch.float32}) if bits == 4 else (Linear8bitLt, {"has_fp16_weights": False})
    quantised = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, **how)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu").requires_grad_(False)


def base(quantiser: str) -> nn.Module:
    """A BART whose layers' projections are quantised; widths are multiples of bitsandbytes' blocks of 64."""
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 128))}
    model = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=64, **sizes, dropout=0.0, forced_eos_token_id=None)).eval()
    if quantiser == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: type(module) is nn.Linear)  # type: ignore[arg-type]
        return model
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, bitsandbytes(module, int(quantiser[-1])))
    return model


def outputs(model: nn.Module) -> Tensor:
    """With gradients: without, bitsandbytes changes 4-bit weights to another format for good, and the numbers with it."""
    return model(**batch()).logits.detach()


@pytest.mark.parametrize("quantiser", ["torchao", "bitsandbytes 8", "bitsandbytes 4"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_base(quantiser: str, method: str, tmp_path: Path) -> None:
    model = base(quantiser)
    out = outputs(model)
    handle = patch(model, method, init="identity", **METHODS[method])
    assert torch.equal(outputs(model), out)
    randomize(handle)
    model.train()
    model(**batch()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in handle.trainable_parameters())
    handle.save(tmp_path)
    trained = outputs(model)
    fresh = base(quantiser)
    patching.load(fresh, tmp_path)
    assert torch.equal(outputs(fresh.train()), trained) and not torch.equal(trained, out)
    if method == "lora":
        with pytest.raises(NotMergeableError, match="not a plain floating tensor"):
            handle.merge()
    handle.unpatch(restore_base=True)
    assert torch.equal(outputs(model), out)
