"""Batches that mix tasks over every kind of bottleneck: one routed op, and the numbers of each task's own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastadapt.nn import Bottleneck, LoRA, MergedLoRA, PerTask, ValueParallelAdapter
from fastadapt.nn.per_task import _same_ids, check_ids
from fastadapt.ops import philox
from fastadapt.ops.lora.function import draw_seed
from tests.ops.checks import runs_on

TASKS = ("vqa", "gqa", "nlvr")
IDS = torch.tensor([2, 0, 2, 0])  # nobody answers gqa
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms": {"norm_before": True, "norm_after": True},
    "norm before, no biases": {"norm_before": True, "bias": False},
    "norm after, no residual": {"norm_after": True, "residual": False},
    "scalar gates": {"scalar_gate": True, "norm_before": True, "scale": 0.5},
    "scalar gates, no biases": {"scalar_gate": True, "bias": False},
    "blocks": {"pair": True, "heads": 2, "input_scale": 0.3},
}


def per_task(make: Any, shared: tuple[str, ...] = ()) -> PerTask:
    torch.manual_seed(0)
    module = PerTask({task: make() for task in TASKS}, shared).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def assert_routed(module: PerTask, *inputs: Tensor) -> None:
    """Outputs and all gradients of a mixed batch, against each sample through its own task's adapter."""
    module.set_route(IDS)
    with runs_on("routed_bottleneck", "reference"):
        mixed = module(*inputs)
        dy = torch.randn_like(mixed)
        leaves = [*inputs, *module.parameters()]
        together = torch.autograd.grad(mixed, leaves, dy)
    module.set_route(None)
    parts = []
    for i, task in enumerate(IDS.tolist()):
        module.set_task(TASKS[task])
        parts.append(module(*(t[i : i + 1] for t in inputs)))
    apart = torch.cat(parts)
    torch.testing.assert_close(mixed, apart, rtol=1e-12, atol=1e-12)
    for got, want in zip(together, torch.autograd.grad(apart, leaves, dy, allow_unused=True, materialize_grads=True), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [(), ("up_sampler.weight",), ("down_sampler.weight",)], ids=["apart", "one up", "one down"])
def test_every_kind_is_one_op(kind: str, shared: tuple[str, ...]) -> None:
    module = per_task(lambda: Bottleneck(12, 6, **KINDS[kind]), shared)
    assert_routed(module, torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("kind", [{}, {"norm_before": True, "norm_after": True}], ids=["plain", "norms"])
def test_beside_a_projection(kind: dict[str, Any]) -> None:
    x, y = (torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert_routed(per_task(lambda: ValueParallelAdapter(12, 6, **kind)), x, y)


widths = pytest.mark.parametrize(("wide_in", "wide_out"), [(12, 12), (12, 20), (20, 12)], ids=["square", "widening", "narrowing"])


@widths
@pytest.mark.parametrize("shared", [(), ("lora_A.weight",), ("lora_B.weight",)], ids=["apart", "one A", "one B"])
def test_lora_of_any_widths(wide_in: int, wide_out: int, shared: tuple[str, ...]) -> None:
    x, y = (torch.randn(4, 5, width, dtype=torch.float64, requires_grad=True) for width in (wide_in, wide_out))
    assert_routed(per_task(lambda: LoRA(wide_in, wide_out, 3, alpha=5.0), shared), x, y)


def test_lora_of_a_fused_projection() -> None:
    x, y = (torch.randn(4, 5, width, dtype=torch.float64, requires_grad=True) for width in (12, 36))
    assert_routed(per_task(lambda: MergedLoRA(12, 36, 3, enabled=(True, False, True))), x, y)


def test_rows_of_no_task_get_the_residual_alone() -> None:
    module, x = per_task(lambda: Bottleneck(12, 6, norm_before=True, norm_after=True)), torch.randn(4, 5, 12, dtype=torch.float64)
    module.set_route(torch.tensor([0, -1, 7, 1]))
    y = module(x)
    assert torch.equal(y[1:3], x[1:3]) and not (y[0] == x[0]).any() and not (y[3] == x[3]).any()


@widths
def test_rows_of_no_task_get_the_projection_alone(wide_in: int, wide_out: int) -> None:
    module, x, y = per_task(lambda: LoRA(wide_in, wide_out, 3)), *(torch.randn(4, 5, width, dtype=torch.float64) for width in (wide_in, wide_out))
    module.set_route(torch.tensor([0, -1, 7, 1]))
    got = module(x, y)
    assert got.shape == y.shape and got.is_contiguous() and torch.equal(got[1:3], y[1:3]) and not (got[0] == y[0]).any() and not (got[3] == y[3]).any()


@widths
def test_dropout_draws_one_mask_for_the_batch(wide_in: int, wide_out: int) -> None:
    module = per_task(lambda: LoRA(wide_in, wide_out, 3, dropout=0.4))
    x, y = (torch.randn(4, 5, width, dtype=torch.float64) for width in (wide_in, wide_out))
    module.set_route(IDS)
    torch.manual_seed(3)
    got = module(x, y)
    torch.manual_seed(3)
    dropped = x * philox.keep(draw_seed(x), 20, wide_in, 0.4).view(x.shape) / 0.6
    expected = torch.cat([module.adapters[TASKS[task]].eval()(dropped[i : i + 1], y[i : i + 1]) for i, task in enumerate(IDS.tolist())])  # type: ignore[operator]
    torch.testing.assert_close(got, expected)


def test_other_layers_run_every_adapter() -> None:
    module = PerTask({task: nn.Linear(4, 4) for task in TASKS})
    x = torch.randn(4, 2, 4)
    module.set_route(IDS)
    torch.testing.assert_close(module(x), torch.stack([module.adapters[TASKS[task]](x[i]) for i, task in enumerate(IDS.tolist())]))


OTHER_OP = "A different number of tensors was saved|Recomputed values for the following tensors have different metadata"
"""What torch says itself where one task runs for several, or several for one."""


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_that_runs_again_for_another_task(reentrant: bool) -> None:
    module = per_task(lambda: Bottleneck(12, 6))
    x = torch.randn(4, 3, 12, dtype=torch.float64, requires_grad=True)

    def chosen(task: str | None, ids: Tensor | None = None) -> None:
        module.set_task(task)
        module.set_route(ids)

    for forward, backward in ((("vqa",), ("gqa",)), (("vqa",), (None,)), (("vqa",), ("vqa", IDS)), (("vqa", IDS), ("vqa",)), (("vqa", IDS), ("vqa", IDS.flip(0)))):
        chosen(*forward)
        y = checkpoint(module, x, use_reentrant=reentrant)
        want = torch.autograd.grad(module(x).sum(), x)[0]
        chosen(*backward)
        with pytest.raises(RuntimeError, match=f"no task is selected|another task is selected than in forward|{OTHER_OP}"):
            y.sum().backward()
        x.grad = None
        chosen(forward[0], IDS.clone() if len(forward) > 1 else None)
        checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(x.grad, want)
        x.grad = None


def test_one_backward_through_checkpointed_forwards_of_two_tasks() -> None:
    """Refused, whatever is selected then and whatever ran before; with what each forward had, in any order and again, it is right."""
    module = per_task(lambda: Bottleneck(12, 6))
    x = torch.randn(4, 3, 12, dtype=torch.float64, requires_grad=True)

    def forward(chosen: str | Tensor) -> Tensor:
        module.set_task(chosen if isinstance(chosen, str) else None)
        module.set_route(None if isinstance(chosen, str) else chosen)
        return checkpoint(module, x, use_reentrant=False).sum()

    with torch.no_grad():
        forward("gqa")
    forward("gqa")  # a loss that is skipped
    for first, second in (("gqa", "vqa"), (IDS, IDS.flip(0)), (IDS, IDS[:2]), ("gqa", IDS)):
        for last in (first, second):
            total = forward(first) + forward(second)
            forward(last)
            with pytest.raises(RuntimeError, match=f"another task is selected than in forward: call backward before|{OTHER_OP}"):
                total.backward()
    for eval_mode in (False, True):
        module.train(not eval_mode)
        a, b = forward("vqa"), forward("gqa")
        for chosen, loss in (("vqa", a), ("gqa", b), ("vqa", a)):
            module.set_task(chosen)
            loss.backward(retain_graph=True)
    with torch.autograd.graph.save_on_cpu():
        loss = (module(x) + forward(IDS)).sum()
    loss.backward()


def test_same_ids() -> None:
    assert _same_ids(IDS, IDS.detach()) and _same_ids(IDS, IDS.clone())
    assert not _same_ids(IDS, IDS[:2]) and not _same_ids(IDS, IDS.flip(0)) and not _same_ids(IDS, IDS.to("meta"))


def test_ids_go_to_the_device_of_the_input() -> None:
    """A model may be spread over several."""
    with FakeTensorMode():
        ids, x = torch.zeros(4, dtype=torch.int64), torch.empty(4, 2, 8)
        assert check_ids(ids, x) is ids
        assert [check_ids(ids, x.to(device)).device for device in ("cuda:0", "cuda:1")] == [torch.device("cuda:0"), torch.device("cuda:1")]
