"""The trained front-end of VL-BART and VL-T5: grid or region features to visual tokens (VL-Adapter, section 3.1; always trained, "visual projection tuning")."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadapt.nn.init import positive


class VisualEmbedding(nn.Module):
    r"""Visual tokens from features and boxes.

    .. math:: E = LN_f(W_f\, feats + b_f) + LN_p(W_p\,[boxes, area] + b_p) + ImgOrder[img] + Tok[V - 1 - obj]

    ``area`` is :math:`(y_2-y_1)(x_2-x_1)` of a box ``(x1, x2, y1, y2)``. ``Tok`` is the host's own token table, indexed from its end; it is an argument of `forward` and no
    parameter of this module, so that the host may resize, tie or freeze it. Parameter names are the published ones.

    Args:
        feat_dim: width F of the features.
        d_model: width D of the host.
        norm: makes a layer norm of a given width: ``nn.LayerNorm`` for BART; T5 gives its RMS norm.
        pos_dim: coordinates of a box, 4.
        n_images: rows of ``ImgOrder``.
        use_vis_order_embedding: add ``ImgOrder`` and ``Tok``.
        use_vis_layer_norm: False leaves out every layer norm.
        individual_vis_layer_norm: False replaces the two layer norms by one after the sum.
    """

    def __init__(
        self,
        feat_dim: int,
        d_model: int,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        *,
        pos_dim: int = 4,
        n_images: int = 2,
        use_vis_order_embedding: bool = True,
        use_vis_layer_norm: bool = True,
        individual_vis_layer_norm: bool = True,
    ) -> None:
        super().__init__()
        self.feat_dim, self.pos_dim = feat_dim, pos_dim
        each = use_vis_layer_norm and individual_vis_layer_norm
        self._embed_features(feat_dim, d_model, norm if each else None)
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(pos_dim + 1, d_model), *([norm(d_model)] if each else []))
        self.img_order_embedding = nn.Embedding(n_images, d_model) if use_vis_order_embedding else None
        self.layer_norm = norm(d_model) if use_vis_layer_norm and not individual_vis_layer_norm else None

    def _embed_features(self, feat_dim: int, d_model: int, norm: Callable[[int], nn.Module] | None) -> None:
        """Makes what `_features` needs."""
        self.feat_embedding = nn.Sequential(nn.Linear(feat_dim, d_model), *([norm(d_model)] if norm else []))

    def _features(self, feats: Tensor) -> Tensor:
        return self.feat_embedding(feats)

    def forward(self, feats: Tensor, boxes: Tensor, table: Tensor, img_order_ids: Tensor | None = None, obj_order_ids: Tensor | None = None) -> Tensor:
        """Visual tokens (B, N, D).

        Args:
            feats: (B, N, F).
            boxes: (B, N, 4), each ``(x1, x2, y1, y2)``; all zeros for grid features without positions.
            table: the host's token table (V, D).
            img_order_ids: which image a token belongs to, (B, N) or (1, N) int64; None: 0.
            obj_order_ids: number of a token inside its image, (B, N) or (1, N) int64; None: 0 .. N-1.

        Raises:
            ValueError: a shape is wrong.
        """
        if feats.ndim != 3 or feats.shape[-1] != self.feat_dim:
            raise ValueError(f"feats: shape {tuple(feats.shape)} must be (batch, tokens, {self.feat_dim})")
        if boxes.shape != (*feats.shape[:2], self.pos_dim):
            raise ValueError(f"boxes: shape {tuple(boxes.shape)} must be {(*feats.shape[:2], self.pos_dim)}")
        boxes = boxes.to(feats.dtype)
        area = (boxes[..., 3] - boxes[..., 2]) * (boxes[..., 1] - boxes[..., 0])
        tokens = self._features(feats) + self.absolute_vis_pos_embedding(torch.cat([boxes, area[..., None]], -1))
        if self.img_order_embedding is not None:
            n = feats.shape[1]
            img = feats.new_zeros(1, n, dtype=torch.long) if img_order_ids is None else img_order_ids
            obj = torch.arange(n, device=feats.device)[None] if obj_order_ids is None else obj_order_ids
            for name, ids in (("img_order_ids", img), ("obj_order_ids", obj)):
                if ids.ndim != 2 or ids.shape[1] != n or ids.shape[0] not in (1, feats.shape[0]):
                    raise ValueError(f"{name}: shape {tuple(ids.shape)} must be {(feats.shape[0], n)} or {(1, n)}")
            tokens = tokens + self.img_order_embedding(img) + F.embedding(table.shape[0] - 1 - obj, table)
        return tokens if self.layer_norm is None else self.layer_norm(tokens)


class LowRankVisualEmbedding(VisualEmbedding):
    r"""VL-PET's low-rank visual projector: a `VisualEmbedding` whose features pass a multi-head bottleneck, with a gate or without.

    .. math:: F = \phi(feats\, W_d^\top + b_d) W_u^\top + b_u, \qquad G = \sigma(\phi(feats\, W_1^\top + b_1) W_2^\top + b_2)

    :math:`LN_f(F)`, :math:`LN_f(F \odot G)` or, with ``residual``, :math:`LN_f(F + F \odot G)` takes the place of :math:`LN_f(W_f\, feats + b_f)`. Parameter names are the
    published ones: ``visual_projector_multihead_down.{i}`` (R / heads, F), ``visual_projector_multihead_up`` (D, R), ``visual_projector_gating_large_x_down`` (Rg, F),
    ``visual_projector_gating_large_x_up`` (D, Rg), ``visual_projector_layer_norm``. The published code has it in VL-BART only.

    Args:
        feat_dim, d_model, norm, options: see `VisualEmbedding`.
        rank: R; published: 96.
        heads: number of down-projections; it must divide ``rank``.
        gate_rank: Rg; None: no gate. Published: 96.
        residual: the last of the three forms; it needs a gate.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, feat_dim: int, d_model: int, norm: Callable[[int], nn.Module] = nn.LayerNorm, *, rank: int = 96, heads: int = 1, gate_rank: int | None = None, residual: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        positive(rank=rank, heads=heads, **({} if gate_rank is None else {"gate_rank": gate_rank}))
        if rank % heads:
            raise ValueError(f"heads: {heads} must divide rank {rank}")
        if residual and gate_rank is None:
            raise ValueError("residual: there is no gate to add (gate_rank=None)")
        self._sizes = rank, heads, gate_rank
        super().__init__(feat_dim, d_model, norm, **options)
        self.residual = residual

    def _embed_features(self, feat_dim: int, d_model: int, norm: Callable[[int], nn.Module] | None) -> None:
        rank, heads, gate_rank = self._sizes
        self.visual_projector_multihead_down = nn.ModuleList(nn.Linear(feat_dim, rank // heads) for _ in range(heads))
        self.visual_projector_multihead_up = nn.Linear(rank, d_model)
        self.visual_projector_layer_norm = norm(d_model) if norm else None
        self.visual_projector_gating_large_x_down = None if gate_rank is None else nn.Linear(feat_dim, gate_rank)
        self.visual_projector_gating_large_x_up = None if gate_rank is None else nn.Linear(gate_rank, d_model)

    def _features(self, feats: Tensor) -> Tensor:
        inner = torch.cat([head(feats) for head in self.visual_projector_multihead_down], -1)
        out = self.visual_projector_multihead_up(F.gelu(inner, approximate="tanh"))
        if self.visual_projector_gating_large_x_down is not None:
            gate = self.visual_projector_gating_large_x_up(F.gelu(self.visual_projector_gating_large_x_down(feats), approximate="tanh"))  # type: ignore[misc]
            gated = out * torch.sigmoid(gate)
            out = out + gated if self.residual else gated
        return out if self.visual_projector_layer_norm is None else self.visual_projector_layer_norm(out)


def downsample(feats: Tensor, n_boxes: int, n_images: int = 1) -> Tensor:
    """Adaptive max-pool of square feature grids: (B, n_images * L, F) to (B, n_images * n_boxes, F), each image by itself (49 cells to 36 in VL-Adapter).

    Raises:
        ValueError: a grid, before or after, is not square.
    """
    batch, tokens, width = feats.shape
    side, target = math.isqrt(tokens // n_images), math.isqrt(n_boxes)
    if side * side * n_images != tokens or target * target != n_boxes:
        raise ValueError(f"feats: {tokens} tokens of {n_images} image(s) and n_boxes={n_boxes}: both grids must be square")
    grid = feats.reshape(batch * n_images, side, side, width).permute(0, 3, 1, 2)
    return F.adaptive_max_pool2d(grid, target).flatten(2).transpose(1, 2).reshape(batch, n_images * n_boxes, width)


def shorten(per_token: Tensor, tokens: int, n_images: int = 1) -> Tensor:
    """Boxes or ids (B, n_images * L, ...) beside pooled features: the first ``tokens / n_images`` of each image."""
    return torch.cat([image[:, : tokens // n_images] for image in per_token.chunk(n_images, 1)], 1)
