"""UniAdapter: one bottleneck that serves the image, the text and the cross-modal layers of a model; and what stands beside it in cross-attention."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.bottleneck import check_scales
from fastadapt.nn.init import Init, booleans, linear, positive, probability
from fastadapt.nn.projections import Keeping, once

MODES = ("text", "visual", "multimodal")
LAYER_NORMS = ("in", "out", "none")
Mode = Literal["text", "visual", "multimodal"]

# What BLIP's own rule, which has the last word over all modules, gives to the published adapters: N(0, 0.02), biases 0.
BLIP = Init(std=0.02)


class UniAdapter(Keeping):
    r"""UniAdapter (Lu et al., ICLR 2024, section 3): one down-projection for all modalities, an up-projection for each, of which the text's is also part of the
    cross-modal one.

    With :math:`k = dropout(relu(LN(x) W_d^\top + b_d))` (LN with ``layer_norm="in"`` only) the mode decides

    .. math::
        u_{text} = k W_t^\top + b_t, \qquad u_{visual} = k W_v^\top + b_v, \qquad u_{multimodal} = LN_{cross}\bigl((k W_m^\top + b_m) + (k W_t^\top + b_t)\bigr)

    and the output is :math:`s\,u`, behind that LN again with ``layer_norm="out"``, plus a residual. Every mode is one `fastadapt.functional.multimodal_bottleneck`; the weights of
    "multimodal"'s two up-projections are summed first, once in all where there are no gradients, as in ``generate``. With dropout, in training, plain torch.

    Parameters have the published names: ``adapter_layer_norm_before`` (not with "none"), ``adapter_layer_norm_cross_modal``, ``down_proj`` (R, D), ``up_proj`` W_t,
    ``multi_up_proj`` W_m and ``visual_up_proj`` W_v (D, R), ``scale`` (1,) if it is learnable.

    Args:
        width: D.
        rank: R.
        dropout: probability of dropping an element of k, in training.
        scale: s, a finite number.
        learnable_scale: s is a Parameter that starts at ``scale``.
        layer_norm: "in" (of the input), "out" (of the scaled output) or "none"; eps 1e-5.
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        rank: int = 512,
        *,
        dropout: float = 0.0,
        scale: float = 0.1,
        learnable_scale: bool = False,
        layer_norm: Literal["in", "out", "none"] = "in",
        init: Init = BLIP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(width=width, rank=rank)
        check_scales(scale=scale)
        booleans(learnable_scale=learnable_scale)
        if layer_norm not in LAYER_NORMS:
            raise ValueError(f"layer_norm: must be one of {', '.join(LAYER_NORMS)}, not {layer_norm!r}")
        self.dropout, self.layer_norm, self.init = probability("dropout", dropout), layer_norm, init
        self._start = float(scale)
        self.scale: float | nn.Parameter = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learnable_scale else float(scale)
        self.adapter_layer_norm_before = None if layer_norm == "none" else nn.LayerNorm(width, device=device, dtype=dtype)
        self.adapter_layer_norm_cross_modal = nn.LayerNorm(width, device=device, dtype=dtype)
        self.down_proj = linear(width, rank, device=device, dtype=dtype)
        self.up_proj = linear(rank, width, device=device, dtype=dtype)
        self.multi_up_proj = linear(rank, width, device=device, dtype=dtype)
        self.visual_up_proj = linear(rank, width, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``; a learnable scale goes back to where it started."""
        self.init.apply(self)
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(self._start)

    def forward(self, x: Tensor, add_residual: bool | Tensor = True, mode: Mode = "text") -> Tensor:
        """The adapter's output in one of its modes.

        Args:
            x: (..., D).
            add_residual: True adds x, a tensor of x's shape is added, False adds nothing. (A host adds the output of the sub-layer that the adapter runs beside.)
            mode: "text", "visual" or "multimodal".

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            ValueError: the mode is unknown.
        """
        if mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, not {mode!r}")
        if isinstance(add_residual, Tensor) and _autocasts(x):
            # A residual stream stays in float32 under autocast; the fused addition would round all of it to half precision.
            return add_residual + self.forward(x, False, mode)
        residual: Any = add_residual if isinstance(add_residual, Tensor) else "input" if add_residual else None
        if self.training and self.dropout > 0.0:
            return self._with_dropout(x, residual, mode)
        after, cross = self._norm("out"), self.adapter_layer_norm_cross_modal
        down, up, multi = self.down_proj, self.visual_up_proj if mode == "visual" else self.up_proj, self.multi_up_proj
        w_up: Tensor = up.weight
        b_up: Tensor | None = up.bias
        norm = None
        if mode == "multimodal":
            w_up, b_up = once(self, (up.weight, multi.weight, up.bias, multi.bias), lambda: (up.weight + multi.weight, up.bias + multi.bias))
            norm = cross.weight, cross.bias, cross.eps
        options: dict[str, Any] = {"residual": residual if after is None else None, "scale": self.scale, "norm_before": self._norm("in"), "norm_cross": norm}
        y = functional.multimodal_bottleneck(x, down.weight, w_up, None, down.bias, b_up, **options)
        return y if after is None else _add(functional.layer_norm(y, after), x, residual)

    def _norm(self, where: str) -> functional.LayerNorm | None:
        norm = self.adapter_layer_norm_before if self.layer_norm == where else None
        return None if norm is None else (norm.weight, norm.bias, norm.eps)

    def _with_dropout(self, x: Tensor, residual: Any, mode: Mode) -> Tensor:
        before, after, cross = self._norm("in"), self._norm("out"), self.adapter_layer_norm_cross_modal
        k = F.dropout(F.relu(_linear(self.down_proj, x if before is None else functional.layer_norm(x, before))), self.dropout)
        u = _linear(self.visual_up_proj if mode == "visual" else self.up_proj, k)
        if mode == "multimodal":
            u = functional.layer_norm(_linear(self.multi_up_proj, k) + u, (cross.weight, cross.bias, cross.eps))
        u = u * (self.scale.to(u.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return _add(u if after is None else functional.layer_norm(u, after), x, residual)

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        return {"op": "bottleneck", "width": self.down_proj.in_features, "rank": self.down_proj.out_features, "param_dtype": self.down_proj.weight.dtype}

    def extra_repr(self) -> str:
        scale = f"learnable, from {self._start}" if isinstance(self.scale, Tensor) else self.scale
        return f"layer_norm={self.layer_norm!r}, scale={scale}, dropout={self.dropout}"


class KeyValueAdapter(nn.Module):
    r"""UniAdapter's linear adapter of cross-attention's keys or values (the published ``Adapter_Lora``): :math:`y = proj(x) + s\,((x W_d^\top + b_d) W_u^\top + b_u)`.

    One such module serves the key projections of all layers of a text encoder, another the value projections. Parameters ``down_proj`` (R, in), ``up_proj`` (out, R) and
    ``scale`` (1,). With in = out this is one fused `fastadapt.functional.bottleneck` (identity activation, the projection's output as residual); otherwise plain torch.

    Args:
        in_features, out_features: of the projection.
        rank: R.
        scale: s, a finite number.
        learnable_scale: s is a Parameter that starts at ``scale``, as published.
        init: starting values.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 64,
        *,
        scale: float = 1.0,
        learnable_scale: bool = True,
        init: Init = BLIP,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, rank=rank)
        check_scales(scale=scale)
        booleans(learnable_scale=learnable_scale)
        self.init, self._start = init, float(scale)
        self.scale: float | nn.Parameter = nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learnable_scale else float(scale)
        self.down_proj = linear(in_features, rank, device=device, dtype=dtype)
        self.up_proj = linear(rank, out_features, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again, by the rule ``init``; a learnable scale goes back to where it started."""
        self.init.apply(self)
        if isinstance(self.scale, nn.Parameter):
            self.scale.fill_(self._start)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The adapter's output of x (..., in), added to the projection's output y (..., out) if that is given."""
        down, up = self.down_proj, self.up_proj
        if down.in_features == up.out_features:
            return functional.bottleneck(x, down.weight, up.weight, down.bias, up.bias, activation="identity", residual=y, scale=self.scale)  # type: ignore[arg-type]
        u = _linear(up, _linear(down, x)) * (self.scale.to(x.dtype) if isinstance(self.scale, Tensor) else self.scale)
        return u if y is None else y + u.to(y.dtype)

    def call(self) -> dict[str, Any]:
        """As `Bottleneck.call`."""
        return {"op": "bottleneck", "width": self.down_proj.in_features, "rank": self.down_proj.out_features, "param_dtype": self.down_proj.weight.dtype}

    def extra_repr(self) -> str:
        return f"scale={f'learnable, from {self._start}' if isinstance(self.scale, Tensor) else self.scale}"


class TemporalEmbedding(nn.Module):
    r"""UniAdapter's temporal embedding for video (section 3): row t of ``time_embed`` (1, T, D) is added to every token of frame t.

    Args:
        frames: T; 8 in the published code.
        width: D.
        zero: start at zero instead of the published N(0, 0.02^2), cut off at 2.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, frames: int, width: int, *, zero: bool = False, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        positive(frames=frames, width=width)
        booleans(zero=zero)
        self.zero = zero
        self.time_embed = nn.Parameter(torch.empty(1, frames, width, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again."""
        self.time_embed.zero_() if self.zero else nn.init.trunc_normal_(self.time_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x plus the embedding; x (B, T N, D) holds N tokens of each frame, frame by frame.

        Raises:
            ValueError: the tokens are no multiple of the frames.
        """
        return x + self.time_embed.to(x.dtype).repeat_interleave(_tokens_per_frame(x.shape[1], self.time_embed.shape[1]), 1)

    def extra_repr(self) -> str:
        return f"frames={self.time_embed.shape[1]}, width={self.time_embed.shape[2]}"


def frame_scores(text: Tensor, frames: Tensor) -> Tensor:
    r"""How much each frame of a video has to do with a text: :math:`s_t = \langle t / \|t\|,\; f_t / \|f_t\| \rangle` (UniAdapter, section 3).

    Args:
        text: projected text features, (B, C).
        frames: projected features of T frames, (B, T, C).

    Returns:
        (B, T): what `frame_weights`, and the text layers of a patched BLIP as ``frame_aware_attention_weight``, take.
    """
    return torch.einsum("bc,btc->bt", F.normalize(text, dim=-1), F.normalize(frames, dim=-1))


def frame_weights(scores: Tensor, tokens: int) -> Tensor:
    r"""The factors of cross-attention's keys in parameter-free frame-aware attention (UniAdapter, section 3): :math:`w_t = T\, softmax_t(s_t / 4)` for the tokens of frame t,
    but 1 for the first of each frame, its class token. No gradient flows into the scores, as published.

    Args:
        scores: s, (B, T).
        tokens: T N, N tokens of each frame, frame by frame.

    Returns:
        (B, T N, 1), to multiply keys (B, T N, D) by.

    Raises:
        ValueError: the tokens are no multiple of the frames.
    """
    frames = scores.shape[1]
    w = (scores.detach() / 4).softmax(1)[..., None] * frames
    return torch.cat((torch.ones_like(w), w.expand(-1, -1, _tokens_per_frame(tokens, frames) - 1)), 2).reshape(len(w), tokens, 1)


def _tokens_per_frame(tokens: int, frames: int) -> int:
    if tokens % frames or not tokens:
        raise ValueError(f"encoder states: {tokens} tokens are no multiple of {frames} frames")
    return tokens // frames


def _autocasts(x: Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _linear(projection: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, projection.weight.to(x.dtype), projection.bias.to(x.dtype))


def _add(u: Tensor, x: Tensor, residual: Any) -> Tensor:
    return u if residual is None else u + (x if isinstance(residual, str) else residual).to(u.dtype)
