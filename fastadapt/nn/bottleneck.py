"""Bottleneck adapters as modules."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.init import TORCH, Init, booleans, is_number, linear, positive, weights
from fastadapt.nn.projections import Projection, low_rank_phm


class Bottleneck(nn.Module):
    r"""The sequential adapter of VL-Adapter (section 3.2; Houlsby, Pfeiffer): one fused operation.

    .. math:: y = LN_{after}\bigl(s\,g\,(\phi(LN_{before}(h) W_d^\top + b_d) W_u^\top + b_u)\bigr) + c\,h

    Parameters have the papers' names: ``down_sampler`` (R, D), ``up_sampler`` (D, R), ``pre_layer_norm``, ``post_layer_norm``, ``gate`` (1,).

    Args:
        width: D.
        rank: R, from 1.
        activation: "gelu_new", "gelu", "relu", "silu" or "identity".
        residual: add h, the un-normalised input.
        scale: s, a finite number.
        heads: number of heads of a multi-head down-projection. The heads are one stacked weight, so this changes nothing but that it must divide ``rank``, unless ``pair``.
        pair: VL-PET's down-up-pair form: ``up_sampler`` is block diagonal, (D, R / heads); head i writes the i-th D / heads outputs.
        norm_before, norm_after: layer norms (eps 1e-5) of the input and of the scaled output.
        bias: biases of the projections.
        projection: makes ``down_sampler`` and ``up_sampler`` in place of ``nn.Linear``, for instance a `PHMLinear` (Compacter) or a `LowRankLinear`; not with ``pair``.
        scalar_gate: a trained factor g, one number that starts at zero (VL-Adapter's CLIP-ViL runs); without it g = 1.
        input_scale: c (VL-PET on T5).
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        activation: str = "gelu_new",
        residual: bool = True,
        scale: float = 1.0,
        heads: int = 1,
        pair: bool = False,
        norm_before: bool = False,
        norm_after: bool = False,
        bias: bool = True,
        projection: Projection | None = None,
        scalar_gate: bool = False,
        input_scale: float = 1.0,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        up_rank = check_projections(width, rank, heads, pair, activation)
        check_scales(scale=scale, input_scale=input_scale)
        booleans(residual=residual, norm_before=norm_before, norm_after=norm_after, bias=bias, scalar_gate=scalar_gate)
        if pair and projection is not None:
            raise ValueError("projection: only Linears can be block diagonal (pair=True)")
        if input_scale != 1.0 and not residual:
            raise ValueError("input_scale: there is no residual to scale (residual=False)")
        if scalar_gate:
            init = dataclasses.replace(init, zero=(*init.zero, "gate"))
        self.activation, self.residual, self.scale, self.heads, self.pair, self.init = activation, residual, float(scale), heads, pair, init
        self.input_scale = float(input_scale)
        self._blocks = heads if pair else 1
        self._residual: Literal["input"] | None = "input" if residual else None
        make = projection or functools.partial(linear, bias=bias)
        self.down_sampler = make(width, rank, device=device, dtype=dtype)
        self.up_sampler = make(up_rank, width, device=device, dtype=dtype)
        self.register_module("pre_layer_norm", nn.LayerNorm(width, device=device, dtype=dtype) if norm_before else None)
        self.register_module("post_layer_norm", nn.LayerNorm(width, device=device, dtype=dtype) if norm_after else None)
        self.register_parameter("gate", nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if scalar_gate else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``."""
        self.init.apply(self)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """y of h's shape (..., D) and dtype. ``x``, the residual stream that hosts hand to every module behind a sub-layer, has no part in it."""
        return self._run(h, self._residual if self.input_scale == 1.0 else self.input_scale * h)

    def bottleneck_call(self, h: Tensor, x: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """The input and the other arguments of the `fastadapt.functional.bottleneck` that `forward` is, whatever its projections are made of."""
        return h, self._arguments(self._residual if self.input_scale == 1.0 else self.input_scale * h)

    def inside(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """What the down-projection reads, before ``pre_layer_norm``."""
        return h

    def _arguments(self, residual: Tensor | Literal["input"] | None) -> dict[str, Any]:
        w_down, w_up, b_down, b_up = self._weights()
        return {"w_down": w_down, "w_up": w_up, "b_down": b_down, "b_up": b_up, "scale": self._scale(), "heads": self._blocks, **self._options(residual)}

    def _weights(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        children = self._modules
        (w_down, b_down), (w_up, b_up) = weights(children["down_sampler"]), weights(children["up_sampler"])  # type: ignore[arg-type]
        return w_down, w_up, b_down, b_up

    def _scale(self) -> float | Tensor:
        gate = self._parameters["gate"]
        return self.scale if gate is None else self.scale * gate

    def _options(self, residual: Tensor | Literal["input"] | None) -> dict[str, Any]:
        before: Any = self._modules["pre_layer_norm"]
        after: Any = self._modules["post_layer_norm"]
        return {
            "activation": self.activation,
            "residual": residual,
            "norm_before": None if before is None else (before.weight, before.bias, before.eps),
            "norm_after": None if after is None else (after.weight, after.bias, after.eps),
        }

    def _run(self, h: Tensor, residual: Tensor | Literal["input"] | None) -> Tensor:
        down: Any = self._modules["down_sampler"]
        up: Any = self._modules["up_sampler"]
        if self._parameters["gate"] is None and low_rank_phm(down, up):
            factors: Any = (*down.factors(), *up.factors(), down.bias, up.bias)
            return functional.phm_bottleneck(h, *factors, scale=self.scale, **self._options(residual))
        return functional.bottleneck(h, *self._weights(), scale=self._scale(), heads=self._blocks, **self._options(residual))

    def call(self) -> dict[str, Any]:
        """The op that `forward` calls and the sizes that decide its backend, as `fastadapt.backend.explain` takes them."""
        down: Any = self.down_sampler
        sizes = {"width": down.in_features, "rank": down.out_features, "param_dtype": next(self.parameters()).dtype}
        if self.gate is None and low_rank_phm(down, self.up_sampler):
            return {"op": "phm_bottleneck", "division": down.division, "factor_rank": down.rank, **sizes}
        return {"op": "bottleneck", **sizes}

    def extra_repr(self) -> str:
        parts = [f"width={self.down_sampler.in_features}", f"rank={self.down_sampler.out_features}", f"activation={self.activation!r}"]
        parts += [] if self.residual else ["residual=False"]
        parts += [f"{name}={value}" for name in ("scale", "input_scale") if (value := getattr(self, name)) != 1.0]
        parts += ["scalar_gate=True"] if self.gate is not None else []
        parts += [f"heads={self.heads}" + (", pair=True" if self.pair else "")] if self.heads > 1 else []
        return ", ".join(parts)


class StreamBottleneck(Bottleneck):
    r"""A bottleneck behind a sub-layer that reads the residual stream x: the parallel adapter (He et al. 2022), and the one behind the sub-layer's sum (Pfeiffer et al. 2020).

    .. math:: y = LN_{after}\bigl(s\,g\,(\phi(LN_{before}(r) W_d^\top + b_d) W_u^\top + b_u)\bigr) + c\,h, \qquad r = x \ \text{or}\ LN_{host}(h + x)

    Args:
        reads: r: "stream", x, or "sum", h + x through the host's layer norm.
        norm: the host's layer norm behind that sum, which stays the host's: none of its parameters is this module's. None: a pre-norm host, r = h + x.
        width, rank, options: as in `Bottleneck`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, width: int, rank: int, *, reads: Literal["stream", "sum"], norm: nn.Module | None = None, **options: Any) -> None:
        super().__init__(width, rank, **options)
        if reads not in ("stream", "sum"):
            raise ValueError(f"reads: must be one of stream, sum, not {reads!r}")
        self.reads = reads
        # Past nn.Module's own __setattr__, which would make it a child, with keys and parameters here.
        object.__setattr__(self, "norm", norm)

    def inside(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        if x is None:
            raise ValueError("x: must be the residual stream that entered the sub-layer")
        if self.reads == "stream":
            return x
        norm: nn.Module | None = self.norm  # type: ignore[assignment]
        return h + x if norm is None else norm(h + x)

    def forward(self, h: Tensor, x: Tensor | None = None) -> Tensor:
        """y of h's shape (..., D) and dtype; x the residual stream, of the same shape and dtype."""
        return self._run(self.inside(h, x), self._beside(h))

    def bottleneck_call(self, h: Tensor, x: Tensor | None = None) -> tuple[Tensor, dict[str, Any]]:
        """As `Bottleneck.bottleneck_call`."""
        return self.inside(h, x), self._arguments(self._beside(h))

    def _beside(self, h: Tensor) -> Tensor | None:
        if not self.residual:
            return None
        return h if self.input_scale == 1.0 else self.input_scale * h

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reads={self.reads!r}"


class ValueParallelAdapter(Bottleneck):
    r"""VL-PET's decoder adapter (section 3.4), beside the value projection of cross-attention.

    .. math:: v' = v + s\,(\phi(kv\, W_d^\top + b_d) W_u^\top + b_u)

    Arguments as in `Bottleneck`, without ``residual``.
    """

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        activation: str = "gelu_new",
        scale: float = 1.0,
        heads: int = 1,
        pair: bool = False,
        norm_before: bool = False,
        norm_after: bool = False,
        bias: bool = True,
        projection: Projection | None = None,
        init: Init = TORCH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            width, rank, activation=activation, scale=scale, heads=heads, pair=pair, norm_before=norm_before, norm_after=norm_after, bias=bias, projection=projection, init=init,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, kv: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        """v' of v's shape; kv (..., D) is the projection's input, v (..., D) its output."""
        return self._run(kv, v)

    def bottleneck_call(self, kv: Tensor, v: Tensor) -> tuple[Tensor, dict[str, Any]]:  # type: ignore[override]
        """As `Bottleneck.bottleneck_call`."""
        return kv, self._arguments(v)


def check_projections(width: int, rank: int, heads: int, pair: bool, activation: str) -> int:
    """Checks the sizes of a bottleneck and returns the width of the up-projection's rows."""
    positive(width=width, rank=rank, heads=heads)
    booleans(pair=pair)
    functional.activation_index(activation)
    if rank % heads or (pair and width % heads):
        raise ValueError(f"heads: {heads} must divide rank {rank}" + (f" and width {width}" if pair else ""))
    return rank // heads if pair else rank


def check_scales(**scales: float) -> None:
    for name, value in scales.items():
        if not is_number(value):
            raise ValueError(f"{name}: must be a finite number, not {value!r}")
