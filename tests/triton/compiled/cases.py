"""The calls whose kernels are compiled: every kernel, every tile table, all options on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastadapt.ops._library import ACTIVATIONS
from fastadapt.ops.bottleneck import triton as bottleneck
from fastadapt.ops.dropout_add_norm import triton as dropout_add_norm
from fastadapt.ops.dropout_add_norm.schema import NORMS
from fastadapt.ops.gated_bottleneck import triton as gated_bottleneck
from fastadapt.ops.gated_bottleneck.reference import KINDS
from fastadapt.ops.lora import triton as lora
from fastadapt.ops.phm_bottleneck import triton as phm_bottleneck
from fastadapt.ops.routed_bottleneck import triton as routed_bottleneck
from tests.triton.compiled.aot import Launch, recorded


class Case(NamedTuple):
    """One call of an op; ``kind`` is None for the plain bottleneck, "routed" for samples of several tasks, "shared" where these share Wd and bd, "phm" for Compacter's, which
    alone has a division, a factor rank and numbers of gradients that nobody asks for, and "lora" for LoRA's, with a width of the output and, where ``dropout``, a mask on x.
    "layer", "rms" and "none" are `dropout_add_norm`'s, with a float32 residual where ``wide``, and weight, bias and a gradient of v where ``options``.
    ``gate_rank``: of large, where it is another than ``rank``. Widths that 64 does not divide need masks; 4096 rows are many tiles and several splits. ``published``: of the
    options the biases alone, and no second residual."""

    kind: str | None
    rank: int
    dtype: torch.dtype
    param_dtype: torch.dtype
    width: int = 768
    rows: int = 4096
    activation: str = "gelu_new"
    add: bool = False
    options: bool = True
    save_gate: bool = False
    division: int = 4
    factor_rank: int = 1
    frozen: tuple[int, ...] = ()
    tasks: int = 4
    out: int = 1024
    dropout: bool = True
    wide: bool = False
    published: bool = False
    gate_rank: int = 0

    @property
    def extra(self) -> bool:
        return self.options and not self.published

    @property
    def op(self) -> str:
        known = {None: "bottleneck", "phm": "phm_bottleneck", "routed": "routed_bottleneck", "shared": "routed_bottleneck", "lora": "lora"}
        return {**known, **dict.fromkeys(NORMS, "dropout_add_norm")}.get(self.kind, "gated_bottleneck")

    def __str__(self) -> str:
        names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
        extra = [f"d{self.width}"] * (self.width != 768) + [f"t{self.rows}"] * (self.rows != 4096) + [self.activation] * (self.activation != "gelu_new")
        extra += ["add"] * self.add + ["plain"] * (not self.options) + ["published"] * self.published + ["saved"] * self.save_gate + [f"g{self.tasks}"] * (self.tasks != 4)
        extra += [f"rg{self.gate_rank}"] * (self.gate_rank > 0)
        extra += [f"n{self.division}k{self.factor_rank}"] * (self.kind == "phm") + [f"frozen{''.join(map(str, self.frozen))}"] * bool(self.frozen)
        extra += [f"o{self.out}", "dropout" if self.dropout else "kept"] * (self.kind == "lora")
        extra += ["dropout" if self.dropout else "kept", *["wide"] * self.wide] * (self.kind in NORMS)
        return "-".join([self.kind or "bottleneck", f"r{self.rank}", names[self.dtype], f"p{names[self.param_dtype]}", *extra])


def launches(case: Case) -> list[Launch]:
    """What forward and backward of the case launch."""
    t, d, r, rg, activation = case.rows, case.width, case.rank, case.gate_rank or case.rank, ACTIVATIONS.index(case.activation)

    def parameter(*shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=case.param_dtype)

    def optional(*shape: int) -> Tensor | None:
        return parameter(*shape) if case.options else None

    if case.kind == "phm":
        return phm_launches(case, parameter, optional)
    if case.kind == "lora":
        return lora_launches(case, parameter, optional)
    if case.kind in NORMS:
        return norm_launches(case)
    x, wd, wu, bd, bu = torch.empty(t, d, dtype=case.dtype), parameter(r, d), parameter(d, r), optional(r), optional(d)
    with recorded() as made:
        if case.kind is None:
            gate, scale = (optional(d), optional(1)) if case.extra else (None, None)
            bottleneck.forward(x, wd, bd, wu, bu, gate, scale, x if case.extra else None, 0.5, activation, True, True)
            needs = [True, True, bd is not None, True, bu is not None, gate is not None, scale is not None]
            bottleneck.backward(x, x, torch.empty(t, r, dtype=case.dtype), wd, wu, bu, gate, scale, 0.5, activation, True, needs)
        elif case.op == "routed_bottleneck":
            g, down = case.tasks, 1 if case.kind == "shared" else case.tasks
            ids = torch.empty(max(1, t // 64), dtype=torch.int64)
            wd, bd, wu, bu = parameter(down, r, d), optional(down, r), parameter(g, d, r), optional(g, d)
            routed_bottleneck.forward(x, ids, wd, bd, wu, bu, x if case.extra else None, 0.5, activation, True, True)
            needs = [True, True, bd is not None, True, bu is not None]
            routed_bottleneck.backward(x, x, ids, torch.empty(t, r, dtype=case.dtype), wd, bd, wu, bu, 0.5, activation, True, needs)
        else:
            g, gb, gu, gub = {
                "large": (parameter(rg, d), optional(rg), parameter(d, rg), optional(d)),
                "logits": (None,) * 4,
                "middleX": (parameter(d), optional(1), None, None),
                "middleY": (parameter(d), None, None, None),
                "small": (parameter(2 * d), optional(1), None, None),
            }[case.kind]
            other, samples, kind = None if case.kind == "middleY" else x, t // 64 if case.kind == "small" else 1, KINDS.index(case.kind)
            common = (1.5, 0.7, 0.3, activation, kind, case.add, samples)
            _, *saved = gated_bottleneck.forward(x, other, wd, bd, wu, bu, g, gb, gu, gub, *common, int(case.save_gate), True)
            needs = [p is not None for p in (x, other, wd, bd, wu, bu, g, gb, gu, gub)]
            gated_bottleneck.backward(x, x, other, *saved, wd, bd, wu, bu, g, gb, gu, gub, *common, needs)
    return made


def phm_launches(case: Case, parameter: Callable[..., Tensor | None], optional: Callable[..., Tensor | None]) -> list[Launch]:
    t, d, r, n, k = case.rows, case.width, case.rank, case.division, case.factor_rank
    x, bd, bu = torch.empty(t, d, dtype=case.dtype), optional(r), optional(d)
    down, up = ([parameter(n, n, n), parameter(n, wide // n, k), parameter(n, k, out // n)] for wide, out in ((d, r), (r, d)))
    activation = ACTIVATIONS.index(case.activation)
    with recorded() as made:
        phm_bottleneck.forward(x, *down, bd, *up, bu, x if case.extra else None, 0.5, activation, True, True)
        needs = [p is not None and i not in case.frozen for i, p in enumerate((x, *down, bd, *up, bu))]
        phm_bottleneck.backward(x, x, torch.empty(t, r, dtype=case.dtype), *down, *up, 0.5, activation, True, needs)
    return made


def norm_launches(case: Case) -> list[Launch]:
    t, d, norm, dropout = case.rows, case.width, NORMS.index(case.kind or ""), 0.1 if case.dropout else 0.0
    x, of_row = torch.empty(t, d, dtype=case.dtype), torch.empty(t)
    residual = torch.empty(t, d) if case.wide else x
    seed, parameter = torch.zeros(1, dtype=torch.int64) if dropout else None, torch.empty(d, dtype=case.param_dtype) if norm and case.options else None
    dy, mean, rstd = residual if norm else None, of_row if norm == 1 else None, of_row if norm else None
    trained = parameter is not None and not case.frozen
    with recorded() as made:
        dropout_add_norm.forward(x, residual, parameter, parameter, seed, norm, 1e-5, dropout, True)
        dropout_add_norm.backward(
            dy, residual if case.options or not norm else None, dy, mean, rstd, parameter, seed, norm, dropout, case.dtype, [True, True, trained, trained]
        )  # fmt: skip
    return made


def lora_launches(case: Case, parameter: Callable[..., Tensor | None], optional: Callable[..., Tensor | None]) -> list[Launch]:
    t, d, out, r = case.rows, case.width, case.out, case.rank
    x, y, z = (torch.empty(t, wide, dtype=case.dtype) for wide in (d, out, r))
    wd, wu, bu, dropout = parameter(r, d), parameter(out, r), optional(out) if case.extra else None, 0.1 if case.dropout else 0.0
    seed = torch.zeros(1, dtype=torch.int64) if case.dropout else None
    with recorded() as made:
        lora.forward(x, y, wd, wu, bu, seed, 0.5, dropout, True)
        lora.backward(y, x, z, wd, wu, seed, 0.5, dropout, [True, True, True, bu is not None])
    return made
