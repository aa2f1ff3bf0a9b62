"""VL-PET's gates where no fused operation has them: behind any module, by themselves, beside a value projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.bottleneck import check_scales
from fastadapt.nn.gated_bottleneck import GRANULARITIES, register_gate
from fastadapt.nn.init import TORCH, Init, booleans, linear, positive, weights

GATES = (*GRANULARITIES, "layernorm", "l2norm")


class Gate(nn.Module):
    r"""A granularity gate of VL-PET (section 3.2) behind any module, where `GatedBottleneck` has adapter and gate in one operation.

    .. math:: y = s\,(h \odot G) \text{ or } s\,(h + G)

    The gates G and their parameters are those of `GatedBottleneck`, with h for H'; the bottleneck inside ``large`` is a fused operation. Two more have nothing to combine with:
    ``layernorm``, y = s LN(h), parameters ``layer_norm`` (eps 1e-5), and ``l2norm``, :math:`y = s\,h / \max(\lVert h \rVert_2, 10^{-12})`, which has no parameters.

    Args:
        width: D.
        granularity: "large", "large_full", "middleX", "middleY", "small", "layernorm" or "l2norm".
        gate_rank: Rg of ``large``, which needs it.
        combine: "multiply" or "add".
        activation: of the bottleneck in ``large``.
        scale: s.
        bias: biases of the gate.
        init: starting values.

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    gate_down: nn.Linear
    gate_up: nn.Linear
    gate: nn.Linear
    gate_vector: nn.Parameter

    def __init__(
        self,
        width: int,
        granularity: str,
        *,
        gate_rank: int | None = None,
        combine: Literal["multiply", "add"] = "multiply",
        activation: str = "gelu_new",
        scale: float = 1.0,
        bias: bool = True,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if granularity not in GATES:
            raise ValueError(f"granularity: {granularity!r} is unknown; must be one of {', '.join(GATES)}")
        if combine not in ("multiply", "add"):
            raise ValueError(f"combine: must be 'multiply' or 'add', not {combine!r}")
        if (gate_rank is None) == (granularity == "large"):
            raise ValueError(f"gate_rank: granularity {granularity!r} {'needs one' if gate_rank is None else 'has no gate rank'}")
        if combine == "add" and granularity in GATES[5:]:
            raise ValueError(f"combine: granularity {granularity!r} has no gate to add")
        booleans(bias=bias)
        positive(width=width, gate_rank=1 if gate_rank is None else gate_rank)
        functional.activation_index(activation)
        check_scales(scale=scale)
        self.width, self.granularity, self.combine, self.activation, self.scale, self.init = width, granularity, combine, activation, float(scale), init
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if granularity == "layernorm":
            self.layer_norm = nn.LayerNorm(width, **factory)
        elif granularity in GRANULARITIES:
            register_gate(self, granularity, width, gate_rank or 0, bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """y of h's shape (..., D) and dtype; x of h's shape is the stream that entered the sub-layer, which ``middleY``, ``layernorm`` and ``l2norm`` do not read. ``small`` takes
        (B, L, D).

        Raises:
            ValueError: x is missing, or ``small`` gets something else than (B, L, D) with L >= 1.
        """
        y = self._gated(h, x).to(h.dtype)
        return y if self.scale == 1.0 else self.scale * y

    def _gated(self, h: Tensor, x: Tensor | None) -> Tensor:
        kind = self.granularity
        if kind == "layernorm":
            norm = self.layer_norm
            return functional.layer_norm(h, (norm.weight, norm.bias, norm.eps))
        if kind == "l2norm":
            return F.normalize(h, dim=-1)
        if kind == "middleY":
            gate = 1 + self.gate_vector.to(h.dtype)
            return h * gate if self.combine == "multiply" else h + gate
        if x is None:
            raise ValueError(f"x: granularity {kind!r} needs the residual stream, got None")
        if kind == "small" and (h.ndim != 3 or h.shape[1] == 0):
            raise ValueError(f"h: granularity 'small' averages over the sequence and needs (B, L, D) with L >= 1, got {tuple(h.shape)}")
        if kind == "large":
            gate = torch.sigmoid(_low_rank(x, self.gate_down, self.gate_up, self.activation))
        else:
            inner = x if kind == "large_full" else x + h if kind == "middleX" else torch.cat([x, h], -1)
            weight, bias = weights(self.gate)
            gate = torch.sigmoid(F.linear(inner, weight.to(h.dtype), None if bias is None else bias.to(h.dtype)))
            gate = gate.mean(1, keepdim=True) if kind == "small" else gate
        return h * gate if self.combine == "multiply" else h + gate

    def call(self) -> dict[str, Any] | None:
        """As `Bottleneck.call`; None where the gate is plain torch."""
        return _call(self.gate_down) if self.granularity == "large" else None

    def extra_repr(self) -> str:
        parts = [f"width={self.width}", f"granularity={self.granularity!r}"] + ([f"combine={self.combine!r}"] if self.combine != "multiply" else [])
        return ", ".join(parts + ([f"scale={self.scale}"] if self.scale != 1.0 else []))


class GatingOnly(nn.Module):
    r"""VL-PET's "gating only" module: an adapter of the stream x that also gates the sub-layer's output h.

    .. math:: \delta = \phi(x W_1^\top + b_1) W_2^\top + b_2, \qquad y = s\,(\delta + h \odot \sigma(\delta)) \text{ or } s\,((\delta + h) \odot \sigma(\delta))

    Parameters: ``gate_down`` (R, D), ``gate_up`` (D, R). The bottleneck is a fused operation.

    Args:
        width: D.
        rank: R.
        add_first: the second form, which adds the adapter before the gate.
        activation: of the bottleneck.
        scale: s.
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        add_first: bool = False,
        activation: str = "gelu_new",
        scale: float = 1.0,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(width=width, rank=rank)
        booleans(add_first=add_first)
        functional.activation_index(activation)
        check_scales(scale=scale)
        self.add_first, self.activation, self.scale, self.init = add_first, activation, float(scale), init
        self.gate_down = linear(width, rank, device=device, dtype=dtype)
        self.gate_up = linear(rank, width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """y of h's shape (..., D) and dtype; x of h's shape is the stream that entered the sub-layer."""
        delta = _low_rank(x, self.gate_down, self.gate_up, self.activation)
        gate = torch.sigmoid(delta)
        y = ((delta + h) * gate if self.add_first else delta + h * gate).to(h.dtype)
        return y if self.scale == 1.0 else self.scale * y

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        return _call(self.gate_down)

    def extra_repr(self) -> str:
        return f"rank={self.gate_down.out_features}, add_first={self.add_first}, scale={self.scale}"


class ValueResidual(nn.Module):
    r"""VL-PET's residual connection around the value projection, with its low-rank gate or without.

    .. math:: v' = kv + v \odot \sigma(\phi(kv\, W_1^\top + b_1) W_2^\top + b_2) \quad\text{or}\quad v' = kv + v

    Parameters of the gate: ``gate_down`` (R, D), ``gate_up`` (D, R). The bottleneck is a fused operation.

    Args:
        width: D of kv and of v.
        gate_rank: R; None: no gate.
        activation: of the bottleneck.
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        gate_rank: int | None = None,
        *,
        activation: str = "gelu_new",
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(width=width, gate_rank=1 if gate_rank is None else gate_rank)
        functional.activation_index(activation)
        self.width, self.gate_rank, self.activation, self.init = width, gate_rank, activation, init
        self.register_module("gate_down", None if gate_rank is None else linear(width, gate_rank, device=device, dtype=dtype))
        self.register_module("gate_up", None if gate_rank is None else linear(gate_rank, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, kv: Tensor, v: Tensor) -> Tensor:
        """v' of v's shape and dtype; kv (..., D) is the projection's input, v (..., D) its output."""
        if self.gate_rank is None:
            return kv + v
        return (kv + v * torch.sigmoid(_low_rank(kv, self.gate_down, self.gate_up, self.activation))).to(v.dtype)  # type: ignore[arg-type]

    def call(self) -> dict[str, Any] | None:
        """As `Bottleneck.call`; None without a gate."""
        return None if self.gate_rank is None else _call(self.gate_down)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"width={self.width}, gate_rank={self.gate_rank}"


class IA3(nn.Module):
    r"""A trained vector over activations (IA3, Liu et al. 2022; VL-PET's ``value_ia3`` and ``ff_ia3``): :math:`y = h \odot v`, or :math:`h + h \odot v` with ``add``.

    Parameter ``ia3`` (D,), which starts at N(0, 0.02^2) as published, so that without ``add`` the activations nearly vanish at first; ``Init(one=("ia3",))`` starts it at one.

    Args:
        width: D of h.
        add: the second form.
        init: starting values.
    """

    def __init__(self, width: int, *, add: bool = False, init: Init = TORCH, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        positive(width=width)
        booleans(add=add)
        self.add, self.init = add, init
        self.ia3 = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Alone, the scaled x (..., D); beside a projection, the scaled y (..., D), its output."""
        h = x if y is None else y
        v = self.ia3.to(h.dtype)
        return torch.addcmul(h, h, v) if self.add else h * v

    def extra_repr(self) -> str:
        return f"width={self.ia3.numel()}, add={self.add}"


class InTurn(nn.Module):
    """Modules of one place, one behind the other, each under its own name.

    Args:
        modules: behind a sub-layer, each gets (h, x), where h is what the one before it gave; beside a projection, each gets (x, y), where y is.
        beside: the second.

    Raises:
        ValueError: no module.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, beside: bool = False) -> None:
        super().__init__()
        if not modules:
            raise ValueError("modules: must not be empty")
        booleans(beside=beside)
        self.beside = beside
        for name, module in modules.items():
            self.add_module(name, module)

    def reset_parameters(self) -> None:
        """Draws the starting values of all modules again."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """What the last module gives."""
        modules: Any = self._modules
        for module in modules.values():
            a, b = (a, module(a, b)) if self.beside else (module(a, b), b)
        return b if self.beside else a

    def call(self) -> dict[str, Any] | None:
        """The call of the first module that has one, see `Bottleneck.call`."""
        calls = (module.call() for module in self.children() if hasattr(module, "call"))  # type: ignore[operator]
        return next((call for call in calls if call is not None), None)


def in_turn(modules: Mapping[str, nn.Module], *, beside: bool = False) -> nn.Module:
    """`InTurn` of several modules; a single one itself."""
    return next(iter(modules.values())) if len(modules) == 1 else InTurn(modules, beside=beside)


def _low_rank(x: Tensor, down: nn.Module, up: nn.Module, activation: str) -> Tensor:
    (w_down, b_down), (w_up, b_up) = weights(down), weights(up)
    return functional.bottleneck(x, w_down, w_up, b_down, b_up, activation=activation, residual=None)


def _call(down: nn.Linear) -> dict[str, Any]:
    return {"op": "bottleneck", "width": down.in_features, "rank": down.out_features, "param_dtype": down.weight.dtype}
