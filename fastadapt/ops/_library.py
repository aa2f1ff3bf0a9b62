"""The operator library ``fastadapt::`` and the pieces that every op's schema and Function share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastadapt import backend

LIBRARY = torch.library.Library("fastadapt", "DEF")

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_new", "silu")
_ALIASES = {"linear": "identity", "swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
_INDEX = {name: i for i, name in enumerate(ACTIVATIONS)} | {alias: ACTIVATIONS.index(name) for alias, name in _ALIASES.items()}


def activation_index(name: str) -> int:
    """The number of an activation in op schemas and kernels."""
    try:
        return _INDEX[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation: {name!r} is unknown; must be one of {', '.join(_INDEX)}") from None


_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def define(name: str, schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers one implementation for all real devices (it asks `backend.choose` itself) and one for fake tensors."""
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastadapt::{name}", fake, lib=LIBRARY)
    _IMPLEMENTATIONS[getattr(torch.ops.fastadapt, name).default] = impl


def refuse_double_backward(name: str) -> None:
    """Gives a backward op an autograd formula that raises, where torch would otherwise return wrong or zero second derivatives."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"fastadapt: double backward of {name} is not supported; torch.func.grad and its like, under which fastadapt's functions are plain torch, can be nested")

    torch.library.register_autograd(f"fastadapt::{name}_backward", backward, lib=LIBRARY)


def run(op: str, direction: str, call: backend.Call, demanded: int, args: Sequence[Any]) -> Any:
    """Chooses the backend of a call, counts it and runs it outside autocast."""
    name = backend.choose(call, demanded)
    kernel = backend.kernels(op, name)[direction == "backward"]
    backend.count(op, direction, name)
    if torch.is_autocast_enabled(call.device):
        with torch.autocast(call.device, enabled=False):
            return kernel(*args)
    return kernel(*args)


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an op whose autograd kernel has nothing to do, without it. Not when traced, and not where a double backward must be refused.

    Plain tensors that nobody watches go to its implementation: torch's way from an op to a Python function takes longer than a small kernel (8 of the 21 us of a LoRA of 4 rows).
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return op(*args)
    first = args[1] if args[0] is None else args[0]
    if (first.is_cpu or first.is_cuda) and not torch._C._len_torch_dispatch_stack() and all(type(a) in _PLAIN for a in args if isinstance(a, Tensor)):
        return _IMPLEMENTATIONS[op](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def apart(*args: Any) -> Sequence[Any]:
    """The arguments of a Function; when traced, a tensor that is several of them (Compacter's shared rule, an input that is the residual too) once, and then as views of it:
    dynamo refuses it otherwise."""
    if not torch.compiler.is_compiling():
        return args
    seen: list[Tensor] = []
    found: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            if any(a is other for other in seen):
                a = a.view_as(a)
            else:
                seen.append(a)
        found.append(a)
    return found


def rows(t: Tensor) -> Tensor:
    """A 2-D tensor whose rows may lie anywhere but are each contiguous, which is what every kernel takes."""
    return t if t.stride(1) == 1 else t.contiguous()


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def none(t: Tensor) -> Tensor:
    """The placeholder that an op returns for a tensor that was not asked for."""
    return t.new_empty(0)


def transformed() -> bool:
    """Whether a functorch transform or forward-mode differentiation is active: a custom op has no rules for them, and torch drops its tangents without a word."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
