"""Projections whose weight is a product of smaller tensors. Each has ``weight`` (out, in) and ``bias`` like ``nn.Linear``, so a bottleneck takes either."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from fastadapt import functional
from fastadapt.nn.init import booleans, is_number, positive

Projection = Callable[..., nn.Module]
"""Makes a projection from (in_features, out_features, device=, dtype=)."""

Made = TypeVar("Made")

WEIGHT_INITS = ("glorot-uniform", "glorot-normal", "normal")
RULE_INITS = ("normal", "uniform")


class Keeping(nn.Module):
    """A module that keeps what `once` made; copies and files do without, and ``train()`` and ``eval()`` forget it."""

    _kept: tuple[Any, Any] | None = None  # of older pickles, too

    def __init__(self) -> None:
        super().__init__()
        self._kept = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def train(self, mode: bool = True) -> Self:
        self._kept = None
        return super().train(mode)


class _Product(Keeping):
    """A projection whose ``weight`` is computed from its parameters whenever it is read."""

    in_features: int
    out_features: int
    b: nn.Parameter | None
    _tied_weights_keys = {"": ""}  # as in `PerTask`
    scaled: str
    """The parameter that is zero where the projection is: the other factors keep their values, or nothing would get a gradient."""

    @property
    def bias(self) -> Tensor | None:
        return self.b

    def matrix(self) -> Tensor:
        """The weight as the papers write it, (in, out): y = x @ matrix + b."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """`matrix` transposed, (out, in). Without gradients, as in ``generate``, it is made again only when a parameter has changed (through its ``.data``, which torch does not
        tell: after the next ``train()`` or ``eval()``)."""
        return once(self, [p for p in self._parameters.values() if p is not None], self.matrix).t()

    @torch.no_grad()
    def zero_(self) -> None:
        """Makes the projection zero, after drawing its other factors."""
        self.reset_parameters()
        self._parameters[self.scaled].zero_()  # type: ignore[union-attr]

    def reset_parameters(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.b is not None}"


class PHMLinear(_Product):
    r"""Compacter's projection (Compacter; Kronecker products by Zhang et al. 2021): a sum of n Kronecker products.

    .. math:: y = x H + b, \qquad H = \sum_{i<n} A_i \otimes W_i, \qquad H[a\,in/n + k,\ c\,out/n + p] = \sum_i A_i[a, c]\, W_i[k, p]

    Parameters have the published names: ``phm_rule`` A (n, n, n), or ``phm_rule_left`` (n, n, 1) and ``phm_rule_right`` (n, 1, n); ``W`` (n, in/n, out/n), or, of rank k,
    ``W_left`` (n, in/n, k) and ``W_right`` (n, k, out/n); ``b`` (out,). A shared rule or a shared W is one Parameter that several projections hold (`share`).

    Args:
        in_features, out_features: widths; n must divide both.
        division: n.
        rank: k of each W_i; None: full W_i.
        factorized_rule: the rule as a product of rank 1.
        bias: a bias b.
        weight_init: of each W_i (or of its factors): "glorot-uniform" and "glorot-normal" with gain sqrt(2), or "normal", N(0, init_range^2).
        rule_init: "normal", N(0, rule_range^2), or "uniform", U(-rule_range, rule_range).
        init_range: for ``weight_init="normal"``.
        rule_range: 0.01 in the published runs of VL-Adapter and in Compacter's unshared rules; 1e-4 in Compacter's shared ones.

    Raises:
        ValueError: n does not divide a width, or an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        division: int,
        *,
        rank: int | None = None,
        factorized_rule: bool = False,
        bias: bool = True,
        weight_init: str = "glorot-uniform",
        rule_init: str = "normal",
        init_range: float = 1e-4,
        rule_range: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, division=division, **({} if rank is None else {"rank": rank}))
        booleans(factorized_rule=factorized_rule, bias=bias)
        if in_features % division or out_features % division:
            raise ValueError(f"division: {division} must divide both widths, {in_features} and {out_features}")
        for name, value, known in (("weight_init", weight_init, WEIGHT_INITS), ("rule_init", rule_init, RULE_INITS)):
            if value not in known:
                raise ValueError(f"{name}: must be one of {', '.join(known)}, not {value!r}")
        for name, size in (("init_range", init_range), ("rule_range", rule_range)):
            if not is_number(size) or size < 0:
                raise ValueError(f"{name}: must be a number, 0 or more, not {size!r}")
        self.in_features, self.out_features, self.division, self.rank = in_features, out_features, division, rank
        self.weight_init, self.rule_init, self.init_range, self.rule_range = weight_init, rule_init, init_range, rule_range
        n, rows, columns = division, in_features // division, out_features // division
        rules = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)} if factorized_rule else {"phm_rule": (n, n, n)}
        weights = {"W": (n, rows, columns)} if rank is None else {"W_left": (n, rows, rank), "W_right": (n, rank, columns)}
        for name, shape in {**rules, **weights}.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.register_parameter("b", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)
        self.scaled = "W" if rank is None else "W_right"
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again."""
        for name, parameter in self.named_parameters():
            if name == "b":
                parameter.zero_()
            elif name.startswith("phm_rule"):
                parameter.normal_(0.0, self.rule_range) if self.rule_init == "normal" else parameter.uniform_(-self.rule_range, self.rule_range)
            elif self.weight_init == "normal":
                parameter.normal_(0.0, self.init_range)
            else:
                # Xavier's rule with gain sqrt(2), for each of the n slices by itself.
                std = math.sqrt(2) * math.sqrt(2.0 / (parameter.shape[1] + parameter.shape[2]))
                parameter.normal_(0.0, std) if self.weight_init == "glorot-normal" else parameter.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std)

    def rule(self) -> Tensor:
        """A, (n, n, n)."""
        p = self._parameters
        return p["phm_rule"] if "phm_rule" in p else p["phm_rule_left"] * p["phm_rule_right"]  # type: ignore[operator, return-value]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, the left and the right factor of W, as `fastadapt.functional.phm_bottleneck` takes them; of a W of rank k only."""
        return self.rule(), self._parameters["W_left"], self._parameters["W_right"]  # type: ignore[return-value]

    def matrix(self) -> Tensor:
        p = self._parameters
        w = p["W"] if self.rank is None else factor_product(p["W_left"], p["W_right"])  # type: ignore[arg-type]
        return kronecker_sum(self.rule(), w)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, division={self.division}, rank={self.rank}"


def state_of(given: Sequence[Tensor]) -> tuple[tuple[int, int], ...] | None:
    """What changes when one of these parameters does, but for writes through its ``.data``, which leave no trace; None where nothing tells."""
    # A tensor of inference mode has no version; a fake one, a shard and one of a functorch transform have no address; one that `functional_call` puts for a parameter may have
    # the address of the one before. What has a gradient may be written by a fused optimiser of torch, which raises no version.
    if any(type(p) is not nn.Parameter or p.is_inference() or p.grad is not None for p in given):
        return None
    # The address too: `.to()` gives a parameter new storage under its old version.
    return tuple((p._version, p.data_ptr()) for p in given)


def once(module: Any, given: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """What ``make`` gives of these parameters, kept in ``module._kept`` while there are no gradients until one of them has changed; with gradients it is made each time."""
    changing = torch.is_grad_enabled() or torch.compiler.is_compiling() or functional.transformed()
    if changing or (state := state_of(given)) is None:
        if module._kept is not None:  # nn.Module's way of setting an attribute is long
            module._kept = None
        return make()
    if module._kept is None or module._kept[0] != state:
        module._kept = state, make()
    return module._kept[1]  # type: ignore[no-any-return]


def as_parameters(p: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What is made of parameters like p inside the ``with`` block has their dtype: autocast would round it to half precision."""
    return contextlib.nullcontext() if p.is_meta else torch.autocast(p.device.type, enabled=False)


def factor_product(left: Tensor, right: Tensor) -> Tensor:
    """(n, a, k) and (n, k, b) -> (n, a, b)."""
    with as_parameters(left):
        return left @ right


def kronecker_sum(rule: Tensor, w: Tensor) -> Tensor:
    """(n, n, n) and (n, in/n, out/n) -> H, (in, out): one product over i, put in its places. (Products that are summed: 10 times slower, measured on CPU.)"""
    n, rows, columns = w.shape
    with as_parameters(w):
        h = rule.reshape(n, n * n).t() @ w.reshape(n, rows * columns)
    return h.view(n, n, rows, columns).transpose(1, 2).reshape(n * rows, n * columns)


def low_rank_phm(down: nn.Module, up: nn.Module) -> bool:
    """Whether a bottleneck of these projections is one `fastadapt.functional.phm_bottleneck`, which never forms their weights."""
    return isinstance(down, PHMLinear) and isinstance(up, PHMLinear) and down.rank is not None and (down.division, down.rank) == (up.division, up.rank)


class LowRankLinear(_Product):
    r"""A projection of low rank (VL-Adapter, "low-rank adapters"; Compacter): :math:`y = x\, W_{left} W_{right} + b`.

    Parameters have the published names: ``W_left`` (in, k), ``W_right`` (k, out), ``b`` (out,).

    Args:
        in_features, out_features: widths.
        rank: k.
        bias: a bias b.
        weight_init: of both factors, "glorot-uniform" or "glorot-normal", with gain sqrt(2).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 1,
        *,
        bias: bool = True,
        weight_init: str = "glorot-uniform",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        positive(in_features=in_features, out_features=out_features, rank=rank)
        booleans(bias=bias)
        if weight_init not in WEIGHT_INITS[:2]:
            raise ValueError(f"weight_init: must be one of {', '.join(WEIGHT_INITS[:2])}, not {weight_init!r}")
        self.in_features, self.out_features, self.rank, self.weight_init, self.scaled = in_features, out_features, rank, weight_init, "W_right"
        self.W_left = nn.Parameter(torch.empty(in_features, rank, device=device, dtype=dtype))
        self.W_right = nn.Parameter(torch.empty(rank, out_features, device=device, dtype=dtype))
        self.register_parameter("b", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the starting values again."""
        draw: Any = nn.init.xavier_uniform_ if self.weight_init == "glorot-uniform" else nn.init.xavier_normal_
        draw(self.W_left, gain=math.sqrt(2))
        draw(self.W_right, gain=math.sqrt(2))
        if self.b is not None:
            self.b.zero_()

    def matrix(self) -> Tensor:
        with as_parameters(self.W_left):
            return self.W_left @ self.W_right

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


def share(first: nn.Module, other: nn.Module, *names: str) -> None:
    """Makes ``other`` hold ``first``'s parameters of these dotted names, as one and the same Parameter.

    Raises:
        ValueError: a parameter is missing, or the shapes differ.
    """
    for name in names:
        path, _, leaf = name.rpartition(".")
        ours, theirs = (m.get_submodule(path)._parameters for m in (first, other))
        if (a := ours.get(leaf)) is None or (b := theirs.get(leaf)) is None or a.shape != b.shape:
            raise ValueError(f"{name}: cannot be shared between {type(first).__name__} and {type(other).__name__}: a parameter of one shape in both is needed")
        theirs[leaf] = a
