"""The drop-in modules: they are the functional ops, under the papers' names."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fastadapt.nn
from fastadapt import functional
from fastadapt.nn import Bottleneck, GatedBottleneck, Init, StreamBottleneck, ValueParallelAdapter
from tests import eager

GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small")
D, R = 12, 8


def inputs(n: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, D, dtype=dtype, generator=generator) for _ in range(n)]


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.3)
    return module


def check(module: nn.Module, out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(t.square().sum(), list(module.parameters()), retain_graph=True) for t in (out, expected)]
    for (name, _), a, b in zip(module.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "relu"},
        {"residual": False},
        {"scale": 0.3},
        {"heads": 4},
        {"norm_before": True},
        {"norm_after": True},
        {"norm_before": True, "norm_after": True, "scale": 2.0},
    ],
)
def test_bottleneck(options: dict[str, object], bias: bool) -> None:
    module = filled(Bottleneck(D, R, bias=bias, dtype=torch.float64, **options))  # type: ignore[arg-type]
    x, other = inputs()
    down, up, norms = module.down_sampler, module.up_sampler, {}
    for name, norm in (("norm_before", module.pre_layer_norm), ("norm_after", module.post_layer_norm)):
        assert (norm is not None) == bool(options.get(name))
        norms[name] = None if norm is None else (norm.weight, norm.bias, 1e-5)
    expected = eager.bottleneck(
        x,
        down.weight,
        up.weight,
        down.bias,
        up.bias,
        activation=options.get("activation", "gelu_new"),
        residual="input" if options.get("residual", True) else None,
        scale=options.get("scale", 1.0),
        **norms,
    )
    check(module, module(x), expected)
    assert torch.equal(module(x, other), module(x)), "the residual stream has no part in it"


@pytest.mark.parametrize("kind", [Bottleneck, ValueParallelAdapter, GatedBottleneck])
def test_pair_is_block_diagonal(kind: type[nn.Module]) -> None:
    module = filled(kind(D, R, heads=4, pair=True, dtype=torch.float64))
    x, other = inputs()
    assert module.up_sampler.weight.shape == (D, R // 4)
    dense = filled(kind(D, R, dtype=torch.float64))
    dense.load_state_dict({**module.state_dict(), "up_sampler.weight": torch.block_diag(*module.up_sampler.weight.detach().chunk(4))})
    torch.testing.assert_close(module(x, other), dense(x, other))


@pytest.mark.parametrize("options", [{}, {"scale": 4.0, "activation": "relu"}, {"residual": False}, {"norm_before": True, "norm_after": True}, {"input_scale": 0.5}])
@pytest.mark.parametrize("reads", ["stream", "sum", "normed sum"])
def test_stream(reads: str, options: dict[str, object]) -> None:
    norm = nn.LayerNorm(D, dtype=torch.float64) if reads == "normed sum" else None
    if norm is not None:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    module = filled(StreamBottleneck(D, R, reads="stream" if reads == "stream" else "sum", norm=norm, dtype=torch.float64, **options))  # type: ignore[arg-type]
    assert not any(name.startswith("norm") for name, _ in [*module.named_parameters(), *module.named_modules()]), "the host's norm stays the host's"
    h, x = inputs()
    inside = {"stream": x, "sum": h + x}.get(reads)
    inside = nn.functional.layer_norm(h + x, (D,), norm.weight, norm.bias) if inside is None else inside  # type: ignore[union-attr]
    down, up, norms = module.down_sampler, module.up_sampler, {}
    for name, own in (("norm_before", module.pre_layer_norm), ("norm_after", module.post_layer_norm)):
        norms[name] = None if own is None else (own.weight, own.bias, 1e-5)
    residual = options.get("input_scale", 1.0) * h if options.get("residual", True) else None  # type: ignore[operator]
    expected = eager.bottleneck(
        inside, down.weight, up.weight, down.bias, up.bias, activation=options.get("activation", "gelu_new"), residual=residual, scale=options.get("scale", 1.0), **norms
    )
    check(module, module(h, x), expected)
    called, arguments = module.bottleneck_call(h, x)
    torch.testing.assert_close(functional.bottleneck(called, **arguments), expected, rtol=1e-12, atol=1e-12)
    if not options:
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(h, x), expected, rtol=1e-12, atol=1e-12)


def test_what_a_stream_bottleneck_reads() -> None:
    with pytest.raises(ValueError, match="reads: must be one of stream, sum, not 'output'"):
        StreamBottleneck(D, R, reads="output")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: must be the residual stream"):
        StreamBottleneck(D, R, reads="sum")(torch.randn(2, D))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_value_parallel(bias: bool, scale: float) -> None:
    module = filled(ValueParallelAdapter(D, R, bias=bias, scale=scale, dtype=torch.float64))
    kv, v = inputs()
    down, up = module.down_sampler, module.up_sampler
    check(module, module(kv, v), eager.bottleneck(kv, down.weight, up.weight, down.bias, up.bias, residual=v, scale=scale))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("options", [{}, {"combine": "add"}, {"scale": 0.3, "input_scale": 0.5, "adapter_scale": 2.0, "activation": "silu"}, {"bias": False, "save_gate": False}])
def test_gated_bottleneck(granularity: str, options: dict[str, object]) -> None:
    module = filled(GatedBottleneck(D, R, granularity=granularity, gate_rank=6 if granularity == "large" else None, dtype=torch.float64, **options))  # type: ignore[arg-type]
    h, x = inputs()
    down, up = module.down_sampler, module.up_sampler
    if granularity == "large":
        gates = {"gate_weight": module.gate_down.weight, "gate_bias": module.gate_down.bias, "gate_up_weight": module.gate_up.weight, "gate_up_bias": module.gate_up.bias}
    elif granularity == "middleY":
        gates = {"gate_weight": module.gate_vector}
    else:
        weight = module.gate.weight
        gates = {"gate_weight": weight if granularity == "large_full" else weight[0], "gate_bias": module.gate.bias}
    eagerly = {k: v for k, v in options.items() if k not in ("bias", "save_gate")}
    check(module, module(h, x), eager.gated_bottleneck(h, x, down.weight, up.weight, down.bias, up.bias, granularity=granularity, **gates, **eagerly))


def test_names_and_shapes() -> None:
    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in module.state_dict().items()}

    adapter = {"down_sampler.weight": (R, D), "down_sampler.bias": (R,), "up_sampler.weight": (D, R), "up_sampler.bias": (D,)}
    norms = {f"{name}_layer_norm.{part}": (D,) for name in ("pre", "post") for part in ("weight", "bias")}
    assert shapes(Bottleneck(D, R, norm_before=True, norm_after=True)) == {**adapter, **norms}
    gates: dict[str, dict[str, tuple[int, ...]]] = {
        "large": {"gate_down.weight": (5, D), "gate_down.bias": (5,), "gate_up.weight": (D, 5), "gate_up.bias": (D,)},
        "large_full": {"gate.weight": (D, D), "gate.bias": (D,)},
        "middleX": {"gate.weight": (1, D), "gate.bias": (1,)},
        "middleY": {"gate_vector": (D,)},
        "small": {"gate.weight": (1, 2 * D), "gate.bias": (1,)},
    }
    for granularity, extra in gates.items():
        assert shapes(GatedBottleneck(D, R, granularity=granularity, gate_rank=5 if granularity == "large" else None)) == {**adapter, **extra}
    assert GatedBottleneck(D, R).gate_down.out_features == R


def modules() -> list[nn.Module]:
    return [Bottleneck(D, R, norm_before=True), ValueParallelAdapter(D, R), *(GatedBottleneck(D, R, granularity=g) for g in GRANULARITIES)]


def test_copies_moves_and_meta() -> None:
    h, x = inputs(dtype=torch.float32)
    for module in modules():
        out = module(h, x)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(h, x), out) and other.extra_repr() == module.extra_repr()
        assert module.double()(h.double(), x.double()).dtype == torch.float64
        with torch.device("meta"):
            meta = type(module)(D, R, **({"granularity": module.granularity} if isinstance(module, GatedBottleneck) else {}))
        assert all(p.is_meta for p in meta.parameters())
        meta.to_empty(device="cpu").reset_parameters()
        assert all(torch.isfinite(p).all() for p in meta.parameters())
        assert repr(module).startswith(type(module).__name__ + "(") and f"rank={R}" in repr(module)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in GatedBottleneck(D, R, device="meta", dtype=torch.bfloat16).parameters())


def test_default_start_is_torchs() -> None:
    """A Linear's, drawn from torch's generator in the order of the children, and nothing beside."""
    torch.manual_seed(0)
    module = Bottleneck(D, R)
    rest = torch.rand(1)
    torch.manual_seed(0)
    down, up = nn.Linear(D, R), nn.Linear(R, D)
    assert torch.equal(torch.rand(1), rest)
    for ours, theirs in ((module.down_sampler, down), (module.up_sampler, up)):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_init_rules() -> None:
    module = GatedBottleneck(D, R, granularity="middleY", init=Init(std=0.5, zero=("up_sampler", "gate_vector")))
    assert not module.up_sampler.weight.any() and not module.up_sampler.bias.any() and not module.gate_vector.any() and not module.down_sampler.bias.any()
    assert 0.3 < module.down_sampler.weight.std() < 0.7
    first = module.down_sampler.weight.clone()
    module.reset_parameters()
    assert not torch.equal(first, module.down_sampler.weight)
    norm = Bottleneck(D, R, norm_after=True, init=Init(std=0.5)).post_layer_norm
    assert norm.weight.eq(1).all() and not norm.bias.any() and norm.eps == 1e-5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Bottleneck(D, 0), "rank: must be a positive integer, not 0"),
        (lambda: Bottleneck(0, R), "width: must be a positive integer"),
        (lambda: Bottleneck(D, 2.0), "rank: must be a positive integer, not 2.0"),
        (lambda: Bottleneck(D, R, heads=3), "heads: 3 must divide rank 8"),
        (lambda: Bottleneck(D, R, heads=8, pair=True), "heads: 8 must divide rank 8 and width 12"),
        (lambda: Bottleneck(D, R, activation="tanh"), "activation: 'tanh' is unknown"),
        (lambda: ValueParallelAdapter(D, R, scale=float("inf")), "scale: must be a finite number"),
        (lambda: GatedBottleneck(D, R, granularity="huge"), "granularity: 'huge' is unknown; must be one of large"),
        (lambda: GatedBottleneck(D, R, granularity="small", gate_rank=3), "gate_rank: granularity 'small' has no gate rank"),
        (lambda: GatedBottleneck(D, R, gate_rank=0), "gate_rank: must be a positive integer"),
        (lambda: GatedBottleneck(D, R, combine="max"), "combine: must be 'multiply' or 'add'"),
        (lambda: GatedBottleneck(D, R, adapter_scale=float("nan")), "adapter_scale: must be a finite number"),
    ],
)
def test_bad_arguments(make, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        make()


def test_wrong_inputs_are_refused_by_name() -> None:
    h, x = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="x: granularity 'large' needs the residual stream"):
        GatedBottleneck(D, R)(h)
    with pytest.raises(ValueError, match="w_down: shape"):
        Bottleneck(D + 1, R)(h)
    with pytest.raises(TypeError, match=r"x: dtype torch.float64 must equal that of h, torch.float32"):
        GatedBottleneck(D, R)(h, x.double())
    assert GatedBottleneck(D, R, granularity="middleY")(h).shape == h.shape


def test_parametrised_projections() -> None:
    h, x = inputs()
    for module in (filled(Bottleneck(D, R, dtype=torch.float64)), filled(GatedBottleneck(D, R, dtype=torch.float64))):
        out = module(h, x)
        nn.utils.parametrizations.weight_norm(module.down_sampler)
        torch.testing.assert_close(module(h, x), out)
        module.down_sampler.parametrizations.weight.original0.data.mul_(2)
        assert not torch.allclose(module(h, x), out)


def test_compiled_in_one_graph() -> None:
    h, x = inputs(dtype=torch.float32)
    for module in (Bottleneck(D, R, norm_before=True), GatedBottleneck(D, R)):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(h, x), module(h, x))


def test_one_op_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("bottleneck", "gated_bottleneck"):
        op = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, op=op, name=name, **k: calls.append(name) or op(*a, **k))
    h, x = inputs(dtype=torch.float32)
    for module in modules():
        module(h, x)
        assert calls.pop() == module.call()["op"] and not calls


def test_save_gate_reaches_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool | None] = []
    op = functional.gated_bottleneck
    monkeypatch.setattr(functional, "gated_bottleneck", lambda *a, **k: seen.append(k["save_gate"]) or op(*a, **k))
    for save_gate in (None, True, False):
        GatedBottleneck(D, R, save_gate=save_gate)(*inputs(dtype=torch.float32))
    assert seen == [None, True, False]


SMALLEST: dict[str, tuple[Any, ...]] = {
    "Bottleneck": (8, 4),
    "Gate": (8, "middleX"),
    "GatedBottleneck": (8, 4),
    "GatingOnly": (8, 4),
    "HyperNetwork": (8, 4, 1, ("feed_forward",), fastadapt.nn.TaskEmbeddings(["vqa"])),
    "IA3": (8,),
    "InTurn": ({"ia3": fastadapt.nn.IA3(8)},),
    "IntrinsicDimension": ([8], 4),
    "KeyValueAdapter": (8, 8),
    "LowRankLinear": (8, 8),
    "PHMLinear": (8, 8, 2),
    "TemporalEmbedding": (2, 8),
    "UniAdapter": (8, 4),
    "ValueParallelAdapter": (8, 4),
    "VisualAdapter": (32, 8),
}
"""What each module with booleans is made of."""


def booleans_of(name: str) -> list[str]:
    made = getattr(fastadapt.nn, name)
    return [parameter for parameter, p in inspect.signature(made).parameters.items() if p.annotation in ("bool", "bool | None")] if inspect.isclass(made) else []


@pytest.mark.parametrize(("name", "flag"), [(name, flag) for name in fastadapt.nn.__all__ for flag in booleans_of(name)])
def test_a_string_is_no_boolean(name: str, flag: str) -> None:
    make = getattr(fastadapt.nn, name)
    make(*SMALLEST[name])
    with pytest.raises(ValueError, match=f"^{flag}: must be True or False( or None)?, not 'False'"):
        make(*SMALLEST[name], **{flag: "False"})


@pytest.mark.parametrize("name", [*SMALLEST, "PerTask"])
def test_reset_parameters_gives_every_tensor_a_value(name: str) -> None:
    """As after ``to_empty``."""
    module = getattr(fastadapt.nn, name)(*copy.deepcopy(SMALLEST.get(name, ({task: Bottleneck(8, 4) for task in "ab"},))))
    tensors = [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        tensor.data.fill_(77)
    module.reset_parameters()
    assert not any(tensor.eq(77).all() for tensor in tensors)


def test_parts_of_a_projection_are_booleans() -> None:
    with pytest.raises(ValueError, match=r"^enabled: must be True or False, not 'False'"):
        fastadapt.nn.MergedLoRA(8, 24, 4, enabled=cast("list[bool]", [True, "False", True]))
