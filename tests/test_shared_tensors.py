"""A tensor that is several arguments of one op, such as Compacter's shared rule: eager and in one compiled graph alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastadapt import functional

X, DOWN, UP, RULE = (6, 16), (4, 16), (16, 4), (4, 4, 4)
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "bottleneck": (lambda x, down, up: functional.bottleneck(x, down, up, residual=x), (X, DOWN, UP)),
    "gated_bottleneck": (lambda x, down, up: functional.gated_bottleneck(x, x, down, up, granularity="large", gate_weight=down, gate_up_weight=up), (X, DOWN, UP)),
    "lora": (lambda x, down, up: functional.lora(x, x, down, up, scale=0.5), (X, DOWN, UP)),
    "dropout_add_norm": (lambda x, scale: functional.dropout_add_norm(x, x, scale, scale), (X, (16,))),
    "phm_bottleneck": (
        lambda x, rule, left, right, left_up, right_up: functional.phm_bottleneck(x, rule, left, right, rule, left_up, right_up),
        (X, RULE, (4, 4, 1), (4, 1, 2), (4, 2, 1), (4, 1, 4)),
    ),
    "routed_bottleneck": (
        lambda x, down, up: functional.routed_bottleneck(x, torch.zeros(len(x), dtype=torch.long), down, up, residual=x),
        (X, (1, *DOWN), (1, *UP)),
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_as_several_arguments(op: str) -> None:
    call, shapes = CALLS[op]
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    results = []
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        y = run(*leaves)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
        assert eager.abs().max() > 0
