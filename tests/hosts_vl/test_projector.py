"""VL-PET's low-rank visual projector: recorded tensors in fp64, its place in VL-BART and VL-T5, starting values, errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt.hosts.visual import LowRankVisualEmbedding
from fastadapt.hosts.vlbart import VLT5, VLBart, VLBartConfig, VLT5Config
from fastadapt.patching import patch
from tests import golden
from tests.tolerance import assert_matches_recorded

TINY: dict[str, Any] = {"vocab_size": 60, "d_model": 16, "feat_dim": 10, "visual_projector_rank": 8, "visual_projector_heads": 2, "visual_projector_gate_rank": 6}


@pytest.mark.parametrize("case_id", golden.case_ids("vlpet_lowrank_visual_projector"))
def test_recorded(case_id: str) -> None:
    case = golden.load_case(case_id)
    flags = dict(re.findall(r"--(\w+)(?:\s+(\d+))?", case.flags))
    module = LowRankVisualEmbedding(
        case.options["feat_dim"],
        case.options["d_model"],
        rank=int(flags["visual_projector_down_dim"]),
        heads=int(flags["visual_projector_multihead_num_head"]),
        gate_rank=int(flags["visual_projector_gating_down_dim"]) if "use_visual_projector_gating_large_x_lowrank" in flags else None,
        residual="use_visual_projector_residual_connection" in flags,
    ).double()
    params = golden.to(case.params, torch.float64)
    table = params.pop("obj_order_embedding.weight").requires_grad_()
    module.load_state_dict(params, strict=True)
    feats, boxes = (case.inputs[name].double().requires_grad_() for name in ("feats", "boxes"))
    out = module(feats, boxes, table)
    assert_matches_recorded("vis_embedding", out, case.outputs["vis_embedding"])
    out.backward(case.cotangents["vis_embedding"].double())
    for name, t in (("feats", feats), ("boxes", boxes)):
        assert_matches_recorded(name, t.grad, case.input_grads[name])
    grads = {name: p.grad for name, p in module.named_parameters()} | {"obj_order_embedding.weight": table.grad}
    assert grads.keys() == case.param_grads.keys()
    for name, grad in grads.items():
        assert_matches_recorded(name, grad, case.param_grads[name])


def model(family: str, **options: Any) -> VLBart | VLT5:
    torch.manual_seed(0)
    options = TINY | options
    if family == "bart":
        sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}
        return VLBart(VLBartConfig(**options, **sizes, max_position_embeddings=32, forced_eos_token_id=None)).eval()
    return VLT5(VLT5Config(**options, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0)).eval()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_in_the_model(family: str, tmp_path: Any) -> None:
    """It is trained with any method, survives saving, and the model generates with it."""
    host = model(family)
    embedding = host.get_encoder().visual_embedding
    assert type(embedding) is LowRankVisualEmbedding and len(embedding.visual_projector_multihead_down) == 2
    call = {"input_ids": torch.randint(3, 50, (2, 5)), "vis_inputs": (torch.randn(2, 4, 10), torch.rand(2, 4, 4))}
    handle = patch(host, "vlpet", rank=4, heads=2, gate_rank=3, value_rank=3, init="identity")
    trained = {name for name in handle.report.trained_base if name.startswith("visual_embedding")}
    assert {f"visual_embedding.visual_projector_{name}.weight" for name in ("multihead_down.0", "multihead_down.1", "multihead_up", "gating_large_x_up", "layer_norm")} <= trained
    host(**call, labels=torch.randint(3, 50, (2, 3))).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in embedding.parameters() if p is not embedding.img_order_embedding.weight)
    handle.unpatch()
    assert host.generate(**call, max_new_tokens=3, num_beams=1, do_sample=False).shape[0] == 2
    host.save_pretrained(tmp_path)
    again = type(host).from_pretrained(tmp_path).eval()
    labels = torch.randint(3, 50, (2, 3))
    torch.testing.assert_close(again(**call, labels=labels).logits, host(**call, labels=labels).logits, rtol=0, atol=0)


def test_starting_values() -> None:
    """BART's rule gives N(0, 0.02) and zero biases; T5's leaves torch's own. The same for the full-rank projection."""
    large = {"d_model": 128, "feat_dim": 128, "visual_projector_rank": 64, "visual_projector_gate_rank": 64}
    plain = large | {"visual_projector_rank": None, "visual_projector_heads": 1, "visual_projector_gate_rank": None}
    for family in ("bart", "t5"):
        embedding = model(family, **large).get_encoder().visual_embedding
        linears = [m for m in embedding.modules() if isinstance(m, nn.Linear) and m.weight.numel() > 2000]
        assert len(linears) == 5
        linears += [model(family, **plain).get_encoder().visual_embedding.feat_embedding[0]]
        for linear in linears:
            std = 0.02 if family == "bart" else 1 / math.sqrt(3 * linear.in_features)
            assert abs(linear.weight.std().item() / std - 1) < 4 / math.sqrt(2 * linear.weight.numel())
            assert bool(linear.bias.any()) == (family == "t5")


def test_errors() -> None:
    for options, message in (
        ({"rank": 6, "heads": 4}, "heads: 4 must divide rank 6"),
        ({"residual": True}, r"residual: there is no gate to add \(gate_rank=None\)"),
        ({"rank": 0}, "rank: must be a positive integer, not 0"),
        ({"gate_rank": 2.5}, "gate_rank: must be a positive integer, not 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankVisualEmbedding(6, 8, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="visual_projector_rank: None leaves no low-rank projector for"):
        model("bart", visual_projector_rank=None)
