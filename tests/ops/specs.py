"""Descriptions of single calls of the ops, from which tests draw the arguments."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ACTIVATIONS = ("gelu_new", "gelu", "relu", "silu", "identity")
GRANULARITIES = ("large", "large_full", "middleX", "middleY", "small")
# (activations, parameters): every dtype by itself, and float32 parameters over half-precision activations, which is how people train.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32))
FP32, BF16, MIXED = DTYPES[0], DTYPES[1], DTYPES[2]
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Spec:
    """One call: leading dimensions, width, rank, dtypes and options."""

    lead: tuple[int, ...] = (65,)
    width: int = 48
    rank: int = 12
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    activation: str = "gelu_new"
    biases: str = "both"
    heads: int = 1

    op = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensor arguments of a call, activations first."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        raise NotImplementedError

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        return getattr(ops, self.op)(**tensors, **self.options())

    @property
    def activations(self) -> tuple[str, ...]:
        return tuple(n for n in self.shapes() if n in ("x", "h", "y", "residual"))

    @property
    def out_width(self) -> int:
        return self.width

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype if name in self.activations else self.param_dtype or self.dtype

    def runs_backward(self, needs: tuple[str, ...]) -> bool:
        """Whether the gradients of these arguments take a kernel: that of what is only added is dy."""
        return bool(set(needs) - {"residual", "y"})

    def draw(self, seed: int, device: str = "cpu") -> dict[str, Tensor]:
        """Arguments of the size that training has: unit activations, projections that keep variance, vectors of N(0, 0.3)."""
        g = torch.Generator().manual_seed(1000 + seed)
        out = {}
        for name, shape in self.shapes().items():
            t = torch.randn(shape, generator=g)
            if name not in self.activations:
                t = t * self._std(name, shape) + (1.0 if name in ("scale", "weight", "norm_before.weight", "norm_after.weight", "norm_cross.weight") else 0.0)
            out[name] = t.to(device, self.dtype_of(name))
        return out

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        return 1 / max(shape[-1], 1) ** 0.5 if len(shape) == 2 else 0.3

    def cotangent(self, seed: int, device: str = "cpu") -> Tensor:
        return torch.randn((*self.lead, self.out_width), generator=torch.Generator().manual_seed(2000 + seed)).to(device, self.out_dtype)

    def __str__(self) -> str:
        default = type(self)()
        changed = [f"{f.name}={_text(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)]
        return ",".join(changed) or "default"

    def _projections(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"w_down": (self.rank, self.width), "w_up": (self.width, self.rank // self.heads)}
        if self.biases in ("both", "down"):
            shapes["b_down"] = (self.rank,)
        if self.biases in ("both", "up"):
            shapes["b_up"] = (self.width,)
        return shapes


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return _SHORT[value] if isinstance(value, torch.dtype) else str(value)


@dataclass(frozen=True)
class Bottleneck(Spec):
    residual: str | None = "input"
    scale: float | str = 1.0
    gate: bool = False
    norm_before: bool = False
    norm_after: bool = False

    op = "bottleneck"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        x = (*self.lead, self.width)
        shapes = {"x": x, **({"residual": x} if self.residual == "other" else {}), **self._projections()}
        if self.scale == "tensor":
            shapes["scale"] = (1,)
        if self.gate:
            shapes["gate"] = (self.width,)
        for name in ("norm_before", "norm_after"):
            if getattr(self, name):
                shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (self.width,)
        return shapes

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"activation": self.activation, "heads": self.heads}
        if self.residual != "other":
            options["residual"] = self.residual
        if self.scale != "tensor":
            options["scale"] = self.scale
        return options

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        norms = {n: (tensors[f"{n}.weight"], tensors[f"{n}.bias"], 1e-5) for n in ("norm_before", "norm_after") if getattr(self, n)}
        return ops.bottleneck(**{k: v for k, v in tensors.items() if "." not in k}, **norms, **self.options())

    @staticmethod
    def random(rng: random.Random) -> Bottleneck:
        heads = rng.choice((1, 1, 1, 2, 4))
        dtype, param_dtype = rng.choice(DTYPES)
        return Bottleneck(
            lead=_random_lead(rng),
            width=heads * rng.randint(1, 96 // heads),
            rank=heads * rng.randint(1, 40 // heads),
            dtype=dtype,
            param_dtype=param_dtype,
            activation=rng.choice(ACTIVATIONS),
            biases=rng.choice(("both", "both", "none", "down", "up")),
            heads=heads,
            residual=rng.choice(("input", "other", None)),
            scale=rng.choice((1.0, 0.3, -2.0, "tensor")),
            gate=rng.random() < 0.4,
        )


@dataclass(frozen=True)
class Gated(Spec):
    lead: tuple[int, ...] = (5, 13)
    granularity: str = "large"
    gate_rank: int = 6
    gate_bias: bool = True
    combine: str = "multiply"
    input_scale: float = 1.0
    adapter_scale: float = 1.0
    scale: float = 1.0
    save_gate: bool | None = None

    op = "gated_bottleneck"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        x, d = (*self.lead, self.width), self.width
        shapes = {"h": x, **({} if self.granularity == "middleY" else {"x": x}), **self._projections()}
        gates: dict[str, tuple[int, ...]] = {
            "large": {"gate_weight": (self.gate_rank, d), "gate_bias": (self.gate_rank,), "gate_up_weight": (d, self.gate_rank), "gate_up_bias": (d,)},
            "large_full": {"gate_weight": (d, d), "gate_bias": (d,)},
            "middleX": {"gate_weight": (d,), "gate_bias": (1,)},
            "middleY": {"gate_weight": (d,)},
            "small": {"gate_weight": (2 * d,), "gate_bias": (1,)},
        }[self.granularity]
        return {**shapes, **{k: v for k, v in gates.items() if self.gate_bias or "bias" not in k}}

    def options(self) -> dict[str, Any]:
        names = ("granularity", "combine", "activation", "heads", "input_scale", "adapter_scale", "scale", "save_gate")
        return {**{n: getattr(self, n) for n in names}, **({"x": None} if self.granularity == "middleY" else {})}

    @staticmethod
    def random(rng: random.Random) -> Gated:
        heads = rng.choice((1, 1, 1, 2, 4))
        dtype, param_dtype = rng.choice(DTYPES)
        granularity = rng.choice(GRANULARITIES)
        return Gated(
            lead=(rng.randint(1, 5), rng.randint(1, 16)) if granularity == "small" else _random_lead(rng),
            width=heads * rng.randint(1, 96 // heads),
            rank=heads * rng.randint(1, 40 // heads),
            dtype=dtype,
            param_dtype=param_dtype,
            activation=rng.choice(ACTIVATIONS),
            biases=rng.choice(("both", "both", "none", "down", "up")),
            heads=heads,
            granularity=granularity,
            gate_rank=rng.randint(1, 40),
            gate_bias=rng.random() < 0.7,
            combine=rng.choice(("multiply", "add")),
            input_scale=rng.choice((1.0, 0.25)),
            adapter_scale=rng.choice((1.0, 0.5)),
            scale=rng.choice((1.0, 0.3)),
            save_gate=rng.choice((None, True, False)),
        )


@dataclass(frozen=True)
class PHM(Spec):
    division: int = 4
    factor_rank: int = 1
    residual: str | None = "input"
    scale: float = 1.0
    norm_before: bool = False
    norm_after: bool = False

    op = "phm_bottleneck"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        n, k, x = self.division, self.factor_rank, (*self.lead, self.width)
        down, up = ((n, self.width // n, k), (n, k, self.rank // n)), ((n, self.rank // n, k), (n, k, self.width // n))
        shapes: dict[str, tuple[int, ...]] = {"x": x, **({"residual": x} if self.residual == "other" else {})}
        for side, (left, right) in (("down", down), ("up", up)):
            shapes |= {f"rule_{side}": (n, n, n), f"left_{side}": left, f"right_{side}": right}
        shapes |= {name: shape for name, shape in self._projections().items() if name.startswith("b_")}
        for name in ("norm_before", "norm_after"):
            if getattr(self, name):
                shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (self.width,)
        return shapes

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        """The sum of n k products has the variance of a Linear that keeps its input's."""
        n, *others = shape
        by_side = {"rule": n, "left": n * others[0], "right": others[0]} if others else {}
        return by_side[name.split("_")[0]] ** -0.5 if others else 0.3

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"activation": self.activation, "scale": self.scale}
        return options if self.residual == "other" else {**options, "residual": self.residual}

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        norms = {n: (tensors[f"{n}.weight"], tensors[f"{n}.bias"], 1e-5) for n in ("norm_before", "norm_after") if getattr(self, n)}
        return ops.phm_bottleneck(**{k: v for k, v in tensors.items() if "." not in k}, **norms, **self.options())

    @staticmethod
    def random(rng: random.Random) -> PHM:
        division = rng.choice((1, 2, 3, 4, 4, 4, 8))
        dtype, param_dtype = rng.choice(DTYPES)
        return PHM(
            lead=_random_lead(rng),
            width=division * rng.randint(1, 96 // division),
            rank=division * rng.randint(1, 40 // division),
            dtype=dtype,
            param_dtype=param_dtype,
            activation=rng.choice(ACTIVATIONS),
            biases=rng.choice(("both", "both", "none", "down", "up")),
            division=division,
            factor_rank=rng.choice((1, 1, 1, 2, 3)),
            residual=rng.choice(("input", "other", None)),
            scale=rng.choice((1.0, 0.3, -2.0)),
        )


@dataclass(frozen=True)
class Routed(Spec):
    lead: tuple[int, ...] = (5, 13)
    tasks: int = 3
    ids: str = "sample"
    """Whether an id is one of the first dimension's ("sample") or of each row ("row")."""
    outside: bool = False
    """Some rows are of no task, and the last task has no rows."""
    shared: str = ""
    """What all tasks share: "down" (with its bias), "up" or nothing."""
    residual: str | None = "input"
    scale: float = 1.0

    op = "routed_bottleneck"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        x = (*self.lead, self.width)
        shapes = {"x": x, **({"residual": x} if self.residual == "other" else {})}
        for name, shape in self._projections().items():
            shapes[name] = (1 if self.shared and name.endswith(self.shared) else self.tasks, *shape)
        return shapes

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        return super()._std(name, shape[1:])

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"activation": self.activation, "scale": self.scale}
        return options if self.residual == "other" else {**options, "residual": self.residual}

    def task_ids(self, device: str | torch.device = "cpu") -> Tensor:
        g = torch.Generator().manual_seed(3000)
        low, high = (-1, max(self.tasks - 1, 1)) if self.outside else (0, self.tasks)
        count = self.lead[0] if self.ids == "sample" else math.prod(self.lead)
        return torch.randint(low, high, (count,), generator=g).to(device)

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        return ops.routed_bottleneck(task_ids=self.task_ids(tensors["x"].device), **tensors, **self.options())

    @staticmethod
    def random(rng: random.Random) -> Routed:
        dtype, param_dtype = rng.choice(DTYPES)
        return Routed(
            lead=_random_lead(rng),
            width=rng.randint(1, 96),
            rank=rng.randint(1, 40),
            dtype=dtype,
            param_dtype=param_dtype,
            activation=rng.choice(ACTIVATIONS),
            biases=rng.choice(("both", "both", "none", "down", "up")),
            tasks=rng.choice((1, 2, 3, 4, 7)),
            ids=rng.choice(("sample", "row")),
            outside=rng.random() < 0.3,
            shared=rng.choice(("", "", "down", "up")),
            residual=rng.choice(("input", "other", None)),
            scale=rng.choice((1.0, 0.3, -2.0)),
        )


@dataclass(frozen=True)
class Lora(Spec):
    biases: str = "none"
    out: int = 40
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0x123456789ABCDEF0

    op = "lora"

    @property
    def out_width(self) -> int:
        return self.out

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"x": (*self.lead, self.width), "y": (*self.lead, self.out), "w_down": (self.rank, self.width), "w_up": (self.out, self.rank)}
        return {**shapes, "b_up": (self.out,)} if self.biases == "up" else shapes

    def options(self) -> dict[str, Any]:
        return {"scale": self.scale, "dropout": self.dropout}

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        seed = seed_of(self, tensors["x"].device)
        return getattr(ops, self.op)(**tensors, **self.options(), seed=seed)

    @staticmethod
    def random(rng: random.Random) -> Lora:
        dtype, param_dtype = rng.choice(DTYPES)
        return Lora(
            lead=_random_lead(rng),
            width=rng.randint(1, 96),
            rank=rng.randint(1, 40),
            dtype=dtype,
            param_dtype=param_dtype,
            biases=rng.choice(("none", "none", "up")),
            out=rng.randint(1, 96),
            scale=rng.choice((1.0, 0.25, -2.0)),
            dropout=rng.choice((0.0, 0.0, 0.1, 0.5)),
            seed=rng.randint(-(2**63), 2**63 - 1),
        )


@dataclass(frozen=True)
class Multimodal(Spec):
    """A `multimodal_bottleneck`, which runs the op ``bottleneck``."""

    activation: str = "relu"
    cross: bool = True
    residual: str | None = "input"
    scale: float | str = 0.1
    norm_before: bool = False
    norm_cross: bool = False

    op = "bottleneck"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        x = (*self.lead, self.width)
        shapes = {"x": x, **({"residual": x} if self.residual == "other" else {}), **self._projections()}
        if self.cross:
            shapes |= {name.replace("up", "cross"): shape for name, shape in shapes.items() if name in ("w_up", "b_up")}
        if self.scale == "tensor":
            shapes["scale"] = (1,)
        for name in ("norm_before", "norm_cross"):
            if getattr(self, name):
                shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (self.width,)
        return shapes

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"activation": self.activation}
        if self.residual != "other":
            options["residual"] = self.residual
        if self.scale != "tensor":
            options["scale"] = self.scale
        return options

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        norms = {n: (tensors[f"{n}.weight"], tensors[f"{n}.bias"], 1e-5) for n in ("norm_before", "norm_cross") if getattr(self, n)}
        return ops.multimodal_bottleneck(**{k: v for k, v in tensors.items() if "." not in k}, **norms, **self.options())

    @staticmethod
    def random(rng: random.Random) -> Multimodal:
        dtype, param_dtype = rng.choice(DTYPES)
        cross = rng.random() < 0.7
        return Multimodal(
            lead=_random_lead(rng),
            width=rng.randint(16, 96),  # the norm of a few numbers is their signs: its gradient is all rounding
            rank=rng.randint(4, 40),
            dtype=dtype,
            param_dtype=param_dtype,
            activation=rng.choice(("relu", "relu", "gelu")),
            biases=rng.choice(("both", "both", "none", "down", "up")),
            cross=cross,
            residual=rng.choice(("input", "other", None)),
            scale=rng.choice((1.0, 0.1, "tensor")),
            norm_before=rng.random() < 0.5,
            norm_cross=cross and rng.random() < 0.7,
        )


@dataclass(frozen=True)
class Norm(Spec):
    rank: int = 0
    residual: str | None = "same"
    """Of x's dtype, "wide", in float32, or none."""
    biases: str = "both"
    """Weight and bias, "weight" alone, or "none"."""
    norm: str | None = "layer"
    eps: float = 1e-5
    dropout: float = 0.0
    returns: str = "y"
    """y, the "sum" v, or "both", one beside the other."""
    seed: int = 0x123456789ABCDEF0

    op = "dropout_add_norm"

    @property
    def out_width(self) -> int:
        return self.width * (2 if self.returns == "both" else 1)

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "wide" and self.dtype.itemsize == 2 else self.dtype

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype if name == "x" else self.out_dtype if name == "residual" else self.param_dtype or self.out_dtype

    def runs_backward(self, needs: tuple[str, ...]) -> bool:
        """Without a norm's gradient in it the sum's is that of the residual, and of x too where nothing is dropped or rounded."""
        if self.norm and self.returns != "sum":
            return bool(needs)
        return "x" in needs and (self.dropout > 0 or self.out_dtype != self.dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        x, vector = (*self.lead, self.width), (self.width,)
        shapes = {"x": x, **({"residual": x} if self.residual else {})}
        return {**shapes, **({"weight": vector} if self.biases != "none" else {}), **({"bias": vector} if self.biases == "both" else {})}

    def options(self) -> dict[str, Any]:
        return {"norm": self.norm, "eps": self.eps, "dropout": self.dropout, "return_sum": self.returns != "y"}

    def call(self, ops: ModuleType, tensors: Mapping[str, Tensor]) -> Tensor:
        seed = seed_of(self, tensors["x"].device)
        out = ops.dropout_add_norm(**tensors, **self.options(), seed=seed)
        return out if self.returns == "y" else out[1] if self.returns == "sum" else torch.cat(out, -1)

    @staticmethod
    def random(rng: random.Random) -> Norm:
        dtype, _ = rng.choice(DTYPES)
        residual = rng.choice(("same", "same", "wide", None))
        norm = rng.choice(("layer", "layer", "rms", "rms", None))
        dropout = rng.choice((0.0, 0.1, 0.5) if norm or residual else (0.1, 0.5))
        return Norm(
            lead=_random_lead(rng),
            width=rng.randint(1, 200),
            dtype=dtype,
            param_dtype=rng.choice((None, torch.float32)),
            residual=residual,
            biases=rng.choice(("both", "both", "weight", "none")) if norm else "none",
            norm=norm,
            eps=rng.choice((1e-5, 1e-6, 0.1)),
            dropout=dropout,
            returns=rng.choice(("y", "both")),
            seed=rng.randint(-(2**63), 2**63 - 1),
        )


def seed_of(spec: Lora | Norm, device: torch.device) -> Tensor | None:
    """Written by the device: a copy from the host may not be in a CUDA graph, and waits for the stream, behind which a kernel on a wrong stream would find everything in place."""
    return torch.full((1,), spec.seed, dtype=torch.int64, device=device) if spec.dropout else None


def _random_lead(rng: random.Random) -> tuple[int, ...]:
    return rng.choice(((rng.randint(1, 80),), (rng.randint(1, 5), rng.randint(1, 16)), (2, 2, rng.randint(1, 9))))


def random_specs(kind: type[Bottleneck] | type[Gated] | type[PHM] | type[Routed] | type[Lora] | type[Norm] | type[Multimodal], count: int, seed: int = 20) -> list[Spec]:
    rng = random.Random(seed)
    return [kind.random(rng) for _ in range(count)]


def specs(values: list[Spec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", values, ids=str)
