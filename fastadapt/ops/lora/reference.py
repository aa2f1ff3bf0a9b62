"""LoRA's update in plain torch: what every kernel must compute, in any floating dtype and on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastadapt.ops._library import none
from fastadapt.ops.philox import keep


def _dropped(x, seed, dropout):
    """M (.) x; the 1 / (1 - p) of dropout is a factor of what comes of it."""
    return torch.where(keep(seed, *x.shape, dropout), x, 0) if dropout else x


def composed(x, y, w_down, w_up, b_up, seed, scale, dropout):
    """y + s (z Wu' + bu) and z = k (M (.) x) Wd' with k = 1 / (1 - p); differentiable by autograd."""
    w_down, w_up, b_up = (None if p is None else p.to(x.dtype) for p in (w_down, w_up, b_up))
    z = F.linear(_dropped(x, seed, dropout), w_down)
    if dropout:
        z = z * (1 / (1 - dropout))
    u = F.linear(z, w_up, b_up)
    return y + (u if scale == 1.0 else u * scale), z


def forward(*args):
    *inputs, save = args
    out, z = composed(*inputs)
    return out, (z if save else none(out))


def backward(dy, x, z, w_down, w_up, seed, scale, dropout, needs):
    """With dz = s dy Wu: dx = M (.) (k dz Wd), dWd = k dz' (M (.) x), dWu = s dy' z, dbu = s (column sums of dy)."""
    need_x, need_wd, need_wu, need_bu = needs
    dx = dwd = dwu = dbu = None
    if need_x or need_wd:
        dz = F.linear(dy, w_up.to(dy.dtype).t()) * (scale / (1 - dropout))
        if need_x:
            dx = _dropped(F.linear(dz, w_down.to(dy.dtype).t()), seed, dropout)
        dwd = (dz.t() @ _dropped(x, seed, dropout)).to(w_down.dtype) if need_wd else None
    if need_wu or need_bu:
        scaled = dy if scale == 1.0 else dy * scale  # before the sums over rows, which fp16 may not hold
        dwu, dbu = (scaled.t() @ z).to(w_up.dtype) if need_wu else None, scaled.sum(0).to(w_up.dtype) if need_bu else None
    return tuple(none(dy) if t is None else t for t in (dx, dwd, dwu, dbu))
