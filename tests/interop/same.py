"""What the tests of `fastadapt.fuse` share: a fused copy of a library's layer against the layer itself."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import get_activation

import fastadapt
from tests.ops import checks
from tests.tolerance import FLOOR, Compared, assert_rule, limit_of, relative_error

_PLAIN: dict[str, Any] = {"layer_norms": "none", "visual_embedding": False, "cross_attention": False}
_FEED_FORWARD = {**_PLAIN, "self_attention": False}
_COMPACTER = {"rank": 8, "division": 4, "phm_rank": 1, "activation": "gelu"}
HUB_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "double_seq_bn": ("vl_adapter", {**_PLAIN, "rank": 5, "activation": "silu"}),
    "seq_bn": ("vl_adapter", {**_FEED_FORWARD, "rank": 5, "activation": "relu", "reads": "sum"}),
    "par_bn": ("vl_adapter", {**_FEED_FORWARD, "rank": 16, "activation": "relu", "reads": "stream", "scale": 4.0}),
    "compacter": ("compacter", {**_PLAIN, **_COMPACTER}),
    "compacter++": ("compacter", {**_FEED_FORWARD, **_COMPACTER, "reads": "sum"}),
    "compacter_full_w": ("compacter", {**_PLAIN, **_COMPACTER, "phm_rank": None, "factorized_rule": True}),
    "compacter_shared_w": ("compacter", {**_PLAIN, **_COMPACTER, "shared_weight": True}),
}
"""AdapterHub's named configurations, as methods of fastadapt's with options, for hosts of width 32."""


def hub_kind(name: str, family: str) -> tuple[str, dict[str, Any]]:
    """As in `HUB_KINDS`; Compacter's rule is shared where AdapterHub's files can say so."""
    method, options = HUB_KINDS[name]
    if family == "t5" or method == "vl_adapter" or name == "compacter_full_w":
        return method, {key: value for key, value in options.items() if key != "shared_weight"}
    return method, {**options, "shared_rule": True}


class Activations(nn.Module):
    """Stands in for the libraries' own module around an activation."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.f = get_activation(name)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


@contextlib.contextmanager
def ops_ran(**expected: int) -> Iterator[None]:
    """Asserts how many forward ops of each name ran in the block, on whatever backend; the layer norms around them are not counted."""
    before = checks.ran()
    yield
    found: dict[str, int] = {}
    for (op, direction, name), n in checks.ran().items():
        if direction == "forward" and (new := n - before.get((op, direction, name), 0)):
            found[op] = found.get(op, 0) + new
    assert found == expected


def results(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Output and the gradients of everything that is trained."""
    model.zero_grad()
    out = call(model)
    out.float().square().sum().backward()
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}}


def same_numbers(make: Callable[[int], nn.Module], call: Callable[[nn.Module, int], Tensor], **ran: int) -> None:
    """A fused copy against the library's own layers, with those in float64 as the exact values."""

    def run(seed: int) -> dict[str, Compared]:
        own = make(seed)
        exact, fused = copy.deepcopy(own).double(), copy.deepcopy(own)
        fastadapt.fuse(fused)
        with ops_ran(**ran):
            got = results(fused, lambda m: call(m, seed))
        eager, want = results(own, lambda m: call(m, seed)), results(exact, lambda m: call(m, seed))
        assert got.keys() == eager.keys() == want.keys() and len(got) > 1
        return {name: Compared(got[name], want[name], eager[name], name != "out") for name in got}

    assert_rule(run, torch.float32)


def rows(seed: int, model: nn.Module, *shape: int) -> Tensor:
    """Random numbers of the model's dtype that require a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype).requires_grad_()


def assert_agree(got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Two results of one computation where neither is the exact one: apart by no more than a gradient of an eager run that is itself off by twice the floor."""
    error = relative_error(got, want)
    assert error <= limit_of(2 * FLOOR[dtype], dtype, gradient=True), error
