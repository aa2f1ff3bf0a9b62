"""Adapters over the channels of an image, for convolutional networks."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.init import booleans, positive

KINDS = ("bottleneck", "basic")


class VisualAdapter(nn.Module):
    r"""VL-Adapter's adapter in a visual ResNet: 1x1 convolutions and batch norms, without a residual of its own.

    .. math:: y = BN_2(W_u * relu(BN_1(W_d * x))) \quad\text{("bottleneck")}, \qquad y = BN(W * x) \quad\text{("basic")}

    Parameters have the published names: ``down_sampler`` (R, C_in, 1, 1), ``bn1``, ``up_sampler`` (C_out, R, 1, 1), ``bn2``; or ``conv`` (C_out, C_in, 1, 1), ``bn``. Convolutions
    have no bias.

    A bottleneck of one width on both sides, whose batch norms use their running statistics (eval mode; VL-Adapter's ``--freeze_bn_statistics`` keeps them there in training) or
    which has none, is one fused `fastadapt.functional.bottleneck` over pixels, with the batch norms folded into the projections. Anything else is plain torch.

    Args:
        input_dim, output_dim: channels C_in and C_out.
        adapter_kind: "bottleneck" or "basic".
        reduction_factor: R = C_in // reduction_factor.
        use_bn: batch norms (eps 1e-5).

    Raises:
        ValueError: an argument is unknown or out of range.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        adapter_kind: Literal["bottleneck", "basic"] = "bottleneck",
        reduction_factor: int = 16,
        use_bn: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if adapter_kind not in KINDS:
            raise ValueError(f"adapter_kind: must be one of {', '.join(KINDS)}, not {adapter_kind!r}")
        booleans(use_bn=use_bn)
        positive(input_dim=input_dim, output_dim=output_dim, reduction_factor=reduction_factor)
        if adapter_kind == "bottleneck" and reduction_factor > input_dim:
            raise ValueError(f"reduction_factor: must be at most the {input_dim} channels, not {reduction_factor}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adapter_kind, self.use_bn = adapter_kind, use_bn
        if adapter_kind == "basic":
            self.conv = nn.Conv2d(input_dim, output_dim, 1, bias=False, **factory)
            self.register_module("bn", nn.BatchNorm2d(output_dim, **factory) if use_bn else None)
        else:
            rank = input_dim // reduction_factor
            self.down_sampler = nn.Conv2d(input_dim, rank, 1, bias=False, **factory)
            self.register_module("bn1", nn.BatchNorm2d(rank, **factory) if use_bn else None)
            self.up_sampler = nn.Conv2d(rank, output_dim, 1, bias=False, **factory)
            self.register_module("bn2", nn.BatchNorm2d(output_dim, **factory) if use_bn else None)

    def reset_parameters(self) -> None:
        """torch's own starting values and running statistics again; the published code changes none of them."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """y (N, C_out, H, W) of x (N, C_in, H, W)."""
        if self.adapter_kind == "basic":
            return _normed(self.conv(x), self.bn)
        if not self.fused():
            return _normed(self.up_sampler(F.relu(_normed(self.down_sampler(x), self.bn1))), self.bn2)
        (w_down, b_down), (w_up, b_up) = _folded(self.down_sampler, self.bn1), _folded(self.up_sampler, self.bn2)
        pixels = functional.bottleneck(x.movedim(1, -1), w_down, w_up, b_down, b_up, activation="relu", residual=None)
        return pixels.movedim(-1, 1)

    def fused(self) -> bool:
        """Whether a call in the present mode is one fused operation."""
        norms: list[Any] = [norm for norm in (self.bn1, self.bn2) if norm is not None] if self.adapter_kind == "bottleneck" else []
        square = self.adapter_kind == "bottleneck" and self.down_sampler.in_channels == self.up_sampler.out_channels
        return square and not any(norm.training or norm.running_mean is None for norm in norms)

    def call(self) -> dict[str, Any] | None:
        """As `Bottleneck.call`; None where a call in the present mode is plain torch."""
        if not self.fused():
            return None
        down = self.down_sampler
        return {"op": "bottleneck", "width": down.in_channels, "rank": down.out_channels, "param_dtype": down.weight.dtype}

    def extra_repr(self) -> str:
        return f"adapter_kind={self.adapter_kind!r}, use_bn={self.use_bn}"


def _normed(x: Tensor, norm: Any) -> Tensor:
    return x if norm is None else norm(x)


def _folded(conv: nn.Conv2d, norm: Any) -> tuple[Tensor, Tensor | None]:
    """A 1x1 convolution and the batch norm behind it, with running statistics, as one weight and bias."""
    weight = conv.weight.flatten(1)
    if norm is None:
        return weight, None
    factor = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return weight * factor[:, None], norm.bias - norm.running_mean * factor
