"""What whole vision-and-language models say of their parts: the projectors between the towers, and what never runs, or runs for nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from fastadapt.hosts.roles import OTHER, Host, Place
from fastadapt.nn import Init

FAMILY = "projector"
PROJECTORS: dict[str, str] = {
    "multi_modal_projector": "LLaVA, LLaVA-NeXT, PaliGemma, Gemma 3, InternVL, Florence-2, Mllama",
    "language_projection": "BLIP-2, InstructBLIP",
    "connector": "Idefics2, Idefics3, SmolVLM",
    "merger": "Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
    "deepstack_merger_list": "Qwen3-VL",
}
"""Names under which models keep the module that maps image features to the language model's width -> those models. An adapter acts on what it gives."""

_FLAT = ("merger", "deepstack_merger_list")  # behind a vision tower that is flat

# Models that read the image's tokens, though their vision tower may pool them.
_READ_TOKENS = ("PaliGemmaModel", "Gemma3Model")

_DECODER = ("encoder_attn", "encoder_attn_layer_norm", "cross_attention_adapter", "key_value_adapter")
_QFORMER = r"qformer\.encoder\.layer\.\d+"
# Models, where in them, the modules and slots there that an ordinary call does not go through, and why. Of the model itself only: inside another one, as a
# VisionEncoderDecoderModel, a decoder gets an encoder's output.
_ALONE: tuple[tuple[tuple[str, ...], str, tuple[str, ...], str], ...] = (
    (("BartForCausalLM", "MBartForCausalLM"), r"model\.decoder\.layers\.\d+", _DECODER, "a decoder by itself is given no encoder's output"),
    (("BlipModel",), r"text_model\.encoder\.layer\.\d+", ("crossattention", "cross_attention_adapter"), "BlipModel's text does not attend to the image"),
    (("CLIPForImageClassification", "MetaClip2ForImageClassification"), "vision_model", ("post_layernorm",), "the classifier reads the tokens' mean, not the normed pooled one"),
    (("SiglipForImageClassification", "Siglip2ForImageClassification"), "vision_model", ("head",), "the classifier reads the tokens' mean, not the pooled ones"),
    (("Blip2TextModelWithProjection",), _QFORMER, ("crossattention", "intermediate_query", "output_query"), "the Q-Former is given text alone, no queries"),
    (("Blip2TextModelWithProjection",), "", ("query_tokens",), "the Q-Former is given text alone, no queries"),
    (("Blip2VisionModelWithProjection",), _QFORMER, ("intermediate", "output"), "the Q-Former is given queries alone, no text"),
)


def projectors(model: nn.Module, taken: Sequence[str]) -> list[tuple[str, nn.Module, Host]]:
    """The projectors of a model, as `fastadapt.hosts.find` gives blocks; none that holds or is one of ``taken``, blocks with hosts of their own."""
    found: list[tuple[str, nn.Module, Host]] = []
    for path, module in model.named_modules():
        parts = path.split(".")
        name = parts[-2] if len(parts) > 1 and parts[-1].isdigit() else parts[-1]
        if name not in PROJECTORS or isinstance(module, nn.ModuleList) or any(other == path or other.startswith(path + ".") for other in taken):
            continue
        if not any(path.startswith(f"{other}.") for other, *_ in found) and (width := _width(module)) is not None:
            found.append((path, module, _host(module, width, name in _FLAT)))
    return found


def _host(module: nn.Module, width: int, flat: bool) -> Host:
    # It is a feed-forward network, in no residual stream.
    places = (Place("encoder.feed_forward", "", "sequential_adapter", behind=True),)
    return Host(
        family=FAMILY,
        block=type(module),
        places=lambda _: places,
        width=lambda _: width,
        adapted={},
        sources={},
        norms=(nn.LayerNorm,),
        init=lambda _: Init(std=0.02),
        stack=lambda _: "projector",
        published=OTHER,
        flat=flat,
    )


def _width(projector: nn.Module) -> int | None:
    """The width of what a projector gives, that of its last projection; Gemma 3 keeps it as a bare weight."""
    if (weight := getattr(projector, "mm_input_projection_weight", None)) is not None:
        return weight.shape[1]
    linears = [module for module in projector.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features if linears else None


def dead(model: nn.Module, *, alone: bool) -> dict[str, str]:
    """Paths of modules, and of slots for adapters, whose output the model never uses, so that what is trained in them would get no gradient (which DDP refuses), and why.

    What an argument of the call decides counts as used, as the heads of BLIP's and BLIP-2's retrieval models. ``alone``: also what an ordinary call of the model by itself does
    not go through, where nobody has named the places.
    """
    found: dict[str, str] = {}
    rows = [row[1:] for row in _ALONE if alone and type(model).__name__ in row[0]]
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        found |= {f"{prefix}{name}": why for where, names, why in rows if re.fullmatch(where, path) for name in names}
        any_module: Any = module
        config = getattr(module, "config", None)
        tower = getattr(module, "vision_tower", None)
        if tower is not None and (feature := getattr(config, "vision_feature_layer", None)) is not None:
            found |= _behind_feature(f"{prefix}vision_tower", tower, feature if isinstance(feature, (list, tuple)) else [feature])
        elif tower is not None and type(module).__name__ in _READ_TOKENS:
            found[f"{prefix}vision_tower.head"] = f"{type(module).__name__} reads the image's tokens, not the pooled ones"
        if type(module).__name__ == "InstructBlipQFormerModel":
            layers = any_module.encoder.layer
            found |= {f"{prefix}encoder.layer.{len(layers) - 1}.{name}": "only the queries leave the last layer" for name in ("intermediate", "output")}
    return found


def _behind_feature(path: str, tower: nn.Module, feature: Sequence[int]) -> dict[str, str]:
    """What runs behind the last of the hidden states that a model reads, 0 the embeddings and -1 the last layer's output."""
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList) and name.endswith(("layers", "layer"))]
    if not lists:
        return {}
    stack, layers = lists[0]
    last = max(index if index >= 0 else len(layers) + 1 + index for index in feature)
    why = f"vision_feature_layer={feature[0] if len(feature) == 1 else list(feature)} reads what comes before"
    unused = {f"{path}.{stack}.{number}": why for number in range(last, len(layers))}
    # CLIP's and SigLIP's last norm is behind every hidden state, InternVL's belongs to the last one.
    norms = ("post_layernorm", "head", "layernorm") if unused else ("post_layernorm", "head")
    return unused | {f"{path}.{name}": why for name, _ in tower.named_modules() if name.rpartition(".")[2] in norms and "." not in name}
