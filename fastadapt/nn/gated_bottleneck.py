"""VL-PET's granularity-controlled adapter as a module."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.bottleneck import check_projections, check_scales
from fastadapt.nn.init import TORCH, Init, as_bool, booleans, linear, positive, weights
from fastadapt.nn.projections import Projection

Granularity = Literal["large", "large_full", "middleX", "middleY", "small"]
GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small")


class GatedBottleneck(nn.Module):
    r"""VL-PET's encoder module (sections 3.2 and 3.3): a multi-head adapter under a gate of chosen granularity, one fused operation.

    .. math:: H' = c\,h + s_a(\phi(h W_d^\top + b_d) W_u^\top + b_u), \qquad y = s\,(H' \odot G) \text{ or } s\,(H' + G)

    The gates G are those of `fastadapt.functional.gated_bottleneck`. Parameters: ``down_sampler`` (R, D) with the heads stacked by rows, ``up_sampler`` (D, R), and

    * ``large``: ``gate_down`` (Rg, D), ``gate_up`` (D, Rg);
    * ``large_full``: ``gate`` (D, D); ``middleX``: ``gate`` (1, D); ``small``: ``gate`` (1, 2 D), which reads [x ; H'];
    * ``middleY``: ``gate_vector`` (D,), where G = 1 + gate_vector.

    Args:
        width: D.
        rank: R, from 1.
        granularity: "large", "large_full", "middleX", "middleY" or "small".
        gate_rank: Rg of ``large``; None: as ``rank``.
        combine: "multiply" or "add".
        activation, heads, pair, bias, projection, init: as in `Bottleneck`; ``bias`` also holds for the gate.
        input_scale, adapter_scale, scale: c, s_a, s.
        save_gate: keep H' and the gate for backward instead of recomputing them; None lets the backend decide.

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
        rank: int,
        *,
        granularity: Granularity = "large",
        gate_rank: int | None = None,
        combine: Literal["multiply", "add"] = "multiply",
        activation: str = "gelu_new",
        heads: int = 1,
        pair: bool = False,
        input_scale: float = 1.0,
        adapter_scale: float = 1.0,
        scale: float = 1.0,
        bias: bool = True,
        projection: Projection | None = None,
        save_gate: bool | None = None,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity: {granularity!r} is unknown; must be one of {', '.join(GRANULARITIES)}")
        if combine not in ("multiply", "add"):
            raise ValueError(f"combine: must be 'multiply' or 'add', not {combine!r}")
        if gate_rank is not None and granularity != "large":
            raise ValueError(f"gate_rank: granularity {granularity!r} has no gate rank")
        gate_rank = rank if gate_rank is None else gate_rank
        up_rank = check_projections(width, rank, heads, pair, activation)
        positive(gate_rank=gate_rank)
        booleans(bias=bias)
        if save_gate is not None:
            as_bool("save_gate", save_gate, " or None")
        check_scales(input_scale=input_scale, adapter_scale=adapter_scale, scale=scale)
        self.granularity: Granularity = granularity
        self.combine: Literal["multiply", "add"] = combine
        self.activation, self.heads, self.pair, self.init = activation, heads, pair, init
        self.input_scale, self.adapter_scale, self.scale, self.save_gate = float(input_scale), float(adapter_scale), float(scale), save_gate
        self._blocks = heads if pair else 1
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if pair and projection is not None:
            raise ValueError("projection: only Linears can be block diagonal (pair=True)")
        make = projection or functools.partial(linear, bias=bias)
        self.down_sampler = make(width, rank, **factory)
        self.up_sampler = make(up_rank, width, **factory)
        register_gate(self, granularity, width, gate_rank, bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """y of h's shape and dtype; h (..., D) is the frozen sub-layer's output, x of h's shape the stream that entered it (unused by ``middleY``). ``small`` takes (B, L, D)."""
        children, kind = self._modules, self.granularity
        (w_down, b_down), (w_up, b_up) = weights(children["down_sampler"]), weights(children["up_sampler"])  # type: ignore[arg-type]
        bias = up_weight = up_bias = None
        if kind == "large":
            (weight, bias), (up_weight, up_bias) = weights(children["gate_down"]), weights(children["gate_up"])  # type: ignore[arg-type]
        elif kind == "middleY":
            weight = self.gate_vector
        else:
            weight, bias = weights(children["gate"])  # type: ignore[arg-type]
            if kind != "large_full":
                weight = weight.view(-1)
        return functional.gated_bottleneck(
            h, x, w_down, w_up, b_down, b_up, granularity=kind, gate_weight=weight, gate_bias=bias, gate_up_weight=up_weight, gate_up_bias=up_bias,
            combine=self.combine, activation=self.activation, heads=self._blocks, save_gate=self.save_gate,
            input_scale=self.input_scale, adapter_scale=self.adapter_scale, scale=self.scale,
        )  # fmt: skip

    def call(self) -> dict[str, Any]:
        """The op that `forward` calls and the sizes that decide its backend, as `fastadapt.backend.explain` takes them."""
        down, large = self.down_sampler, self.granularity == "large"
        # The gate of large_full reaches the op as logits.
        kind = "logits" if self.granularity == "large_full" else self.granularity
        sizes = {"width": down.in_features, "rank": down.out_features, "gate_rank": self.gate_down.out_features if large else 0}
        return {"op": "gated_bottleneck", **sizes, "granularity": kind, "param_dtype": next(self.parameters()).dtype}

    def extra_repr(self) -> str:
        parts = [f"width={self.down_sampler.in_features}", f"rank={self.down_sampler.out_features}", f"granularity={self.granularity!r}", f"activation={self.activation!r}"]
        parts += [f"combine={self.combine!r}"] if self.combine != "multiply" else []
        parts += [f"heads={self.heads}" + (", pair=True" if self.pair else "")] if self.heads > 1 else []
        parts += [f"{name}={value}" for name in ("input_scale", "adapter_scale", "scale") if (value := getattr(self, name)) != 1.0]
        return ", ".join(parts)


def register_gate(module: nn.Module, granularity: str, width: int, gate_rank: int, bias: bool, **factory: Any) -> None:
    """Gives ``module`` the gate parameters of a granularity."""
    if granularity == "large":
        module.gate_down = linear(width, gate_rank, bias, **factory)
        module.gate_up = linear(gate_rank, width, bias, **factory)
    elif granularity == "middleY":
        module.gate_vector = nn.Parameter(torch.empty(width, **factory))
    else:
        module.gate = linear(2 * width if granularity == "small" else width, width if granularity == "large_full" else 1, bias, **factory)
