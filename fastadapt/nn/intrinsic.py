"""Intrinsic dimension: a few trained numbers move every tensor of a model through fixed random projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadapt.nn.init import booleans, positive

PROJECTIONS = ("fastfood", "dense")


def walsh_hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension in natural order, not normalised: twice gives ``n * x``.

    Args:
        x: (..., n), n a power of two.

    Raises:
        ValueError: n is no power of two.
    """
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"x: the last of {tuple(x.shape)} must be a power of two")
    y, half = x, 1
    while half < n:
        a, b = y.reshape(*x.shape[:-1], n // (2 * half), 2, half).unbind(-2)
        y, half = torch.stack((a + b, a - b), -2), 2 * half
    return y.reshape(x.shape)


class _Projection(nn.Module):
    """A fixed random P (size, dimension), drawn from its own seed on the CPU, so that it is the same on every device. Its buffers are in no state dict."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__()
        self.size, self.seed = size, seed

    def _hold(self, **buffers: Tensor) -> None:
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)

    def reset_parameters(self) -> None:
        """Draws P again: the same."""
        if not next(self.buffers()).is_meta:
            self._draw(torch.Generator().manual_seed(self.seed))

    def _draw(self, generator: torch.Generator) -> None:
        raise NotImplementedError


class Fastfood(_Projection):
    r"""Fastfood's structured projection (Le et al. 2013): :math:`P v = (H G \Pi H B \tilde v)_{0 \dots D-1} / \sqrt{D \sum G^2}`, with :math:`\tilde v` v padded with zeros, or
    cut, to N = 2^ceil(log2 D) numbers and H unnormalised.

    Buffers: ``B`` (N,) signs, ``Pi`` (N,) a permutation, ``G`` (N,) normal.

    Args:
        size: D, the number of elements of the tensor.
        published_gradient: Compacter's repository multiplies the gradient by 1 / sqrt(N) in each of the two transforms, though neither is normalised; the gradient of v is then
            the true one divided by N.
        seed: of P.
    """

    B: Tensor
    Pi: Tensor
    G: Tensor

    def __init__(self, size: int, *, published_gradient: bool = False, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(size, seed)
        positive(size=size)
        self.published_gradient, n = published_gradient, 1 << (size - 1).bit_length()
        where: dict[str, Any] = {"device": device}
        self._hold(B=torch.empty(n, dtype=torch.int8, **where), Pi=torch.empty(n, dtype=torch.int32, **where), G=torch.empty(n, dtype=dtype, **where))
        self.reset_parameters()

    def _draw(self, generator: torch.Generator) -> None:
        n = self.G.numel()
        self.B.copy_(torch.randint(0, 2, (n,), generator=generator, device="cpu") * 2 - 1)
        self.Pi.copy_(torch.randperm(n, generator=generator, device="cpu"))
        self.G.copy_(torch.randn(n, generator=generator, device="cpu", dtype=torch.float32))

    def forward(self, v: Tensor) -> Tensor:
        """P v (D,)."""
        n = self.G.numel()
        if self.published_gradient:
            v = _ScaledGradient.apply(v, 1 / n)
        # A transform of m numbers and zeros behind them repeats the transform of the m numbers.
        m = min(n, 1 << (v.numel() - 1).bit_length())
        v = nn.functional.pad(v, (0, m - v.numel()))
        y = walsh_hadamard(walsh_hadamard(v * self.B[:m]).repeat(n // m).index_select(0, self.Pi) * self.G)
        return y[: self.size] / (self.size * self.G.square().sum()).sqrt()


class Dense(_Projection):
    """A dense P (D, dimension) of N(0, 0.01^2), as published not normalised: for small models, since it holds D times ``dimension`` numbers.

    Args:
        size: D, the number of elements of the tensor.
        dimension: of v.
        seed: of P.
    """

    P: Tensor

    def __init__(self, size: int, dimension: int, *, seed: int = 0, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(size, seed)
        positive(size=size, dimension=dimension)
        self._hold(P=torch.empty(size, dimension, device=device, dtype=dtype))
        self.reset_parameters()

    def _draw(self, generator: torch.Generator) -> None:
        self.P.copy_(torch.randn(self.P.shape, generator=generator, device="cpu", dtype=torch.float32) * 0.01)

    def forward(self, v: Tensor) -> Tensor:
        """P v (D,)."""
        with torch.autocast(v.device.type, enabled=False):
            return self.P @ v


class _ScaledGradient(torch.autograd.Function):
    """v, with its gradient multiplied by a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, factor: float) -> Tensor:
        return v.view_as(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class IntrinsicDimension(nn.Module):
    r"""Moves the tensors of a model by a projected vector (Aghajanyan et al. 2021, "SAID"; Compacter).

    .. math:: \theta_k = \theta_k^0 + \lambda_k P_k v

    v starts at zero and each :math:`\lambda_k` at 1, so the start is exact. Parameters have the published names: ``intrinsic_parameter`` v, ``intrinsic_parameter_said``
    :math:`\lambda`. As published, :math:`\lambda` has an entry more than there are tensors, and both together have ``dimension`` numbers.

    Args:
        sizes: number of elements of each tensor.
        dimension: trained numbers in all.
        projection: "fastfood" (`fastadapt.nn.intrinsic.Fastfood`) or "dense".
        said: structure-aware: with :math:`\lambda`; otherwise v alone has ``dimension`` numbers.
        published_gradient: see `fastadapt.nn.intrinsic.Fastfood`.
        seed: of the projections. A file holds the seed and not the projections.

    Raises:
        ValueError: an argument is out of range, or ``dimension`` leaves no number for v.
    """

    intrinsic_parameter_said: nn.Parameter | None

    def __init__(
        self,
        sizes: Sequence[int],
        dimension: int,
        *,
        projection: Literal["fastfood", "dense"] = "fastfood",
        said: bool = True,
        published_gradient: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(dimension=dimension)
        booleans(said=said, published_gradient=published_gradient)
        if projection not in PROJECTIONS:
            raise ValueError(f"projection: must be one of {', '.join(PROJECTIONS)}, not {projection!r}")
        if published_gradient and projection != "fastfood":
            raise ValueError(f"published_gradient: only fastfood's differs from the true one, not that of projection={projection!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"seed: must be an integer from 0 to below 2^31, not {seed!r}")
        own = dimension - (len(sizes) + 1 if said else 0)
        if own < 1:
            raise ValueError(f"dimension: {dimension} must be above {len(sizes) + 1}, one for each of the {len(sizes)} tensors and one more, so that some are left for the vector")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.intrinsic_parameter = nn.Parameter(torch.empty(own, **where))
        self.register_parameter("intrinsic_parameter_said", nn.Parameter(torch.empty(len(sizes) + 1, **where)) if said else None)
        seeds = torch.randint(0, 2**31, (len(sizes),), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
        self.projections = nn.ModuleList(
            Fastfood(size, published_gradient=published_gradient, seed=s, **where) if projection == "fastfood" else Dense(size, own, seed=s, **where)
            for size, s in zip(sizes, seeds, strict=True)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The start, at which nothing is moved."""
        self.intrinsic_parameter.zero_()
        if self.intrinsic_parameter_said is not None:
            self.intrinsic_parameter_said.fill_(1.0)
        for projection in self.projections:
            projection.reset_parameters()  # type: ignore[operator]

    def forward(self, k: int, tensor: Tensor) -> Tensor:
        """Theta of the k-th tensor, of its shape and dtype."""
        update = self.projections[k](self.intrinsic_parameter)
        if self.intrinsic_parameter_said is not None:
            update = self.intrinsic_parameter_said[k] * update
        return (tensor + update.view(tensor.shape)).to(tensor.dtype)

    def of(self, k: int) -> nn.Module:
        """The module of one tensor: ``module(tensor)`` is ``self(k, tensor)``. It has no parameters of its own."""
        return _Of(self, k)

    def extra_repr(self) -> str:
        return f"tensors={len(self.projections)}, dimension={self.intrinsic_parameter.numel()}"


class _Of(nn.Module):
    def __init__(self, whole: IntrinsicDimension, k: int) -> None:
        super().__init__()
        self._whole: tuple[IntrinsicDimension] = (whole,)  # in a tuple, so that it is no child
        self.k = k

    def forward(self, tensor: Tensor) -> Tensor:
        return self._whole[0](self.k, tensor)
