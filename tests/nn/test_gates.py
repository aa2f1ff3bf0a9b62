"""VL-PET's gates behind any module, gating only, value residuals, vectors, and modules in turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.nn import IA3, Bottleneck, Gate, GatedBottleneck, GatingOnly, Init, InTurn, ValueParallelAdapter, ValueResidual, in_turn
from tests import eager

D, R = 12, 8
GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small")


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, D, dtype=dtype, generator=generator) for _ in range(2)]


def filled(module: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.to(dtype).parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.3)
    return module


def check(module: nn.Module, out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(t.square().sum(), list(module.parameters()), retain_graph=True) for t in (out, expected)]
    for (name, _), a, b in zip(module.named_parameters(), *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("combine", ["multiply", "add"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gate_behind_an_adapter_is_the_gated_adapter(granularity: str, combine: str) -> None:
    """Parameters have the same names; adapter, then gate, gives what the one operation gives, in the output and in every gradient."""
    gate_rank = 6 if granularity == "large" else None
    fused = filled(GatedBottleneck(D, R, granularity=granularity, gate_rank=gate_rank, combine=combine, scale=0.3))  # type: ignore[arg-type]
    adapter, gate = Bottleneck(D, R).double(), Gate(D, granularity, gate_rank=gate_rank, combine=combine, scale=0.3).double()  # type: ignore[arg-type]
    for module in (adapter, gate):
        module.load_state_dict({name: t for name, t in fused.state_dict().items() if name in module.state_dict()})
    assert {**adapter.state_dict(), **gate.state_dict()}.keys() == fused.state_dict().keys()
    h, x = inputs()
    chain = in_turn({"adapter": adapter, "gate": gate})
    torch.testing.assert_close(chain(h, x), fused(h, x), rtol=1e-12, atol=1e-12)
    names = [name for name, _ in fused.named_parameters()]
    ours, theirs = (dict(zip(keys, torch.autograd.grad(y.square().sum(), list(values)), strict=True)) for keys, values, y in (
        ([n.partition(".")[2] for n, _ in chain.named_parameters()], [p for _, p in chain.named_parameters()], chain(h, x)),
        (names, fused.parameters(), fused(h, x)),
    ))  # fmt: skip
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10, msg=name)
    assert (gate.call() is None) == (granularity != "large")


def test_norms() -> None:
    h, x = inputs()
    module = filled(Gate(D, "layernorm", scale=0.5))
    norm = module.layer_norm
    check(module, module(h, x), 0.5 * F.layer_norm(h, (D,), norm.weight, norm.bias, 1e-5))
    module = Gate(D, "l2norm").double()
    assert not list(module.parameters())
    torch.testing.assert_close(module(h, x), h / h.square().sum(-1, keepdim=True).sqrt(), rtol=1e-12, atol=0)
    assert torch.equal(module(torch.zeros_like(h)), torch.zeros_like(h)), "at most divided by 1e-12"


@pytest.mark.parametrize("add_first", [False, True])
def test_gating_only(add_first: bool) -> None:
    h, x = inputs()
    module = filled(GatingOnly(D, R, add_first=add_first, scale=0.3))
    delta = F.linear(eager.gelu_new(F.linear(x, module.gate_down.weight, module.gate_down.bias)), module.gate_up.weight, module.gate_up.bias)
    check(module, module(h, x), 0.3 * ((delta + h) * delta.sigmoid() if add_first else delta + h * delta.sigmoid()))


def test_value_residual() -> None:
    kv, v = inputs()
    assert torch.equal(ValueResidual(D)(kv, v), kv + v)
    module = filled(ValueResidual(D, R))
    gate = F.linear(eager.gelu_new(F.linear(kv, module.gate_down.weight, module.gate_down.bias)), module.gate_up.weight, module.gate_up.bias).sigmoid()
    check(module, module(kv, v), kv + v * gate)


def test_ia3() -> None:
    x, y = inputs()
    for add in (False, True):
        module = filled(IA3(D, add=add))
        for out, h in ((module(x), x), (module(x, y), y)):
            check(module, out, h + h * module.ia3 if add else h * module.ia3)
    assert (0.01 < IA3(4096).ia3.std() < 0.03) and IA3(4, init=Init(one=("ia3",))).ia3.eq(1).all() and not IA3(4, init=Init(zero=("ia3",))).ia3.any()


def test_in_turn() -> None:
    x, y = inputs()
    value, residual = filled(ValueParallelAdapter(D, R)), filled(ValueResidual(D, 3))
    chain = in_turn({"adapter": value, "residual": residual}, beside=True)
    assert torch.equal(chain(x, y), residual(x, value(x, y))) and next(iter(chain.state_dict())) == "adapter.down_sampler.weight"
    assert chain.call() == value.call() and InTurn({"ia3": IA3(D)}).call() is None and in_turn({"only": value}) is value
    with pytest.raises(ValueError, match="modules: must not be empty"):
        InTurn({})
    before = chain.adapter.down_sampler.weight.clone()
    chain.reset_parameters()
    assert not torch.equal(before, chain.adapter.down_sampler.weight)


def modules() -> list[nn.Module]:
    gates = [Gate(D, g, gate_rank=R if g == "large" else None) for g in (*GRANULARITIES, "layernorm", "l2norm")]
    return [*gates, GatingOnly(D, R), ValueResidual(D, R), ValueResidual(D), IA3(D), IA3(D, add=True), in_turn({"a": IA3(D), "b": Gate(D, "small")})]


@pytest.mark.parametrize("number", range(len(modules())))
def test_dtypes_copies_and_one_graph(number: int) -> None:
    """float32 parameters over bfloat16 activations, also under autocast; deep copies; the meta device; compiled in one graph."""
    module = filled(modules()[number], torch.float32)
    h, x = inputs(torch.float32)
    exact = module(h, x)
    half = module(h.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16 and half.shape == h.shape
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(module(h.bfloat16(), x.bfloat16()).float(), exact, rtol=0.05, atol=0.05)
    assert torch.equal(copy.deepcopy(module)(h, x), exact) and repr(module)
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
        assert all(torch.isfinite(p).all() for p in module.parameters())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(h, x), module(h, x))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Gate(D, "huge"), "granularity: 'huge' is unknown; must be one of large, large_full, middleX, middleY, small, layernorm, l2norm"),
        (lambda: Gate(D, "large"), "gate_rank: granularity 'large' needs one"),
        (lambda: Gate(D, "small", gate_rank=3), "gate_rank: granularity 'small' has no gate rank"),
        (lambda: Gate(D, "l2norm", combine="add"), "combine: granularity 'l2norm' has no gate to add"),
        (lambda: Gate(D, "small", combine="max"), "combine: must be 'multiply' or 'add'"),
        (lambda: Gate(D, "small", scale=float("nan")), "scale: must be a finite number"),
        (lambda: GatingOnly(D, 0), "rank: must be a positive integer, not 0"),
        (lambda: GatingOnly(D, 2, activation="tanh"), "activation: 'tanh' is unknown"),
        (lambda: ValueResidual(D, 0), "gate_rank: must be a positive integer, not 0"),
        (lambda: IA3(0), "width: must be a positive integer, not 0"),
        (lambda: Gate(D, "small")(torch.ones(3, D), torch.ones(3, D)), r"h: granularity 'small' averages over the sequence and needs \(B, L, D\)"),
        (lambda: Gate(D, "middleX")(torch.ones(3, D)), "x: granularity 'middleX' needs the residual stream, got None"),
    ],
)
def test_errors(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
