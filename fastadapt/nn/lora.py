"""LoRA beside a frozen projection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.init import linear, positive, weights


class LoRA(nn.Module):
    r"""LoRA (Hu et al. 2021, section 4.1) as VL-Adapter puts it beside a projection: :math:`y = proj(x) + \frac{\alpha}{r}\,(dropout(x) A^\top) B^\top`.

    Parameters ``lora_A.weight`` (r, in), ``lora_B.weight`` (out, r). With in = out this is one fused `fastadapt.functional.bottleneck` (identity activation, the projection's
    output as residual); otherwise plain torch.

    Args:
        in_features, out_features: of the projection.
        rank: r.
        alpha: the scale is alpha / r.
        dropout: probability of dropping an element of x before A, in training.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float = 32.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, rank=rank)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: must be from 0 to below 1, not {dropout!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"alpha: must be a finite number, not {alpha!r}")
        self.rank, self.alpha, self.dropout = rank, float(alpha), dropout
        self.lora_A = linear(in_features, rank, False, device=device, dtype=dtype)
        self.lora_B = linear(rank, out_features, False, device=device, dtype=dtype)
        self.reset_parameters()

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A uniform in +-1/sqrt(in), B zero: the start is exactly the frozen projection."""
        self.lora_A.reset_parameters()
        self.lora_B.weight.zero_()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The projection's output y (..., out) plus the update; x (..., in) is its input."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        (a, _), (b, _) = weights(self._modules["lora_A"]), weights(self._modules["lora_B"])  # type: ignore[arg-type]
        if a.shape[1] == b.shape[0]:
            return functional.bottleneck(x, a, b, activation="identity", residual=y, scale=self.scale)
        return y + self.scale * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)).to(y.dtype)

    def bottleneck_call(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]] | None:
        """As `Bottleneck.bottleneck_call`; None where `forward` is no bottleneck, or drops elements of x first."""
        a, b = self.lora_A.weight, self.lora_B.weight
        if a.shape[1] != b.shape[0] or (self.training and self.dropout):
            return None
        none = dict.fromkeys(("b_down", "b_up", "norm_before", "norm_after"))
        return x, {"w_down": a, "w_up": b, "activation": "identity", "residual": y, "scale": self.scale, "heads": 1, **none}

    def merged_delta(self) -> Tensor:
        """What merging adds to the projection's weight, (out, in): alpha / r B A, in fp32 at least."""
        a, b = (p.weight.to(torch.promote_types(p.weight.dtype, torch.float32)) for p in (self.lora_A, self.lora_B))
        return self.scale * (b @ a)

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        return {"op": "bottleneck", "width": self.lora_A.in_features, "rank": self.rank, "param_dtype": self.lora_A.weight.dtype}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
