"""From VL-PET's flags and state dicts to `VLPETConfig` and patched stock layers: sites, decoder variants, value paths."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, T5Config
from transformers.models.bart.modeling_bart import BartDecoderLayer, BartEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block

from fastadapt.patching import Handle, patch
from tests import golden

_SITE = {"attn": "self_attention", "self_attn": "self_attention", "enc_attn": "cross_attention", "ff": "feed_forward"}
_ONE, _TASK = r"^(self_attn|enc_attn|attn|ff)", r"\.adapters\.\w+\."
# Published name -> the site (by its group, or fixed) and the name in the site's module; in a chain of modules the adapter's names stand behind "adapter.".
_NAMES: list[tuple[str, str | None, str]] = [
    (_ONE + r"_adapter_multihead_(down|up)\.(?:\d+\.)?(?=\w+$)", None, r"adapter.\2_sampler."),
    (_ONE + r"_adapter" + _TASK, None, "adapter."),
    (r"^encoder_(attn|ff)_adapter_gating_large_x_(down|up)\.", None, r"adapter.gate_\2."),
    (r"^encoder_(attn|ff)_adapter_gating_(?:large_x|small_xy_cat|middle_xy_add)\.", None, "adapter.gate."),
    (r"^encoder_(attn|ff)_adapter_gating_middle_ia3_add$", None, "adapter.gate_vector"),
    (r"^encoder_(attn|ff)_gating_large_x_(down|up)\.", None, r"gating.gate_\2."),
    (r"^decoder_enc_attn_adapter_gating_large_x_(down|up)\.", "cross_attention", r"adapter.gate_\1."),
    (r"^decoder_enc_attn_key_value_adapter" + _TASK, "cross_attention.key_value", "adapter."),
    (r"^decoder_(self_attn|enc_attn|ff)_adapter" + _TASK, None, "adapter."),
    (r"^decoder_ff_ia3$", "feed_forward.inner", "ia3"),
    (r"^(?:encoder_attn\.)?attn_value_ia3$", "cross_attention.value", "ia3"),
    (r"^(?:encoder_attn\.)?decoder_enc_attn_value_parallel_adapter_gating_large_x_(down|up)\.", "cross_attention.value", r"residual.gate_\1."),
    (r"^(?:encoder_attn\.)?attn_value_parallel_adapter" + _TASK, "cross_attention.value", "adapter."),
    (r"^(?:encoder_attn\.)?enc_attn_value_sequential_adapter" + _TASK, "cross_attention.value", "adapter."),
]


def converted(tensors: dict[str, Tensor], handle: Handle, task: str | None = None) -> dict[str, Tensor]:
    """Published parameters or gradients as "site/name" (heads stacked by rows), and those of the host under their own names; of several tasks' adapters only ``task``'s."""
    parts: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.search(r"\.adapters\.(\w+)\.", key)
        if found and task is not None and found[1] != task:
            continue
        for pattern, place, name in _NAMES:
            if match := re.match(pattern, key):
                place = place or _SITE[match[1]]
                site = next(site for site in handle.sites if site.split(".", 2)[2] == place)
                own = handle.sites[site].state_dict()
                name = match.expand(name) + key[match.end() :]
                key = f"{site}/{name if name in own else name.partition('.')[2]}"
                break
        parts.setdefault(key, []).append(tensor)
    return {key: torch.cat(several) if len(several) > 1 else several[0] for key, several in parts.items()}


def flags_of(case: golden.Case) -> dict[str, str]:
    """The published flags with their values; "" for switches."""
    return {name: value for name, value in re.findall(r"--(\w+)(?:\s+([\d.]+))?", case.flags)}


def options_of(case: golden.Case) -> dict[str, Any]:
    """`VLPETConfig`'s options from the published flags."""
    flags = flags_of(case)

    def number(name: str, otherwise: Any = None) -> Any:
        return otherwise if name not in flags else float(flags[name]) if "." in flags[name] else int(flags[name])

    multihead = next((kind for kind in ("down", "up", "down_up", "down_up_pair") if f"use_encoder_adapter_{kind}_multihead" in flags), None)
    plain = "use_adapter" in flags and "no_encoder_adapter" not in flags and "no_decoder_adapter" not in flags
    gates = {"large_x_lowrank": "large", "large_x": "large_full", "small_xy_cat": "small", "middle_xy_add": "middleX", "middle_ia3_add": "middleY"}
    options: dict[str, Any] = {
        "granularity": next((name for flag, name in gates.items() if f"use_encoder_adapter_gating_{flag}" in flags), "none"),
        "adapter": "bottleneck" if multihead or plain else "none",
        "rank": number("adapter_down_dim", case.options["d_model"] // number("reduction_factor", 8)),
        "heads": number("encoder_adapter_multihead_num_head", number("decoder_adapter_multihead_num_head", 1)),
        "pair": multihead == "down_up_pair",
        "gate_rank": number("adapter_gating_down_dim"),
        "combine": "add" if "use_encoder_adapter_gating_add" in flags else "multiply",
        "scale": number("encoder_gating_scaling_factor", 1.0),
        "adapter_scale": number("encoder_adapter_scaling_factor", 1.0),
        "input_scale": number("encoder_x2_scaling_factor", 1.0),
        "gating_rank": number("gating_down_dim"),
        "gating_add_first": "use_encoder_gating_large_x_lowrank_add_x2_deltay" in flags,
        "value_residual": "use_decoder_enc_attn_value_residual_connection" in flags,
        "value_gate_rank": number("decoder_enc_attn_value_parallel_adapter_gating_large_x_lowrank_down_dim"),
        "cross_gate_rank": number("decoder_enc_attn_adapter_gating_large_x_lowrank_down_dim"),
        "ia3_add": any(flag.endswith("ia3_add") for flag in flags if flag.startswith("use_decoder")),
    }
    decoder = {
        "use_decoder_enc_attn_value_parallel_adapter_down_dim": "value_parallel",
        "use_decoder_enc_attn_value_sequential_adapter_down_dim": "value_sequential",
        "use_decoder_enc_attn_value_ia3": "value_ia3",
        "use_decoder_enc_attn_key_value_adapter_down_dim": "key_value",
        "use_decoder_self_attn_adapter_down_dim": "self_attention",
        "use_decoder_enc_attn_adapter_down_dim": "cross_attention",
        "use_decoder_ff_adapter_down_dim": "feed_forward",
        "use_decoder_adapter_down_multihead": "multihead",
        "use_decoder_ff_ia3": "feed_forward_ia3",
    }
    options["decoder"] = [name for flag, name in decoder.items() if flag in flags]
    value = (number(f"decoder_enc_attn_{name}_adapter_down_dim") for name in ("value_parallel", "value_sequential", "key_value"))
    options["value_rank"] = next((rank for rank in value if rank), None)
    ranks = [number(f"decoder_{name}_adapter_down_dim") for name in ("self_attn", "enc_attn", "ff")]
    options["decoder_ranks"] = [rank for rank in ranks if rank] or None
    if options["adapter"] == "none" and "multihead" not in options["decoder"]:
        options["rank"] = options["heads"] = None
    return options


def patched_block(case: golden.Case, dtype: torch.dtype) -> tuple[nn.Module, Handle]:
    """A stock block in eval mode, patched by the case's flags, with random values."""
    o, decoder = case.options, "decoder" in case.id or "value" in case.id
    heads, ffn = o.get("heads", 4), o.get("ffn", 96)
    if "t5" in case.id:
        block: nn.Module = T5Block(T5Config(d_model=o["d_model"], num_heads=heads, d_kv=o["d_model"] // heads, d_ff=ffn, is_decoder=decoder), layer_idx=0)
    else:
        config = BartConfig(d_model=o["d_model"], encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=ffn, decoder_ffn_dim=ffn)
        block = (BartDecoderLayer if decoder else BartEncoderLayer)(config, layer_idx=0)
    block = block.to(dtype).eval()
    return block, patch(block, "vlpet", layer_norms="all", **options_of(case))


def load(handle: Handle, block: nn.Module, params: dict[str, Tensor], prefix: str | None = "") -> None:
    """Every parameter into its place: adapters by site, the host's under ``prefix``; None: a site alone, without a host."""
    for site, module in handle.sites.items():
        own = {name.partition("/")[2]: t for name, t in params.items() if name.startswith(f"{site}/")}
        if own:
            module.load_state_dict({name: t.reshape(module.state_dict()[name].shape) for name, t in own.items()}, strict=True)
    if prefix is None:
        assert all("/" in name for name in params)
        return
    host = {prefix + name: t for name, t in params.items() if "/" not in name}
    missing, unexpected = block.load_state_dict(host, strict=False)
    assert not unexpected and all("adapter" in name or not name.startswith(prefix) for name in missing), (missing, unexpected)
