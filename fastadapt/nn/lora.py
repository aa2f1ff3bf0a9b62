"""LoRA beside a frozen projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.bottleneck import check_scales
from fastadapt.nn.init import as_bool, linear, positive, probability, weights


class LoRA(nn.Module):
    r"""LoRA (Hu et al. 2021, section 4.1) as VL-Adapter puts it beside a projection: :math:`y = proj(x) + \frac{\alpha}{r}\,(dropout(x) A^\top) B^\top`.

    Parameters ``lora_A.weight`` (r, in), ``lora_B.weight`` (out, r). One fused `fastadapt.functional.lora`, dropout included. The projection itself may be anything, quantised
    for instance: only its output comes here.

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
        check_scales(alpha=alpha)
        self.rank, self.alpha, self.dropout = rank, float(alpha), probability("dropout", dropout)
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
        a, b = self._down_up()
        return functional.lora(x, y, a, b, scale=self.scale, dropout=self.dropout if self.training else 0.0)

    def _down_up(self) -> tuple[Tensor, Tensor]:
        (a, _), (b, _) = weights(self._modules["lora_A"]), weights(self._modules["lora_B"])  # type: ignore[arg-type]
        return a, b

    def bottleneck_call(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """As `Bottleneck.bottleneck_call`, of x behind ``dropout`` with that probability; in and out may differ."""
        a, b = self._down_up()
        none = dict.fromkeys(("b_down", "b_up", "norm_before", "norm_after"))
        return x, {"w_down": a, "w_up": b, "activation": "identity", "residual": y, "scale": self.scale, "heads": 1, "dropout": self.dropout if self.training else 0.0, **none}

    def merged_delta(self) -> Tensor:
        """What merging adds to the projection's weight, (out, in): alpha / r B A, in fp32 at least."""
        a, b = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in self._down_up())
        return self.scale * (b @ a)

    @torch.no_grad()
    def merged_weight(self, projection: nn.Module) -> Tensor:
        """The weight of the projection that this runs beside with the update in it: (out, in) as in nn.Linear, or (in, out) as in transformers' Conv1D. The sum is rounded once.

        Raises:
            ValueError: the projection has no floating-point weight of that shape (it is quantised, say), or the result would not be finite.
        """
        delta, weight = self.merged_delta().double(), projection.weight
        delta = delta.t() if any(cls.__name__ == "Conv1D" for cls in type(projection).__mro__) else delta
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.shape != delta.shape:
            was = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(
                f"projection: the weight of this {type(projection).__name__} is {was}; an update can only be merged into floating-point numbers of {tuple(delta.shape)}"
            )
        merged = (weight.double() + delta).to(weight.dtype)
        if not merged.isfinite().all():
            raise ValueError(f"projection: the merged weight of this {type(projection).__name__} would not be finite")
        return merged

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        a, b = self._down_up()
        return {"op": "lora", "width": a.shape[1], "rank": a.shape[0], "param_dtype": a.dtype, "out_width": b.shape[0], "dropout": self.dropout > 0}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


class MergedLoRA(LoRA):
    r"""LoRA on some of the projections that one fused projection makes of an x, such as query, key and value in one (``MergedLinear`` of Hu et al.'s own code).

    Parameters ``lora_A.weight`` (m r, in), ``lora_B.weight`` (m out/n, r) for m enabled ones of n, in their order. One call of rank m r, whose up-projection is block-diagonal and
    zero in the rows of the others; x is dropped and projected down once.

    Args:
        in_features, out_features: of the fused projection.
        rank: r, of each.
        enabled: which of the n equal parts of the output have an update.
        alpha, dropout: as in `LoRA`.

    Raises:
        ValueError: an argument is out of range, none is enabled, or n does not divide the output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        enabled: Sequence[bool],
        alpha: float = 32.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        enabled = tuple(as_bool("enabled", part) for part in enabled)
        parts, count = len(enabled), sum(enabled)
        if not count or out_features % parts:
            raise ValueError(f"enabled: must have a true part, and as many parts as divide out_features {out_features}, not {enabled!r}")
        super().__init__(in_features, out_features // parts * count, rank, alpha=alpha, dropout=dropout, device=device, dtype=dtype)
        self.enabled = enabled
        self.lora_A = linear(in_features, rank * count, False, device=device, dtype=dtype)
        self.reset_parameters()

    def _down_up(self) -> tuple[Tensor, Tensor]:
        a, b = super()._down_up()
        blocks, part = iter(b.split(len(b) // sum(self.enabled))), b.new_zeros(len(b) // sum(self.enabled), 0)
        return a, torch.block_diag(*(next(blocks) if enabled else part for enabled in self.enabled))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enabled={self.enabled}"
