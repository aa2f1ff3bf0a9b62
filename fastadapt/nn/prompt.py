"""Trained prompt vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastadapt.nn.init import TORCH, Init, positive


class Prompt(nn.Module):
    r"""Prompt vectors, through an MLP or as they are (Lester et al. 2021; VL-Adapter; prefix MLP of Li and Liang 2021).

    .. math:: P = \tanh(E W_1^\top + b_1) W_2^\top + b_2 \quad\text{or}\quad P = E

    Parameters have the published names: ``prefix_embedding.0`` E (length, D), ``prefix_embedding.1`` (mid, D), ``prefix_embedding.3`` (D, mid).

    Args:
        length: number of vectors.
        width: D.
        mid: width of the MLP; None: no MLP.
        init: starting values of the MLP and its E; without MLP, E is uniform in +-0.5 (Compacter's "random" prompt tuning).
        table: a token table whose first ``length`` rows E starts with, without MLP (Compacter's "tokens"). They are read in `reset_parameters`; the published code reads them
            before the checkpoint is loaded. The prompt does not own it.

    Raises:
        ValueError: a size is out of range, or a table is given with an MLP or is too short.
    """

    def __init__(
        self,
        length: int,
        width: int,
        mid: int | None = None,
        *,
        init: Init = TORCH,
        table: nn.Embedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(length=length, width=width, **({} if mid is None else {"mid": mid}))
        if table is not None and (mid is not None or table.num_embeddings < length or table.embedding_dim != width):
            raise ValueError(f"table: must have at least {length} rows of {width}, and mid must be None; not {table.num_embeddings} rows of {table.embedding_dim} and {mid}")
        factory = {"device": device, "dtype": dtype}
        mlp = [] if mid is None else [nn.Linear(width, mid, **factory), nn.Tanh(), nn.Linear(mid, width, **factory)]  # type: ignore[arg-type]
        self.prefix_embedding = nn.Sequential(nn.Embedding(length, width, **factory), *mlp)  # type: ignore[arg-type]
        self.init = init
        self._table: tuple[nn.Embedding | None] = (table,)  # in a tuple, so that it is no child
        self.reset_parameters()

    @property
    def length(self) -> int:
        """Number of vectors."""
        return self.prefix_embedding[0].num_embeddings  # type: ignore[return-value]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again."""
        std, (table,) = self.init.std, self._table
        if table is not None:
            self.prefix_embedding[0].weight.copy_(table(torch.arange(self.length, device=table.weight.device)))  # type: ignore[operator]
            return
        for layer in self.prefix_embedding:
            if isinstance(layer, nn.Embedding):
                layer.weight.uniform_(-0.5, 0.5) if len(self.prefix_embedding) == 1 else layer.weight.normal_(0.0, 1.0 if std is None else std)
            elif isinstance(layer, nn.Linear):
                if std is None:
                    layer.reset_parameters()
                else:
                    layer.weight.normal_(0.0, std)
                    layer.bias.zero_()

    def forward(self) -> Tensor:
        """P (length, D)."""
        return self.prefix_embedding[1:](self.prefix_embedding[0].weight)
