"""Which backend runs a call, and why.

A *backend* is one implementation of an op: ``reference`` (plain torch, any device and dtype), ``cpu`` (C++), ``cuda`` (CUDA C++) and ``triton`` (both for CUDA devices of compute
capability 8.0 and newer). Ops register a `Plan` here; this module knows none of them by name.

* ``auto`` (the default) takes the first backend in the device's order that can run the call, warns once for each reason it had to pass one over, and says so in `explain`. On a
  CUDA device a later one is taken where it is modelled to be clearly faster, forward and backward together: a function of the call and the device's architecture alone, and of a
  calibration where ``make gpu-check`` has written one.
* ``use("triton")`` or the environment variable ``FASTADAPT_BACKEND`` is a demand: a call that the backend cannot take raises `BackendError` with the reasons.
* `ran` counts the kernels that really ran; not the plain torch of `reference` under ``torch.func`` transforms and forward-mode differentiation, where nothing else runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

# A backend's place is its number in op schemas, and so in exported programs: names are only ever added at the end. "emulated-cuda" is for tests: the kernels of "cuda" on the CPU.
NAMES = ("auto", "reference", "cpu", "triton", "cuda", "emulated-cuda")
AUTO = 0

# The order in which ``auto`` prefers the backends of a device type; anything else runs on ``reference``.
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# How many times faster than an earlier backend of the order a later one must be to be taken. Modelled times are no better than that, while what the order is by, memory kept and
# moved, is sure; calibrated times are better.
MARGIN, MARGIN_CALIBRATED = 1.25, 1.05

# Short names of dtypes, as the command line has them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# Compute capabilities that NVIDIA's devices have. Those below 8.0 have no kernels, and a name that is none of these is a mistake.
ARCHITECTURES = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)


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
    arch: int = 0  # compute capability of a CUDA device, 90 for 9.0; 0: not CUDA, or not known

    def option(self, name: str, default: Any = None) -> Any:
        """The value of an option of the op, such as the granularity of a gate."""
        return dict(self.options).get(name, default)


class Direction(Protocol):
    """Forward or backward of an `Estimate`."""

    @property
    def microseconds(self) -> float:
        """Predicted time."""


class Estimate(Protocol):
    """The predicted time of a call on one backend; str() says what it is made of."""

    @property
    def forward(self) -> Direction:
        """Forward alone."""

    @property
    def backward(self) -> Direction:
        """Backward alone."""

    @property
    def microseconds(self) -> float:
        """Forward and backward together."""

    @property
    def device(self) -> str:
        """The device that stands for the architecture."""

    @property
    def basis(self) -> str:
        """Where the times come from: "modelled", or "calibrated on <device>, <date>"."""


class Plan(Protocol):
    """What an op tells this module about its backends."""

    def reasons(self, backend: str, call: Call) -> list[str]:
        """Why ``backend`` cannot run ``call`` here and now; an empty list means that it can."""

    def limits(self, backend: str, call: Call) -> list[str]:
        """Those of the reasons that hold on every machine with a device of the call's architecture."""

    def estimate(self, backend: str, call: Call) -> Estimate | None:
        """The predicted time of the call, or None where there is no model of its device."""

    def kernels(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The forward and backward launchers of ``backend``."""


@dataclass(frozen=True)
class Explanation:
    """The answer of `explain`.

    Attributes:
        call: the call.
        chosen: the backend that runs it.
        reasons: by backend considered, why it cannot run the call; empty where it can.
        estimates: by backend that can, its predicted time, on CUDA devices of a known architecture.
        here: for an architecture that was named, by backend, what this machine lacks to run it. It has no part in the choice.
        passed_over: what ``auto`` warns of.
    """

    call: Call
    chosen: str
    reasons: dict[str, list[str]] = field(default_factory=dict)
    estimates: dict[str, Estimate] = field(default_factory=dict)
    here: dict[str, list[str]] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()

    @property
    def basis(self) -> str:
        """Where the predicted times come from, or nothing where there are none."""
        if self.chosen not in self.estimates:
            return f"no times: sm_{self.call.arch} has no model" if self.call.arch else ""
        known = self.estimates[self.chosen]
        calibrated = sorted({e.basis for e in self.estimates.values()} - {"modelled"})
        if not calibrated:
            return f"times modelled for {known.device}, which stands for sm_{self.call.arch}, not measured"
        return f"times {', '.join(calibrated)}; modelled for {known.device} where a backend has no calibration"

    def __str__(self) -> str:
        c = self.call
        where = f"sm_{c.arch}" if c.arch else c.device
        lines = [f"{c.op}: rows={c.rows} width={c.width} rank={c.rank} {c.dtype} (parameters {c.param_dtype}) on {where}: {self.chosen}"]
        for name, why in self.reasons.items():
            estimate = f", {self.estimates[name]}" if name in self.estimates else ""
            lines.append(f"  {name}: {'; '.join(why) if why else 'can run it'}{estimate}")
        lines += [f"  {self.basis}"] if self.basis else []
        lines += [f"  on this machine: {name}: {'; '.join(why)}" for name, why in self.here.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """The explanation in plain types, for JSON."""
        c = self.call
        return {
            "call": {**c._asdict(), "dtype": str(c.dtype), "param_dtype": str(c.param_dtype), "options": dict(c.options)},
            "chosen": self.chosen,
            "basis": self.basis,
            "backends": {
                name: {
                    "runs": not why,
                    "reasons": why,
                    **({"on_this_machine": self.here[name]} if name in self.here else {}),
                    **({"estimate": asdict(self.estimates[name])} if name in self.estimates else {}),  # type: ignore[call-overload]
                }
                for name, why in self.reasons.items()
            },
        }


_plans: dict[str, Plan] = {}
_doors: dict[str, Callable[[Call], None]] = {}
_ran: Counter[tuple[str, str, str]] = Counter()
_counters: list[Callable[[bool], dict[tuple[str, str, str], int]]] = []
_warned: set[str] = set()
_lock = threading.Lock()


def index(name: str) -> int:
    """The number under which a backend travels through op schemas."""
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}: must be one of {', '.join(NAMES[:-1])}")  # without that of the tests
    return NAMES.index(name)


def _demanded_by_environment() -> int:
    try:
        return index(os.environ.get("FASTADAPT_BACKEND") or "auto")
    except ValueError as error:
        raise ValueError(f"environment variable FASTADAPT_BACKEND: {error}") from None


_default = _demanded_by_environment()
_demand: ContextVar[int] = ContextVar("fastadapt_backend", default=_default)
# What torch.compile reads: it cannot trace a ContextVar, and it guards on a module global, so a compiled function is compiled again when the demand changes. A `use` in one
# thread is therefore seen by a compilation that runs in another at the same time: it is that of the last block entered that is not left yet.
_traced_demand = _default
_inside: list[tuple[object, int]] = []


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Demand a backend for every call inside the ``with`` block (of this thread or task).

    The backend that forward ran under is also the one that its backward runs under, wherever and whenever backward runs.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, or ``"auto"`` to lift an outer demand.

    Raises:
        ValueError: the name is unknown.
        BackendError: (at the call) the backend cannot run it.
    """
    global _traced_demand
    number = index(name)
    token = _demand.set(number)
    _inside.append((token, number))
    _traced_demand = number
    try:
        yield
    finally:
        _demand.reset(token)
        _inside.remove((token, number))
        _traced_demand = _inside[-1][1] if _inside else _default


def demand() -> int:
    """The backend number that `use` or ``FASTADAPT_BACKEND`` demands; 0 is ``auto``."""
    return _traced_demand if torch.compiler.is_compiling() else _demand.get()


def register(op: str, plan: Plan) -> None:
    """Tells this module how the backends of an op are chosen and found."""
    _plans[op] = plan


def register_door(op: str, door: Callable[[Call], None]) -> None:
    """Tells `explain` what raises for a call that no arguments of an op's function make: of other options, or of sizes that the function refuses."""
    _doors[op] = door


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """The compute capability of a CUDA device, 90 for 9.0; 0 for any other device, and where torch sees none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def named_architecture(name: object) -> int:
    """The compute capability that a name such as ``"sm_90"`` or ``"sm_90a"`` stands for; 0 where it is no such name.

    Raises:
        ValueError: no device has it.
    """
    named = re.fullmatch(r"sm_?(\d+)[af]?", str(name))
    if named and int(named[1]) not in ARCHITECTURES:
        raise ValueError(f"device: unknown architecture {str(name)!r}: must be one of {', '.join(f'sm_{arch}' for arch in ARCHITECTURES)}")
    return int(named[1]) if named else 0


def explain(
    op: str,
    *,
    rows: int,
    width: int,
    rank: int = 0,
    dtype: torch.dtype | str = torch.float32,
    param_dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Explanation:
    """Which backend would run a call under the present demand, why the others would not, and on a CUDA device what each is predicted to take.

    Args:
        op: an op of `fastadapt.functional`; a call of `multimodal_bottleneck` is one of "bottleneck".
        rows: T, all leading dimensions together.
        width: D.
        rank: R; 0 of an op without one.
        dtype: of the activations; also "fp32", "bf16", "fp16" or "fp64", as on the command line.
        param_dtype: of the parameters, by default that of the activations.
        device: a torch device, or an architecture such as ``"sm_90"``, which need not be here: the answer is then of any machine that has it, with what this one lacks beside it.
        options: of the op, such as ``granularity="large", gate_rank=96``.

    Raises:
        TypeError: the op has no such option, or a dtype is none.
        ValueError: the op, the device or the architecture is unknown, or the op takes no such sizes or values of its options.
        BackendError: the demanded backend cannot run the call.

    >>> print(fastadapt.backend.explain("bottleneck", rows=4096, width=768, rank=96, dtype=torch.bfloat16, device="sm_90"))  # doctest: +SKIP
    """
    if op not in _plans:
        raise ValueError(f"unknown op {op!r}: must be one of {', '.join(sorted(_plans))}")
    for name, value, least in (("rows", rows, 0), ("width", width, 1), ("rank", rank, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: must be a whole number from {least} on, not {value!r}")
    dtype = _dtype("dtype", dtype)
    param_dtype = dtype if param_dtype is None else _dtype("param_dtype", param_dtype)
    named = named_architecture(device)
    try:
        where = torch.device("cuda" if named else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: must be a torch device or an architecture such as 'sm_90', not {device!r}") from None
    call = Call(op, where.type, dtype, param_dtype, rows, width, rank, tuple(sorted(options.items())), named or architecture(where))
    if op in _doors:
        _doors[op](call)
    return _explain(call, demand(), bool(named))


def _dtype(name: str, dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TypeError(f"{name}: must be a floating-point torch.dtype or one of {', '.join(DTYPES)}, not {dtype!r}")
    return found


def _explain(call: Call, demanded: int, named: bool = False) -> Explanation:
    """``named``: of the architecture, wherever it is, and not of this machine."""
    plan = _plans[call.op]
    names = (NAMES[demanded],) if demanded != AUTO else _ORDER.get(call.device, ("reference",))
    named = named and set(names) <= set(_ORDER["cuda"])
    reasons: dict[str, list[str]] = {}
    able: list[str] = []
    for name in names:
        reasons[name] = plan.limits(name, call) if named else plan.reasons(name, call)
        able += [] if reasons[name] else [name]
        if able and not call.arch:  # nothing to weigh it against
            break
    if not able:
        why = "; ".join(reasons[names[-1]])
        raise BackendError(f"backend {names[-1]!r} was demanded but cannot run {call.op} with {call.dtype}, width {call.width}, rank {call.rank} on {_where(call, named)}: {why}")
    estimates = {name: estimate for name in able if call.arch and (estimate := plan.estimate(name, call)) is not None}
    chosen = _prefer(able, estimates)
    passed_over = tuple(
        f"fastadapt: {call.op} runs on {chosen!r} instead of {name!r}: {'; '.join(why)}" for name, why in reasons.items() if why and names.index(name) < names.index(chosen)
    )
    here = {name: lacks for name in able if named and (lacks := plan.reasons(name, call))}
    return Explanation(call, chosen, reasons, estimates, here, passed_over)


def _where(call: Call, named: bool) -> str:
    return f"sm_{call.arch}" if named else call.device


def _prefer(able: list[str], estimates: dict[str, Estimate]) -> str:
    """The first of the backends than which no later one is clearly faster; the first where times are not known."""
    if len(estimates) < len(able):
        return able[0]

    def clearly_faster(a: Estimate, b: Estimate) -> bool:
        margin = MARGIN if "modelled" in (a.basis, b.basis) else MARGIN_CALIBRATED
        return a.microseconds * margin < b.microseconds

    return next(name for i, name in enumerate(able) if not any(clearly_faster(estimates[other], estimates[name]) for other in able[i + 1 :]))


def choose(call: Call, demanded: int = AUTO) -> str:
    """The backend that runs ``call``, forward and backward alike. Under ``auto`` warns once per reason for which a preferred backend was passed over."""
    chosen, passed_over = _choice(call, demanded)
    for text in passed_over:
        if text not in _warned:
            _warned.add(text)
            warnings.warn(text, stacklevel=2)
    return chosen


@functools.lru_cache(maxsize=16384)
def _choice(call: Call, demanded: int) -> tuple[str, tuple[str, ...]]:
    """What is kept of an explanation, which takes about a millisecond and ten kilobytes: batches of many lengths are as many calls."""
    explanation = _explain(call, demanded)
    return explanation.chosen, explanation.passed_over


@functools.cache
def kernels(op: str, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and backward launchers of a backend of an op."""
    return _plans[op].kernels(backend)


def count(op: str, direction: str, backend: str) -> None:
    """Notes that a kernel runs; `ran` reads the counts."""
    with _lock:
        _ran[op, direction, backend] += 1


def count_too(counter: Callable[[bool], dict[tuple[str, str, str], int]]) -> None:
    """Adds what compiled code counts by itself to `ran`; ``counter(reset)`` tells it."""
    if counter not in _counters:
        _counters.append(counter)


def ran(*, reset: bool = False) -> dict[tuple[str, str, str], int]:
    """How often each ``(op, "forward" | "backward", backend)`` ran in this process since the start or the last reset."""
    with _lock:
        counts = +sum((Counter(counter(reset)) for counter in _counters), _ran)  # without zeros
        if reset:
            _ran.clear()
    return dict(counts)
