"""Dropout, the sum with the residual stream and the norm in plain torch: what every kernel must compute, in any floating dtype and on any device."""

from __future__ import annotations

import torch

from fastadapt.ops._library import none
from fastadapt.ops.philox import keep


def _wide(t):
    return t if t.dtype == torch.float64 else t.float()


def _dropped(x, seed, dropout):
    """M (.) x / (1 - p)."""
    return torch.where(keep(seed, *x.shape, dropout), x * (1 / (1 - dropout)), 0) if dropout else x


def composed(x, residual, weight, bias, seed, norm, eps, dropout):
    """y, v = residual + D(x), and the norm's mean and 1 / deviation; differentiable by autograd."""
    v = _dropped(_wide(x), seed, dropout)
    v = v.to(x.dtype) if residual is None else (v + _wide(residual)).to(residual.dtype)
    if norm == 0:
        return v, v, None, None
    u = _wide(v)
    mean = u.mean(1) if norm == 1 else None
    u = u if mean is None else u - mean[:, None]
    rstd = (u.square().mean(1) + eps).rsqrt()
    y = u * rstd[:, None]
    y = y if weight is None else y * _wide(weight)
    return (y if bias is None else y + _wide(bias)).to(v.dtype), v, mean, rstd


def forward(*args):
    *inputs, save = args
    y, v, mean, rstd = composed(*inputs)
    if inputs[5] == 0:
        return none(v), v, _no_statistics(v), _no_statistics(v)
    is_x = inputs[1] is None and not inputs[7]
    return y, (v if save and not is_x else none(v)), (mean if save and mean is not None else _no_statistics(v)), (rstd if save else _no_statistics(v))


def _no_statistics(v):
    return none(_wide(v[:0]))


def backward(dy, dv, v, mean, rstd, weight, seed, norm, dropout, dtype, needs):
    """With c = dy (.) w: g = rstd (c - xhat mean(c (.) xhat) [- mean(c)]) + dv; dx = M (.) g / (1 - p), dw = sum dy (.) xhat, db = sum dy."""
    need_x, need_residual, need_weight, need_bias = needs
    given = dy if dv is None else dv
    g = dweight = dbias = None
    if norm:
        u, c = _wide(v), _wide(dy)
        xhat = (u if mean is None else u - mean[:, None]) * rstd[:, None]
        dweight = (c * xhat).sum(0).to(weight.dtype) if need_weight else None
        dbias = c.sum(0).to(weight.dtype) if need_bias else None
        if need_x or need_residual:
            c = c if weight is None else c * _wide(weight)
            g = c - xhat * (c * xhat).mean(1, keepdim=True)
            g = (g if mean is None else g - c.mean(1, keepdim=True)) * rstd[:, None]
    if dv is not None:
        g = _wide(dv) if g is None else g + _wide(dv)
    dx, dresidual = _dropped(g, seed, dropout).to(dtype) if need_x else None, g.to(given.dtype) if need_residual else None
    return tuple(none(given) if t is None else t for t in (dx, dresidual, dweight, dbias))
