"""The adapters as the methods' authors write them in plain torch: one module call per projection and head, ``gelu_new`` as eight operations, gates as separate operations.

It is the rival of the benchmarks, the same-dtype error in `tests.tolerance`, and in fp64 the exact result: it shares no code with the library. Arguments as in
`fastadapt.functional`; a projection may also be a list of one weight per head, which is how the authors store it. Parameters are cast to the activations' dtype, as autocast does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Tensor | Sequence[Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """The tanh form of the gelu, eight elementwise operations, each of which reads and writes memory."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS = {"gelu_new": gelu_new, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "identity": lambda x: x}


def _list(weights: Weights | None, like: Sequence[Tensor] = ()) -> list[Tensor | None]:
    if weights is None:
        return [None] * len(like)
    return [weights] if isinstance(weights, Tensor) else list(weights)


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return F.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype))


def _projections(x: Tensor, w_down: Weights, w_up: Weights, b_down: Weights | None, b_up: Weights | None, activation: str, heads: int) -> Tensor:
    """The output of a bottleneck: one or h Linears down and up, concatenated. ``heads`` > 1 is the pair variant, where head i goes up by itself."""
    phi = ACTIVATIONS[activation]
    if heads > 1:
        downs, ups = (list(w.chunk(heads)) if isinstance(w, Tensor) else list(w) for w in (w_down, w_up))
        b_downs, b_ups = ([None] * heads if b is None else list(b.chunk(heads)) if isinstance(b, Tensor) else list(b) for b in (b_down, b_up))
        return torch.cat([_linear(phi(_linear(x, wd, bd)), wu, bu) for wd, bd, wu, bu in zip(downs, b_downs, ups, b_ups, strict=True)], -1)
    downs, ups = _list(w_down), _list(w_up)
    z = [_linear(x, w, b) for w, b in zip(downs, _list(b_down, downs), strict=True)]
    a = phi(torch.cat(z, -1) if len(z) > 1 else z[0])
    u = [_linear(a, w, b) for w, b in zip(ups, _list(b_up, ups), strict=True)]
    return torch.cat(u, -1) if len(u) > 1 else u[0]


def _layer_norm(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0].to(x.dtype), norm[1].to(x.dtype), norm[2])


def bottleneck(
    x: Tensor,
    w_down: Weights,
    w_up: Weights,
    b_down: Weights | None = None,
    b_up: Weights | None = None,
    *,
    activation: str = "gelu_new",
    residual: Tensor | str | None = "input",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    heads: int = 1,
    norm_before: tuple[Tensor, Tensor, float] | None = None,
    norm_after: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """An adapter controller: [layer norm], down, nonlinearity, up, [scale], [gate], [layer norm], residual."""
    y = _projections(x if norm_before is None else _layer_norm(x, norm_before), w_down, w_up, b_down, b_up, activation, heads)
    if isinstance(scale, Tensor):
        y = scale.to(x.dtype) * y
    elif scale != 1.0:
        y = scale * y
    if gate is not None:
        y = y * gate.to(x.dtype)
    if norm_after is not None:
        y = _layer_norm(y, norm_after)
    if residual is None:
        return y
    return y + (residual if isinstance(residual, Tensor) else x)


def multimodal_bottleneck(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    w_cross: Tensor | None = None,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    b_cross: Tensor | None = None,
    *,
    activation: str = "relu",
    residual: Tensor | str | None = "input",
    scale: float | Tensor = 0.1,
    norm_before: tuple[Tensor, Tensor, float] | None = None,
    norm_cross: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """UniAdapter: [layer norm], down, nonlinearity, the modality's up, [the cross-modal up, their sum, layer norm], scale, residual."""
    w_down, w_up, w_cross, b_down, b_up, b_cross = (None if p is None else p.to(x.dtype) for p in (w_down, w_up, w_cross, b_down, b_up, b_cross))
    k = ACTIVATIONS[activation](F.linear(x if norm_before is None else _layer_norm(x, norm_before), w_down, b_down))
    y = F.linear(k, w_up, b_up)
    if w_cross is not None:
        y = F.linear(k, w_cross, b_cross) + y
    if norm_cross is not None:
        y = _layer_norm(y, norm_cross)
    y = y * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
    if residual is None:
        return y
    return y + (residual if isinstance(residual, Tensor) else x)


def _kronecker(rule: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (in, out) that PHMLinear builds in every forward: the sum of the Kronecker products of A_i and W_i = L_i R_i."""
    rule, w = rule.to(dtype), torch.bmm(left.to(dtype), right.to(dtype))
    return torch.einsum("bac,bkp->bakcp", rule, w).reshape(len(rule), rule.shape[1] * w.shape[1], -1).sum(0)


def phm_bottleneck(
    x: Tensor,
    rule_down: Tensor,
    left_down: Tensor,
    right_down: Tensor,
    rule_up: Tensor,
    left_up: Tensor,
    right_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "gelu_new",
    residual: Tensor | str | None = "input",
    scale: float = 1.0,
    norm_before: tuple[Tensor, Tensor, float] | None = None,
    norm_after: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Compacter's adapter: a bottleneck whose two weights are built as Kronecker products first."""
    w_down, w_up = (_kronecker(*factors, x.dtype).t() for factors in ((rule_down, left_down, right_down), (rule_up, left_up, right_up)))
    return bottleneck(x, w_down, w_up, b_down, b_up, activation=activation, residual=residual, scale=scale, norm_before=norm_before, norm_after=norm_after)


def gated_bottleneck(
    h: Tensor,
    x: Tensor | None,
    w_down: Weights,
    w_up: Weights,
    b_down: Weights | None = None,
    b_up: Weights | None = None,
    *,
    granularity: str,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_up_weight: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    combine: str = "multiply",
    activation: str = "gelu_new",
    heads: int = 1,
    input_scale: float = 1.0,
    adapter_scale: float = 1.0,
    scale: float = 1.0,
    save_gate: bool | None = None,
) -> Tensor:
    """VL-PET's encoder module: multi-head adapter, then the granularity gate (VL-PET, section 3.2 and 3.3). ``save_gate`` has no meaning here."""
    delta = _projections(h, w_down, w_up, b_down, b_up, activation, heads)
    if adapter_scale != 1.0:
        delta = adapter_scale * delta
    total = (h if input_scale == 1.0 else input_scale * h) + delta
    if granularity == "middleY":
        v = gate_weight.to(h.dtype)
        y = total + 1 + v if combine == "add" else total + total * v
    else:
        if granularity == "large":
            gate = torch.sigmoid(_linear(ACTIVATIONS[activation](_linear(x, gate_weight, gate_bias)), gate_up_weight, gate_up_bias))
        elif granularity == "large_full":
            gate = torch.sigmoid(_linear(x, gate_weight, gate_bias))
        elif granularity == "middleX":
            gate = torch.sigmoid(_linear(x + total, gate_weight[None], gate_bias))
        else:
            gate = torch.sigmoid(_linear(torch.cat([x, total], -1), gate_weight[None], gate_bias)).mean(1, keepdim=True)
        y = total + gate if combine == "add" else total * gate
    return y if scale == 1.0 else scale * y


def routed_bottleneck(
    x: Tensor,
    task_ids: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "gelu_new",
    residual: Tensor | str | None = "input",
    scale: float = 1.0,
) -> Tensor:
    """A call of one task's adapter after the other, each on its own rows, and the rows put back: what a batch of several tasks takes without a routed op."""
    rows = x.reshape(-1, x.shape[-1])
    ids = task_ids.repeat_interleave(len(rows) // max(len(task_ids), 1))
    y = torch.zeros_like(rows)
    for g in range(max(len(p) for p in (w_down, w_up, b_down, b_up) if p is not None)):
        wd, wu, bd, bu = (None if p is None else p[g if len(p) > 1 else 0] for p in (w_down, w_up, b_down, b_up))
        own = (ids == g).nonzero()[:, 0]
        y = y.index_copy(0, own, bottleneck(rows[own], wd, wu, bd, bu, activation=activation, residual=None, scale=scale))  # type: ignore[arg-type]
    y = y.reshape(x.shape)
    return y if residual is None else y + (residual if isinstance(residual, Tensor) else x)


def lora(
    x: Tensor,
    y: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_up: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """PEFT's Linear beside its base layer's output y. A seed's mask is that of Philox4x32-10; without one it is torch's own."""
    if dropout:
        x = F.dropout(x, dropout) if seed is None else x * kept(seed, x, dropout).to(x.dtype) / (1 - dropout)
    return y + _linear(_linear(x, w_down, None), w_up, b_up) * scale


def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str | None = "layer",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A host's dropout, sum and norm: torch's layer norm, in float32 where its parameters are wider, as autocast has it, or T5LayerNorm. Masks as in `lora`."""
    if dropout:
        x = F.dropout(x, dropout) if seed is None else x * kept(seed, x, dropout).to(x.dtype) / (1 - dropout)
    v = x if residual is None else residual + x
    y = v
    if norm == "layer":
        wide = v if weight is None or weight.dtype == v.dtype else v.to(weight.dtype)
        y = F.layer_norm(wide, v.shape[-1:], weight, bias, eps).to(v.dtype)
    elif norm == "rms":
        wide = v if v.dtype == torch.float64 else v.float()
        y = v * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        if weight is not None:
            y = weight * y.to(weight.dtype)
        y = (y if bias is None else y + bias).to(v.dtype)
    return (y, v) if return_sum else y


def kept(seed: Tensor, x: Tensor, dropout: float) -> Tensor:
    """The elements of x that dropout keeps, by Philox4x32-10 as Random123 writes it: round, then bump of the key."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    t, group = np.meshgrid(np.arange(math.prod(x.shape[:-1]), dtype=np.uint64), np.arange(-(-x.shape[-1] // 4), dtype=np.uint64), indexing="ij")
    c, key = [group, t & low, t >> shift, np.zeros_like(t)], [np.uint64(int(seed) & 0xFFFFFFFF), np.uint64(int(seed) >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> shift) ^ c[1] ^ key[0], b & low, (a >> shift) ^ c[3] ^ key[1], a & low]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    numbers = np.stack(c, -1).reshape(len(t), 4 * t.shape[1])[:, : x.shape[-1]]
    return torch.from_numpy(numbers >= min(2**32 - 1, round(dropout * 2**32))).reshape(x.shape).to(x.device)
