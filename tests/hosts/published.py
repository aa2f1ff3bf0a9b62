"""From the published codes' state dicts and flags to patched stock models."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, T5Config
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config
from fastadapt.interop import load_published
from fastadapt.patching import Handle, patch
from tests import golden

# Published names of modules, in the order in which they are tried, and the path that they have here. A trailing head number is cut off: heads are stacked by rows.
_NAMES = [
    (r"\bencoder\.prompt_modules\.prompts\.\w+\.", {"bart": "encoder.prompt.", "t5": "encoder.prompt."}),
    (r"\bmodel\.prompt_modules\.prompts\.\w+\.", {"bart": "model.decoder.prompt.", "t5": "decoder.prompt."}),
    (r"\.lora_([AB])s\.\w+$", dict.fromkeys(("bart", "t5"), r".parallel_adapter.lora_\1.weight")),
    (r"\battn_value_parallel_adapter\.adapters\.\w+\.", {"bart": "v_proj.parallel_adapter.", "t5": "v.parallel_adapter."}),
    (r"\b(self_)?attn_adapter\.adapters\.\w+\.", {"bart": "self_attention_adapter.", "t5": "adapter."}),
    (r"\benc_attn_adapter\.adapters\.\w+\.", {"bart": "cross_attention_adapter.", "t5": "adapter."}),
    (r"\bff_adapter\.adapters\.\w+\.", {"bart": "feed_forward_adapter.", "t5": "adapter."}),
    (r"\battn_adapter_multihead_down\.\d+\.", {"bart": "self_attention_adapter.down_sampler.", "t5": "adapter.down_sampler."}),
    (r"\battn_adapter_multihead_up\.", {"bart": "self_attention_adapter.up_sampler.", "t5": "adapter.up_sampler."}),
    (r"\bff_adapter_multihead_down\.\d+\.", {"bart": "feed_forward_adapter.down_sampler.", "t5": "adapter.down_sampler."}),
    (r"\bff_adapter_multihead_up\.", {"bart": "feed_forward_adapter.up_sampler.", "t5": "adapter.up_sampler."}),
    (r"\bencoder_attn_adapter_gating_large_x_(down|up)\.", {"bart": r"self_attention_adapter.gate_\1.", "t5": r"adapter.gate_\1."}),
    (r"\bencoder_ff_adapter_gating_large_x_(down|up)\.", {"bart": r"feed_forward_adapter.gate_\1.", "t5": r"adapter.gate_\1."}),
]


def converted(tensors: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Published parameters, or their gradients, under the names that they have in a patched model; heads stacked."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        head = "multihead_down" in key
        for pattern, paths in _NAMES:
            key, found = re.subn(pattern, paths[family], key)
            if found:
                break
        if head or key not in parts:
            parts.setdefault(key, []).append(tensor)
        else:
            # One adapter under several tasks.
            assert torch.equal(parts[key][0], tensor)
    return {key: torch.cat(tensors) for key, tensors in parts.items()}


def method_of(case: golden.Case) -> tuple[str, dict[str, object]]:
    """The method and its options from the published flags."""
    o = case.options
    prompts: dict[str, object] = {f"{side}_prompt": o[f"{side}_prompt_len"] for side in ("encoder", "decoder") if f"{side}_prompt_len" in o}
    if prompts:
        prompts["prompt_mid"] = o["mid_dim"]
    if "--use_lora" in case.flags or "lora" in case.id:
        return "lora", {"rank": o["lora_dim"], "biases": False}
    if "--use_adapter" not in case.flags:
        return "base_tuning", prompts
    if "adapter_down_dim" not in case.flags:
        return "vl_adapter", {"reduction_factor": o["reduction_factor"], **prompts}
    flags = dict(re.findall(r"--(\w+)\s+([\d.]+)", case.flags))
    options = {
        "rank": int(flags["adapter_down_dim"]),
        "heads": int(flags["encoder_adapter_multihead_num_head"]),
        "gate_rank": int(flags["adapter_gating_down_dim"]),
        "value_rank": int(flags["decoder_enc_attn_value_parallel_adapter_down_dim"]),
        "scale": float(flags.get("encoder_gating_scaling_factor", 1.0)),
    }
    return "vlpet", options


def family_of(case: golden.Case) -> str:
    return "t5" if "t5" in case.id else "bart"


def patched_block(case: golden.Case, dtype: torch.dtype) -> tuple[nn.Module, Handle]:
    """One stock block in eval mode, patched, with the case's parameters under ``inner`` (the part of the block that was recorded)."""
    o, decoder = case.options, "decoder" in case.id or "value" in case.id
    if family_of(case) == "bart":
        heads, ffn = o["heads"], o.get("ffn", 96)
        config = BartConfig(d_model=o["d_model"], encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn)
        block: nn.Module = (BartDecoderLayer if decoder else BartEncoderLayer)(config, layer_idx=0)
    else:
        config = T5Config(d_model=o["d_model"], num_heads=o["heads"], d_kv=o["d_model"] // o["heads"], d_ff=o.get("d_ff", 96), is_decoder=decoder)
        block = T5Block(config, has_relative_attention_bias=True, layer_idx=0)
    block = block.to(dtype).eval()
    method, options = method_of(case)
    # The recorded layer cases train every layer norm of their layer.
    handle = patch(block, method, layer_norms="all", **options)
    return block, handle


def patched_model(case: golden.Case, dtype: torch.dtype) -> tuple[VLBart | VLT5, Handle]:
    """The whole model of a case, patched, with the case's parameters."""
    o = case.options
    common = {
        "vocab_size": o["vocab"],
        "d_model": o["d_model"],
        "feat_dim": o["feat_dim"],
        "n_boxes": 4,
        "pad_token_id": o["pad"],
        "eos_token_id": o["eos"],
        "decoder_start_token_id": o["decoder_start"],
    }
    if o["backbone"] == "BART":
        sizes = {f"{side}_{name}": o[key] for side in ("encoder", "decoder") for name, key in (("attention_heads", "heads"), ("ffn_dim", "ffn"))}
        positions = case.params["model.encoder.embed_positions.weight"].shape[0] - 2
        model: VLBart | VLT5 = VLBart(VLBartConfig(**common, **sizes, encoder_layers=2, decoder_layers=2, max_position_embeddings=positions, forced_eos_token_id=None))
    else:
        model = VLT5(VLT5Config(**common, num_heads=o["heads"], d_kv=o["d_model"] // o["heads"], d_ff=o["ffn"], num_layers=2))
    model = model.to(dtype).eval()
    method, options = method_of(case)
    handle = patch(model, method, tasks=o["tasks"].split(","), **options)
    load_published(handle, golden.to(case.params, dtype))
    return model, handle


@pytest.fixture
def fp64_rms_norm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stock T5 takes the variance in fp32; the recordings take it in fp64."""
    stock = T5LayerNorm.forward

    def forward(self: T5LayerNorm, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)) if x.dtype == torch.float64 else stock(self, x)

    monkeypatch.setattr(T5LayerNorm, "forward", forward)
    yield
