"""One public function per op: the maths, shapes, dtypes and errors.

Dtypes: activations (x, h, residual) share one dtype A, one of float32, bfloat16, float16 (float64 runs on ``reference``). All parameters of a call share one dtype P, which is A or
float32; float32 parameters over half-precision activations is how people train. Kernels round parameters to A, accumulate in float32, and return weight gradients in P; on a CPU
bfloat16 results below 2^-126 may be zero. Under autocast, activations are cast to the autocast dtype and parameters stay as they are. `dropout_add_norm` has rules of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import backend
from fastadapt.ops import _cpu
from fastadapt.ops._library import activation_index, transformed
from fastadapt.ops.bottleneck import reference as _bottleneck_reference
from fastadapt.ops.bottleneck.function import bottleneck as _bottleneck
from fastadapt.ops.dropout_add_norm import reference as _norm_reference
from fastadapt.ops.dropout_add_norm.function import dropout_add_norm as _dropout_add_norm
from fastadapt.ops.gated_bottleneck import reference as _gated_reference
from fastadapt.ops.gated_bottleneck.function import gated_bottleneck as _gated_bottleneck
from fastadapt.ops.gated_bottleneck.schema import KINDS
from fastadapt.ops.lora import reference as _lora_reference
from fastadapt.ops.lora.function import draw_seed
from fastadapt.ops.lora.function import lora as _lora
from fastadapt.ops.phm_bottleneck import reference as _phm_reference
from fastadapt.ops.phm_bottleneck.function import phm_bottleneck as _phm_bottleneck
from fastadapt.ops.routed_bottleneck import reference as _routed_reference
from fastadapt.ops.routed_bottleneck.function import routed_bottleneck as _routed_bottleneck

__all__ = ["bottleneck", "dropout_add_norm", "gated_bottleneck", "lora", "multimodal_bottleneck", "phm_bottleneck", "routed_bottleneck"]

LayerNorm = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon of a layer norm."""

_STRIDED = torch.strided
_NORMS = {None: 0, "layer": 1, "rms": 2}
_SAVING = {None: -1, False: 0, True: 1}
_FACTORS = ("rule_down", "left_down", "right_down", "rule_up", "left_up", "right_up")
_GATES = ("gate_weight", "gate_bias", "gate_up_weight", "gate_up_bias")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bottleneck(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "gelu_new",
    residual: Tensor | Literal["input"] | None = "input",
    scale: float | Tensor = 1.0,
    gate: Tensor | None = None,
    heads: int = 1,
    norm_before: LayerNorm | None = None,
    norm_after: LayerNorm | None = None,
) -> Tensor:
    r"""Bottleneck adapter as one operation: down-projection, nonlinearity, up-projection, scale, gate and residual.

    .. math:: y = LN_{after}\bigl(s\, g \odot (\phi(LN_{before}(x) W_d^\top + b_d) W_u^\top + b_u)\bigr) + residual

    The sequential adapter of VL-Adapter (section 3.2; Houlsby, Pfeiffer) has ``residual="input"``, a parallel adapter (VL-PET's value-parallel adapter) gives the tensor
    that it runs beside. Layer norms are a `dropout_add_norm` before and one after the fused operation.

    Args:
        x: input, (..., D), any strides.
        w_down: down-projection, (R, D). Several heads' down-projections are one weight, stacked by rows.
        w_up: up-projection, (D, R); with ``heads=h`` > 1 the block-diagonal pair variant, (D, R/h): block i of D/h rows reads head i's R/h activations only, by a
            product with zeros for the others': a head that is not finite makes all others NaN.
        b_down: bias, (R,), or None.
        b_up: bias, (D,), or None.
        activation: "gelu_new" (tanh form; also "gelu_pytorch_tanh"), "gelu" (erf), "relu", "silu" ("swish") or "identity" ("linear").
        residual: "input" adds the un-normalised x, a tensor of x's shape is added, None adds nothing.
        scale: s, a Python number or a tensor of one element (which then gets a gradient).
        gate: g, a vector (D,), or None.
        heads: number of blocks of a block-diagonal ``w_up``.
        norm_before: (weight, bias, eps) of a layer norm of x, or None.
        norm_after: (weight, bias, eps) of a layer norm of the scaled and gated output, or None.

    Returns:
        y, of x's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    act = activation_index(activation)
    other, add_input = _residual(residual)
    scale_number, scale_tensor = _scale("scale", scale)
    if norm_before is None and norm_after is None and heads == 1:
        types = type(x), type(w_down), type(b_down), type(w_up), type(b_up), type(gate), type(scale_tensor), type(other)
        if (enter := _cpu.entrance("bottleneck", types)) and (y := enter(x, w_down, b_down, w_up, b_up, gate, scale_tensor, other, scale_number, act, add_input)) is not None:
            return y  # type: ignore[no-any-return]
    if not _evident(x, (other,), (w_down, w_up, b_down, b_up, gate, scale_tensor), heads) or norm_before is not None or norm_after is not None:
        x, other = _activations(x=x, residual=other)
        width = x.shape[-1]
        vectors = {**_norm_vectors("norm_before", norm_before), **_norm_vectors("norm_after", norm_after)}
        _projections(x, w_down, w_up, b_down, b_up, heads)
        _parameters(x, w_down.dtype, gate=(gate, (width,)), scale=(scale_tensor, None), **{k: (v, (width,)) for k, v in vectors.items()})
    if heads > 1:
        w_up = _block_diagonal(w_up, heads)

    def call(u: Tensor, residual: Tensor | None, add_input: bool) -> Tensor:
        return _call(_bottleneck, _bottleneck_reference.composed, u, w_down, b_down, w_up, b_up, gate, scale_tensor, _rows(residual), scale_number, act, add_input)

    try:
        return _normed(call, x, other, add_input, norm_before, norm_after)
    except RuntimeError:
        _dense(x=x, residual=other, w_down=w_down, w_up=w_up, b_down=b_down, b_up=b_up, gate=gate, scale=scale_tensor)
        raise


def gated_bottleneck(
    h: Tensor,
    x: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    granularity: Literal["large", "large_full", "middleX", "middleY", "small"],
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    gate_up_weight: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    combine: Literal["multiply", "add"] = "multiply",
    activation: str = "gelu_new",
    heads: int = 1,
    input_scale: float = 1.0,
    adapter_scale: float = 1.0,
    scale: float = 1.0,
    save_gate: bool | None = None,
) -> Tensor:
    r"""VL-PET's granularity-controlled adapter as one operation (VL-PET, section 3.2 and 3.3).

    With :math:`H' = c\,h + s_a (\phi(h W_d^\top + b_d) W_u^\top + b_u)` and :math:`\sigma` the logistic function,

    .. math:: y = s\,(H' \odot G) \quad\text{or}\quad y = s\,(H' + G)

    =============  ==========================================================  ==========================================
    granularity    G                                                           gate parameters
    =============  ==========================================================  ==========================================
    ``large``      :math:`\sigma(\phi(x W_1^\top + b_1) W_2^\top + b_2)`       gate_weight (Rg, D), gate_bias (Rg,), gate_up_weight (D, Rg), gate_up_bias (D,)
    ``large_full`` :math:`\sigma(x W_g^\top + b_g)`                            gate_weight (D, D), gate_bias (D,)
    ``middleX``    :math:`\sigma((x + H') w + b)`, one per row                 gate_weight (D,), gate_bias (1,)
    ``middleY``    :math:`1 + v`                                               gate_weight (D,)
    ``small``      mean over L of :math:`\sigma([x; H'] w + b)`, per sample     gate_weight (2D,), gate_bias (1,)
    =============  ==========================================================  ==========================================

    ``small`` averages over all L positions, padding included, as the original does: a sample's output depends on the padded length of its batch.
    The projection of ``large_full`` runs as one library GEMM, whose bits torch lets depend on the number of threads; its gate is applied in the fused kernel.

    Args:
        h: output of the frozen sub-layer, (..., D); ``small`` needs (B, L, D) with L >= 1.
        x: residual stream that enters the sub-layer, of h's shape; unused (may be None) for ``middleY``.
        w_down, w_up, b_down, b_up, activation, heads: as in `bottleneck`; the gate of ``large`` uses the same activation.
        combine: "multiply" or "add".
        input_scale: c. VL-PET on T5: ``encoder_x2_scaling_factor``.
        adapter_scale: s_a.
        scale: s. VL-PET on T5: ``encoder_gating_scaling_factor``, 0.3.
        save_gate: keep H' and the gate for backward (2 D numbers a row) instead of recomputing them; None lets the backend decide.

    Returns:
        y, of h's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    act = activation_index(activation)
    if granularity not in ("large", "large_full", *KINDS[2:]):
        raise ValueError(f"granularity: {granularity!r} is unknown; must be one of large, large_full, middleX, middleY, small")
    if combine not in ("multiply", "add"):
        raise ValueError(f"combine: must be 'multiply' or 'add', not {combine!r}")
    if x is None and granularity != "middleY":
        raise ValueError(f"x: granularity {granularity!r} needs the residual stream, got None")
    other = x if granularity != "middleY" else None
    gates = (gate_weight, gate_bias, gate_up_weight, gate_up_bias)
    try:
        saving = _SAVING[save_gate]
    except (KeyError, TypeError):
        raise TypeError(f"save_gate: must be True, False or None, not {repr(save_gate) if isinstance(save_gate, str) else type(save_gate).__name__}") from None
    if granularity != "large_full" and heads == 1 and type(input_scale) is type(adapter_scale) is type(scale) is float:
        tensors = h, other, w_down, b_down, w_up, b_up, *gates
        if enter := _cpu.entrance("gated_bottleneck", tuple(map(type, tensors))):
            y = enter(*tensors, input_scale, adapter_scale, scale, act, KINDS.index(granularity), combine == "add", saving)
            if y is not None:
                return y  # type: ignore[no-any-return]
    scales = [_number(n, v) for n, v in (("input_scale", input_scale), ("adapter_scale", adapter_scale), ("scale", scale))]
    if not (_evident(h, (other,), (w_down, w_up, b_down, b_up), heads) and _evident_gate(h, w_down.dtype, granularity, gates)):
        h, other = _activations(h=h, x=other)
        _projections(h, w_down, w_up, b_down, b_up, heads)
        _gate_parameters(h, w_down.dtype, granularity, gates)
    samples = 1
    if granularity == "small":
        if h.dim() != 3 or h.shape[1] == 0:
            raise ValueError(f"h: granularity 'small' averages over the sequence and needs (B, L, D) with L >= 1, got {tuple(h.shape)}")
        samples = h.shape[0]
    if heads > 1:
        w_up = _block_diagonal(w_up, heads)
    kind: str = granularity
    if granularity == "large_full":
        kind, other = "logits", F.linear(other, gate_weight.to(h.dtype), None if gate_bias is None else gate_bias.to(h.dtype))  # type: ignore[arg-type, union-attr]
        gate_weight = gate_bias = None
    try:
        return _call(
            _gated_bottleneck, _gated_reference.composed, h, _rows(other), w_down, b_down, w_up, b_up, gate_weight, gate_bias, gate_up_weight, gate_up_bias,
            *scales, act, KINDS.index(kind), combine == "add", samples, saving,
        )  # fmt: skip
    except RuntimeError:
        _dense(h=h, x=x, w_down=w_down, w_up=w_up, b_down=b_down, b_up=b_up, **dict(zip(_GATES, gates, strict=True)))
        raise


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
    r"""LoRA beside a frozen projection as one operation: dropout, down-projection, up-projection, scale and the sum with the projection's output (Hu et al. 2021, section 4.1).

    .. math:: y' = y + s\,(D(x) W_d^\top W_u^\top + b_u), \qquad D(x) = \tfrac{1}{1 - p}\, M \odot x

    M keeps an element with probability 1 - p. It is a function of the seed and of an element's row and column alone (Philox4x32-10; `fastadapt.ops.philox.keep`), the same on every
    backend, and never stored: backward draws it again.

    Args:
        x: input of the projection, (..., in), any strides.
        y: output of the projection, (..., out); in and out may differ.
        w_down: down-projection, (R, in); LoRA's A. Adapters of several projections of one x are one weight, stacked by rows.
        w_up: up-projection, (out, R); LoRA's B. For stacked adapters, block-diagonal.
        b_up: bias, (out,), or None.
        scale: s, a Python number.
        dropout: p, from 0 to below 1: what this call applies, so give 0 outside training.
        seed: of the dropout, int64, one element on x's device, never read on the host. None draws it from torch's generator of that device, which `torch.manual_seed` sets.

    Returns:
        y', of y's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    if type(scale) is type(dropout) is float and (enter := _cpu.entrance("lora", (type(x), type(y), type(w_down), type(w_up), type(b_up), type(seed)))):
        out = enter(x, y, w_down, w_up, b_up, seed, scale, dropout)
        if out is not None:
            return out  # type: ignore[no-any-return]
    scale = _number("scale", scale)
    _check_dropout(dropout)
    if not _evident_lora(x, y, w_down, w_up, b_up):
        (x,), (y,) = _activations(x=x), _activations(y=y)
        _beside(x, y, w_down, w_up, b_up)
    seed = _seed(x, seed, dropout)
    try:
        return _call(_lora, _lora_reference.composed, x, _rows(y), w_down, w_up, b_up, seed, scale, float(dropout), shape=y.shape)
    except RuntimeError:
        _dense(x=x, y=y, w_down=w_down, w_up=w_up, b_up=b_up, seed=seed)
        raise


@overload
def dropout_add_norm(
    x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *, norm: Literal["layer", "rms"] | None = "layer", eps: float = 1e-5,
    dropout: float = 0.0, seed: Tensor | None = None, return_sum: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def dropout_add_norm(
    x: Tensor, residual: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, *, norm: Literal["layer", "rms"] | None = "layer", eps: float = 1e-5,
    dropout: float = 0.0, seed: Tensor | None = None, return_sum: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def dropout_add_norm(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: Literal["layer", "rms"] | None = "layer",
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""What stands behind a sub-layer as one operation: dropout, the sum with the residual stream, and the norm (Vaswani et al. 2017, section 5.4).

    .. math::
        v = residual + D(x), \qquad D(x) = \tfrac{1}{1 - p}\, M \odot x, \qquad
        y = w \odot \frac{v - mean(v)}{\sqrt{var(v) + \epsilon}} + b \quad\text{or}\quad y = w \odot \frac{v}{\sqrt{mean(v^2) + \epsilon}} + b

    Post-norm hosts (BART) go on with y, pre-norm ones (T5) with v and y; alone it is a layer norm or an RMS norm. M is that of `lora`.

    Dtypes: the residual has x's dtype A, or float32 beside a half-precision x (a residual stream under autocast); v and y have the residual's dtype V, without one A. Weight and
    bias share one dtype, V or float32, and are not rounded to V, as torch's own norms do not. v is rounded to V before its statistics are taken; everything is computed in float32.
    Under autocast tensors keep their dtypes, and a half-precision residual beside a float32 x becomes float32, as in torch's own sum.

    Args:
        x: output of the sub-layer, (..., D), any strides.
        residual: residual stream, of x's shape, or None.
        weight: w, (D,); None is ones.
        bias: b, (D,); None is zeros.
        norm: "layer" (biased variance), "rms", or None: y is v, and there are neither weight nor bias.
        eps: a Python number.
        dropout: p, from 0 to below 1: what this call applies, so give 0 outside training.
        seed: of the dropout, int64, one element on x's device, never read on the host. None draws it from torch's generator of that device, which `torch.manual_seed` sets.
        return_sum: return v too.

    Returns:
        y, of x's shape and dtype V; with ``return_sum`` y and v. What would be x itself is x.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    kind = _norm_index(norm)
    if type(eps) is type(dropout) is float and (enter := _cpu.entrance("dropout_add_norm", (type(x), type(residual), type(weight), type(bias), type(seed)))):
        try:
            y, v = enter(x, residual, weight, bias, seed, kind, eps, dropout, return_sum)
        except RuntimeError:
            _flag("return_sum", return_sum)
            raise
        if y is not None:
            return (y, v) if return_sum else y
    eps = _number("eps", eps)
    if eps < 0.0:
        raise ValueError(f"eps: must not be negative, not {eps!r}")
    _check_dropout(dropout)
    if not _evident_norm(x, residual, weight, bias, kind):
        (x,) = _activations(False, x=x)
        residual = _stream(x, residual)
        _norm_parameters(x if residual is None else residual, weight, bias, kind)
    seed = _seed(x, seed, dropout)
    if kind == 0 and residual is None and not dropout:
        return (x, x) if return_sum else x
    if bias is not None and weight is None:
        weight = torch.ones_like(bias)
    try:
        args = _rows(x), _rows(residual), weight, bias, seed, kind, eps, float(dropout)
        if _in_plain_torch():
            y, v = _norm_reference.composed(*args)[:2]
        else:
            y, v = _dropout_add_norm(*args, return_sum=return_sum, demand=backend.demand())
    except RuntimeError:
        _dense(x=x, residual=residual, weight=weight, bias=bias, seed=seed)
        _flag("return_sum", return_sum)
        raise
    if x.dim() != 2:
        y, v = y.reshape(x.shape), v.reshape(x.shape) if return_sum else v
    return (y, v) if return_sum else y


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
    residual: Tensor | Literal["input"] | None = "input",
    scale: float = 1.0,
    norm_before: LayerNorm | None = None,
    norm_after: LayerNorm | None = None,
) -> Tensor:
    r"""Compacter's adapter as one operation: a bottleneck whose projections are sums of Kronecker products of low rank, which are never formed (Compacter, section 3.2).

    .. math::
        y = LN_{after}\bigl(s\,(\phi(LN_{before}(x) H_d + b_d) H_u + b_u)\bigr) + residual, \qquad
        H = \sum_{i<n} A_i \otimes (L_i R_i), \quad H[a\,in/n + j,\ c\,out/n + p] = \sum_{i,q} A_i[a, c]\, L_i[j, q]\, R_i[q, p]

    With x's n parts :math:`x_a` a projection is :math:`y_c = \sum_i \bigl(\sum_a A_i[a, c]\, x_a L_i\bigr) R_i`: k (n in + n^3 + n out) multiply-adds a row instead of in out,
    3,520 instead of 73,728 at n = 4, k = 1, in = 768, out = 96.

    Args:
        x: input, (..., D), any strides.
        rule_down: A of the down-projection, (n, n, n); n divides D and R. A factorised rule is the product of its factors; a shared one is one tensor given to several calls.
        left_down: L of the down-projection, (n, D/n, k).
        right_down: R of the down-projection, (n, k, R/n).
        rule_up: A of the up-projection, (n, n, n).
        left_up: L of the up-projection, (n, R/n, k).
        right_up: R of the up-projection, (n, k, D/n).
        b_down: bias, (R,), or None.
        b_up: bias, (D,), or None.
        activation, residual, norm_before, norm_after: as in `bottleneck`.
        scale: s, a Python number.

    Returns:
        y, of x's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    act = activation_index(activation)
    other, add_input = _residual(residual)
    scale = _number("scale", scale)
    factors = (rule_down, left_down, right_down, rule_up, left_up, right_up)
    if not _evident_phm(x, other, factors, b_down, b_up) or norm_before is not None or norm_after is not None:
        x, other = _activations(x=x, residual=other)
        _factors(x, factors, b_down, b_up)
        vectors = {**_norm_vectors("norm_before", norm_before), **_norm_vectors("norm_after", norm_after)}
        _parameters(x, rule_down.dtype, "rule_down", **{k: (v, (x.shape[-1],)) for k, v in vectors.items()})

    def call(u: Tensor, residual: Tensor | None, add_input: bool) -> Tensor:
        return _call(_phm_bottleneck, _phm_reference.composed, u, *factors[:3], b_down, *factors[3:], b_up, _rows(residual), scale, act, add_input)

    try:
        return _normed(call, x, other, add_input, norm_before, norm_after)
    except RuntimeError:
        _dense(x=x, residual=other, **dict(zip(_FACTORS, factors, strict=True)), b_down=b_down, b_up=b_up)
        raise


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
    residual: Tensor | Literal["input"] | None = "input",
    scale: float | Tensor = 1.0,
    norm_before: LayerNorm | None = None,
    norm_cross: LayerNorm | None = None,
) -> Tensor:
    r"""UniAdapter's bottleneck, whose down-projection all modalities share, as one `bottleneck` (UniAdapter, section 3).

    With :math:`k = \phi(LN_{before}(x) W_d^\top + b_d)`

    .. math::
        y = s\,(k W_t^\top + b_t) + residual \quad\text{or, with } W_m, \qquad y = s\,LN_{cross}\bigl((k W_m^\top + b_m) + (k W_t^\top + b_t)\bigr) + residual

    Each modality has its own up-projection :math:`W_t`; the cross-modal branch adds :math:`W_m` to the text's. The two are one projection by the sum of their weights, formed in
    their dtype, D R additions in place of T D R multiplications; both get its gradient. A query residual (the text adapter's output beside the cross-modal one's) is given as
    ``residual``.

    Args:
        x: input, (..., D), any strides.
        w_down: down-projection, (R, D), one for all modalities.
        w_up: W_t, the up-projection of one modality, (D, R).
        w_cross: W_m, the cross-modal up-projection, (D, R), or None: one modality alone, or ``w_up`` and ``b_up`` are the sums already.
        b_down: bias, (R,), or None.
        b_up: bias of ``w_up``, (D,), or None.
        b_cross: bias of ``w_cross``, (D,), or None.
        activation, residual, norm_before: as in `bottleneck`.
        scale: s, a Python number or a tensor of one element (which then gets a gradient).
        norm_cross: (weight, bias, eps) of a layer norm of the sum, or None.

    Returns:
        y, of x's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    if w_cross is None:
        if b_cross is not None:
            raise ValueError("b_cross: there is no cross-modal up-projection (w_cross=None) that it would belong to")
    else:
        _alike("w_cross", w_cross, "w_up", w_up)
        w_up = w_up + w_cross
        if b_cross is not None:
            if b_up is not None:
                _alike("b_cross", b_cross, "b_up", b_up)
            b_up = b_cross if b_up is None else b_up + b_cross
    scale = scale if isinstance(scale, Tensor) else _scale("scale", scale)[0]
    if norm_cross is not None:
        _activations(False, x=x)
        _tensor("w_down", w_down)
        _parameters(
            x,
            w_down.dtype,
            **{name: (v, (x.shape[-1],)) for name, v in _norm_vectors("norm_cross", norm_cross).items()},
            scale=(scale if isinstance(scale, Tensor) else None, None),
        )
        # s LN(u) is LN with s times the weights: the fused operation has no scale of its own then.
        scale = scale.reshape(()) if isinstance(scale, Tensor) else scale
        norm_cross, scale = (norm_cross[0] * scale, norm_cross[1] * scale, norm_cross[2]), 1.0
    return bottleneck(x, w_down, w_up, b_down, b_up, activation=activation, residual=residual, scale=scale, norm_before=norm_before, norm_after=norm_cross)


def _alike(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Checks that two parameters can be added: a sum that broadcasts or promotes would hide a mistake."""
    for n, value in ((name, t), (other_name, other)):
        _tensor(n, value)
    if t.shape != other.shape:
        raise ValueError(f"{name}: shape {tuple(t.shape)} must equal that of {other_name}, {tuple(other.shape)}")
    if t.dtype != other.dtype:
        raise TypeError(f"{name}: dtype {t.dtype} must equal that of {other_name}, {other.dtype}")
    if t.device != other.device:
        raise ValueError(f"{name}: is on {t.device}, but {other_name} is on {other.device}")


def routed_bottleneck(
    x: Tensor,
    task_ids: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    activation: str = "gelu_new",
    residual: Tensor | Literal["input"] | None = "input",
    scale: float = 1.0,
) -> Tensor:
    r"""Bottleneck adapters of several tasks over a batch that mixes them, as one operation (VL-Adapter, section 3.3: an adapter per task, or half-shared ones).

    .. math:: y_t = s\,(\phi(x_t W_d[g]^\top + b_d[g]) W_u[g]^\top + b_u[g]) + residual_t, \qquad g = \text{the id of row } t

    Row for row what `bottleneck` with the parameters of the row's task gives. The ids are a tensor that is never read on the host: other tasks need no other graph and no
    synchronisation. A row whose id is none of 0 .. G - 1, for instance -1, has no adapter: its y is the residual alone. Tasks that have no row get gradients of zero.

    Args:
        x: input, (..., D), any strides.
        task_ids: g, int64, (N,) with N a divisor of the number of rows: each id is that of as many consecutive rows. One id a sample for x of shape (N, L, D), or one a row.
        w_down: down-projections, (G, R, D), or (1, R, D): shared by all tasks.
        w_up: up-projections, (G, D, R) or (1, D, R).
        b_down: biases, (G, R) or (1, R), or None.
        b_up: biases, (G, D) or (1, D), or None.
        activation, residual: as in `bottleneck`.
        scale: s, a Python number.

    Returns:
        y, of x's shape and dtype A.

    Raises:
        TypeError, ValueError: an argument's type, shape, dtype or device is wrong; raised before any kernel runs.
        fastadapt.backend.BackendError: a demanded backend cannot run the call.
    """
    act = activation_index(activation)
    other, add_input = _residual(residual)
    scale = _number("scale", scale)
    x, other = _activations(x=x, residual=other)
    try:
        _banks(x, task_ids, w_down, w_up, b_down, b_up)
        return _call(_routed_bottleneck, _routed_reference.composed, x, task_ids, w_down, b_down, w_up, b_up, _rows(other), scale, act, add_input)
    except RuntimeError:
        _dense(x=x, task_ids=task_ids, w_down=w_down, w_up=w_up, b_down=b_down, b_up=b_up)
        raise


def _banks(x: Tensor, task_ids: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor | None, b_up: Tensor | None) -> None:
    """Checks the ids and the tasks' parameters of a `routed_bottleneck` over x."""
    for name, t in (("task_ids", task_ids), ("w_down", w_down), ("w_up", w_up)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(t).__name__}")
    width, count = x.shape[-1], x.numel() // x.shape[-1]
    if task_ids.dtype != torch.int64:
        raise TypeError(f"task_ids: dtype {task_ids.dtype} must be int64")
    if task_ids.dim() != 1 or (count % len(task_ids) if len(task_ids) else count):
        raise ValueError(f"task_ids: shape {tuple(task_ids.shape)} must be (N,) with N a divisor of the number of rows, {count}")
    if task_ids.device != x.device:
        raise ValueError(f"task_ids: is on {task_ids.device}, but the input is on {x.device}")
    if w_down.dim() != 3 or w_down.shape[2] != width or 0 in w_down.shape:
        raise ValueError(f"w_down: shape {tuple(w_down.shape)} must be (G, R, {width}) with G >= 1 and R >= 1")
    rank = w_down.shape[1]
    given = {"w_down": (w_down, (rank, width)), "w_up": (w_up, (width, rank)), "b_down": (b_down, (rank,)), "b_up": (b_up, (width,))}
    lengths = {name: len(p) if isinstance(p, Tensor) and p.dim() == 1 + len(shape) else 0 for name, (p, shape) in given.items()}
    tasks = max([*lengths.values()])
    shapes = {name: (p, (1 if lengths[name] == 1 else tasks, *shape)) for name, (p, shape) in given.items()}
    _parameters(x, w_down.dtype, **shapes)


def _residual(residual: Tensor | str | None) -> tuple[Tensor | None, bool]:
    """Another tensor to add, and whether the input is added."""
    if isinstance(residual, Tensor):
        return residual, False
    if residual is not None and (not isinstance(residual, str) or residual != "input"):
        raise TypeError(f"residual: must be a tensor, 'input' or None, not {repr(residual) if isinstance(residual, str) else type(residual).__name__}")
    return None, residual is not None


def _normed(call: Callable[[Tensor, Tensor | None, bool], Tensor], x: Tensor, other: Tensor | None, add_input: bool, before: LayerNorm | None, after: LayerNorm | None) -> Tensor:
    """``call(u, residual, add_input)`` between layer norms: the residual is the un-normalised x, and is added behind the last norm."""
    if before is None and after is None:
        return call(x, other, add_input)
    u = x
    if before is not None:
        u, other, add_input = layer_norm(x, before), x if add_input else other, False
    if after is None:
        return call(u, other, add_input)
    y = layer_norm(call(u, None, False), after)
    return y + x if add_input else y if other is None else y + other


def _call(function, composed, x: Tensor, *args, shape=None) -> Tensor:  # type: ignore[no-untyped-def]
    """Runs ``function`` on x and the other `_rows`; while torch transforms calls, the differentiable reference. ``shape``: y's, if not x's."""
    rows = _rows(x)
    y = composed(rows, *args)[0] if _in_plain_torch() else function(rows, *args, demand=backend.demand())
    return y if x.dim() == 2 else y.reshape(x.shape if shape is None else shape)


def _in_plain_torch() -> bool:
    """`transformed`, where no kernel is demanded."""
    if not transformed():
        return False
    if (name := backend.NAMES[backend.demand()]) not in ("auto", "reference"):
        raise backend.BackendError(f"backend {name!r} cannot run this call: under torch.func transforms and forward-mode differentiation only 'reference' runs")
    return True


def _rows(t):  # type: ignore[no-untyped-def]
    return t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1])


def _autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)


def _evident(x: Tensor, others: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...], heads: int) -> bool:
    """Whether a call is right at a glance. Anything else goes through the full checks, which say what is wrong: they cost more than the op at small shapes (measured: 100 us)."""
    try:
        dtype, device, shape = x.dtype, x.device, x.shape
        if _autocasts(device.type):
            return False
        w_down, w_up, b_down, b_up, *vectors = parameters
        p_dtype, (rank, width) = w_down.dtype, w_down.shape  # type: ignore[union-attr]
        return (
            dtype in _FLOATS
            and (p_dtype == dtype or p_dtype == torch.float32)
            and len(shape) > 1
            and shape[-1] == width
            and rank > 0 < width
            and heads == 1
            and w_up.shape == (width, rank)  # type: ignore[union-attr]
            and (b_down is None or b_down.shape == (rank,))
            and (b_up is None or b_up.shape == (width,))
            and (not vectors or ((vectors[0] is None or vectors[0].shape == (width,)) and (vectors[1] is None or vectors[1].numel() == 1)))
            and all(p is None or (p.dtype == p_dtype and p.device == device) for p in parameters)
            and all(t is None or (t.shape == shape and t.dtype == dtype and t.device == device) for t in others)
        )
    except (AttributeError, ValueError, RuntimeError):  # the last of nested tensors, which have no shape
        return False


def _evident_gate(h: Tensor, dtype: torch.dtype, granularity: str, gates: tuple[Tensor | None, ...]) -> bool:
    try:
        weight, bias, up, up_bias = gates
        if weight is None:
            return False
        width, device = h.shape[-1], h.device
        if granularity == "large":
            rank = weight.shape[0]  # type: ignore[union-attr]
            right = (
                weight.shape == (rank, width)
                and rank > 0
                and up.shape == (width, rank)  # type: ignore[union-attr]
                and (bias is None or bias.shape == (rank,))
                and (up_bias is None or up_bias.shape == (width,))
            )  # type: ignore[union-attr]
        else:
            right = granularity in ("middleX", "middleY") and weight.shape == (width,) and up is None and up_bias is None  # type: ignore[union-attr]
            right = right and (bias is None or (granularity == "middleX" and bias.shape == (1,)))
        return right and all(p is None or (p.dtype == dtype and p.device == device) for p in gates)
    except (AttributeError, IndexError, RuntimeError):
        return False


def _gate_parameters(h: Tensor, dtype: torch.dtype, granularity: str, gates: tuple[Tensor | None, ...]) -> None:
    """Checks that the gate parameters are those that the granularity has."""
    _dense(**dict(zip(_GATES, gates, strict=True)))
    width, gate_weight = h.shape[-1], gates[0]
    gate_rank = gate_weight.shape[0] if granularity == "large" and isinstance(gate_weight, Tensor) and gate_weight.dim() == 2 else None
    expected: dict[str, tuple[int, ...]] = {
        "large": {"gate_weight": (gate_rank or 0, width), "gate_bias": (gate_rank or 0,), "gate_up_weight": (width, gate_rank or 0), "gate_up_bias": (width,)},
        "large_full": {"gate_weight": (width, width), "gate_bias": (width,)},
        "middleX": {"gate_weight": (width,), "gate_bias": (1,)},
        "middleY": {"gate_weight": (width,)},
        "small": {"gate_weight": (2 * width,), "gate_bias": (1,)},
    }[granularity]  # type: ignore[assignment]
    given = dict(zip(_GATES, gates, strict=True))
    for name, value in given.items():
        if value is not None and name not in expected:
            raise ValueError(f"{name}: granularity {granularity!r} has no such parameter")
        if value is None and name in expected and "weight" in name:
            raise ValueError(f"{name}: granularity {granularity!r} needs it, got None")
    if granularity == "large" and not gate_rank:
        raise ValueError(f"gate_weight: must be (Rg, {width}) with Rg >= 1, got {tuple(gate_weight.shape)}")  # type: ignore[union-attr]
    _parameters(h, dtype, **{name: (given[name], shape) for name, shape in expected.items()})


def _evident_phm(x: Tensor, other: Tensor | None, factors: tuple[Tensor, ...], b_down: Tensor | None, b_up: Tensor | None) -> bool:
    """As `_evident`."""
    try:
        dtype, device, shape = x.dtype, x.device, x.shape
        if _autocasts(device.type):
            return False
        rule, left, right, rule_up, left_up, right_up = factors
        p_dtype, (n, part, k), inner = rule.dtype, left.shape, right.shape[2]
        return (
            dtype in _FLOATS
            and (p_dtype == dtype or p_dtype == torch.float32)
            and len(shape) > 1
            and shape[-1] == n * part
            and n > 0 < part
            and k > 0 < inner
            and rule.shape == rule_up.shape == (n, n, n)
            and right.shape == (n, k, inner)
            and left_up.shape == (n, inner, k)
            and right_up.shape == (n, k, part)
            and (b_down is None or (b_down.shape == (n * inner,) and b_down.dtype == p_dtype and b_down.device == device))
            and (b_up is None or (b_up.shape == (n * part,) and b_up.dtype == p_dtype and b_up.device == device))
            and all(p.dtype == p_dtype and p.device == device for p in factors)
            and (other is None or (other.shape == shape and other.dtype == dtype and other.device == device))
        )
    except (AttributeError, IndexError, ValueError, RuntimeError):
        return False


def _factors(x: Tensor, factors: tuple[Tensor, ...], b_down: Tensor | None, b_up: Tensor | None) -> None:
    """Checks the factors of a `phm_bottleneck` over x."""
    for name, factor in zip(_FACTORS, factors, strict=True):
        _tensor(name, factor)
    width, rule, left, right = x.shape[-1], *factors[:3]
    n = rule.shape[0] if rule.dim() == 3 else 0
    if n == 0 or rule.shape != (n, n, n) or width % n:
        raise ValueError(f"rule_down: shape {tuple(rule.shape)} must be (n, n, n) with n >= 1 that divides the width {width}")
    k = left.shape[-1] if left.dim() == 3 else 0
    if k == 0 or left.shape[:2] != (n, width // n):
        raise ValueError(f"left_down: shape {tuple(left.shape)} must be ({n}, {width // n}, k) with k >= 1")
    inner = right.shape[-1] if right.dim() == 3 else 0
    if inner == 0 or right.shape[:2] != (n, k):
        raise ValueError(f"right_down: shape {tuple(right.shape)} must be ({n}, {k}, R/{n}) with R >= {n}")
    shapes = ((n, n, n), (n, width // n, k), (n, k, inner), (n, n, n), (n, inner, k), (n, k, width // n))
    expected = {name: (factor, shape) for name, factor, shape in zip(_FACTORS, factors, shapes, strict=True)}
    _parameters(x, rule.dtype, "rule_down", **expected, b_down=(b_down, (n * inner,)), b_up=(b_up, (width,)))


def _evident_lora(x: Tensor, y: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None) -> bool:
    """As `_evident`."""
    try:
        dtype, device, shape, out = x.dtype, x.device, x.shape, y.shape
        if _autocasts(device.type):
            return False
        p_dtype, (rank, width) = w_down.dtype, w_down.shape
        return (
            dtype in _FLOATS
            and (p_dtype == dtype or p_dtype == torch.float32)
            and len(shape) > 1
            and shape[-1] == width
            and rank > 0 < width
            and len(out) == len(shape)
            and out[:-1] == shape[:-1]
            and out[-1] > 0
            and y.dtype == dtype
            and y.device == device
            and w_up.shape == (out[-1], rank)
            and w_up.dtype == p_dtype
            and w_down.device == w_up.device == device
            and (b_up is None or (b_up.shape == out[-1:] and b_up.dtype == p_dtype and b_up.device == device))
        )
    except (AttributeError, ValueError, RuntimeError):  # the last of nested tensors, which have no shape
        return False


def _beside(x: Tensor, y: Tensor, w_down: Tensor, w_up: Tensor, b_up: Tensor | None) -> None:
    """Checks the output of the projection and the weights of a `lora` over x."""
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"y: shape {tuple(y.shape)} must be ({', '.join(map(str, x.shape[:-1]))}, out), the rows of x, {tuple(x.shape)}")
    if y.dtype != x.dtype:
        raise TypeError(f"y: dtype {y.dtype} must equal that of x, {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"y: is on {y.device}, but x is on {x.device}")
    rank = _rank(w_down, x.shape[-1], w_up=w_up)
    _parameters(x, w_down.dtype, w_down=(w_down, (rank, x.shape[-1])), w_up=(w_up, (y.shape[-1], rank)), b_up=(b_up, (y.shape[-1],)))


def _norm_index(norm: str | None) -> int:
    try:
        return _NORMS[norm]
    except (KeyError, TypeError):
        raise ValueError(f"norm: must be 'layer', 'rms' or None, not {norm!r}") from None


def _evident_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, kind: int) -> bool:
    """As `_evident`."""
    try:
        dtype, device, shape = x.dtype, x.device, x.shape
        if dtype not in _FLOATS or len(shape) < 2 or shape[-1] == 0:
            return False
        if residual is not None:
            if residual.shape != shape or residual.device != device or (residual.dtype != dtype and (residual.dtype != torch.float32 or dtype.itemsize != 2)):
                return False
            dtype = residual.dtype
        if weight is None or kind == 0:
            return weight is bias is None
        p_dtype = weight.dtype
        return (
            (p_dtype == dtype or p_dtype == torch.float32)
            and weight.shape == shape[-1:]
            and weight.device == device
            and (bias is None or (bias.shape == shape[-1:] and bias.dtype == p_dtype and bias.device == device))
        )
    except (AttributeError, RuntimeError):
        return False


def _stream(x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Checks the residual stream that x is added to."""
    if residual is None:
        return None
    (residual,) = _activations(False, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)} must equal that of x, {tuple(x.shape)}")
    if residual.device != x.device:
        raise ValueError(f"residual: is on {residual.device}, but x is on {x.device}")
    if residual.dtype == x.dtype or (residual.dtype == torch.float32 and x.dtype.itemsize == 2):
        return residual
    if x.dtype == torch.float32 and residual.dtype.itemsize == 2 and _autocasts(x.device.type):
        return residual.to(x.dtype)
    raise TypeError(f"residual: dtype {residual.dtype} must equal that of x, {x.dtype}, or be float32 beside a half-precision x")


def _norm_parameters(v: Tensor, weight: Tensor | None, bias: Tensor | None, kind: int) -> None:
    """Checks weight and bias of a norm of tensors like v."""
    given = {name: p for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    for name, p in given.items():
        if kind == 0:
            raise ValueError(f"{name}: norm None has no such parameter")
        _tensor(name, p)
    if given:
        first = next(iter(given))
        _parameters(v, given[first].dtype, first, **{name: (p, (v.shape[-1],)) for name, p in given.items()})


def _check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: must be a number from 0 to below 1, not {dropout!r}")


def _seed(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    """The seed of a call's dropout: the one given, which is checked, or a new one; None where nothing is dropped."""
    if seed is not None:
        _check_seed(x, seed)
    if not dropout:
        return None
    return draw_seed(x) if seed is None else seed


def _check_seed(x: Tensor, seed: Tensor) -> None:
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        raise TypeError(f"seed: must be an int64 tensor, not {seed.dtype if isinstance(seed, Tensor) else type(seed).__name__}")
    _tensor("seed", seed)
    if seed.numel() != 1:
        raise ValueError(f"seed: shape {tuple(seed.shape)} must be one element")
    if seed.device != x.device:
        raise ValueError(f"seed: is on {seed.device}, but the input is on {x.device}")


def _activations(cast: bool = True, /, **tensors: Tensor | None) -> list[Any]:
    """Checks the activations of a call against the first one, and casts them under autocast, unless ``cast`` is False."""
    first_name, first = next(iter(tensors.items()))
    out: list[Any] = []
    for name, t in tensors.items():
        if t is None and out:  # the first one is needed
            out.append(t)
            continue
        t = _tensor(name, t)
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name}: dtype {t.dtype} is not supported; must be float32, bfloat16, float16 or float64")
        if cast and t.dtype != torch.float64 and _autocasts(t.device.type):
            t = t.to(torch.get_autocast_dtype(t.device.type))
        if name == first_name:
            first = t
            if t.dim() < 2 or t.shape[-1] == 0:
                raise ValueError(f"{name}: must be (..., D) with at least two dimensions and D >= 1, got shape {tuple(t.shape)}")
        elif t.shape != first.shape:  # type: ignore[union-attr]
            raise ValueError(f"{name}: shape {tuple(t.shape)} must equal that of {first_name}, {tuple(first.shape)}")  # type: ignore[union-attr]
        elif t.dtype != first.dtype:  # type: ignore[union-attr]
            raise TypeError(f"{name}: dtype {t.dtype} must equal that of {first_name}, {first.dtype}")  # type: ignore[union-attr]
        elif t.device != first.device:  # type: ignore[union-attr]
            raise ValueError(f"{name}: is on {t.device}, but {first_name} is on {first.device}")  # type: ignore[union-attr]
        out.append(t)
    return out


def _parameters(x: Tensor, dtype: torch.dtype, first: str = "w_down", /, **expected: tuple[Tensor | None, tuple[int, ...] | None]) -> None:
    """Checks that the parameters of a call have the expected shapes (None: one element), x's device and the dtype of the ``first`` one, x's or float32."""
    for name, (p, shape) in expected.items():
        if p is None:
            continue
        _tensor(name, p)
        if p.numel() != 1 if shape is None else p.shape != shape:
            raise ValueError(f"{name}: shape {tuple(p.shape)} must be {'one element' if shape is None else shape}")
        if p.device != x.device:
            hint = "; it has no values there: adapters must stay on the device where the rest of a model is offloaded" if p.is_meta else ""
            raise ValueError(f"{name}: is on {p.device}, but the input is on {x.device}{hint}")
        if p.dtype != dtype:
            raise TypeError(f"{name}: dtype {p.dtype} must equal that of {first}, {dtype}")
    if dtype != x.dtype and dtype != torch.float32:
        raise TypeError(f"{first}: parameters of dtype {dtype} over activations of dtype {x.dtype}; parameters must have the activations' dtype or float32")


def _projections(x: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor | None, b_up: Tensor | None, heads: int) -> None:
    """Checks the weights of a bottleneck over x."""
    width = x.shape[-1]
    rank = _rank(w_down, width, w_up=w_up)
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or rank % heads or width % heads:
        raise ValueError(f"heads: must be a positive number that divides the rank {rank} and the width {width}, not {heads!r}")
    _parameters(x, w_down.dtype, w_down=(w_down, (rank, width)), w_up=(w_up, (width, rank // heads)), b_down=(b_down, (rank,)), b_up=(b_up, (width,)))


def _rank(w_down: Tensor, width: int, **w_up: Tensor) -> int:
    """R of a down-projection of rows of ``width``."""
    for name, w in {"w_down": w_down, **w_up}.items():
        _tensor(name, w)
    if w_down.dim() != 2 or w_down.shape[1] != width or w_down.shape[0] == 0:
        raise ValueError(f"w_down: shape {tuple(w_down.shape)} must be (R, {width}) with R >= 1")
    return w_down.shape[0]


_LARGEST = sys.float_info.max


def _scale(name: str, value: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        return 1.0, value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: must be a finite number or a tensor of one element, not {value!r}")
    return float(value), None


def _number(name: str, value: float) -> float:
    """As `_scale`, of what no tensor may be."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a Python number, not a tensor")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: must be a finite number, not {value!r}")
    return float(value)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: must be True or False, not {type(value).__name__}") from None


def _tensor(name: str, t: object) -> Tensor:
    """t, unless it is no tensor with strides."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: must be a tensor, not {type(t).__name__}")
    if t.layout is not _STRIDED or t.is_nested:
        raise TypeError(f"{name}: must be a dense tensor, not {'a nested one' if t.is_nested else f'one of layout {t.layout}'}") from None
    return t


def _dense(**tensors: Tensor | None) -> None:
    """`_tensor` of those that are given. Behind a call that failed it says by which argument, where that was one without strides: to look beforehand would cost every call."""
    for name, t in tensors.items():
        if t is not None:
            _tensor(name, t)


def _norm_vectors(name: str, norm: LayerNorm | None) -> dict[str, Tensor]:
    if norm is None:
        return {}
    if not isinstance(norm, tuple) or len(norm) != 3 or not all(isinstance(v, Tensor) for v in norm[:2]):
        was = f"({', '.join(type(v).__name__ for v in norm)})" if isinstance(norm, tuple) else type(norm).__name__
        raise TypeError(f"{name}: must be (weight, bias, eps) with two tensors and a number, not {was}")
    if _number(f"{name} eps", norm[2]) < 0.0:
        raise ValueError(f"{name} eps: must not be negative, not {norm[2]!r}")
    return {f"{name} weight": norm[0], f"{name} bias": norm[1]}


def layer_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    """LN(x) in x's dtype, whatever the parameters'."""
    return dropout_add_norm(x, None, *norm[:2], eps=norm[2])


def _block_diagonal(w_up: Tensor, heads: int) -> Tensor:
    """(D, R/h) -> the dense (D, R) that it stands for; D R numbers, negligible beside T D."""
    return torch.block_diag(*w_up.chunk(heads))


# What `backend.explain` is told of a call beside its sizes: by op the options, what each must be, and whether a value is.
_SIZE = ("a whole number from 1 on", lambda value: type(value) is int and value >= 1)
_FLAG = ("True or False", lambda value: type(value) is bool)
_EXPLAINED: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "bottleneck": {},
    "dropout_add_norm": {"dropout": _FLAG, "norm": ("'layer', 'rms' or 'none'", ("layer", "rms", "none").__contains__), "wide": _FLAG},
    "gated_bottleneck": {
        "gate_rank": ("a whole number from 0 on", lambda value: type(value) is int and value >= 0),
        "granularity": ("one of large, large_full, middleX, middleY, small", ("large_full", *KINDS).__contains__),
    },
    "lora": {"dropout": _FLAG, "out_width": _SIZE},
    "phm_bottleneck": {"division": _SIZE, "factor_rank": _SIZE},
    "routed_bottleneck": {"tasks": _SIZE},
}


def _door(call: backend.Call) -> None:
    """Refuses a call to be explained that no arguments of the op's function make."""
    known = _EXPLAINED[call.op]
    for name, value in call.options:
        if name not in known:
            raise TypeError(f"{name}: is no option of {call.op}, which has {', '.join(known) or 'none'}")
        must, right = known[name]
        if not right(value):
            raise ValueError(f"{name}: must be {must}, not {value!r}")
    if (call.op == "dropout_add_norm") != (call.rank == 0):
        raise ValueError(f"rank: must be {'0, dropout_add_norm has none' if call.rank else 'a whole number from 1 on'}, not {call.rank}")
    if call.width % (n := call.option("division", 1)) or call.rank % n:
        raise ValueError(f"division: must divide the width {call.width} and the rank {call.rank}, not {n}")
    if call.option("gate_rank", 0) and (granularity := call.option("granularity", "large")) != "large":
        raise ValueError(f"gate_rank: granularity {granularity!r} has none, not {call.option('gate_rank')}")
    if call.option("wide", False) and call.dtype.itemsize != 2:
        raise ValueError(f"wide: a float32 residual stands beside half-precision activations, not beside {call.dtype}")


for _op in _EXPLAINED:
    backend.register_door(_op, _door)
