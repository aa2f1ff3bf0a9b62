"""VL-PET's sites and decoder variants, patched into stock layers by the published flags, against recorded tensors: fp64 on `reference`, fp32 on every backend that can run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import fastadapt
from tests import eager, golden
from tests.hosts.published_vlpet import converted, load, patched_block
from tests.ops import checks
from tests.ops.checks import every_backend
from tests.tolerance import SMALL, assert_close_to_f64, assert_matches_recorded

SITES = [name for name in golden.case_ids("vlpet_") if "_site_" in name]
VALUES = [name for name in golden.case_ids("vlpet_bart_value_")]
LAYERS = [name for name in golden.case_ids("vlpet_bart_decoder_layer_")] + ["vlpet_bart_encoder_layer_large"]
CASES = [*SITES, *VALUES, *LAYERS]
# Plain torch: a vector times activations.
NO_OP = ("vlpet_bart_value_ia3_D48", "vlpet_bart_value_ia3_add_D48", "vlpet_bart_decoder_layer_ff_ia3")


def run(case: golden.Case, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Outputs and gradients under the case's names (adapters' as "site/name"), what is recorded under the same names, and the ops that the modules say they call."""
    block, handle = patched_block(case, dtype)
    task = "gqa" if case.id in VALUES else "vqa"
    params = converted(golden.to(case.params, dtype), handle, task)
    attention = "encoder_attn." if case.id in VALUES else ""
    x = {name: t.to(device).requires_grad_(name in case.input_grads) for name, t in golden.to(case.inputs, dtype).items()}
    sites: list[nn.Module] = list(handle.sites.values())
    if case.id in SITES:
        site = f"encoder.0.{'feed_forward' if '_ff_' in case.id else 'self_attention'}"
        sites = [handle.sites[site].to(device)]
        load(handle, block, params, None)
        y = sites[0](x["h"], x["x"])
        out = {"y": x["x"] + y if "t5" in case.id else y}
        trained = {f"{site}/{name}": p for name, p in sites[0].named_parameters()}
    else:
        load(handle, block, params, attention)
        block.to(device)
        out = call(block, x, bool(attention))
        trained = {f"{site}/{name}": p for site, module in handle.sites.items() for name, p in module.named_parameters()}
        adapters = {id(p) for p in trained.values()}
        host = {name: p for name, p in block.named_parameters() if p.requires_grad and id(p) not in adapters}
        assert all("layer_norm" in name for name in host)
        trained |= {} if attention else host
    torch.autograd.backward(list(out.values()), [case.cotangents[name].to(device, dtype) for name in out])
    grads = {f"d {name}": p.grad for name, p in trained.items()} | {f"d in {name}": x[name].grad for name in case.input_grads}
    ops = {made["op"] for site in sites for m in site.modules() if (made := getattr(m, "call", lambda: None)())}
    return {**out, **grads}, recorded(case, handle), ops  # type: ignore[dict-item]


def recorded(case: golden.Case, handle: Any) -> dict[str, Tensor]:
    grads = converted(case.param_grads, handle)
    return {**case.outputs, **{f"d {name}": t for name, t in grads.items()}, **{f"d in {name}": t for name, t in case.input_grads.items()}}


def call(block: Any, x: dict[str, Tensor], attention: bool) -> dict[str, Tensor]:
    if not attention:
        out = block(**x)
        return {"hidden_states": out if isinstance(out, Tensor) else out[0]}
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    out, _ = block.encoder_attn(x["hidden_states"], key_value_states=x["key_value_states"], attention_mask=x["attention_mask"], past_key_values=cache)
    kept = cache.cross_attention_cache.layers[0]
    return {"attn_output": out, "key": kept.keys, "value": kept.values}


def test_all_recorded_cases_are_here() -> None:
    """With tests.hosts.test_golden (whole models, T5's block and value path, the controller) and tests.hosts_vl.test_projector: every recorded case of VL-PET."""
    assert (len(SITES), len(VALUES), len(LAYERS)) == (28, 5, 6)
    elsewhere = ("vlpet_vlbart", "vlpet_vlt5", "vlpet_t5_encoder_block", "vlpet_t5_value", "vlpet_parallel_value_adapter_controller", "vlpet_lowrank_visual_projector")
    assert {name for name in golden.case_ids("vlpet_") if not name.startswith(elsewhere)} == set(CASES)


@pytest.mark.parametrize("case_id", CASES)
def test_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    got, want, ops = run(case, torch.float64)
    assert {name for name, t in got.items() if t is not None} == want.keys()
    for name, tensor in want.items():
        assert_matches_recorded(name, got[name].reshape(tensor.shape), tensor)
    assert {(op, backend) for op, _, backend in checks.ran()} == {(op, "reference") for op in ops}
    assert bool(ops) == (case_id not in NO_OP)


@pytest.mark.parametrize("case_id", [name for name in CASES if name not in NO_OP])
@every_backend
def test_fp32(case_id: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use(name):
        got, want, ops = run(case, torch.float32, device)
    assert set(checks.ran()) == {(op, direction, name) for op in ops for direction in ("forward", "backward")} and ops
    with monkeypatch.context() as patched:
        for op in ("bottleneck", "gated_bottleneck"):
            patched.setattr(fastadapt.functional, op, getattr(eager, op))
        rival, _, _ = run(golden.load_case(case_id), torch.float32, device)
    judge(case, got, rival, want)


def judge(case: golden.Case, got: dict[str, Tensor], rival: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """The rule of the suite beside eager, and the recordings' own rule: ten times the largest error of the published code in fp32, at least 2e-6, of the largest magnitude or 1."""
    for name, tensor in want.items():
        ours = got[name].detach().cpu().reshape(tensor.shape)
        if tensor.numel() >= SMALL:
            assert_close_to_f64(name, ours, tensor, rival[name].detach().cpu().reshape(tensor.shape), gradient=name.startswith("d "))
        limit = max(10 * max(case.entry["fp32_run_max_rel_diff"].values()), 2e-6) * max(1.0, tensor.abs().max().item())
        difference = (ours.double() - tensor).abs().max().item()
        assert difference <= limit, f"{name}: {difference:.3g} > {limit:.3g}"
