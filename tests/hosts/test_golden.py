"""Patched stock layers and whole models against recorded tensors of the published code: outputs and gradients, fp64 on `reference`, fp32 on every backend that can run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import fastadapt
from fastadapt.nn import ValueParallelAdapter
from fastadapt.patching import Handle
from tests import eager, golden
from tests.hosts.published import converted, family_of, fp64_rms_norm, patched_block, patched_model  # noqa: F401
from tests.ops import checks
from tests.tolerance import SMALL, assert_close_to_f64, assert_matches_recorded

pytestmark = pytest.mark.usefixtures("fp64_rms_norm")

BLOCKS = [
    "vla_bart_encoder_layer_adapter",
    "vla_bart_decoder_layer_adapter",
    "vla_t5_encoder_block_adapter",
    "vlpet_bart_encoder_layer_large",
    "vlpet_bart_decoder_layer_value_parallel",
    "vlpet_t5_encoder_block_large",
    "vlpet_bart_value_parallel_adapter",
    "vlpet_t5_value_parallel_adapter",
    "vla_bart_encoder_layer_lora",
]
PROMPTS = ["vla_vlbart_encoder_prompt_single_adapter", "vla_vlt5_encoder_prompt_single_adapter", "vla_vlbart_decoder_prompt"]
MODELS = ["vla_vlbart_single_adapter", "vla_vlt5_single_adapter", "vlpet_vlbart_large", "vlpet_vlt5_large", *PROMPTS]


class Ran:
    """Outputs and gradients of one run of a case, under the case's names, and the handle."""

    def __init__(self, handle: Handle, outputs: dict[str, Tensor], input_grads: dict[str, Tensor], param_grads: dict[str, Tensor]) -> None:
        self.handle, self.outputs, self.input_grads, self.param_grads = handle, outputs, input_grads, param_grads


def run_block(case: golden.Case, dtype: torch.dtype, device: str) -> Ran:
    block, handle = patched_block(case, dtype)
    family = family_of(case)
    inner, prefix = block, ""
    if case.id in ("vlpet_bart_value_parallel_adapter", "vlpet_t5_value_parallel_adapter"):
        inner, prefix = (block.encoder_attn, "encoder_attn.") if family == "bart" else (block.layer[1], "layer.1.")
    params = converted(golden.to(case.params, dtype), family)
    inner.load_state_dict(params, strict=True)
    block.to(device)
    x = {name: t.to(device).requires_grad_(name in case.input_grads) for name, t in golden.to(case.inputs, dtype).items()}
    out = _call(case, inner, x)
    torch.autograd.backward(list(out.values()), [case.cotangents[name].to(device, dtype).reshape(t.shape) for name, t in out.items()])
    grads = {name: p.grad for name, p in inner.named_parameters() if p.requires_grad}
    trained = {name for name, p in block.named_parameters() if p.requires_grad and name.startswith(prefix)}
    assert trained == {prefix + name for name in grads}
    return Ran(handle, out, {name: x[name].grad for name in case.input_grads}, grads)


def _call(case: golden.Case, inner: nn.Module, x: dict[str, Tensor]) -> dict[str, Tensor]:
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    if case.id == "vlpet_bart_value_parallel_adapter":
        out, _ = inner(x["hidden_states"], key_value_states=x["key_value_states"], attention_mask=x["attention_mask"], past_key_values=cache)
        kept = cache.cross_attention_cache.layers[0]
        return {"attn_output": out, "key": kept.keys, "value": kept.values}
    if case.id == "vlpet_t5_value_parallel_adapter":
        out, _, _ = inner(x["hidden_states"], x["key_value_states"], past_key_values=cache)
        return {"hidden_states": out, "value": cache.cross_attention_cache.layers[0].values}
    out = inner(**x)
    return {"hidden_states": out if isinstance(out, Tensor) else out[0]}


def run_model(case: golden.Case, dtype: torch.dtype, device: str) -> Ran:
    model, handle = patched_model(case, dtype)
    model.to(device)
    inputs = {name: t.to(device) for name, t in golden.to(case.inputs, dtype).items()}
    feats = inputs["vis_feats"].requires_grad_()
    call = {"input_ids": inputs["input_ids"], "vis_inputs": (feats, inputs["boxes"])}
    out = model(**call, labels=inputs["labels"])
    out.loss.backward()
    outputs = {"logits": out.logits, "loss": out.loss.reshape(1)}
    if "encoder_last_hidden_state" in case.outputs:
        outputs["encoder_last_hidden_state"] = out.encoder_last_hidden_state
    if "prompt" in case.outputs:
        prompt = handle.sites["decoder.prompt"]()
        outputs["prompt"] = prompt.expand(len(feats), -1, -1)
        for i, layer in enumerate(model(**call, decoder_input_ids=inputs["input_ids"], use_cache=True).past_key_values.self_attention_cache.layers):
            outputs |= {f"past.{i}.key": layer.keys[:, :, : len(prompt)], f"past.{i}.value": layer.values[:, :, : len(prompt)]}
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for cached in (True, False):
        ids = model.generate(**call, num_beams=1, do_sample=False, max_length=8, use_cache=cached)
        assert torch.equal(ids.cpu(), case.extra["greedy_ids"]), f"use_cache={cached}"
    return Ran(handle, outputs, {"vis_feats": feats.grad}, grads)


def compare(case: golden.Case, ran: Ran, check: Callable[[str, Tensor, Tensor, bool], None]) -> None:
    """Every recorded output and gradient, and no other: the trained set is the published one."""
    wanted = converted(case.param_grads, family_of(case))
    assert ran.outputs.keys() == case.outputs.keys()
    assert ran.input_grads.keys() == case.input_grads.keys()
    assert ran.param_grads.keys() == wanted.keys()
    for got, want, gradient in ((ran.outputs, case.outputs, False), (ran.input_grads, case.input_grads, True), (ran.param_grads, wanted, True)):
        for name, tensor in want.items():
            assert got[name] is not None, f"{name}: no gradient"
            check(name, got[name].detach().cpu(), tensor, gradient)


@pytest.mark.parametrize("case_id", BLOCKS + MODELS)
def test_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    ran = (run_model if case_id in MODELS else run_block)(case, torch.float64, "cpu")
    compare(case, ran, lambda name, got, want, _: assert_matches_recorded(name, got.reshape(want.shape), want))
    calls = any(hasattr(module, "call") for module in ran.handle.sites.values())
    assert {backend for _, _, backend in fastadapt.backend.ran()} == ({"reference"} if calls else set())


@pytest.mark.parametrize("backend", checks.every_name)
@pytest.mark.parametrize("case_id", BLOCKS + MODELS)
def test_fp32(case_id: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, run, device = golden.load_case(case_id), run_model if case_id in MODELS else run_block, "cuda" if backend == "triton" else "cpu"
    for module in patched_block(case, torch.float32)[1].sites.values() if run is run_block else patched_model(case, torch.float32)[1].sites.values():
        if not hasattr(module, "call"):
            continue
        explained = fastadapt.backend.explain(rows=8, dtype=torch.float32, device=device, **module.call())
        if why := explained.reasons.get(backend):
            pytest.skip("; ".join(why))
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use(backend):
        ran = run(case, torch.float32, device)
    directions = {(op, direction) for op, direction, _ in checks.ran()}
    ops = {m.call()["op"] for m in ran.handle.sites.values() if hasattr(m, "call") and ("value" not in case_id or isinstance(m, ValueParallelAdapter))}
    assert directions == {(op, direction) for op in ops for direction in ("forward", "backward")}
    assert {name for _, _, name in checks.ran()} == ({backend} if ops else set())

    with monkeypatch.context() as patched:
        patched.setattr(fastadapt.functional, "bottleneck", eager.bottleneck)
        patched.setattr(fastadapt.functional, "gated_bottleneck", eager.gated_bottleneck)
        rival = run(golden.load_case(case_id), torch.float32, device)
    eagerly = {**rival.outputs, **rival.input_grads, **rival.param_grads}
    recorded = case.entry["fp32_run_max_rel_diff"]

    def check(name: str, got: Tensor, want: Tensor, gradient: bool) -> None:
        got = got.reshape(want.shape)
        if want.numel() >= SMALL and name != "loss":
            assert_close_to_f64(name, got, want, eagerly[name].detach().cpu().reshape(want.shape), gradient=gradient)
        # The recordings' own rule: ten times the largest error of the published code in fp32, at least 2e-6, of the largest magnitude or 1.
        limit = max(10 * max(recorded.values()), 2e-6) * max(1.0, want.abs().max().item())
        assert (got.double() - want).abs().max().item() <= limit, f"{name}: {(got.double() - want).abs().max().item():.3g} > {limit:.3g}"

    compare(case, ran, check)


@pytest.mark.parametrize("case_id", ["vlpet_parallel_value_adapter_controller"])
def test_value_parallel_module(case_id: str) -> None:
    case = golden.load_case(case_id)
    p = {name.replace("adapters.vqa.", ""): t for name, t in golden.to(case.params, torch.float64).items() if ".vqa." in name}
    module = ValueParallelAdapter(case.options["d_model"], case.options["bottleneck"], dtype=torch.float64)
    module.load_state_dict(p, strict=True)
    x, y = (case.inputs[n].double().requires_grad_() for n in ("x_vqa", "y_vqa"))
    out = module(x, y)
    out.backward(case.cotangents["y_out_vqa"].double())
    assert_matches_recorded("y_out_vqa", out, case.outputs["y_out_vqa"])
    for name, t in (("x_vqa", x), ("y_vqa", y)):
        assert_matches_recorded(name, t.grad, case.input_grads[name])
    for name, parameter in module.named_parameters():
        assert_matches_recorded(name, parameter.grad, case.param_grads[f"adapters.vqa.{name}"])
