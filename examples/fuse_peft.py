"""PEFT's LoRA on fused ops: `python examples/fuse_peft.py`. PEFT goes on as before: training, switching, saving, merging."""

from __future__ import annotations

import tempfile

import peft
import torch
from transformers import BartConfig, BartForConditionalGeneration

import fastadapt


def main(steps: int = 20) -> None:
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))}
    base = BartForConditionalGeneration(BartConfig(vocab_size=99, d_model=64, **sizes))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "fc1", "fc2"], lora_dropout=0.1))
    print(fastadapt.fuse(model))
    batch = {"input_ids": torch.randint(3, 98, (8, 12)), "labels": torch.randint(3, 98, (8, 5))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # PEFT's own file
        handle = fastadapt.interop.from_peft(BartForConditionalGeneration(base.config), folder)  # which is fastadapt's adapter as well
        print(f"read back as {len(handle.sites)} sites of fastadapt's LoRA")
    fastadapt.unfuse(model)


if __name__ == "__main__":
    main()
