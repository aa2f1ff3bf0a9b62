"""What every backend of every op must pass. The tests of an op say which calls; the bodies are here."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import backend, functional
from fastadapt.ops import _cpu as compiled
from fastadapt.ops import _library
from tests import eager
from tests.golden import Case
from tests.ops.specs import Bottleneck, Spec
from tests.tolerance import FLOOR, Compared, assert_close_to_f64, assert_matches_recorded, assert_rule, relative_error

# A machine that cannot have the C++ library says so here; anywhere else a missing library fails the tests, since they would otherwise pass without running a kernel.
_NO_CPU = os.environ.get("FASTADAPT_TEST_NO_COMPILER") == "1" or platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "DEFAULT"
_cpu = pytest.mark.skipif(_NO_CPU, reason="the cpu backend needs x86-64 with AVX2 and a compiler (FASTADAPT_TEST_NO_COMPILER=1 says there is none)")
_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

REFERENCE = pytest.param("reference", "cpu", id="reference")
CPU = pytest.param("cpu", "cpu", id="cpu", marks=_cpu)
TRITON = pytest.param("triton", "cuda", id="triton", marks=_gpu)
CUDA = pytest.param("cuda", "cuda", id="cuda", marks=_gpu)
# What enters and leaves an op is the same for all backends: tests of that take the best one that each device can have.
one_backend = pytest.mark.parametrize(("name", "device"), [REFERENCE if _NO_CPU else CPU, TRITON])
every_backend = pytest.mark.parametrize(("name", "device"), [REFERENCE, CPU, TRITON])
every_kernel = pytest.mark.parametrize(("name", "device"), [CPU, TRITON])
every_pair = pytest.mark.parametrize(
    ("forward", "backward", "device"),
    [
        pytest.param("reference", "cpu", "cpu", id="reference-cpu", marks=_cpu),
        pytest.param("cpu", "reference", "cpu", id="cpu-reference", marks=_cpu),
        pytest.param("reference", "triton", "cuda", id="reference-triton", marks=_gpu),
        pytest.param("triton", "reference", "cuda", id="triton-reference", marks=_gpu),
    ],
)
# A call that the cuda kernels take too: of half precision, widths that 8 divides.
one_backend_or_cuda = pytest.mark.parametrize(("name", "device"), [REFERENCE if _NO_CPU else CPU, TRITON, CUDA])
on_gpus = pytest.mark.parametrize(("name", "device"), [TRITON, CUDA])
kernel_names: list[Any] = [*([] if _NO_CPU else ["cpu"]), pytest.param("triton", marks=_gpu)]
every_name: list[Any] = ["reference", "cpu", pytest.param("triton", marks=_gpu)]

Results = dict[str, Tensor]
Change = Callable[[dict[str, Tensor], Tensor], tuple[dict[str, Tensor], Tensor]]
"""Of a call's arguments and dy."""


def ran(op: str = "") -> dict[tuple[str, str, str], int]:
    """`fastadapt.backend.ran` without the layer norms that stand around adapters, unless they are the op in question."""
    return {key: n for key, n in backend.ran().items() if key[0] in (op, *_ADAPTERS)}


_ADAPTERS = tuple(op for op in backend._plans if op != "dropout_add_norm")


@contextlib.contextmanager
def runs_on(op: str, forward: str, backward: str | None = None, *, counts: tuple[int, int] = (1, 1)) -> Iterator[None]:
    """Demands backend ``forward`` and asserts that exactly these kernels of the op ran in the block, and none of another op but the layer norms around it."""
    before = ran(op)
    with backend.use(forward):
        yield
    delta = {key: n - before.get(key, 0) for key, n in ran(op).items() if n != before.get(key, 0)}
    expected = {(op, "forward", forward): counts[0], (op, "backward", backward or forward): counts[1]}
    assert delta == {key: n for key, n in expected.items() if n}


@contextlib.contextmanager
def spied(backward: str | None = None) -> Iterator[list[tuple[str, tuple[Any, ...], Any]]]:
    """Records (direction, arguments, outputs) of every kernel call; with ``backward``, backward runs under that backend whatever forward ran under. No call takes the short way."""
    original, entrance, calls = _library.run, compiled.entrance, []

    def run(op: str, direction: str, call: backend.Call, demanded: int, args: tuple[Any, ...]) -> Any:
        out = original(op, direction, call, backend.index(backward) if backward and direction == "backward" else demanded, args)
        calls.append((direction, args, out))
        return out

    _library.run, compiled.entrance = run, lambda op, types: None
    try:
        yield calls
    finally:
        _library.run, compiled.entrance = original, entrance


def evaluate(call: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor], dy: Tensor | None, needs: tuple[str, ...] | None = None) -> Results:
    """The output ``y`` and the gradients of ``(y * dy).sum()`` by name; ``needs`` names the tensors that are trained, by default all; without ``dy`` there is no backward."""
    needs = tuple(tensors) if needs is None else needs
    leaves = {name: t.detach().requires_grad_(name in needs) for name, t in tensors.items()}
    y = call(leaves)
    if dy is None or not needs:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, [leaves[name] for name in needs], dy)
    return {"y": y.detach(), **{f"d {name}": g for name, g in zip(needs, grads, strict=True)}}


def fused(spec: Spec, name: str, tensors: Mapping[str, Tensor], dy: Tensor | None, needs: tuple[str, ...] | None = None, backward: str | None = None) -> Results:
    """The library's result under backend ``name`` (and ``backward``), which must have run it."""
    with runs_on(spec.op, name, backward, counts=(1, int(dy is not None and spec.runs_backward(tuple(tensors) if needs is None else needs)))):
        return evaluate(lambda t: spec.call(functional, t), tensors, dy, needs)


def in_eager(spec: Spec, tensors: Mapping[str, Tensor], dy: Tensor) -> Results:
    return evaluate(lambda t: spec.call(eager, t), tensors, dy)


def exact(spec: Spec, tensors: Mapping[str, Tensor], dy: Tensor) -> Results:
    return in_eager(spec, {n: t.double() for n, t in tensors.items()}, dy.double())


def compared(got: Results, exact64: Results, same_dtype: Results) -> dict[str, Compared]:
    return {name: Compared(got[name], exact64[name], same_dtype[name], name.startswith("d ")) for name in got}


def assert_within_rule(spec: Spec, name: str, device: str, *, backward: str | None = None, needs: tuple[str, ...] | None = None, change: Change = lambda t, dy: (t, dy)) -> None:
    """Output and every gradient (that ``needs`` names) of ``spec`` (after a ``change``) under backend ``name`` (and ``backward``), within the rule of `tests.tolerance`."""

    def run(seed: int) -> dict[str, Compared]:
        tensors, dy = change(spec.draw(seed, device), spec.cotangent(seed, device))
        got = fused(spec, name, tensors, dy, needs, backward)
        assert got["y"].dtype == spec.out_dtype and got["y"].shape == dy.shape
        return compared(got, exact(spec, tensors, dy), in_eager(spec, tensors, dy))

    with spied(backward) if backward else contextlib.nullcontext():
        assert_rule(run, spec.out_dtype)


def alike(tensors: Mapping[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Rows that are all alike, as behind a mean over them: a sum over rows rounds the same way every time, so its errors add up."""
    first = lambda t: t[(slice(1),) * (dy.dim() - 1)].expand(dy.shape)
    return {n: first(t) if n in ("x", "h", "residual") else t for n, t in tensors.items()}, first(dy)


def assert_exact_reference(spec: Spec) -> None:
    """The fp64 reference, with its hand-written backward, against autograd through the authors' operations: to rounding."""
    tensors, dy = {n: t.double() for n, t in spec.draw(0).items()}, spec.cotangent(0).double()
    got, expected = fused(spec, "reference", tensors, dy), in_eager(spec, tensors, dy)
    for name in expected:
        difference, size = (got[name] - expected[name]).norm(), expected[name].norm()
        assert difference <= 1e-12 * size + 1e-13, f"{name}: {difference:.2g} of {size:.2g}"


def assert_gradcheck(spec: Spec) -> None:
    tensors = {n: t.double().requires_grad_() for n, t in spec.draw(0).items()}
    with backend.use("reference"):
        assert torch.autograd.gradcheck(lambda *args: spec.call(functional, dict(zip(tensors, args, strict=True))), tuple(tensors.values()))


def assert_single_gradients(spec: Spec, name: str, device: str, *, rounded: Collection[str] = ()) -> None:
    """Every gradient asked alone has the bits that it has among all, or, if ``rounded``, is within the rule; what is not asked for is neither computed nor returned."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    together = fused(spec, name, tensors, dy)
    for trained in tensors:
        with spied() as calls:
            alone = fused(spec, name, tensors, dy, needs=(trained,))
        if trained in rounded:
            assert_within_rule(spec, name, device, needs=(trained,))
            del alone[f"d {trained}"]
        assert_same_bits(alone, {key: together[key] for key in alone})
        for direction, _, out in calls:
            if direction == "backward":
                assert sum(t.numel() > 0 for t in out) == 1, f"{trained} alone: backward returned {[tuple(t.shape) for t in out]}"
    frozen = {n: t.detach().requires_grad_(n in ("x", "h")) for n, t in tensors.items()}
    with backend.use(name):
        spec.call(functional, frozen).backward(dy)
    assert all((t.grad is not None) == t.requires_grad for t in frozen.values())


def assert_no_grad_path(spec: Spec, name: str, device: str) -> None:
    """Without gradients the bits are the same, and nothing is kept for backward."""
    tensors = spec.draw(0, device)
    expected = fused(spec, name, tensors, spec.cotangent(0, device))
    for context in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        grad = context is not contextlib.nullcontext
        with spied() as calls, context(), runs_on(spec.op, name, counts=(1, 0)):
            y = spec.call(functional, {n: t.clone().requires_grad_(grad) for n, t in tensors.items()})
        assert not y.requires_grad
        assert_same_bits({"y": y}, {"y": expected["y"]})
        assert [t.numel() for t in calls[0][2][1:]] == [0] * (len(calls[0][2]) - 1)


def assert_rounds_parameters(spec: Spec, name: str, device: str) -> None:
    """Parameters of a wider dtype than the activations' are rounded to it first: rounded beforehand they give the same bits."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    rounded = {n: t.to(spec.dtype).to(t.dtype) for n, t in tensors.items()}
    assert any(not torch.equal(t, tensors[n]) for n, t in rounded.items())
    assert_same_bits(fused(spec, name, tensors, dy), fused(spec, name, rounded, dy))


def assert_finite_far_from_zero(spec: Spec, name: str, device: str) -> None:
    """A gate whose logits are beyond the range of exp passes everything or nothing, and its gradients are finite: 0, up to what fp32 holds."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    bias = "gate_up_bias" if "gate_up_bias" in tensors else "gate_bias"
    for logit in (200.0, -200.0):
        far = {**tensors, bias: torch.full_like(tensors[bias], logit)}
        got, exact64, same = fused(spec, name, far, dy), exact(spec, far, dy), in_eager(spec, far, dy)
        assert all(t.isfinite().all() for t in got.values())
        assert_close_to_f64("y", got["y"], exact64["y"], same["y"], gradient=False)


def assert_extreme_pre_activations(spec: Bottleneck, name: str, device: str) -> None:
    """Derivatives far beyond the range of exp are those of the line that the activation has become there, and an overflow stays visible: -inf times 0 is no number."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    tensors = {n: torch.ones_like(t) if n == "w_up" else torch.zeros_like(t) for n, t in tensors.items()}
    slopes = (1.0, 1.0) if spec.activation == "identity" else (0.0, 1.0)
    for size in (1e4,) if spec.dtype == torch.float16 else (1e12, 1e18):
        for z, slope in ((-size, slopes[0]), (size, slopes[1])):
            tensors["b_down"][0] = z
            got = fused(spec, name, tensors, torch.full_like(dy, 0.125))
            assert abs(got["d b_down"][0].item() - slope * len(dy)) < 1e-6, f"the derivative at {z}"
    for z, phi in ((-torch.inf, {"identity": -torch.inf, "relu": 0.0}.get(spec.activation, torch.nan)), (torch.inf, torch.inf)):
        tensors["b_down"][0] = z
        y = fused(spec, name, tensors, None)["y"]
        # The erf of torch's vectors, on which gelu is computed, gives NaN for infinity.
        assert torch.allclose(y, torch.full_like(y, phi), equal_nan=True) or (spec.activation == "gelu" and z > 0 and y.isnan().all()), f"phi({z}) is {y[0, 0].item()}"


def assert_untouched(spec: Spec, name: str, device: str) -> None:
    """No argument is written to, in forward or in backward."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    everything = {**tensors, "dy": dy}
    before, versions = {n: t.clone() for n, t in everything.items()}, [t._version for t in everything.values()]
    fused(spec, name, tensors, dy)
    assert_same_bits(before, everything)
    assert [t._version for t in everything.values()] == versions


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same numbers in other memory layouts."""
    out = {
        "row-padded": torch.cat([t, t[..., :5]], -1)[..., : t.shape[-1]],
        "offset": torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
        "strided": t.repeat_interleave(2, -1)[..., ::2],
    }
    if t.dim() > 1:
        out["transposed"] = t.transpose(-1, -2).contiguous().transpose(-1, -2)
        out["batch-last"] = t.transpose(0, -2).contiguous().transpose(0, -2)
    return out


def assert_any_layout(spec: Spec, name: str, device: str, *, rounded: bool = False) -> None:
    """Strides change no bit, of activations, parameters and dy alike; on reference they may change the rounding of the library's matrix products, and, if ``rounded``, what the
    rule allows."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)

    def assert_same(change: Change, expected: Results) -> None:
        if rounded:
            return assert_within_rule(spec, name, device, change=change)
        got = fused(spec, name, *change(tensors, dy))
        if name != "reference":
            return assert_same_bits(got, expected)
        for key in got:
            assert relative_error(got[key], expected[key]) <= 5 * FLOOR[spec.dtype], key

    def in_layout(layout: str, *names: str) -> Change:
        return lambda t, dy: ({n: layouts(v).get(layout, v) if n in names else v for n, v in t.items()}, layouts(dy)[layout] if "dy" in names else dy)

    expected = fused(spec, name, tensors, dy)
    for layout in ("row-padded", "offset", "strided", "transposed", "batch-last"):
        assert_same(in_layout(layout, *tensors, "dy"), expected)
        for one in spec.activations:
            assert_same(in_layout(layout, one), expected)
    for columns in (1, spec.out_width):
        expand: Change = lambda t, dy, columns=columns: (t, dy.reshape(-1, spec.out_width)[0, :columns].expand(dy.shape))
        assert_same(expand, fused(spec, name, tensors, expand(tensors, dy)[1].contiguous()))


def assert_deterministic(spec: Spec, name: str, device: str) -> None:
    """Bitwise the same from run to run and, on a CPU, for 1 and 2 threads."""
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    expected, before = fused(spec, name, tensors, dy), torch.get_num_threads()
    try:
        for threads in (before, 2, 1) if device == "cpu" else (before, before):
            torch.set_num_threads(threads)
            assert_same_bits(expected, fused(spec, name, tensors, dy))
    finally:
        torch.set_num_threads(before)


def assert_same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        x, y = (t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]) for t in (a[name], b[name]))
        assert torch.equal(x, y), f"{name}: {(x != y).sum().item()} of {x.numel()} elements differ in their bits"


# Recorded cases: `build(ops, case, inputs, params)` computes the outputs by name with `fastadapt.functional` or `tests.eager`.
Build = Callable[[Any, Case, Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]


def _recorded_run(build: Build, ops: Any, case: Case, inputs: Mapping[str, Tensor], cotangents: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> Results:
    """Outputs, and gradients of every input and parameter that has a recorded one, in ``dtype``."""
    first = case.entry.get("aliases", {})
    leaves_in = {n: t.to(device, dtype).requires_grad_(n in case.input_grads) for n, t in inputs.items()}
    leaves = {n: t.to(device, dtype).requires_grad_() for n, t in case.params.items() if n not in first}
    outputs = build(ops, case, leaves_in, {**leaves, **{alias: leaves[key] for alias, key in first.items()}})
    wanted = {**{f"d in {n}": leaves_in[n] for n in case.input_grads}, **{f"d {n}": leaves[n] for n in case.param_grads}}
    grads = torch.autograd.grad([outputs[n] for n in cotangents], list(wanted.values()), [c.to(device, dtype) for c in cotangents.values()])
    return {**{n: y.detach() for n, y in outputs.items()}, **dict(zip(wanted, grads, strict=True))}


def assert_recorded_in_fp64(build: Build, case: Case) -> None:
    """The fp64 reference against the recorded outputs and gradients."""
    assert set(case.param_grads) == set(case.entry["trainable_parameters"]) and case.input_grads
    with backend.use("reference"):
        got = _recorded_run(build, functional, case, case.inputs, case.cotangents, torch.float64, "cpu")
    for name, recorded in _recorded(case).items():
        assert_matches_recorded(name, got[name], recorded)


def _recorded(case: Case) -> Results:
    return {**case.outputs, **{f"d in {n}": g for n, g in case.input_grads.items()}, **{f"d {n}": g for n, g in case.param_grads.items()}}


def assert_recorded(build: Build, case: Case, op: str, name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """The kernels against the recorded fp64 tensors; the further seeds that small tensors need redraw inputs and cotangents, with the fp64 reference as the exact result."""
    calls = len(case.outputs)

    def run(seed: int) -> dict[str, Compared]:
        inputs, cotangents, recorded = case.inputs, case.cotangents, _recorded(case)
        if seed:
            g = torch.Generator().manual_seed(seed)
            inputs, cotangents = ({n: torch.randn(t.shape, generator=g) for n, t in tensors.items()} for tensors in (inputs, cotangents))
            with backend.use("reference"):
                recorded = _recorded_run(build, functional, case, inputs, cotangents, torch.float64, "cpu")
        with runs_on(op, name, counts=(calls, calls)):
            got = _recorded_run(build, functional, case, inputs, cotangents, dtype, device)
        same = _recorded_run(build, eager, case, inputs, cotangents, dtype, device)
        assert got.keys() == recorded.keys()
        return compared(got, recorded, same)

    assert_rule(run, dtype)


def recorded_table(build: Build, cases: list[Case], name: str, device: str) -> dict[str, str]:
    """For every recorded case: which kernels ran, by `fastadapt.backend.ran`, when backend ``name`` was demanded."""
    table = {}
    for case in cases:
        before = ran()
        with backend.use(name):
            _recorded_run(build, functional, case, case.inputs, case.cotangents, torch.float32, device)
        after = ran()
        table[case.id] = ", ".join(f"{direction} {where} x{n - before.get(key, 0)}" for key, n in sorted(after.items()) if n != before.get(key, 0) for _, direction, where in [key])
    return table
