"""Which backend runs a call, and why.

A *backend* is one implementation of an op: ``reference`` (plain torch, any device and dtype), ``cpu`` (C++), ``triton`` (CUDA devices of compute capability 8.0
and newer). Ops register a `Plan` here; this module knows none of them by name.

* ``auto`` (the default) takes the first backend in the device's order that can run the call, warns once for each reason it had to pass one over, and says so in `explain`.
* ``use("triton")`` or the environment variable ``FASTADAPT_BACKEND`` is a demand: a call that the backend cannot take raises `BackendError` with the reasons.
* `ran` counts the kernels that really ran.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

NAMES = ("auto", "reference", "cpu", "triton")
AUTO = 0

# The order in which ``auto`` tries the backends of a device type; anything else runs on ``reference``.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


class BackendError(RuntimeError):
    """A backend was demanded that cannot run the call."""


class Call(NamedTuple):
    """What the choice of a backend may depend on: shapes, dtypes, device type and options; never values."""

    op: str
    device: str
    dtype: torch.dtype
    param_dtype: torch.dtype
    rows: int
    width: int
    rank: int
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        """The value of an option of the op, such as the granularity of a gate."""
        return dict(self.options).get(name, default)


class Plan(Protocol):
    """What an op tells this module about its backends."""

    def reasons(self, backend: str, call: Call) -> list[str]:
        """Why ``backend`` cannot run ``call``; an empty list means that it can."""

    def kernels(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The forward and backward launchers of ``backend``."""


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`: the backend chosen for a call and why each one before it was passed over."""

    call: Call
    chosen: str
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        c = self.call
        lines = [f"{c.op}: rows={c.rows} width={c.width} rank={c.rank} {c.dtype} (parameters {c.param_dtype}) on {c.device}: {self.chosen}"]
        lines += [f"  {name}: {'; '.join(why) if why else 'can run it'}" for name, why in self.reasons.items()]
        return "\n".join(lines)


_plans: dict[str, Plan] = {}
_ran: Counter[tuple[str, str, str]] = Counter()
_warned: set[str] = set()
_lock = threading.Lock()


def index(name: str) -> int:
    """The number under which a backend travels through op schemas."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: must be one of {', '.join(NAMES)}")
    return NAMES.index(name)


_default = index(os.environ.get("FASTADAPT_BACKEND", "auto"))
_demand: ContextVar[int] = ContextVar("fastadapt_backend", default=_default)
# What torch.compile reads: it cannot trace a ContextVar, and it guards on a module global, so a compiled function is compiled again when the demand changes. A `use` in one
# thread is therefore seen by a compilation that runs in another at the same time.
_traced_demand = _default


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Demand a backend for every call inside the ``with`` block (of this thread or task).

    The backend that forward ran under is also the one that its backward runs under, wherever and whenever backward runs.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, or ``"auto"`` to lift an outer demand.

    Raises:
        ValueError: the name is unknown.
        BackendError: (at the call) the backend cannot run it.
    """
    global _traced_demand
    number = index(name)
    before, token = _traced_demand, _demand.set(number)
    _traced_demand = number
    try:
        yield
    finally:
        _demand.reset(token)
        _traced_demand = before


def demand() -> int:
    """The backend number that `use` or ``FASTADAPT_BACKEND`` demands; 0 is ``auto``."""
    return _traced_demand if torch.compiler.is_compiling() else _demand.get()


def register(op: str, plan: Plan) -> None:
    """Tells this module how the backends of an op are chosen and found."""
    _plans[op] = plan


def explain(
    op: str,
    *,
    rows: int,
    width: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    param_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Explanation:
    """Which backend would run a call under the present demand, and why the others would not.

    >>> print(fastadapt.backend.explain("bottleneck", rows=4096, width=768, rank=96))  # doctest: +SKIP
    """
    if op not in _plans:
        raise ValueError(f"unknown op {op!r}: must be one of {', '.join(sorted(_plans))}")
    call = Call(op, torch.device(device).type, dtype, param_dtype or dtype, rows, width, rank, tuple(sorted(options.items())))
    return _explain(call, demand())


@functools.lru_cache(maxsize=4096)
def _explain(call: Call, demanded: int) -> Explanation:
    plan = _plans[call.op]
    names = (NAMES[demanded],) if demanded != AUTO else _ORDER.get(call.device, ("reference",))
    reasons: dict[str, list[str]] = {}
    for name in names:
        reasons[name] = plan.reasons(name, call)
        if not reasons[name]:
            return Explanation(call, name, reasons)
    why = "; ".join(reasons[names[-1]])
    raise BackendError(f"backend {names[-1]!r} was demanded but cannot run {call.op} with {call.dtype}, width {call.width}, rank {call.rank} on {call.device}: {why}")


def choose(call: Call, demanded: int = AUTO) -> str:
    """The backend that runs ``call``. Under ``auto`` warns once per reason for which a faster backend was passed over."""
    explanation = _explain(call, demanded)
    for name, why in explanation.reasons.items():
        if why and (text := f"fastadapt: {call.op} runs on {explanation.chosen!r} instead of {name!r}: {'; '.join(why)}") not in _warned:
            _warned.add(text)
            warnings.warn(text, stacklevel=2)
    return explanation.chosen


@functools.cache
def kernels(op: str, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward launchers of a backend of an op."""
    return _plans[op].kernels(backend)


def count(op: str, direction: str, backend: str) -> None:
    """Notes that a kernel runs; `ran` reads the counts."""
    with _lock:
        _ran[op, direction, backend] += 1


def ran(*, reset: bool = False) -> dict[tuple[str, str, str], int]:
    """How often each ``(op, "forward" | "backward", backend)`` ran in this process since the start or the last reset."""
    with _lock:
        counts = dict(_ran)
        if reset:
            _ran.clear()
    return counts
