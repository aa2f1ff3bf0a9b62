"""Starting values of adapters."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Init:
    """How the projections and vectors of one module start.

    The published starting values come from the host as much as from the method: BART gives every Linear N(0, 0.02) and a zero bias, T5 leaves torch's default. So modules do not
    choose; they are given a rule and apply it in ``reset_parameters``. Layer norms always start at weight 1, bias 0.

    Args:
        std: weights N(0, std^2) and biases 0; None: torch's default for ``nn.Linear``, weight and bias uniform in +-1/sqrt(fan_in).
        zero: names of children and parameters that start at zero, weight and bias; the others follow ``std``.
        uniform: names of Linear children whose weight is uniform in +-1/sqrt(fan_in) and whose bias is zero, whatever ``std`` is.
        one: names of vectors that start at one.
    """

    std: float | None = None
    zero: tuple[str, ...] = ()
    uniform: tuple[str, ...] = ()
    one: tuple[str, ...] = ()

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Sets the parameters of ``module`` and of its direct children, in the order in which they were registered."""
        for name, parameter in module.named_parameters(recurse=False):
            if name in self.zero or name in self.one:
                parameter.fill_(float(name in self.one))
            else:
                parameter.normal_(0.0, 0.02 if self.std is None else self.std)
        for name, child in module.named_children():
            if name in self.zero:
                if (zero := getattr(child, "zero_", None)) is not None:
                    zero()
                else:
                    for parameter in child.parameters():
                        parameter.zero_()
            elif isinstance(child, nn.Linear) and (self.std is not None or name in self.uniform):
                nn.init.kaiming_uniform_(child.weight, a=math.sqrt(5)) if name in self.uniform else child.weight.normal_(0.0, self.std)  # type: ignore[arg-type]
                if child.bias is not None:
                    child.bias.zero_()
            else:
                child.reset_parameters()  # type: ignore[operator]


TORCH = Init()


def linear(in_features: int, out_features: int, bias: bool = True, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> nn.Linear:
    """A Linear whose values are left to `Init`: nothing is drawn from torch's generator."""
    return nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype).to_empty(device=torch.get_default_device() if device is None else device)


def weights(projection: nn.Module) -> tuple[Tensor, Tensor | None]:
    """``projection.weight, projection.bias`` without nn.Module's ``__getattr__``: a gated bottleneck's forward then costs 5 us of host time beside its op instead of 35."""
    own = projection._parameters
    if "weight" in own:
        return own["weight"], own["bias"]  # type: ignore[return-value]
    if "base_layer" in projection._modules:
        raise TypeError(f"{type(projection).__name__}: a layer of PEFT stands in an adapter, whose fused op would not run it; leave adapters out (target_modules, exclude_modules)")
    return projection.weight, projection.bias  # type: ignore[return-value]  # parametrised


def positive(**numbers: int) -> None:
    """Refuses sizes that are not positive integers."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: must be a positive integer, not {value!r}")


def booleans(**values: object) -> None:
    """Refuses what is no bool of Python's or numpy's, such as "False", which would count as true."""
    for name, value in values.items():
        as_bool(name, value)


def as_bool(name: str, value: Any, or_none: str = "") -> bool:
    """A bool of Python's or numpy's as Python's.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, bool) and (type(value).__module__, type(value).__name__) not in (("numpy", "bool"), ("numpy", "bool_")):
        raise ValueError(f"{name}: must be True or False{or_none}, not {value!r}")
    return bool(value)


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number of Python or numpy; a bool is none."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond float's range
        return False


def probability(name: str, value: float) -> float:
    """A dropout probability, as a Python number.

    Raises:
        ValueError: it is no number from 0 to below 1.
    """
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: must be from 0 to below 1, not {value!r}")
    return float(value)
