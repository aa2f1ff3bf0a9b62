"""VL-BART and VL-T5 against recorded tensors of the published code, in fp64. The recorded whole models carry adapters: here a plain hook adds them behind the stock projections, so
that these tests judge the hosts alone."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from fastadapt.hosts.visual import VisualEmbedding
from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config
from tests import golden
from tests.tolerance import RECORDED, relative_error

SITES = {
    "self_attn.out_proj": {"encoder": "attn_adapter", "decoder": "self_attn_adapter"},
    "encoder_attn.out_proj": {"decoder": "enc_attn_adapter"},
    "fc2": {"encoder": "ff_adapter", "decoder": "ff_adapter"},
}
T5_SITES = {"SelfAttention.o": "attn_adapter", "EncDecAttention.o": "enc_attn_adapter", "DenseReluDense.wo": "ff_adapter"}


@pytest.fixture(autouse=True)
def fp64_rms_norm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stock T5 takes the variance in fp32; the recordings take it in fp64."""
    monkeypatch.setattr(T5LayerNorm, "forward", lambda self, x: self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)))
    yield


def close(name: str, got: Tensor, want: Tensor) -> None:
    # Some gradients are zero but for rounding (a bias in front of a softmax), hence the absolute part.
    assert (got.detach() - want).abs().max() < 1e-12 or relative_error(got, want) < RECORDED, f"{name}: {relative_error(got, want):.2e}"


@pytest.mark.parametrize("form, norm", [("bart", nn.LayerNorm), ("t5", functools.partial(T5LayerNorm, eps=1e-6))])
def test_visual_embedding(form: str, norm: object) -> None:
    case = golden.load_case(f"vla_visual_embedding_{form}")
    module = VisualEmbedding(case.options["feat_dim"], case.options["d_model"], norm).double()
    params = golden.to(case.params, torch.float64)
    table = params.pop("obj_order_embedding.weight").requires_grad_()
    module.load_state_dict(params)
    feats, boxes = (case.inputs[n].double().requires_grad_() for n in ("feats", "boxes"))
    out = module(feats, boxes, table)
    close("vis_embedding", out, case.outputs["vis_embedding"])
    out.backward(case.cotangents["vis_embedding"].double())
    close("feats", feats.grad, case.input_grads["feats"])
    close("boxes", boxes.grad, case.input_grads["boxes"])
    grads = {name: p.grad for name, p in module.named_parameters()} | {"obj_order_embedding.weight": table.grad}
    assert grads.keys() == case.param_grads.keys()
    for name, grad in grads.items():
        close(name, grad, case.param_grads[name])


def model_of(case: golden.Case) -> VLBart | VLT5:
    o = case.options
    tokens = {"pad_token_id": o["pad"], "eos_token_id": o["eos"], "decoder_start_token_id": o["decoder_start"]}
    common = {"vocab_size": o["vocab"], "d_model": o["d_model"], "feat_dim": o["feat_dim"], "n_boxes": 4, **tokens}
    if o["backbone"] == "BART":
        sizes = {f"{side}_{name}": o[key] for side in ("encoder", "decoder") for name, key in (("attention_heads", "heads"), ("ffn_dim", "ffn"))}
        positions = case.params["model.encoder.embed_positions.weight"].shape[0] - 2
        model = VLBart(VLBartConfig(**common, **sizes, encoder_layers=2, decoder_layers=2, max_position_embeddings=positions, forced_eos_token_id=None))
    else:
        model = VLT5(VLT5Config(**common, num_heads=o["heads"], d_kv=o["d_model"] // o["heads"], d_ff=o["ffn"], num_layers=2))
    model = model.double().eval()
    params = golden.to(case.params, torch.float64)
    own = model.state_dict()
    model.load_state_dict({name: params[name].reshape(own[name].shape) for name in own}, strict=True)
    left = {name for name in params if name not in own}
    assert all("adapter" in name or "prompt" in name or name.endswith("obj_order_embedding.weight") for name in left)
    return model


def add_adapters(model: nn.Module, case: golden.Case) -> dict[str, Tensor]:
    """Published adapters behind the stock projections: h + up(gelu_new(down(h)))."""
    params = {name: p.double().requires_grad_() for name, p in case.params.items() if ".adapters.vqa." in name}
    used = set()
    for path, module in model.named_modules():
        for suffix, adapter in (T5_SITES if isinstance(model, VLT5) else SITES).items():
            if not path.endswith(suffix):
                continue
            name = adapter if isinstance(adapter, str) else adapter["encoder" if ".encoder." in path else "decoder"]
            prefix = f"{path[: -len(suffix)]}{name}.adapters.vqa."
            used |= {n for n in params if n.startswith(prefix)}

            def hook(_m: nn.Module, _i: object, h: Tensor, prefix: str = prefix) -> Tensor:
                z = F.linear(h, params[prefix + "down_sampler.weight"], params[prefix + "down_sampler.bias"])
                return h + F.linear(F.gelu(z, approximate="tanh"), params[prefix + "up_sampler.weight"], params[prefix + "up_sampler.bias"])

            module.register_forward_hook(hook)
    assert used == set(params)
    return params


@pytest.mark.parametrize("case_id", ["vla_vlbart_single_adapter", "vla_vlt5_single_adapter"])
def test_whole_model(case_id: str) -> None:
    case = golden.load_case(case_id)
    model = model_of(case)
    adapters = add_adapters(model, case)
    trainable = set(case.entry["trainable_parameters"])
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)
    feats = case.inputs["vis_feats"].double().requires_grad_()
    call = {"input_ids": case.inputs["input_ids"], "vis_inputs": (feats, case.inputs["boxes"].double())}
    out = model(**call, labels=case.inputs["labels"])
    close("logits", out.logits, case.outputs["logits"])
    close("loss", out.loss.reshape(1), case.outputs["loss"])
    if "encoder_last_hidden_state" in case.outputs:
        close("encoder", out.encoder_last_hidden_state, case.outputs["encoder_last_hidden_state"])
    out.loss.backward()
    close("vis_feats", feats.grad, case.input_grads["vis_feats"])
    grads = {name: p.grad for name, p in (*model.named_parameters(), *adapters.items()) if p.grad is not None}
    assert grads.keys() == case.param_grads.keys()
    for name, grad in grads.items():
        close(name, grad, case.param_grads[name])
    for cached in (True, False):
        assert torch.equal(model.generate(**call, num_beams=1, do_sample=False, max_length=8, use_cache=cached), case.extra["greedy_ids"])
