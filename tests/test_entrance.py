"""The ways a call can come in: eager, compiled, exported, under function transforms, autocast, checkpointing, threads; for every op on every backend of the machine's CPU."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._python_dispatch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastadapt import backend, functional
from fastadapt.ops import _library
from tests import eager
from tests.ops import checks
from tests.ops.checks import assert_same_bits, evaluate, every_backend, one_backend, runs_on
from tests.ops.specs import GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, specs
from tests.tolerance import FLOOR, assert_close_to_f64, relative_error

PLAIN = Bottleneck(lead=(3, 7), width=16, rank=4, residual="other", scale="tensor", gate=True)
GATED = Gated(lead=(3, 7), width=16, rank=4, gate_rank=5)
SMALL = Gated(lead=(3, 7), width=16, rank=4, granularity="small", scale=0.3)
COMPACTER = PHM(lead=(3, 7), width=16, rank=4, residual="other", scale=0.3)
LORA = Lora(lead=(3, 7), width=16, out=12, rank=4, biases="up", scale=0.3, dropout=0.3)
NORM = Norm(lead=(3, 7), width=16, dropout=0.3)
CASTS = [PLAIN, GATED, COMPACTER, LORA]
EVERY = specs([*CASTS, NORM])
# An argument of each op that is trained.
WEIGHT = {"bottleneck": "w_down", "gated_bottleneck": "w_down", "phm_bottleneck": "left_down", "lora": "w_down", "dropout_add_norm": "weight"}
# The tensor arguments of the ops, in order.
ORDER = {
    "bottleneck": ("x", "w_down", "b_down", "w_up", "b_up", "gate", "scale", "residual"),
    "gated_bottleneck": ("h", "x", "w_down", "b_down", "w_up", "b_up", "gate_weight", "gate_bias", "gate_up_weight", "gate_up_bias"),
    "phm_bottleneck": ("x", "rule_down", "left_down", "right_down", "b_down", "rule_up", "left_up", "right_up", "b_up", "residual"),
    "lora": ("x", "y", "w_down", "w_up", "b_up"),
    "dropout_add_norm": ("x", "residual", "weight", "bias"),
}
ALL = specs(
    [
        PLAIN,
        COMPACTER,
        LORA,
        replace(LORA, biases="none", dropout=0.0),
        NORM,
        replace(NORM, norm="rms", biases="weight", dropout=0.0, returns="both"),
        replace(NORM, dtype=torch.bfloat16, param_dtype=torch.float32, residual="wide", norm=None, biases="none"),
        Norm(lead=(21,), width=16, residual=None),
        Bottleneck(lead=(21,), width=16, rank=4, heads=2, norm_before=True, norm_after=True),
        *(Gated(lead=(3, 7), width=16, rank=4, gate_rank=5, granularity=g) for g in GRANULARITIES),
    ]
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Tests share no compiled graphs."""
    yield
    torch._dynamo.reset()


class Module(torch.nn.Module):
    """A spec's parameters as a module; the activations are its inputs."""

    def __init__(self, spec: Spec, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec, self.names = spec, [n for n in tensors if n not in spec.activations]
        self.parameters_ = torch.nn.ParameterList([torch.nn.Parameter(tensors[n]) for n in self.names])

    def forward(self, *activations: Tensor) -> Tensor:
        return self.spec.call(functional, {**dict(zip(self.spec.activations, activations, strict=True)), **dict(zip(self.names, self.parameters_, strict=True))})


def plain(spec: Spec, name: str, device: str, seed: int = 0) -> dict[str, Tensor]:
    return checks.fused(spec, name, spec.draw(seed, device), spec.cotangent(seed, device))


@one_backend
@ALL
def test_compiled_without_graph_breaks_has_the_bits_of_eager(spec: Spec, name: str, device: str) -> None:
    compiled = torch.compile(lambda t: spec.call(functional, t), fullgraph=True, backend="aot_eager")
    expected = plain(spec, name, device)
    with runs_on(spec.op, name):
        got = evaluate(compiled, spec.draw(0, device), spec.cotangent(0, device))
    assert_same_bits(got, expected)


@one_backend
@EVERY
def test_compiled_by_inductor(spec: Spec, name: str, device: str) -> None:
    compiled = torch.compile(lambda t: spec.call(functional, t), fullgraph=True)
    expected = plain(spec, name, device)
    with runs_on(spec.op, name):
        got = evaluate(compiled, spec.draw(0, device), spec.cotangent(0, device))
    for key in expected:
        assert relative_error(got[key], expected[key]) <= 5 * FLOOR[spec.dtype], key


@one_backend
@specs([PLAIN, SMALL, COMPACTER, LORA, NORM])
def test_other_shapes_do_not_compile_again(spec: Spec, name: str, device: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = Module(spec, spec.draw(0, device))
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for lead in ((3, 7), (2, 9), (5, 31)):
        other = replace(spec, lead=lead)
        activations, dy = {n: t for n, t in other.draw(1, device).items() if n in spec.activations}, other.cotangent(1, device)
        with runs_on(spec.op, name, counts=(2, 2)):
            expected, got = (evaluate(lambda t, run=run: run(*t.values()), activations, dy) for run in (module, compiled))
        assert_same_bits(got, expected)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@one_backend
@specs([replace(PLAIN, lead=(21,)), GATED, replace(COMPACTER, lead=(21,)), LORA, NORM])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(spec: Spec, name: str, device: str, strict: bool) -> None:
    tensors = spec.draw(0, device)
    module = Module(spec, tensors)
    batch = torch.export.Dim("batch", min=2, max=64)
    with backend.use(name):
        exported = torch.export.export(module, tuple(tensors[n] for n in spec.activations), strict=strict, dynamic_shapes=(tuple({0: batch} for _ in spec.activations),))
    other = replace(spec, lead=(5, *spec.lead[1:]))
    activations = [other.draw(1, device)[n] for n in spec.activations]
    with backend.use(name):
        expected = module(*activations)
    with runs_on(spec.op, name, counts=(1, 0)):
        got = exported.module()(*activations)
    assert_same_bits({"y": got.detach()}, {"y": expected.detach()})


def _tangent(y: Callable[[Tensor], Tensor], w: Tensor) -> Tensor | None:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(y(forward_ad.make_dual(w, w))).tangent


def _transforms(spec: Spec, ops: Any, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Any]:
    """One function of a weight, seen by every transform."""

    def y(w: Tensor) -> Tensor:
        return spec.call(ops, {**tensors, WEIGHT[spec.op]: w})

    def loss(w: Tensor, scale: Tensor) -> Tensor:
        return (y(w).square() * dy * scale).sum()

    w, scales = tensors[WEIGHT[spec.op]], torch.tensor([1.0, 0.5, -2.0], dtype=dy.dtype)
    one, many = torch.func.grad(loss), torch.func.vmap(torch.func.grad(loss), (None, 0))
    return {
        "grad": lambda: one(w, scales[1]),
        "vmap(grad)": lambda: many(w, scales),
        "vmap over weights": lambda: torch.func.vmap(y)(torch.stack([w, 2 * w])),
        "jacrev": lambda: torch.func.jacrev(y)(w),
        "jacfwd": lambda: torch.func.jacfwd(y)(w),
        "jvp": lambda: torch.func.jvp(y, (w,), (w,))[1],
        "dual numbers": lambda: _tangent(y, w),
        "hessian": lambda: torch.func.jacrev(torch.func.grad(loss))(w, scales[0]),
        "compile(grad)": lambda: torch.compile(one, fullgraph=True, backend="aot_eager")(w, scales[1]),
        "compile(vmap(grad))": lambda: torch.compile(many, fullgraph=True, backend="aot_eager")(w, scales),
    }


@EVERY
@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "vmap over weights", "jacrev", "jacfwd", "jvp", "dual numbers", "hessian", "compile(grad)", "compile(vmap(grad))"])
def test_function_transforms_run_on_the_reference(spec: Spec, transform: str) -> None:
    tensors, dy = {n: t.double() for n, t in spec.draw(0).items()}, spec.cotangent(0).double()
    uncompiled = transform.removeprefix("compile(").removesuffix(")") if transform.startswith("compile") else transform
    got, expected = _transforms(spec, functional, tensors, dy)[transform](), _transforms(spec, eager, tensors, dy)[uncompiled]()
    assert got is not None and expected.abs().max() > 0
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


@EVERY
def test_dual_numbers_where_a_kernel_would_run(spec: Spec) -> None:
    """Of which an op would drop the tangents without a word."""
    tensors, dy = spec.draw(0), spec.cotangent(0)
    tangent, same = _transforms(spec, functional, tensors, dy)["dual numbers"](), _transforms(spec, eager, tensors, dy)["jvp"]()
    exact = _transforms(spec, eager, {n: t.double() for n, t in tensors.items()}, dy.double())["jvp"]()
    assert tangent is not None and tensors[WEIGHT[spec.op]].dtype == torch.float32
    assert_close_to_f64("tangent", tangent, exact, same, gradient=True)


@EVERY
@pytest.mark.parametrize("transform", ["grad", "vmap over weights", "jvp", "dual numbers", "compile(grad)"])
def test_no_kernel_can_be_demanded_of_transforms(spec: Spec, transform: str) -> None:
    run = _transforms(spec, functional, spec.draw(0), spec.cotangent(0))[transform]
    with (
        backend.use("cpu"),
        pytest.raises(Exception, match=r"backend 'cpu' cannot run this call: under torch.func transforms"),
    ):
        run()
    with backend.use("reference"):
        run()


@one_backend
@ALL
def test_opcheck(spec: Spec, name: str, device: str) -> None:
    """torch's own checks of the schema, the fake implementation, the autograd registration and tracing, forward and backward op."""
    if isinstance(spec, Bottleneck):  # norms are ops beside it
        spec = replace(spec, norm_before=False, norm_after=False)
    with checks.spied() as calls:
        plain(spec, name, device)
    assert [direction for direction, *_ in calls] == ["forward", "backward"]
    for direction, args, _ in calls:
        op = getattr(torch.ops.fastadapt, spec.op if direction == "forward" else f"{spec.op}_backward").default
        args = tuple(a.detach().clone().requires_grad_(direction == "forward") if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        results = torch.library.opcheck(op, (*args, backend.index(name)))
        assert set(results.values()) == {"SUCCESS"}, results


@one_backend
@EVERY
def test_the_ops_themselves_differentiate(spec: Spec, name: str, device: str) -> None:
    """A caller of `torch.ops.fastadapt` gets the same gradients as one of `fastadapt.functional`."""
    with checks.spied() as calls:
        expected = plain(spec, name, device)
    args = calls[0][1]
    leaves = {n: a.detach().requires_grad_() for n, a in zip(ORDER[spec.op], args, strict=False)}
    y = getattr(torch.ops.fastadapt, spec.op)(*leaves.values(), *args[len(leaves) :], backend.index(name))[0]
    grads = torch.autograd.grad(y, [leaves[n[2:]] for n in expected if n != "y"], spec.cotangent(0, device).reshape(y.shape))
    for (key, gradient), got in zip([item for item in expected.items() if item[0] != "y"], grads, strict=True):
        assert torch.equal(got.reshape(gradient.shape), gradient), key


@one_backend
@specs(CASTS)  # the norm leaves dtypes as they are: tests/ops/test_dropout_add_norm.py
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast(spec: Spec, name: str, device: str, compiled: bool) -> None:
    """fp32 in, bf16 out; parameters stay fp32, and so do their gradients; the numbers are those of fp32 parameters over bf16 activations."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device).bfloat16()
    call = lambda t: spec.call(functional, t)
    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with checks.spied() as calls, torch.autocast(device, dtype=torch.bfloat16), runs_on(spec.op, name):
        got = evaluate(call, tensors, dy)
    assert got["y"].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for n, g in got.items() if n != "y")
    assert {a.dtype for a in calls[0][1] if isinstance(a, Tensor) and a.is_floating_point()} == {torch.bfloat16, torch.float32}
    mixed = replace(spec, dtype=MIXED[0], param_dtype=MIXED[1])
    expected = checks.fused(mixed, name, {n: t.to(torch.bfloat16) if n in spec.activations else t for n, t in tensors.items()}, dy)
    assert_same_bits({n: t.float() for n, t in got.items()}, {n: t.float() for n, t in expected.items()})


@specs(CASTS)
def test_autocast_leaves_float64(spec: Spec) -> None:
    tensors = {n: t.double() for n, t in spec.draw(0).items()}
    want = spec.call(functional, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(spec.call(functional, tensors), want)


@every_backend
@EVERY
def test_the_ops_themselves_ignore_autocast(spec: Spec, name: str, device: str) -> None:
    """Casting is `functional`'s decision; what reaches an op is computed as it came."""
    with checks.spied() as calls:
        expected = plain(spec, name, device)["y"]
    with torch.autocast(device, dtype=torch.bfloat16):
        y = getattr(torch.ops.fastadapt, spec.op)(*calls[0][1], backend.index(name))[0]
    assert_same_bits({"y": y.reshape(expected.shape)}, {"y": expected})


@one_backend
@EVERY
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing(spec: Spec, name: str, device: str, reentrant: bool) -> None:
    names = list(spec.draw(0))

    def call(t: dict[str, Tensor]) -> Tensor:
        return checkpoint(lambda *args: spec.call(functional, dict(zip(names, args, strict=True))), *t.values(), use_reentrant=reentrant)

    tensors, dy = {n: t.requires_grad_() for n, t in spec.draw(0, device).items()}, spec.cotangent(0, device)
    with runs_on(spec.op, name, counts=(2, 1)):
        y = call(tensors)
        y.backward(dy)
    assert_same_bits({"y": y.detach(), **{f"d {n}": t.grad for n, t in tensors.items()}}, plain(spec, name, device))


@one_backend
@EVERY
@pytest.mark.parametrize("direct", [False, True], ids=["functional", "op"])
def test_double_backward_is_refused(spec: Spec, name: str, device: str, direct: bool) -> None:
    tensors = {n: t.requires_grad_() for n, t in spec.draw(0, device).items()}
    first = next(iter(tensors.values()))
    with checks.spied() as calls, backend.use(name):
        y = spec.call(functional, tensors)
    if direct:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in calls[0][1]]
        first, y = leaves[0], getattr(torch.ops.fastadapt, spec.op)(*leaves, backend.index(name))[0]
    (gradient,) = torch.autograd.grad(y.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match=f"double backward of {spec.op} is not supported"):
        gradient.sum().backward()


@EVERY
def test_batched_gradients_are_refused_or_right(spec: Spec) -> None:
    """As those of `torch.autograd.grad(..., is_grads_batched=True)`: C++ has no rule for them, torch has one for ops of Python."""
    tensors = {n: t.requires_grad_() for n, t in spec.draw(0).items()}
    leaves, dys = list(tensors.values()), torch.stack([spec.cotangent(seed) for seed in range(3)])
    y = spec.call(functional, tensors)
    try:
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    except RuntimeError as error:
        assert re.search(f"backward of {spec.op} takes a plain tensor as gradient, neither batched", str(error))
        with backend.use("reference"):
            y = spec.call(functional, tensors)
        batched = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for got, want in zip(batched, torch.autograd.grad(y, leaves, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want)


@one_backend
@EVERY
def test_a_saved_argument_changed_in_place_is_noticed(spec: Spec, name: str, device: str) -> None:
    first = () if isinstance(spec, Norm) else spec.activations[:1]  # the norm keeps the sum, not x
    for victim in (*first, *(n for n in spec.shapes() if n.startswith(("w", "rule_", "left_", "right_")))):
        tensors = {n: t.requires_grad_(n != victim) for n, t in spec.draw(0, device).items()}
        with backend.use(name):
            y = spec.call(functional, tensors)
        tensors[victim].add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_backend
@EVERY
def test_backward_runs_where_forward_ran(spec: Spec, name: str, device: str) -> None:
    """After the ``with`` has ended, under another demand, and in another thread."""
    tensors, dy = {n: t.requires_grad_() for n, t in spec.draw(0, device).items()}, spec.cotangent(0, device)
    other = "cpu" if name == "reference" else "reference"
    outputs = []
    with backend.use(name):
        outputs = [spec.call(functional, tensors) for _ in range(3)]
    before = backend.ran()

    def under_another_demand() -> None:
        with backend.use(other):
            outputs[1].backward(dy)

    thread = threading.Thread(target=under_another_demand)
    outputs[0].backward(dy)
    thread.start(), thread.join()
    outputs[2].backward(dy)
    ran = {key: n - before.get(key, 0) for key, n in backend.ran().items() if n != before.get(key, 0)}
    assert ran == {(spec.op, "backward", name): 3}


@EVERY
@pytest.mark.parametrize("name", checks.kernel_names)
def test_a_compiled_function_follows_the_demand(spec: Spec, name: str) -> None:
    device = "cuda" if name == "triton" else "cpu"
    compiled = torch.compile(lambda t: spec.call(functional, t), fullgraph=True, backend="aot_eager")
    for demanded in ("reference", name, "reference"):
        with runs_on(spec.op, demanded):
            evaluate(compiled, spec.draw(0, device), spec.cotangent(0, device))


needs_cpu_kernels = pytest.mark.skipif("cpu" not in checks.kernel_names, reason="the CPU kernels are not built")
SHORT = specs(
    [PLAIN, replace(PLAIN, lead=(21,), residual="input", biases="none"), GATED, SMALL, replace(GATED, granularity="middleY"), LORA, NORM, replace(NORM, norm=None, biases="none")]
)


def long_way(*args: Any) -> None:
    raise AssertionError("this call goes the long way")


@needs_cpu_kernels
@SHORT
def test_a_plain_call_takes_the_short_way(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python in one step, forward and backward, on the CPU's kernels; the bits and what is kept are those of the long way."""
    tensors, dy = spec.draw(0), spec.cotangent(0)

    def call() -> tuple[dict[str, Tensor], list[tuple[Any, ...]]]:
        kept: list[Any] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append((t.shape, t.dtype)), t)[1], lambda t: t):
            return checks.fused(spec, "cpu", tensors, dy), sorted((t.numel(), str(dtype)) for t, dtype in kept if t.numel())

    with checks.spied():
        expected, kept = call()
    monkeypatch.setattr(_library, "run", long_way)
    got, kept_too = call()
    assert_same_bits(got, expected)
    assert kept_too == kept
    for context in (torch.no_grad, torch.inference_mode):
        with context(), runs_on(spec.op, "cpu", counts=(1, 0)):
            assert_same_bits({"y": spec.call(functional, tensors)}, {"y": expected["y"]})


@pytest.mark.parametrize("name", ["reference", *checks.kernel_names])
@specs([PLAIN, GATED, SMALL, COMPACTER, LORA, NORM, Routed(lead=(3, 7), width=16, rank=4)])
def test_what_is_kept_may_come_back_with_other_strides(spec: Spec, name: str) -> None:
    """From a hook that compresses or offloads, on the short way and on the long one."""
    device = "cuda" if name == "triton" else "cpu"
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)

    def spread(t: Tensor) -> Tensor:
        wide = t.new_zeros((*t.shape, 2))
        wide[..., 0] = t
        return wide[..., 0]

    for way in (contextlib.nullcontext, checks.spied):
        with way():
            expected = checks.fused(spec, name, tensors, dy)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spread):
                assert_same_bits(checks.fused(spec, name, tensors, dy), expected)


@needs_cpu_kernels
@pytest.mark.parametrize("op", ["lora", "dropout_add_norm"])
def test_the_short_way_draws_the_same_seeds(op: str) -> None:
    x, w = torch.randn(5, 8), torch.eye(8)

    def call() -> Tensor:
        torch.manual_seed(3)
        return functional.lora(x, x, w, w, dropout=0.5) if op == "lora" else functional.dropout_add_norm(x, norm=None, dropout=0.5)

    with checks.spied():
        expected = call()
    assert torch.equal(call(), expected) and not torch.equal(expected, x)


class Subclass(Tensor):
    """Sees torch's functions."""


class Watcher(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@needs_cpu_kernels
@SHORT
@pytest.mark.parametrize("what", ["watched", "subclass", "autocast", "double", "reference", "negated"])
def test_what_is_not_plain_goes_the_long_way(spec: Spec, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = spec.draw(0)
    first, run, directions = next(iter(tensors)), _library.run, []
    with checks.spied(), backend.use("cpu"):
        expected = spec.call(functional, tensors)
    monkeypatch.setattr(_library, "run", lambda op, direction, *args: directions.append(direction) or run(op, direction, *args))
    if what == "watched":
        with Watcher() as watcher, torch.inference_mode():
            spec.call(functional, tensors)
        assert f"fastadapt::{spec.op}" in watcher.seen
    elif what == "autocast":
        if spec.op == "dropout_add_norm":
            pytest.skip("whose tensors keep their dtypes")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            spec.call(functional, tensors)
    elif what == "double":
        spec.call(functional, {n: t.double() for n, t in tensors.items()})
    elif what == "reference":
        with backend.use("reference"):
            spec.call(functional, tensors)
    else:
        lazily = torch._neg_view(-tensors[first])
        assert lazily.is_neg()
        with backend.use("cpu"):
            y = spec.call(functional, {**tensors, first: tensors[first].as_subclass(Subclass) if what == "subclass" else lazily})
        assert_same_bits({"y": y.as_subclass(Tensor)}, {"y": expected})
    assert directions == ["forward"]


@EVERY
def test_meta_tensors_give_shapes(spec: Spec) -> None:
    tensors = {n: t.requires_grad_() for n, t in spec.draw(0, "meta").items()}
    y = spec.call(functional, tensors)
    assert y.device.type == "meta" and y.shape == (*spec.lead, spec.out_width) and y.dtype == spec.dtype
    y.sum().backward()
    assert all(t.grad.shape == t.shape and t.grad.device.type == "meta" for t in tensors.values())


@one_backend
@EVERY
def test_inference_inside_a_trained_graph(spec: Spec, name: str, device: str) -> None:
    """A frozen adapter passes the gradient of its input on, and takes none itself."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    first = spec.activations[0]
    with runs_on(spec.op, name):
        got = evaluate(lambda t: spec.call(functional, {**t, first: 2.0 * t[first]}), tensors, dy, needs=(first,))
    doubled = checks.fused(spec, name, {**tensors, first: 2.0 * tensors[first]}, dy, needs=(first,))
    assert_same_bits({"d": got[f"d {first}"]}, {"d": 2.0 * doubled[f"d {first}"]})
