"""GPT-2, whose projections are Conv1Ds, Linears with a weight (in, out): adapters behind them, LoRA beside them, merged into them, and PEFT's files for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from fastadapt import interop, patching
from fastadapt.patching import patch
from tests.hosts.tiny import assert_same, randomize, snapshot

SITES = {"encoder.self_attention.query": r"transformer\.h\.\d+\.attn\.c_attn"}
LORA: dict[str, Any] = {"rank": 4, "dropout": 0.0, "biases": False, "visual_embedding": False}


def model() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=32, n_embd=24, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()


IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(of: nn.Module) -> Tensor:
    with torch.no_grad():
        return of(input_ids=IDS).logits


@pytest.mark.parametrize(("method", "options"), [("vl_adapter", {"reduction_factor": 4}), ("lora", {**LORA, "sites": SITES})])
def test_life(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    gpt = model()
    before, out = snapshot(gpt), logits(gpt)
    handle = patch(gpt, method, init="identity", **options)
    parts = ("self_attention", "feed_forward") if method == "vl_adapter" else ("self_attention.query",)
    assert list(handle.sites) == [f"text.{i}.{part}" for i in range(2) for part in parts]
    assert torch.equal(logits(gpt), out) and isinstance(gpt.transformer.h[0].attn.c_attn, Conv1D)  # type: ignore[union-attr, index]
    randomize(handle)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gpt(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for site in handle.sites.values() for p in site.parameters())
    handle.save(tmp_path)
    fresh = model()
    patching.load(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(gpt)) and not torch.equal(logits(gpt), out)
    plain = gpt.generate(input_ids=IDS, max_new_tokens=5, do_sample=False, use_cache=False)  # type: ignore[operator]
    assert torch.equal(gpt.generate(input_ids=IDS, max_new_tokens=5, do_sample=False), plain)  # type: ignore[operator]
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(gpt))


def test_merged_into_the_transposed_weight() -> None:
    gpt = model()
    handle = patch(gpt, "lora", sites=SITES, **LORA)
    randomize(handle)
    adapted = logits(gpt)
    with handle.merged():
        torch.testing.assert_close(logits(gpt), adapted, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(gpt), adapted)
    merged = handle.merge()
    assert type(merged.transformer.h[0].attn.c_attn) is Conv1D  # type: ignore[union-attr, index]
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)


def test_pefts_files(tmp_path: Path) -> None:
    base = model()
    peft = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["c_attn"], r=4, lora_alpha=8, fan_in_fan_out=True, init_lora_weights=False)).eval()  # type: ignore[arg-type]
    peft.save_pretrained(str(tmp_path))
    handle = interop.from_peft(base, tmp_path)
    torch.testing.assert_close(logits(base), logits(peft), rtol=1e-5, atol=1e-6)
    interop.to_peft(handle, tmp_path / "back")
    again = get_peft_model(model(), LoraConfig(target_modules=["c_attn"], r=4, lora_alpha=8, fan_in_fan_out=True))  # type: ignore[arg-type]
    again.load_adapter(str(tmp_path / "back"), "default")
    torch.testing.assert_close(logits(again.eval()), logits(peft))
