"""Compacter's bottleneck in plain torch, without the Kronecker products that it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadapt.ops import activations
from fastadapt.ops._library import none


def _project(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x H for H = sum_i A_i (x) (L_i R_i): n rank-k products of each of x's n parts, mixed by the rule."""
    parts = x.unflatten(-1, (rule.shape[0], left.shape[1]))
    mixed = torch.einsum("iac,tiaq->ticq", rule, torch.einsum("tak,ikq->tiaq", parts, left))
    return torch.einsum("ticq,iqp->tcp", mixed, right).flatten(-2)


def _backproject(dy: Tensor, x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, rule, left and right from that of `_project`."""
    parts, dy = x.unflatten(-1, (rule.shape[0], left.shape[1])), dy.unflatten(-1, (rule.shape[0], right.shape[2]))
    inner = torch.einsum("tak,ikq->tiaq", parts, left)
    d_mixed = torch.einsum("tcp,iqp->ticq", dy, right)
    d_inner = torch.einsum("iac,ticq->tiaq", rule, d_mixed)
    d_right = torch.einsum("ticq,tcp->iqp", torch.einsum("iac,tiaq->ticq", rule, inner), dy)
    dx = torch.einsum("tiaq,ikq->tak", d_inner, left).flatten(-2)
    return dx, torch.einsum("tiaq,ticq->iac", inner, d_mixed), torch.einsum("tak,tiaq->ikq", parts, d_inner), d_right


def composed(x, rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up, residual, scale, activation, add_input):
    """y = s (phi(x Hd + bd) Hu + bu) [+ x] [+ residual], and z = x Hd + bd; differentiable by autograd."""
    *down, bd, ru, lu, rup, bu = (None if p is None else p.to(x.dtype) for p in (rule_down, left_down, right_down, b_down, rule_up, left_up, right_up, b_up))
    z = _project(x, *down)
    z = z if bd is None else z + bd
    y = _project(activations.apply(z, activation), ru, lu, rup)
    y = scale * (y if bu is None else y + bu)
    y = y + x if add_input else y
    return (y if residual is None else y + residual), z


def forward(*args):
    *inputs, save = args
    y, z = composed(*inputs)
    return y, (z if save else none(y))


def backward(dy, x, z, rule_down, left_down, right_down, rule_up, left_up, right_up, scale, activation, add_input, needs):
    """With du = s dy: da = du Hu', dz = da (.) phi'(z), dx = dz Hd' [+ dy]; the factors' gradients from the same thin products."""
    dtype = rule_down.dtype
    down, up = ([p.to(x.dtype) for p in factors] for factors in ((rule_down, left_down, right_down), (rule_up, left_up, right_up)))
    du = scale * dy
    da, *d_up = _backproject(du, activations.apply(z, activation), *up)
    dz = da * activations.derivative(z, activation)
    dx, *d_down = _backproject(dz, x, *down)
    grads = (dx + dy if add_input else dx, *d_down, dz.sum(0), *d_up, du.sum(0))
    return tuple((t if i == 0 else t.to(dtype)) if need else none(dy) for i, (t, need) in enumerate(zip(grads, needs, strict=True)))
