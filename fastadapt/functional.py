"""One public function per op: the maths, shapes, dtypes and errors.

Dtypes: activations (x, h, residual) share one dtype A, one of float32, bfloat16, float16 (float64 runs on ``reference``). All parameters of a call share one dtype P, which is A or
float32; float32 parameters over half-precision activations is how people train. Kernels round parameters to A, accumulate in float32, and return weight gradients in P. Under
autocast, activations are cast to the autocast dtype and parameters stay as they are.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt import backend
from fastadapt.ops._library import activation_index
from fastadapt.ops.bottleneck import reference as _bottleneck_reference
from fastadapt.ops.bottleneck.function import bottleneck as _bottleneck
from fastadapt.ops.gated_bottleneck import reference as _gated_reference
from fastadapt.ops.gated_bottleneck.function import gated_bottleneck as _gated_bottleneck
from fastadapt.ops.gated_bottleneck.schema import KINDS

__all__ = ["bottleneck", "gated_bottleneck"]

LayerNorm = tuple[Tensor, Tensor, float]
"""Weight, bias and epsilon of a layer norm."""

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
    that it runs beside. Layer norms run as torch's own kernel before and after the fused one.

    Args:
        x: input, (..., D), any strides.
        w_down: down-projection, (R, D). Several heads' down-projections are one weight, stacked by rows.
        w_up: up-projection, (D, R); with ``heads=h`` > 1 the block-diagonal pair variant, (D, R/h): block i of D/h rows reads head i's R/h activations only.
        b_down: bias, (R,), or None.
        b_up: bias, (D,), or None.
        activation: "gelu_new" (tanh form), "gelu" (erf), "relu", "silu" or "identity".
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
    other = residual if isinstance(residual, Tensor) else None
    if other is None and residual is not None and residual != "input":
        raise TypeError(f"residual: must be a tensor, 'input' or None, not {residual!r}")
    scale_number, scale_tensor = _scale("scale", scale)
    if not _evident(x, (other,), (w_down, w_up, b_down, b_up, gate, scale_tensor), heads) or norm_before is not None or norm_after is not None:
        x, other = _activations(x=x, residual=other)
        width = x.shape[-1]
        vectors = {**_norm_vectors("norm_before", norm_before), **_norm_vectors("norm_after", norm_after)}
        _projections(x, w_down, w_up, b_down, b_up, heads)
        _parameters(x, w_down.dtype, gate=(gate, (width,)), scale=(scale_tensor, None), **{k: (v, (width,)) for k, v in vectors.items()})
    if heads > 1:
        w_up = _block_diagonal(w_up, heads)
    add_input = residual is not None and other is None
    u = x
    if norm_before is not None:
        u = layer_norm(x, norm_before)
        add_input, other = False, (x if add_input else other)
    inner = (add_input, other) if norm_after is None else (False, None)
    y = _call(_bottleneck, _bottleneck_reference.composed, u, w_down, b_down, w_up, b_up, gate, scale_tensor, inner[1], scale_number, act, inner[0])
    if norm_after is not None:
        y = layer_norm(y, norm_after)
        y = y + x if add_input else y if other is None else y + other
    return y


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
    The projection of ``large_full`` runs as one library GEMM; its gate is applied in the fused kernel.

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
    scales = [_scale(n, v)[0] for n, v in (("input_scale", input_scale), ("adapter_scale", adapter_scale), ("scale", scale)) if not _is_tensor(n, v)]
    gates = (gate_weight, gate_bias, gate_up_weight, gate_up_bias)
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
    saving = -1 if save_gate is None else int(save_gate)
    return _call(
        _gated_bottleneck, _gated_reference.composed, h, other, w_down, b_down, w_up, b_up, gate_weight, gate_bias, gate_up_weight, gate_up_bias,
        *scales, act, KINDS.index(kind), combine == "add", samples, saving,
    )  # fmt: skip


def _call(function, composed, x: Tensor, *args) -> Tensor:  # type: ignore[no-untyped-def]
    """Runs ``function`` on rows; under a functorch transform, where a custom op has no rules, the differentiable reference instead."""
    shape = x.shape
    if len(shape) != 2:
        width = shape[-1]
        args = tuple(a.reshape(-1, width) if isinstance(a, Tensor) and a.dim() == len(shape) else a for a in args)  # only activations have that many dimensions
        x = x.reshape(-1, width)
    y = composed(x, *args)[0] if torch._C._are_functorch_transforms_active() else function(x, *args, demand=backend.demand())
    return y if len(shape) == 2 else y.reshape(shape)


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
    except (AttributeError, ValueError):
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
    except (AttributeError, IndexError):
        return False


def _gate_parameters(h: Tensor, dtype: torch.dtype, granularity: str, gates: tuple[Tensor | None, ...]) -> None:
    """Checks that the gate parameters are those that the granularity has."""
    width, gate_weight = h.shape[-1], gates[0]
    gate_rank = gate_weight.shape[0] if granularity == "large" and isinstance(gate_weight, Tensor) and gate_weight.dim() == 2 else None
    expected: dict[str, tuple[int, ...]] = {
        "large": {"gate_weight": (gate_rank or 0, width), "gate_bias": (gate_rank or 0,), "gate_up_weight": (width, gate_rank or 0), "gate_up_bias": (width,)},
        "large_full": {"gate_weight": (width, width), "gate_bias": (width,)},
        "middleX": {"gate_weight": (width,), "gate_bias": (1,)},
        "middleY": {"gate_weight": (width,)},
        "small": {"gate_weight": (2 * width,), "gate_bias": (1,)},
    }[granularity]  # type: ignore[assignment]
    given = dict(zip(("gate_weight", "gate_bias", "gate_up_weight", "gate_up_bias"), gates))
    for name, value in given.items():
        if value is not None and name not in expected:
            raise ValueError(f"{name}: granularity {granularity!r} has no such parameter")
        if value is None and name in expected and "weight" in name:
            raise ValueError(f"{name}: granularity {granularity!r} needs it, got None")
    if granularity == "large" and not gate_rank:
        raise ValueError(f"gate_weight: must be (Rg, {width}) with Rg >= 1, got {tuple(gate_weight.shape)}")  # type: ignore[union-attr]
    _parameters(h, dtype, **{name: (given[name], shape) for name, shape in expected.items()})


def _activations(**tensors: Tensor | None) -> list[Any]:
    """Checks the activations of a call against the first one, and casts them under autocast."""
    first_name, first = next(iter(tensors.items()))
    out: list[Any] = []
    for name, t in tensors.items():
        if t is None:
            out.append(t)
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(t).__name__}")
        if t.dtype not in _FLOATS:
            raise TypeError(f"{name}: dtype {t.dtype} is not supported; must be float32, bfloat16, float16 or float64")
        if t.dtype != torch.float64 and _autocasts(t.device.type):
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


def _parameters(x: Tensor, dtype: torch.dtype, **expected: tuple[Tensor | None, tuple[int, ...] | None]) -> None:
    """Checks that the parameters of a call have the expected shapes (None: one element), x's device and one dtype, x's or float32."""
    for name, (p, shape) in expected.items():
        if p is None:
            continue
        if not isinstance(p, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(p).__name__}")
        if p.numel() != 1 if shape is None else p.shape != shape:
            raise ValueError(f"{name}: shape {tuple(p.shape)} must be {'one element' if shape is None else shape}")
        if p.device != x.device:
            raise ValueError(f"{name}: is on {p.device}, but the input is on {x.device}")
        if p.dtype != dtype:
            raise TypeError(f"{name}: dtype {p.dtype} must equal that of w_down, {dtype}")
    if dtype != x.dtype and dtype != torch.float32:
        raise TypeError(f"w_down: parameters of dtype {dtype} over activations of dtype {x.dtype}; parameters must have the activations' dtype or float32")


def _projections(x: Tensor, w_down: Tensor, w_up: Tensor, b_down: Tensor | None, b_up: Tensor | None, heads: int) -> None:
    """Checks the weights of a bottleneck over x."""
    width = x.shape[-1]
    for name, w in (("w_down", w_down), ("w_up", w_up)):
        if not isinstance(w, Tensor):
            raise TypeError(f"{name}: must be a tensor, not {type(w).__name__}")
    if w_down.dim() != 2 or w_down.shape[1] != width or w_down.shape[0] == 0:
        raise ValueError(f"w_down: shape {tuple(w_down.shape)} must be (R, {width}) with R >= 1")
    rank = w_down.shape[0]
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or rank % heads or width % heads:
        raise ValueError(f"heads: must be a positive number that divides the rank {rank} and the width {width}, not {heads!r}")
    _parameters(x, w_down.dtype, w_down=(w_down, (rank, width)), w_up=(w_up, (width, rank // heads)), b_down=(b_down, (rank,)), b_up=(b_up, (width,)))


def _scale(name: str, value: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(value, Tensor):
        return 1.0, value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: must be a finite number or a tensor of one element, not {value!r}")
    return float(value), None


def _is_tensor(name: str, value: object) -> bool:
    if isinstance(value, Tensor):
        raise TypeError(f"{name}: must be a Python number, not a tensor")
    return False


def _norm_vectors(name: str, norm: LayerNorm | None) -> dict[str, Tensor]:
    if norm is None:
        return {}
    if not isinstance(norm, tuple) or len(norm) != 3 or not all(isinstance(v, Tensor) for v in norm[:2]):
        raise TypeError(f"{name}: must be (weight, bias, eps) with two tensors and a number, not {norm!r}")
    return {f"{name} weight": norm[0], f"{name} bias": norm[1]}


def layer_norm(x: Tensor, norm: LayerNorm) -> Tensor:
    """LN(x) in x's dtype, whatever the parameters'."""
    weight, bias, eps = norm
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps).to(x.dtype)  # autocast on CUDA makes it float32


def _block_diagonal(w_up: Tensor, heads: int) -> Tensor:
    """(D, R/h) -> the dense (D, R) that it stands for; D R numbers, negligible beside T D."""
    return torch.block_diag(*w_up.chunk(heads))
