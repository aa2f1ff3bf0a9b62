"""What only a device shows: streams, a second device, CUDA graphs, the same bits from run to run; and a few calls of every op, so that this file is a quick check of a device.
All their numbers are in test_ops.py and tests/ops, whose tests run on it too.

The ways in of tests/test_entrance.py are here for the cuda kernels, which take half precision; they run in the emulator where there is no device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import backend, functional
from fastadapt.ops import _library
from tests import test_entrance
from tests.ops import checks
from tests.ops.checks import CPU, CUDA, on_gpus
from tests.ops.specs import BF16, DTYPES, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, specs
from tests.tolerance import FLOOR, relative_error

EMULATED = pytest.param("emulated-cuda", "cpu", id="emulated")
HALF: dict[str, Any] = {"dtype": MIXED[0], "param_dtype": MIXED[1]}
FP16: dict[str, Any] = {"dtype": DTYPES[3][0]}
FEW: dict[str, Spec] = {
    "bottleneck": Bottleneck(lead=(130,), width=768, rank=96, biases="up", residual="other", scale=0.3, gate=True, **HALF),
    "bottleneck_ragged": Bottleneck(lead=(65,), width=72, rank=7, activation="silu", biases="up", **FP16),
    "gated_bottleneck": Gated(lead=(5, 13), width=96, rank=96, gate_rank=72, biases="up", **HALF),
    "gated_bottleneck_small": Gated(lead=(3, 70), width=768, rank=96, biases="up", granularity="small", gate_bias=False, **HALF),
    "phm_bottleneck": PHM(lead=(65,), width=96, rank=64, **HALF),
    "phm_bottleneck_wide": PHM(lead=(300,), width=768, rank=96, factor_rank=2, **FP16),
    "routed_bottleneck": Routed(lead=(9, 17), width=72, rank=33, tasks=4, residual="other", outside=True, scale=0.7, **HALF),
    "routed_bottleneck_rows": Routed(lead=(700,), width=768, rank=96, tasks=3, ids="row", **FP16),
    "lora": Lora(lead=(65,), width=72, out=136, rank=33, dropout=0.3, **HALF),
    "lora_wide": Lora(lead=(600,), width=768, out=768, rank=16, biases="up", scale=2.0, **FP16),
    "dropout_add_norm": Norm(lead=(70,), width=72, residual="wide", dropout=0.3, returns="both", **HALF),
    "dropout_add_norm_rms": Norm(lead=(515,), width=1040, norm="rms", **FP16),
    "dropout_add_norm_fp32": Norm(lead=(37,), width=768, dropout=0.1),
}
# Without the routed op, whose ids a test copies from the host: it has graphs of its own below.
CALLS: list[Spec] = [
    Bottleneck(lead=(4096,), width=768, rank=96, **HALF, gate=True, scale="tensor"),
    Bottleneck(lead=(1000,), width=1024, rank=7, dtype=BF16[0]),
    *(Gated(lead=(8, 500), width=768, rank=96, gate_rank=96, **HALF, granularity=g) for g in GRANULARITIES if g != "large_full"),
    PHM(lead=(10000,), width=768, rank=96, **HALF),
    PHM(lead=(1000,), width=772, rank=24, dtype=BF16[0], factor_rank=2),
    Lora(lead=(4096,), width=1024, out=512, rank=16, **HALF, dropout=0.1),
    Lora(lead=(1000,), width=512, out=1536, rank=96, dtype=BF16[0], biases="up"),
    Norm(lead=(4096,), width=768, **HALF, residual="wide", dropout=0.1, returns="both"),
    Norm(lead=(2000,), width=4096, dtype=BF16[0], norm="rms", returns="both"),
    Norm(lead=(1000,), width=1027, dropout=0.1),
]


def test_both_backends_take_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a device can say."""
    calls: list[backend.Call] = []
    run, everything = _library.run, (*FEW.values(), *CALLS, *COMPILED, *HALVES)
    monkeypatch.setattr(_library, "run", lambda op, direction, call, *args: calls.append(call) or run(op, direction, call, *args))
    with backend.use("reference"), torch.no_grad():
        for spec in everything:
            few = replace(spec, lead=(2, 3) if spec.lead[1:] else (6,))
            few.call(functional, few.draw(0))
    for spec, call in zip(everything, calls, strict=True):
        for arch, name in product((80, 90), ("triton", "cuda")):
            assert backend._plans[spec.op].limits(name, call._replace(device="cuda", rows=math.prod(spec.lead), arch=arch)) == [], f"{name} on sm_{arch}: {spec.op} {spec}"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Tests share no compiled graphs."""
    yield
    torch._dynamo.reset()


@on_gpus
@pytest.mark.parametrize("spec", FEW.values(), ids=FEW.keys())
def test_within_rule(spec: Spec, name: str, device: str) -> None:
    checks.assert_within_rule(spec, name, device)


def results(spec: Spec, name: str, device: str = "cuda") -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    return tensors, dy, checks.fused(spec, name, tensors, dy)


@on_gpus
@specs([*CALLS, FEW["routed_bottleneck_rows"]])
def test_deterministic_beside_other_work(spec: Spec, name: str, device: str) -> None:
    """The same bits from run to run, whatever else on the device changes the order of blocks."""
    tensors, dy, expected = results(spec, name)
    other = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
        checks.assert_same_bits(expected, checks.fused(spec, name, tensors, dy))


@on_gpus
@specs(CALLS)
def test_on_another_stream(spec: Spec, name: str, device: str) -> None:
    """The kernels run on the current stream, behind what it holds: on the default stream they would read zeros."""
    tensors, dy, expected = results(spec, name)
    stream = torch.cuda.Stream()
    late = {n: torch.zeros_like(t) for n, t in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        for n, t in tensors.items():
            late[n].copy_(t)
        got = checks.fused(spec, name, late, dy)
    stream.synchronize()
    checks.assert_same_bits(expected, got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@on_gpus
@specs([*CALLS, FEW["routed_bottleneck_rows"]])
def test_on_another_device(spec: Spec, name: str, device: str) -> None:
    """The tensors' device, whatever the current one is."""
    _, _, expected = results(spec, name, "cuda:0")
    with torch.cuda.device(0):
        _, _, got = results(spec, name, "cuda:1")
    assert {t.device.index for t in got.values()} == {1} and torch.cuda.current_device() == 0
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        checks.assert_same_bits(expected, {n: t.to("cuda:0") for n, t in got.items()})


def in_a_graph(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of the step, which ran once before on a stream of its own, and what its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


@on_gpus
@specs(CALLS)
def test_in_a_cuda_graph(spec: Spec, name: str, device: str) -> None:
    """Forward and backward captured once and replayed over other numbers: nothing waits for the host, and nothing is allocated outside the graph's pool."""
    tensors, dy, _ = results(spec, name)
    static, static_dy = {n: t.clone().requires_grad_() for n, t in tensors.items()}, dy.clone()

    def step() -> tuple[Tensor, ...]:
        y = spec.call(functional, static)
        return (y, *torch.autograd.grad(y, list(static.values()), static_dy))

    with backend.use(name):
        graph, captured = in_a_graph(step)
    for seed in (1, 2):
        fresh, fresh_dy = spec.draw(seed, "cuda"), spec.cotangent(seed, "cuda")
        with torch.no_grad():
            for n, t in fresh.items():
                static[n].copy_(t)
            static_dy.copy_(fresh_dy)
        graph.replay()
        got = dict(zip(["y", *(f"d {n}" for n in static)], captured, strict=True))
        checks.assert_same_bits(checks.fused(spec, name, fresh, fresh_dy), {n: t.detach() for n, t in got.items()})


@on_gpus
def test_other_tasks_in_the_same_cuda_graph(name: str, device: str) -> None:
    """Ids are read on the device alone: one captured graph serves every mixture, rows of no task and absent tasks included."""
    spec = Routed(lead=(8, 500), width=768, rank=96, tasks=4, **HALF)
    leaves = {n: t.requires_grad_() for n, t in spec.draw(0, "cuda").items()}
    dy, ids = spec.cotangent(0, "cuda"), spec.task_ids("cuda")

    def step() -> tuple[Tensor, ...]:
        y = functional.routed_bottleneck(task_ids=ids, **leaves, **spec.options())
        return (y, *torch.autograd.grad(y, list(leaves.values()), dy))

    with backend.use(name):
        graph, captured = in_a_graph(step)
        for mixture in ([0] * 8, [3, -1, 3, 0, 9, 0, 3, 1], [-1] * 8):
            ids.copy_(torch.tensor(mixture))
            graph.replay()
            expected = step()
            checks.assert_same_bits({str(i): t for i, t in enumerate(expected)}, {str(i): t.detach() for i, t in enumerate(captured)})


@on_gpus
def test_other_seeds_in_the_same_cuda_graph(name: str, device: str) -> None:
    """The seed is read on the device alone: a replay drops what the seed of that time says, forward and backward alike."""
    spec = Lora(lead=(1000,), width=1024, out=512, rank=16, **HALF)
    leaves = {n: t.requires_grad_() for n, t in spec.draw(0, "cuda").items()}
    dy, seed = spec.cotangent(0, "cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        y = functional.lora(**leaves, dropout=0.3, seed=seed)
        return (y, *torch.autograd.grad(y, list(leaves.values()), dy))

    with backend.use(name):
        graph, captured = in_a_graph(step)
        seen = []
        for number in (1, -(2**40), 2**63 - 1):
            seed.fill_(number)
            graph.replay()
            seen.append(captured[1].clone())
            checks.assert_same_bits({str(i): t for i, t in enumerate(step())}, {str(i): t.detach() for i, t in enumerate(captured)})
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


@on_gpus
def test_a_thread_of_its_own(name: str, device: str) -> None:
    """Backward runs in autograd's threads, each with a current device and stream of its own."""
    spec = CALLS[0]
    tensors, dy, expected = results(spec, name)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with backend.use(name), torch.cuda.stream(stream):
        spec.call(functional, leaves).backward(dy)
    stream.synchronize()
    checks.assert_same_bits({n: g for n, g in expected.items() if n != "y"}, {f"d {n}": t.grad for n, t in leaves.items() if t.grad is not None})


def steps_of(spec: Spec, name: str, device: str, **compiler: Any) -> list[int]:
    """Five steps of one compiled function, each from numbers of its own, are within rounding of plain calls: how many kernels the library launched in each."""
    compiled, launched = torch.compile(lambda t: spec.call(functional, t), fullgraph=True, **compiler), []
    for seed in range(5):
        tensors, dy = spec.draw(seed, device), spec.cotangent(seed, device)
        expected, before = checks.fused(spec, name, tensors, dy), backend.ran()
        torch.compiler.cudagraph_mark_step_begin()
        with backend.use(name):
            got = {n: t.clone() for n, t in checks.evaluate(compiled, tensors, dy).items()}
        for key in expected:
            assert relative_error(got[key], expected[key]) <= 5 * FLOOR[spec.dtype], f"{key} of step {seed}"
        launched.append(sum(backend.ran().values()) - sum(before.values()))
    return launched


COMPILED = [replace(spec, lead=(8, 500)) for spec in (FEW["bottleneck"], FEW["gated_bottleneck"], FEW["phm_bottleneck"], FEW["lora"], FEW["dropout_add_norm"])]


@on_gpus
@specs(COMPILED)
def test_compiled_into_cuda_graphs(spec: Spec, name: str, device: str) -> None:
    """`mode="reduce-overhead"`: after calls to warm up and to record the library is no more asked, and the graphs' replays compute with the new numbers."""
    assert steps_of(spec, name, device, mode="reduce-overhead")[-2:] == [0, 0]


@pytest.mark.parametrize(("name", "device"), [CPU])
@specs([replace(spec, lead=(5, 13)) for spec in COMPILED])
def test_compiled_once_for_many_steps(spec: Spec, name: str, device: str) -> None:
    """The same steps without a device."""
    assert steps_of(spec, name, device, backend="aot_eager") == [2] * 5


# The specs of tests/test_entrance.py in half precision and widths that 8 divides; in float32 where autocast is to make half precision of it.
CASTS = [replace(spec, lead=(21,)) for spec in (test_entrance.PLAIN, test_entrance.COMPACTER)] + [test_entrance.GATED, test_entrance.SMALL, replace(test_entrance.LORA, out=16)]
HALVES = [*(replace(spec, **HALF) for spec in CASTS), test_entrance.NORM, replace(test_entrance.NORM, residual="wide", returns="both", **HALF)]
WAYS: list[tuple[Callable[..., None], dict[str, Any]]] = [
    (test_entrance.test_compiled_without_graph_breaks_has_the_bits_of_eager, {}),
    (test_entrance.test_compiled_by_inductor, {}),
    (test_entrance.test_other_shapes_do_not_compile_again, {}),
    *((test_entrance.test_export, {"strict": strict}) for strict in (False, True)),
    (test_entrance.test_opcheck, {}),
    (test_entrance.test_checkpointing, {"reentrant": False}),
    (test_entrance.test_double_backward_is_refused, {"direct": False}),
    (test_entrance.test_backward_runs_where_forward_ran, {}),
]


@pytest.mark.parametrize(("name", "device"), [pytest.param("emulated-cuda", "cpu", id="emulated", marks=pytest.mark.full), CUDA])  # a minute
@pytest.mark.parametrize(("test", "arguments"), WAYS, ids=["-".join([test.__name__.removeprefix("test_"), *map(str, of.values())]) for test, of in WAYS])
@pytest.mark.parametrize("spec", HALVES, ids=lambda spec: f"{spec.op}:{spec}")
def test_way_in(spec: Spec, test: Callable[..., None], arguments: dict[str, Any], name: str, device: str, request: pytest.FixtureRequest) -> None:
    if device == "cpu":
        request.getfixturevalue("machine")
    test(spec=spec, name=name, device=device, **arguments)


@pytest.mark.parametrize(("name", "device"), [EMULATED, CUDA])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("spec", CASTS, ids=lambda spec: f"{spec.op}:{spec}")
def test_autocast(spec: Spec, compiled: bool, name: str, device: str, request: pytest.FixtureRequest) -> None:
    if device == "cpu":
        request.getfixturevalue("machine")
    test_entrance.test_autocast(spec=spec, name=name, device=device, compiled=compiled)


@pytest.mark.parametrize(("name", "device"), [CUDA])
def test_auto_prefers_the_kernels(name: str, device: str) -> None:
    """Whatever is chosen, explain says it, and cuda is among what can run."""
    explanation = backend.explain("bottleneck", rows=4096, width=768, rank=96, dtype=torch.bfloat16, param_dtype=torch.float32, device=device)
    assert explanation.reasons[name] == []
