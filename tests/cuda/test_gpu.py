"""What only a device shows: streams, a second device, CUDA graphs, the same bits from run to run. Its numbers are in test_ops.py, whose tests run on it too."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastadapt import backend, functional
from tests.ops import checks
from tests.ops.specs import BF16, GRANULARITIES, MIXED, PHM, Bottleneck, Gated, Lora, Norm, Routed, Spec, specs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CALLS: list[Spec] = [
    Bottleneck(lead=(4096,), width=768, rank=96, dtype=MIXED[0], param_dtype=MIXED[1], gate=True, scale="tensor"),
    Bottleneck(lead=(1000,), width=1024, rank=7, dtype=BF16[0]),
    *(Gated(lead=(8, 500), width=768, rank=96, gate_rank=96, dtype=MIXED[0], param_dtype=MIXED[1], granularity=g) for g in GRANULARITIES if g != "large_full"),
    PHM(lead=(10000,), width=768, rank=96, dtype=MIXED[0], param_dtype=MIXED[1]),
    PHM(lead=(1000,), width=772, rank=24, dtype=BF16[0], factor_rank=2),
    Lora(lead=(4096,), width=1024, out=512, rank=16, dtype=MIXED[0], param_dtype=MIXED[1], dropout=0.1),
    Lora(lead=(1000,), width=512, out=1536, rank=96, dtype=BF16[0], biases="up"),
    Norm(lead=(4096,), width=768, dtype=MIXED[0], param_dtype=MIXED[1], residual="wide", dropout=0.1, returns="both"),
    Norm(lead=(2000,), width=4096, dtype=BF16[0], norm="rms", returns="both"),
    Norm(lead=(1000,), width=1027, dropout=0.1),
]


def results(spec: Spec, device: str = "cuda") -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    tensors, dy = spec.draw(0, device), spec.cotangent(0, device)
    return tensors, dy, checks.fused(spec, "cuda", tensors, dy)


@specs(CALLS)
def test_deterministic_beside_other_work(spec: Spec) -> None:
    """The same bits from run to run, whatever else on the device changes the order of blocks."""
    tensors, dy, expected = results(spec)
    other = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            torch.randn(2048, 2048, device="cuda") @ torch.randn(2048, 2048, device="cuda")
        checks.assert_same_bits(expected, checks.fused(spec, "cuda", tensors, dy))


@specs(CALLS)
def test_on_another_stream(spec: Spec) -> None:
    """The kernels run on the current stream, behind what it holds: on the default stream they would read zeros."""
    tensors, dy, expected = results(spec)
    stream = torch.cuda.Stream()
    late = {n: torch.zeros_like(t) for n, t in tensors.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        for name, t in tensors.items():
            late[name].copy_(t)
        got = checks.fused(spec, "cuda", late, dy)
    stream.synchronize()
    checks.assert_same_bits(expected, got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@specs(CALLS)
def test_on_another_device(spec: Spec) -> None:
    """The tensors' device, whatever the current one is."""
    _, _, expected = results(spec, "cuda:0")
    with torch.cuda.device(0):
        _, _, got = results(spec, "cuda:1")
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


@specs(CALLS)
def test_in_a_cuda_graph(spec: Spec) -> None:
    """Forward and backward captured once and replayed over other numbers: nothing waits for the host, and nothing is allocated outside the graph's pool."""
    tensors, dy, _ = results(spec)
    static, static_dy = {n: t.clone().requires_grad_() for n, t in tensors.items()}, dy.clone()

    def step() -> tuple[Tensor, ...]:
        y = spec.call(functional, static)
        return (y, *torch.autograd.grad(y, list(static.values()), static_dy))

    with backend.use("cuda"):
        graph, captured = in_a_graph(step)
    for seed in (1, 2):
        fresh, fresh_dy = spec.draw(seed, "cuda"), spec.cotangent(seed, "cuda")
        with torch.no_grad():
            for name, t in fresh.items():
                static[name].copy_(t)
            static_dy.copy_(fresh_dy)
        graph.replay()
        got = dict(zip(["y", *(f"d {n}" for n in static)], captured, strict=True))
        checks.assert_same_bits(checks.fused(spec, "cuda", fresh, fresh_dy), {n: t.detach() for n, t in got.items()})


def test_other_tasks_in_the_same_cuda_graph() -> None:
    """Ids are read on the device alone: one captured graph serves every mixture, rows of no task and absent tasks included."""
    spec = Routed(lead=(8, 500), width=768, rank=96, tasks=4, dtype=MIXED[0], param_dtype=MIXED[1])
    leaves = {n: t.requires_grad_() for n, t in spec.draw(0, "cuda").items()}
    dy, ids = spec.cotangent(0, "cuda"), spec.task_ids("cuda")

    def step() -> tuple[Tensor, ...]:
        y = functional.routed_bottleneck(task_ids=ids, **leaves, **spec.options())
        return (y, *torch.autograd.grad(y, list(leaves.values()), dy))

    with backend.use("cuda"):
        graph, captured = in_a_graph(step)
        for mixture in ([0] * 8, [3, -1, 3, 0, 9, 0, 3, 1], [-1] * 8):
            ids.copy_(torch.tensor(mixture))
            graph.replay()
            expected = step()
            checks.assert_same_bits({str(i): t for i, t in enumerate(expected)}, {str(i): t.detach() for i, t in enumerate(captured)})


def test_other_seeds_in_the_same_cuda_graph() -> None:
    """The seed is read on the device alone: a replay drops what the seed of that time says, forward and backward alike."""
    spec = Lora(lead=(1000,), width=1024, out=512, rank=16, dtype=MIXED[0], param_dtype=MIXED[1])
    leaves = {n: t.requires_grad_() for n, t in spec.draw(0, "cuda").items()}
    dy, seed = spec.cotangent(0, "cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, ...]:
        y = functional.lora(**leaves, dropout=0.3, seed=seed)
        return (y, *torch.autograd.grad(y, list(leaves.values()), dy))

    with backend.use("cuda"):
        graph, captured = in_a_graph(step)
        seen = []
        for number in (1, -(2**40), 2**63 - 1):
            seed.fill_(number)
            graph.replay()
            seen.append(captured[1].clone())
            checks.assert_same_bits({str(i): t for i, t in enumerate(step())}, {str(i): t.detach() for i, t in enumerate(captured)})
    assert not any(torch.equal(a, b) for a, b in pairwise(seen))


def test_a_thread_of_its_own() -> None:
    """Backward runs in autograd's threads, each with a current device and stream of its own."""
    spec = CALLS[0]
    tensors, dy, expected = results(spec)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with backend.use("cuda"), torch.cuda.stream(stream):
        spec.call(functional, leaves).backward(dy)
    stream.synchronize()
    checks.assert_same_bits({n: g for n, g in expected.items() if n != "y"}, {f"d {n}": t.grad for n, t in leaves.items() if t.grad is not None})


def test_auto_prefers_the_kernels() -> None:
    """Whatever is chosen, explain says it, and cuda is among what can run."""
    explanation = backend.explain("bottleneck", rows=4096, width=768, rank=96, dtype=torch.bfloat16, param_dtype=torch.float32, device="cuda")
    assert explanation.reasons["cuda"] == []
