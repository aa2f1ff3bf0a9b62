"""Visual adapters in CLIP's ResNet, and CLIP-ViL's gated adapters: recorded tensors, which of them are one fused operation, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt.hosts.clip_resnet import ClipBottleneck, clip_stage
from fastadapt.hosts.clipvil import AdaptedOutput
from fastadapt.nn import Bottleneck, Init, VisualAdapter
from tests import eager, golden
from tests.ops.checks import every_backend
from tests.tolerance import SMALL, assert_close_to_f64, assert_matches_recorded

ADAPTERS, BLOCKS = golden.case_ids("vla_visual_adapter_"), golden.case_ids("vla_clip_bottleneck_")
BERT, GATED = "vla_clipvil_bert_layer_gated", "vla_clipvil_adapter_gated"
# How many fused operations a forward is: a plain width on both sides.
CALLS = {"vla_clip_bottleneck_all_positions_stride2": 2, "vla_clip_bottleneck_middle": 1, BERT: 2, GATED: 1}


def build(case: golden.Case) -> nn.Module:
    o = case.options
    if case.id in ADAPTERS:
        return VisualAdapter(o["input_dim"], o["output_dim"], o["adapter_kind"], o["reduction_factor"], o["use_bn"])
    if case.id in BLOCKS:
        return ClipBottleneck(o["inplanes"], o["planes"], o["stride"], adapter_type=o["adapter_type"], reduction_factor=o["reduction_factor"], use_bn=o["use_bn"])
    if case.id == GATED:
        return Bottleneck(o["d_model"], o["bottleneck"], scalar_gate=True)
    from transformers import LxmertConfig
    from transformers.models.lxmert.modeling_lxmert import LxmertLayer

    sizes = {"hidden_size": o["hidden_size"], "num_attention_heads": o["heads"], "intermediate_size": o["intermediate_size"]}
    layer = LxmertLayer(LxmertConfig(**sizes))
    for half in (layer.attention, layer):
        half.output = AdaptedOutput(half.output, Bottleneck(o["hidden_size"], o["bottleneck"], scalar_gate=True))
        half.output.LayerNorm.eps = o["layer_norm_eps"]
    return layer


def run(case: golden.Case, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the case, and what is recorded under the same names."""
    module = build(case).to(dtype).eval()
    own = module.state_dict()
    params = {name.replace("adapters.vqa.", ""): t for name, t in golden.to(case.params, dtype).items()}
    module.load_state_dict({name: t.reshape(own[name].shape) for name, t in params.items()}, strict=True)
    module.to(device)
    wanted = {name.replace("adapters.vqa.", ""): t for name, t in case.param_grads.items()}
    for name, p in module.named_parameters():
        p.requires_grad_(name in wanted)
    x = {name: t.to(device).requires_grad_(name in case.input_grads) for name, t in golden.to(case.inputs, dtype).items()}
    out = module(*x.values()) if case.id != BERT else module(x["hidden_states"], x["attention_mask"])
    out = out if isinstance(out, Tensor) else out[0]
    name = next(iter(case.outputs))
    out.backward(case.cotangents[name].to(device, dtype))
    got = {name: out, **{f"d in {n}": x[n].grad for n in case.input_grads}, **{f"d {n}": p.grad for n, p in module.named_parameters() if p.requires_grad}}
    return got, {**case.outputs, **{f"d in {n}": t for n, t in case.input_grads.items()}, **{f"d {n}": t for n, t in wanted.items()}}  # type: ignore[return-value]


@pytest.mark.parametrize("case_id", [*ADAPTERS, *BLOCKS, BERT, GATED])
def test_fp64(case_id: str) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    got, want = run(case, torch.float64)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert_matches_recorded(name, got[name], tensor)
    calls = CALLS.get(case_id, 0)
    assert fastadapt.backend.ran() == ({("bottleneck", direction, "reference"): calls for direction in ("forward", "backward")} if calls else {})


@pytest.mark.parametrize("case_id", CALLS)
@every_backend
def test_fp32(case_id: str, name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = golden.load_case(case_id)
    fastadapt.backend.ran(reset=True)
    with fastadapt.backend.use(name):
        got, want = run(case, torch.float32, device)
    assert fastadapt.backend.ran() == {("bottleneck", direction, name): CALLS[case_id] for direction in ("forward", "backward")}
    with monkeypatch.context() as patched:
        patched.setattr(fastadapt.functional, "bottleneck", eager.bottleneck)
        rival, _ = run(golden.load_case(case_id), torch.float32, device)
    for tensor_name, tensor in want.items():
        ours = got[tensor_name].detach().cpu()
        if tensor.numel() >= SMALL:
            assert_close_to_f64(tensor_name, ours, tensor, rival[tensor_name].detach().cpu(), gradient=tensor_name.startswith("d "))
        limit = max(10 * max(case.entry["fp32_run_max_rel_diff"].values()), 2e-6) * max(1.0, tensor.abs().max().item())
        assert (ours.double() - tensor).abs().max().item() <= limit, tensor_name


def filled(module: nn.Module) -> nn.Module:
    """In fp64, with batch norms that have seen something."""
    generator = torch.Generator().manual_seed(1)
    for name, t in module.double().state_dict().items():
        if t.is_floating_point():
            t.copy_(torch.randn(t.shape, dtype=t.dtype, generator=generator))
            if name.endswith("var"):
                t.abs_().add_(0.3)
    return module


@pytest.mark.parametrize("use_bn", [True, False])
def test_one_operation_or_convolutions(use_bn: bool) -> None:
    """The folded form is the convolutions' own result, in the output and in every gradient; in training mode the batch's statistics need the convolutions."""
    module = filled(VisualAdapter(12, 12, "bottleneck", 4, use_bn)).eval()
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert module.call() == {"op": "bottleneck", "width": 12, "rank": 3, "param_dtype": torch.float64}
    stages = [m for m in (module.down_sampler, module.bn1, nn.ReLU(), module.up_sampler, module.bn2) if m is not None]
    fused, plain = module(x), nn.Sequential(*stages)(x)
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-12)
    leaves = [x, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (fused, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    module.train()
    assert (module.call() is None) == use_bn
    expected = nn.Sequential(*stages)(x)
    before = None if not use_bn else module.bn1.num_batches_tracked.clone()
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert before is None or module.bn1.num_batches_tracked == before + 1
    assert VisualAdapter(32, 16).eval().call() is None and VisualAdapter(12, 12, "basic").eval().call() is None


def test_clip_blocks_without_batch_norms_in_the_adapters() -> None:
    """relu(bn(adapter(x) + conv(x))): the host's norm is around both."""
    block = filled(ClipBottleneck(8, 8, 2, adapter_type="front+middle+back-basic", use_bn=False)).eval()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    y = torch.relu(block.bn1(block.conv1(x) + block.front_adapter.conv(x)))
    y = block.avgpool(torch.relu(block.bn2(block.conv2(y) + block.middle_adapter.conv(y))))
    y = torch.relu(block.bn3(block.conv3(y) + block.back_adapter.conv(y)) + block.downsample(x))
    torch.testing.assert_close(block(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("everywhere", [False, True])
def test_stages_pass_use_bn_to_their_first_block_as_published(everywhere: bool) -> None:
    stage = clip_stage(16, 8, 3, 2, adapter_type="middle+transition-bottleneck", use_bn=False, use_bn_everywhere=everywhere)
    assert [block.use_bn for block in stage] == [False, *[not everywhere] * 2]
    assert [block.middle_adapter.bn1 is None for block in stage] == [True, everywhere, everywhere]
    assert stage(torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)
    assert all(block.use_bn for block in clip_stage(16, 8, 2))
    plain = clip_stage(16, 8, 2, adapter_type=None)
    assert not any(isinstance(m, VisualAdapter) for m in plain.modules()) and plain[0].downsample is not None and plain[1].downsample is None


def test_stages_pass_reduction_factor_to_every_block() -> None:
    assert [block.middle_adapter.down_sampler.out_channels for block in clip_stage(16, 8, 2, reduction_factor=4)] == [2, 2]


def test_gate_starts_at_zero() -> None:
    """CLIP-ViL's adapter is the identity at first; only the gate has a gradient then."""
    module = Bottleneck(12, 4, scalar_gate=True, scale=2.0, norm_after=False, init=Init(std=0.5))
    x = torch.randn(3, 5, 12)
    assert torch.equal(module(x), x) and module.gate.shape == (1,) and "scalar_gate=True" in repr(module)
    module(x).square().sum().backward()
    assert module.gate.grad.any() and not module.down_sampler.weight.grad.any() and module.down_sampler.weight.std() > 0.2
    with torch.no_grad():
        module.gate.fill_(0.25)
        plain = Bottleneck(12, 4, scale=0.5)
        plain.load_state_dict({name: t for name, t in module.state_dict().items() if name != "gate"})
        torch.testing.assert_close(module(x), plain(x))


def test_starting_values_are_torchs() -> None:
    torch.manual_seed(0)
    module = VisualAdapter(8, 8, "bottleneck", 2)
    torch.manual_seed(0)
    down, up = nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 8, 1, bias=False)
    assert torch.equal(module.down_sampler.weight, down.weight) and torch.equal(module.up_sampler.weight, up.weight)
    module.bn1.running_mean.fill_(3.0)
    module.reset_parameters()
    assert not module.bn1.running_mean.any() and not torch.equal(module.down_sampler.weight, down.weight)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VisualAdapter(8, 8, "wide"), ValueError, "adapter_kind: must be one of bottleneck, basic, not 'wide'"),
        (lambda: VisualAdapter(8, 0), ValueError, "output_dim: must be a positive integer"),
        (lambda: VisualAdapter(8, 8, reduction_factor=9), ValueError, "reduction_factor: must be at most the 8 channels, not 9"),
        (
            lambda: ClipBottleneck(8, 8, adapter_type="middle+end-basic"),
            ValueError,
            "adapter_type: 'end' in 'middle.end-basic' is unknown; positions are front, middle, back, trans",
        ),
        (lambda: ClipBottleneck(8, 8, adapter_type="middle-wide"), ValueError, "adapter_kind: must be one of"),
        (lambda: clip_stage(8, 8, 0), ValueError, "blocks: must be at least 1, not 0"),
        (lambda: AdaptedOutput(nn.Linear(2, 2), nn.Identity()), TypeError, "output: a Linear without dense, dropout, LayerNorm is no output half"),
        (lambda: Bottleneck(8, 4, residual=False, input_scale=0.5), ValueError, "input_scale: there is no residual to scale"),
    ],
)
def test_errors(make: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
