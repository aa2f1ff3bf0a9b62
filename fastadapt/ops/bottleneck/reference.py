"""The bottleneck in plain torch: what every kernel must compute, in any floating dtype and on any device."""

from __future__ import annotations

import torch.nn.functional as F

from fastadapt.ops import activations
from fastadapt.ops._library import none


def composed(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input):
    """y = s * g (.) (phi(x Wd' + bd) Wu' + bu) [+ x] [+ residual], and z = x Wd' + bd; differentiable by autograd."""
    w_down, b_down, w_up, b_up, gate, scale_tensor = (None if p is None else p.to(x.dtype) for p in (w_down, b_down, w_up, b_up, gate, scale_tensor))
    z = F.linear(x, w_down, b_down)
    y = F.linear(activations.apply(z, activation), w_up, b_up)
    if gate is not None:
        y = y * gate
    if scale_tensor is not None:
        y = y * scale_tensor.reshape(())
    if scale != 1.0:
        y = y * scale
    if add_input:
        y = y + x
    return (y if residual is None else y + residual), z


def forward(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input, save):
    y, z = composed(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input)
    return y, (z if save else none(x))


def backward(dy, x, z, w_down, w_up, b_up, gate, scale_tensor, scale, activation, add_input, needs):
    """With P = c dy' a and S = the column sums of c dy, s = c times the scale tensor s': dWu = s' g (.) P, dbu = s' g (.) S, dg = s' b, ds' = sum(g (.) b) where
    b = rowsum(Wu (.) P) + bu (.) S."""
    need_x, need_wd, need_bd, need_wu, need_bu, need_gate, need_scale = needs
    p_dtype, (wd, wu) = w_down.dtype, (w.to(x.dtype) for w in (w_down, w_up))
    a = activations.apply(z, activation)
    g = 1.0 if gate is None else gate.to(x.dtype)
    s = 1.0 if scale_tensor is None else scale_tensor.to(x.dtype).reshape(())
    dx = dwd = dbd = dwu = dbu = dg = ds = None
    if need_x or need_wd or need_bd:
        dz = F.linear(dy * (g * s * scale), wu.t()) * activations.derivative(z, activation)
        if need_x:
            dx = F.linear(dz, wd.t()) + dy if add_input else F.linear(dz, wd.t())
        dwd, dbd = (dz.t() @ x).to(p_dtype) if need_wd else None, dz.sum(0).to(p_dtype) if need_bd else None
    if need_wu or need_bu or need_gate or need_scale:
        scaled = dy if scale == 1.0 else dy * scale  # before the sums over rows, which fp16 may not hold
        p, sums = scaled.t() @ a, scaled.sum(0)
        if need_gate or need_scale:
            bracket = (wu * p).sum(1) + (0.0 if b_up is None else b_up.to(x.dtype) * sums)
            dg = (s * bracket).to(p_dtype) if need_gate else None
            ds = (g * bracket).sum().to(p_dtype).reshape(scale_tensor.shape) if need_scale else None
        gs = (g * s) * p.new_ones(p.shape[0])
        dwu, dbu = (gs[:, None] * p).to(p_dtype) if need_wu else None, (gs * sums).to(p_dtype) if need_bu else None
    return tuple(none(dy) if t is None else t for t in (dx, dwd, dbd, dwu, dbu, dg, ds))
