"""UniAdapter's modules: the recorded cases of the published classes, the formulas, starting values, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadapt
from fastadapt.nn import KeyValueAdapter, TemporalEmbedding, UniAdapter, frame_scores, frame_weights
from tests import eager, golden
from tests.hosts.published_blip import check_fp32, check_fp64
from tests.ops import checks

MODES = ("text", "visual", "multimodal")


def recorded_module(case: golden.Case, dtype: torch.dtype) -> nn.Module:
    o = case.options
    learnable = o["adapter_scalar"] == "learnable_scalar"
    if case.entry["class"] == "Adapter_Lora":
        scale = 1.0 if learnable else float(o["adapter_scalar"])
        module: nn.Module = KeyValueAdapter(o["d_model"], o["d_model"], o["bottleneck"], scale=scale, learnable_scale=learnable, dtype=dtype)
    else:
        scale = 0.1 if learnable else float(o["adapter_scalar"])
        norm = o["adapter_layernorm_option"]
        module = UniAdapter(o["d_model"], o["bottleneck"], scale=scale, learnable_scale=learnable, layer_norm=norm, dtype=dtype)
    module.load_state_dict(golden.to(case.params, dtype), strict=True)
    return module


def run(case: golden.Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, dict[str, Tensor]]:
    module = recorded_module(case, dtype).to(device)
    x = case.inputs["x"].to(device, dtype).clone().requires_grad_()
    if isinstance(module, UniAdapter):
        out = {f"y_{mode}": module(x, add_residual=case.options["add_residual"], mode=mode) for mode in case.options["modes"]}
    else:
        out = {"y": module(x)}
    torch.autograd.backward(list(out.values()), [case.cotangents[name].to(device, dtype) for name in out])
    without = set(case.entry["parameters_without_gradient"])
    assert {name for name, p in module.named_parameters() if p.grad is None} == without
    grads = {name: p.grad for name, p in module.named_parameters() if name not in without}
    return {"outputs": out, "input_grads": {"x": x.grad}, "param_grads": grads}


@pytest.mark.parametrize("case_id", golden.case_ids("uni_adapter_"))
def test_recorded_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    ran = run(case, torch.float64)
    for part in ran:
        check_fp64(ran[part], getattr(case, part))
    assert {backend for _, _, backend in fastadapt.backend.ran()} == {"reference"}


@pytest.mark.parametrize("backend", checks.every_name)
@pytest.mark.parametrize("case_id", golden.case_ids("uni_adapter_"))
def test_recorded_fp32(case_id: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, device = golden.load_case(case_id), "cuda" if backend == "triton" else "cpu"
    if why := fastadapt.backend.explain(rows=8, dtype=torch.float32, device=device, **recorded_module(case, torch.float32).call()).reasons.get(backend):
        pytest.skip("; ".join(why))
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use(backend):
        ran = run(case, torch.float32, device)
    assert set(checks.ran()) == {("bottleneck", direction, backend) for direction in ("forward", "backward")}
    monkeypatch.setattr(fastadapt.functional, "bottleneck", eager.bottleneck)
    rival = run(case, torch.float32, device)
    for part in ran:
        check_fp32(case, ran[part], getattr(case, part), rival[part], gradient=part != "outputs")


def filled(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.3)
    return module


def formula(m: Any, x: Tensor, mode: str, p: float = 0.0) -> Tensor:
    """Section by section as the docstring says it, with two up-projections in "multimodal"."""

    def norm(t: Tensor, n: nn.LayerNorm) -> Tensor:
        return F.layer_norm(t, t.shape[-1:], n.weight, n.bias, n.eps)

    k = F.dropout(F.relu(m.down_proj(norm(x, m.adapter_layer_norm_before) if m.layer_norm == "in" else x)), p)
    if mode == "multimodal":
        u = norm(m.multi_up_proj(k) + m.up_proj(k), m.adapter_layer_norm_cross_modal)
    else:
        u = (m.visual_up_proj if mode == "visual" else m.up_proj)(k)
    u = u * m.scale
    return norm(u, m.adapter_layer_norm_before) if m.layer_norm == "out" else u


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("layer_norm", ["in", "out", "none"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residual", ["none", "input", "tensor"])
def test_every_mode(mode: str, layer_norm: str, learnable: bool, residual: str) -> None:
    module = filled(UniAdapter(12, 5, layer_norm=layer_norm, scale=0.7, learnable_scale=learnable, dtype=torch.float64))  # type: ignore[arg-type]
    x, other = (torch.randn(2, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in (0, 2))
    got = module(x, {"none": False, "input": True, "tensor": other}[residual], mode)
    want = formula(module, x, mode)
    want = want if residual == "none" else want + (x if residual == "input" else other)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [p for p in module.parameters() if p.requires_grad] + [x, other]
    grads = [torch.autograd.grad(t.square().sum(), leaves, allow_unused=True) for t in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_default_mode_is_text_with_residual() -> None:
    module = filled(UniAdapter(12, 5, dtype=torch.float64))
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.equal(module(x), module(x, add_residual=True, mode="text")) and torch.equal(module(x, x), module(x))


@pytest.mark.parametrize("layer_norm", ["in", "out", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_dropout(mode: str, layer_norm: str) -> None:
    module = filled(UniAdapter(12, 8, dropout=0.5, layer_norm=layer_norm, learnable_scale=True, dtype=torch.float64))  # type: ignore[arg-type]
    x = torch.randn(4, 12, dtype=torch.float64)
    for residual, added in ((False, 0.0), (True, x), (2 * x, 2 * x)):
        torch.manual_seed(3)
        got = module(x, residual, mode)
        torch.manual_seed(3)
        torch.testing.assert_close(got, formula(module, x, mode, 0.5) + added, rtol=1e-12, atol=1e-12)
    assert not torch.equal(module(x, False, mode), module(x, False, mode))
    module.eval()
    torch.testing.assert_close(module(x, False, mode), formula(module, x, mode), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (12, 20)])
@pytest.mark.parametrize("learnable", [False, True])
def test_key_value_adapter(shape: tuple[int, int], learnable: bool) -> None:
    module = filled(KeyValueAdapter(*shape, 5, scale=0.5, learnable_scale=learnable, dtype=torch.float64))
    x, y = torch.randn(2, 3, shape[0], dtype=torch.float64), torch.randn(2, 3, shape[1], dtype=torch.float64)
    want = module.up_proj(module.down_proj(x)) * module.scale
    torch.testing.assert_close(module(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x, y), y + want, rtol=1e-12, atol=1e-12)


def test_autocast_keeps_a_residual_stream_in_float32() -> None:
    module = UniAdapter(16, 8)
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for mode in MODES:
            assert module(x, y, mode).dtype == torch.float32 and module(x, False, mode).dtype == torch.bfloat16
            assert torch.equal(module(x, y, mode), y + module(x, False, mode))
        assert KeyValueAdapter(16, 16, 4)(x, nn.Linear(16, 16)(x)).dtype == torch.bfloat16


@pytest.mark.parametrize("layer_norm", ["in", "out"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_half_precision_with_float32_parameters(layer_norm: str, dropout: float) -> None:
    module = UniAdapter(16, 8, layer_norm=layer_norm, dropout=dropout, learnable_scale=True)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    for mode in MODES:
        out = module(x, x, mode)
        out.sum().backward()
        assert out.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_names_and_sizes() -> None:
    """Section 4.11's keys; 1,578,752 numbers at the published size, and 99,137 in a key adapter."""
    parts = ("adapter_layer_norm_before", "adapter_layer_norm_cross_modal", "down_proj", "up_proj", "multi_up_proj", "visual_up_proj")
    with torch.device("meta"):
        module, key = UniAdapter(768), KeyValueAdapter(768, 768)
    assert list(module.state_dict()) == [f"{part}.{name}" for part in parts for name in ("weight", "bias")]
    assert list(key.state_dict()) == ["scale", "down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"]
    assert sum(p.numel() for p in module.parameters()) == 1_578_752 and sum(p.numel() for p in key.parameters()) == 99_137
    assert "adapter_layer_norm_before" not in "".join(UniAdapter(8, 4, layer_norm="none").state_dict())


def test_starting_values() -> None:
    torch.manual_seed(0)
    module, key = UniAdapter(256, 128, learnable_scale=True), KeyValueAdapter(256, 256, 128)
    for m in (module, key):
        filled(m).reset_parameters()
    for projection in (module.down_proj, module.up_proj, module.multi_up_proj, module.visual_up_proj, key.down_proj, key.up_proj):
        assert abs(projection.weight.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * projection.weight.numel()) and not projection.bias.any()
    assert module.scale.item() == pytest.approx(0.1) and key.scale.item() == 1.0 and KeyValueAdapter(8, 8, 4, scale=0.5).scale.item() == 0.5
    time = TemporalEmbedding(8, 256).time_embed
    assert abs(time.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * time.numel())
    for norm in (module.adapter_layer_norm_before, module.adapter_layer_norm_cross_modal):
        assert torch.equal(norm.weight, torch.ones(256)) and not norm.bias.any()


def test_temporal_embedding() -> None:
    module = TemporalEmbedding(3, 8)
    x = torch.randn(2, 12, 8)
    out = module(x).reshape(2, 3, 4, 8)
    assert torch.equal(out, x.reshape(2, 3, 4, 8) + module.time_embed[:, :, None])
    assert 0 < module.time_embed.abs().max() < 0.1 and not TemporalEmbedding(3, 8, zero=True).time_embed.any()
    with pytest.raises(ValueError, match="13 tokens are no multiple of 3 frames"):
        module(torch.randn(1, 13, 8))


def test_frame_weights() -> None:
    """Weights of a text's frames sum to their number, and class tokens keep theirs (section 14, test 12)."""
    text, frames = torch.randn(2, 6), torch.randn(2, 3, 6, requires_grad=True)
    scores = frame_scores(text, frames)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(scores[1, 2], F.cosine_similarity(text[1], frames[1, 2], dim=0))
    w = frame_weights(scores, 12)
    assert w.shape == (2, 12, 1) and not w.requires_grad
    per_frame = w.reshape(2, 3, 4)
    assert torch.equal(per_frame[..., 0], torch.ones(2, 3))
    assert torch.equal(per_frame[..., 1], per_frame[..., 3])
    torch.testing.assert_close(per_frame[..., 1], 3 * F.softmax(scores / 4, 1))
    torch.testing.assert_close(per_frame[..., 1].sum(1), torch.full((2,), 3.0))
    with pytest.raises(ValueError, match="10 tokens are no multiple of 3 frames"):
        frame_weights(scores, 10)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: UniAdapter(0), "width: must be a positive integer, not 0"),
        (lambda: UniAdapter(8, 0), "rank"),
        (lambda: UniAdapter(8, 4, dropout=1.0), "dropout: must be from 0 to below 1"),
        (lambda: UniAdapter(8, 4, dropout=False), "dropout: must be from 0 to below 1, not False"),
        (lambda: UniAdapter(8, 4, scale=float("nan")), "scale: must be a finite number"),
        (lambda: UniAdapter(8, 4, layer_norm="before"), "layer_norm: must be one of in, out, none"),  # type: ignore[arg-type]
        (lambda: UniAdapter(8, 4)(torch.zeros(2, 8), mode="cross"), "mode: must be one of text, visual, multimodal, not 'cross'"),  # type: ignore[arg-type]
        (lambda: UniAdapter(8, 4)(torch.zeros(2, 9)), "w_down: shape"),
        (lambda: KeyValueAdapter(8, 8, 0), "rank"),
        (lambda: KeyValueAdapter(8, 8, 4, scale=True), "scale: must be a finite number"),
        (lambda: TemporalEmbedding(0, 8), "frames: must be a positive integer"),
    ],
)
def test_refusals(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_copies_and_says_what_it_is() -> None:
    module = filled(UniAdapter(12, 5, dtype=torch.float64))
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.equal(copy.deepcopy(module)(x), module(x)) and "layer_norm='in', scale=0.1, dropout=0.0" in repr(module)
    assert "scale=learnable, from 1.0" in repr(KeyValueAdapter(8, 8, 4)) and "frames=3, width=8" in repr(TemporalEmbedding(3, 8))


def test_without_gradients_the_cross_modal_weights_are_summed_once() -> None:
    """Until one of them changes; a copy does not carry the sum along."""
    module, x = UniAdapter(16, 4), torch.randn(3, 16)
    expected = module(x, mode="multimodal").detach()
    with torch.no_grad():
        assert torch.equal(module(x, mode="multimodal"), expected)
        kept = module._kept
        assert torch.equal(module(x, mode="multimodal"), expected) and module._kept is kept and copy.deepcopy(module)._kept is None
        module.multi_up_proj.weight.add_(1.0)
        changed = module(x, mode="multimodal")
        assert module._kept is not kept and not torch.equal(changed, expected)
    torch.testing.assert_close(module(x, mode="multimodal"), changed)
    assert module._kept is None
