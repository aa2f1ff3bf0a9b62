"""VL-PET's gated bottleneck in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.ops import activations
from fastadapt.ops._library import none

KINDS = ("large", "logits", "middleX", "middleY", "small")


def _sample_means(t: Tensor, samples: int) -> Tensor:
    """The mean over each sample's rows, for each of its rows."""
    per_sample = t.view(samples, len(t) // max(samples, 1))
    return per_sample.mean(1, keepdim=True).expand_as(per_sample).reshape(-1)


def _gate(kind, x, total, gates, activation, samples):
    """G, zg and the row logits."""
    w, b, w_up, b_up = gates
    if kind == "large":
        zg = F.linear(x, w, b)
        return torch.sigmoid(F.linear(activations.apply(zg, activation), w_up, b_up)), zg, none(total)
    if kind == "logits":
        return torch.sigmoid(x), none(total), none(total)
    if kind == "middleY":
        return 1 + w, none(total), none(total)
    inputs = x + total if kind == "middleX" else torch.cat([x, total], -1)
    logits = F.linear(inputs, w[None], b)[:, 0]
    gate = torch.sigmoid(logits)
    if kind == "small":
        gate = _sample_means(gate, samples)
    return gate[:, None], none(total), logits


def composed(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, save_gate):
    """y = s (H' (.) G) or s (H' + G), H' = c h + sa (phi(h Wd' + bd) Wu' + bu); differentiable by autograd. Also what backward needs."""
    w_down, b_down, w_up, b_up, *gates = (None if p is None else p.to(h.dtype) for p in (w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias))
    z = F.linear(h, w_down, b_down)
    total = input_scale * h + adapter_scale * F.linear(activations.apply(z, activation), w_up, b_up)
    gate, zg, logits = _gate(KINDS[kind], x, total, gates, activation, samples)
    return scale * (total + gate if add else total * gate), z, zg, logits, total, gate


def forward(h, *args):
    *rest, save_gate, save = args
    y, z, zg, logits, total, gate = composed(h, *rest, save_gate)
    kind = KINDS[rest[-3]]
    keep = save and save_gate == 1
    row_logits = logits.to(torch.promote_types(h.dtype, torch.float32))
    saved = (z, zg, row_logits) if save else (none(h), none(h), none(row_logits))
    return y, *saved, total if keep else none(h), gate if keep and kind == "large" else none(h)


def backward(
    dy, h, x, z, zg, logits, total, gate, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, input_scale, adapter_scale, scale, activation, kind, add, samples, needs
):
    """With E = s dy: dH' = E (.) G, dG = E (.) H' (or both E), then through the logits to x, H' and the gate's parameters, and through the bottleneck to h."""
    name, p_dtype = KINDS[kind], w_down.dtype
    wd, wu, bu, *gates = (None if p is None else p.to(h.dtype) for p in (w_down, w_up, b_up, g, g_bias, g_up, g_up_bias))
    a = activations.apply(z, activation)
    if total.numel() == 0:
        total = input_scale * h + adapter_scale * F.linear(a, wu, bu)
    G = _gate(name, x, total, gates, activation, samples)[0]
    E = scale * dy
    d_total, d_gate = (E, E) if add else (E * G, E * total)
    dx = dg = dgb = dgu = dgub = None
    if name in ("large", "logits"):
        dl = d_gate * G * (1 - G)
        if name == "logits":
            dx = dl
        else:
            dzg = (dl @ gates[2]) * activations.derivative(zg, activation)
            dx, dg, dgb, dgu, dgub = dzg @ gates[0], dzg.t() @ x, dzg.sum(0), dl.t() @ activations.apply(zg, activation), dl.sum(0)
    elif name == "middleY":
        dg = d_gate.sum(0)
    else:
        rows = d_gate.sum(1)
        s = torch.sigmoid(logits.to(h.dtype))
        if name == "small":
            rows = _sample_means(rows, samples)
        dl = (rows * s * (1 - s))[:, None]
        w_x, w_h = (gates[0], gates[0]) if name == "middleX" else gates[0].chunk(2)
        dx, d_total, dgb = dl * w_x, d_total + dl * w_h, dl.sum(0)
        dg = (dl * (x + total)).sum(0) if name == "middleX" else torch.cat([(dl * x).sum(0), (dl * total).sum(0)])
    du = adapter_scale * d_total
    dz = (du @ wu) * activations.derivative(z, activation)
    grads = (input_scale * d_total + dz @ wd, dx, dz.t() @ h, dz.sum(0), du.t() @ a, du.sum(0), dg, dgb, dgu, dgub)
    return tuple((t if i < 2 else t.to(p_dtype)) if need else none(dy) for i, (t, need) in enumerate(zip(grads, needs, strict=True)))
