"""Errors at the door: each names the argument, what it was and what it must be; nothing has run and nothing has changed when one is raised."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastadapt import backend, functional

D, R, N, K, E = 8, 4, 2, 1, 6


def _bottleneck() -> dict[str, Any]:
    return {"x": torch.randn(3, 5, D), "w_down": torch.randn(R, D), "w_up": torch.randn(D, R), "b_down": torch.randn(R), "b_up": torch.randn(D)}


def _gated(granularity: str = "large") -> dict[str, Any]:
    gates = {
        "large": {"gate_weight": (2, D), "gate_bias": (2,), "gate_up_weight": (D, 2), "gate_up_bias": (D,)},
        "large_full": {"gate_weight": (D, D), "gate_bias": (D,)},
        "middleX": {"gate_weight": (D,), "gate_bias": (1,)},
        "middleY": {"gate_weight": (D,)},
        "small": {"gate_weight": (2 * D,), "gate_bias": (1,)},
    }[granularity]
    arguments = _bottleneck()
    return {"h": torch.randn(3, 5, D), **arguments, "granularity": granularity, **{n: torch.randn(s) for n, s in gates.items()}}


def _phm() -> dict[str, Any]:
    down, up = ((N, N, N), (N, D // N, K), (N, K, R // N)), ((N, N, N), (N, R // N, K), (N, K, D // N))
    factors = {f"{name}_{side}": torch.randn(s) for side, shapes in (("down", down), ("up", up)) for name, s in zip(("rule", "left", "right"), shapes, strict=True)}
    return {"x": torch.randn(3, 5, D), **factors, "b_down": torch.randn(R), "b_up": torch.randn(D)}


def _lora() -> dict[str, Any]:
    return {"x": torch.randn(3, 5, D), "y": torch.randn(3, 5, E), "w_down": torch.randn(R, D), "w_up": torch.randn(E, R), "b_up": torch.randn(E)}


def _norm() -> dict[str, Any]:
    return {"x": torch.randn(3, 5, D), "residual": torch.randn(3, 5, D), "weight": torch.randn(D), "bias": torch.randn(D)}


def _refused(function: Any, arguments: dict[str, Any], kind: type[Exception], *says: str) -> None:
    before = {n: v.clone() for n, v in arguments.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
    ran = backend.ran()
    with pytest.raises(kind) as raised:
        function(**arguments)
    for text in says:
        assert text in str(raised.value), f"{raised.value!s} does not say {text!r}"
    assert backend.ran() == ran, "a kernel ran"
    assert all(torch.equal(v, arguments[n]) for n, v in before.items())


meta = lambda *shape: torch.empty(*shape, device="meta")

BOTTLENECK = {
    "width of w_down": ({"w_down": torch.randn(R, D + 1)}, ValueError, "w_down", f"({R}, {D + 1})", f"(R, {D})"),
    "width of w_up": ({"w_up": torch.randn(D + 1, R)}, ValueError, "w_up", f"({D + 1}, {R})", f"({D}, {R})"),
    "rank of w_up": ({"w_up": torch.randn(D, R + 1)}, ValueError, "w_up", f"({D}, {R + 1})", f"({D}, {R})"),
    "length of b_down": ({"b_down": torch.randn(R + 1)}, ValueError, "b_down", f"({R + 1},)", f"({R},)"),
    "length of b_up": ({"b_up": torch.randn(1)}, ValueError, "b_up", "(1,)", f"({D},)"),
    "length of gate": ({"gate": torch.randn(1)}, ValueError, "gate", "(1,)", f"({D},)"),
    "1-D w_down": ({"w_down": torch.randn(D)}, ValueError, "w_down", f"({D},)", f"(R, {D})"),
    "rank 0": ({"w_down": torch.randn(0, D), "w_up": torch.randn(D, 0), "b_down": torch.randn(0)}, ValueError, "w_down", f"(0, {D})", "R >= 1"),
    "width 0": ({"x": torch.randn(3, 0)}, ValueError, "x", "(3, 0)", "D >= 1"),
    "1-D x": ({"x": torch.randn(D)}, ValueError, "x", f"({D},)", "(..., D)"),
    "integer x": ({"x": torch.ones(3, D, dtype=torch.int64)}, TypeError, "x", "torch.int64", "float32"),
    "boolean x": ({"x": torch.ones(3, D, dtype=torch.bool)}, TypeError, "x", "torch.bool", "float32"),
    "complex x": ({"x": torch.ones(3, D, dtype=torch.complex64)}, TypeError, "x", "torch.complex64", "float32"),
    "x is a list": ({"x": [1.0]}, TypeError, "x", "list", "tensor"),
    "x is None": ({"x": None}, TypeError, "x", "NoneType", "tensor"),
    "residual is an array": ({"residual": np.zeros((3, 5, D))}, TypeError, "residual", "ndarray", "'input'"),
    "w_down is None": ({"w_down": None}, TypeError, "w_down", "NoneType", "tensor"),
    "w_up is None": ({"w_up": None}, TypeError, "w_up", "NoneType", "tensor"),
    "b_up is a number": ({"b_up": 1.0}, TypeError, "b_up", "float", "tensor"),
    "half parameters over float32": ({n: _bottleneck()[n].bfloat16() for n in ("w_down", "w_up", "b_down", "b_up")}, TypeError, "w_down", "torch.bfloat16", "torch.float32"),
    "fp16 parameters over bf16": ({n: v.half() if n != "x" else v.bfloat16() for n, v in _bottleneck().items()}, TypeError, "w_down", "torch.float16", "torch.bfloat16"),
    "float64 parameters over float32": ({n: v.double() for n, v in _bottleneck().items() if n != "x"}, TypeError, "w_down", "torch.float64", "torch.float32"),
    "integer parameters": ({n: torch.ones_like(v, dtype=torch.int32) for n, v in _bottleneck().items() if n != "x"}, TypeError, "w_down", "torch.int32"),
    "mixed parameters": ({"b_up": torch.randn(D).bfloat16()}, TypeError, "b_up", "torch.bfloat16", "torch.float32"),
    "device of w_down": ({"w_down": meta(R, D)}, ValueError, "w_down", "meta", "cpu"),
    "device of b_up": ({"b_up": meta(D)}, ValueError, "b_up", "meta", "cpu"),
    "device of residual": ({"residual": meta(3, 5, D)}, ValueError, "residual", "meta", "cpu"),
    "device of x": ({"x": meta(3, 5, D)}, ValueError, "w_down", "cpu", "meta"),
    "shape of residual": ({"residual": torch.randn(5, D)}, ValueError, "residual", f"(5, {D})", f"(3, 5, {D})"),
    "dtype of residual": ({"residual": torch.randn(3, 5, D).half()}, TypeError, "residual", "torch.float16", "torch.float32"),
    "name of residual": ({"residual": "output"}, TypeError, "residual", "'output'", "'input'"),
    "unknown activation": ({"activation": "gleu"}, ValueError, "activation", "'gleu'", "gelu_new", "silu"),
    "activation is None": ({"activation": None}, ValueError, "activation", "None", "identity"),
    "NaN scale": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    "infinite scale": ({"scale": float("-inf")}, ValueError, "scale", "-inf", "finite"),
    "scale beyond float": ({"scale": 10**400}, ValueError, "scale", "finite"),
    "boolean scale": ({"scale": True}, ValueError, "scale", "True", "number"),
    "scale is a string": ({"scale": "0.3"}, ValueError, "scale", "'0.3'", "number"),
    "scale of two elements": ({"scale": torch.ones(2)}, ValueError, "scale", "(2,)", "one element"),
    "scale of no elements": ({"scale": torch.ones(0)}, ValueError, "scale", "(0,)", "one element"),
    "dtype of scale": ({"scale": torch.ones(1).half()}, TypeError, "scale", "torch.float16", "torch.float32"),
    "heads do not divide the rank": ({"heads": 3}, ValueError, "heads", "3", f"rank {R}", f"width {D}"),
    "zero heads": ({"heads": 0}, ValueError, "heads", "0", "positive"),
    "fractional heads": ({"heads": 2.0}, ValueError, "heads", "2.0", "positive"),
    "pair weight with the whole rank": ({"heads": 2}, ValueError, "w_up", f"({D}, {R})", f"({D}, {R // 2})"),
    "layer norm without bias": ({"norm_before": (torch.ones(D), None, 1e-5)}, TypeError, "norm_before", "None", "(weight, bias, eps)"),
    "layer norm's weight alone": ({"norm_after": torch.ones(D)}, TypeError, "norm_after", "(weight, bias, eps)"),
    "layer norm's negative eps": ({"norm_after": (torch.ones(D), torch.zeros(D), -1.0)}, ValueError, "norm_after eps: must not be negative, not -1.0"),
    "layer norm's eps is no number": ({"norm_before": (torch.ones(D), torch.zeros(D), None)}, ValueError, "norm_before eps: must be a finite number, not None"),
    "width of a layer norm": ({"norm_before": (torch.ones(D + 1), torch.zeros(D + 1), 1e-5)}, ValueError, "norm_before", f"({D + 1},)", f"({D},)"),
    "dtype of a layer norm": ({"norm_after": (torch.ones(D).half(), torch.zeros(D), 1e-5)}, TypeError, "norm_after", "torch.float16"),
}

GATED = {
    "unknown granularity": ("large", {"granularity": "huge"}, ValueError, "granularity", "'huge'", "middleX"),
    "unknown combine": ("large", {"combine": "mul"}, ValueError, "combine", "'mul'", "'multiply'"),
    "unknown activation": ("large", {"activation": "tanh"}, ValueError, "activation", "'tanh'", "gelu_new"),
    "no x": ("large", {"x": None}, ValueError, "x", "large", "None"),
    "no h": ("large", {"h": None}, TypeError, "h: must be a tensor, not NoneType"),
    "no h of middleY": ("middleY", {"h": None, "x": None}, TypeError, "h: must be a tensor, not NoneType"),
    "save_gate is a word": ("large", {"save_gate": "yes"}, TypeError, "save_gate: must be True, False or None, not 'yes'"),
    "save_gate is a list": ("middleX", {"save_gate": []}, TypeError, "save_gate: must be True, False or None, not list"),
    "gate_weight is a number": ("large", {"gate_weight": 1.0}, TypeError, "gate_weight: must be a tensor, not float"),
    **{f"{name} is no number": ("large", {name: "1"}, ValueError, f"{name}: must be a finite number, not '1'") for name in ("input_scale", "adapter_scale", "scale")},
    "shape of x": ("middleX", {"x": torch.randn(3, 5, D + 1)}, ValueError, "x", f"(3, 5, {D + 1})", f"(3, 5, {D})"),
    "dtype of x": ("small", {"x": torch.randn(3, 5, D).bfloat16()}, TypeError, "x", "torch.bfloat16", "torch.float32"),
    "device of x": ("large", {"x": meta(3, 5, D)}, ValueError, "x", "meta", "cpu"),
    "integer h": ("large", {"h": torch.ones(3, 5, D, dtype=torch.int32)}, TypeError, "h", "torch.int32", "float32"),
    "1-D h": ("middleY", {"h": torch.randn(D)}, ValueError, "h", f"({D},)", "(..., D)"),
    "rank 0": ("large", {"w_down": torch.randn(0, D)}, ValueError, "w_down", f"(0, {D})", "R >= 1"),
    "gate rank 0": ("large", {"gate_weight": torch.randn(0, D)}, ValueError, "gate_weight", f"(0, {D})", "Rg >= 1"),
    "1-D gate of large": ("large", {"gate_weight": torch.randn(D)}, ValueError, "gate_weight", f"({D},)", f"(Rg, {D})"),
    "width of gate_weight": ("large", {"gate_weight": torch.randn(2, D + 1)}, ValueError, "gate_weight", f"(2, {D + 1})", f"(2, {D})"),
    "gate_up_weight": ("large", {"gate_up_weight": torch.randn(D, 3)}, ValueError, "gate_up_weight", f"({D}, 3)", f"({D}, 2)"),
    "gate_bias of a row gate": ("middleX", {"gate_bias": torch.randn(D)}, ValueError, "gate_bias", f"({D},)", "(1,)"),
    "gate of small is 2D wide": ("small", {"gate_weight": torch.randn(D)}, ValueError, "gate_weight", f"({D},)", f"({2 * D},)"),
    "gate of middleX is a vector": ("middleX", {"gate_weight": torch.randn(1, D)}, ValueError, "gate_weight", f"(1, {D})", f"({D},)"),
    "dtype of gate_weight": ("middleY", {"gate_weight": torch.randn(D).half()}, TypeError, "gate_weight", "torch.float16", "torch.float32"),
    "device of gate_weight": ("middleY", {"gate_weight": meta(D)}, ValueError, "gate_weight", "meta", "cpu"),
    **{f"no gate_weight, {g}": (g, {"gate_weight": None}, ValueError, "gate_weight", g, "None") for g in ("large", "large_full", "middleX", "middleY", "small")},
    "no gate_up_weight": ("large", {"gate_up_weight": None}, ValueError, "gate_up_weight", "large", "None"),
    "gate_bias of middleY": ("middleY", {"gate_bias": torch.randn(1)}, ValueError, "gate_bias", "middleY"),
    "gate_up_weight of small": ("small", {"gate_up_weight": torch.randn(D, 2)}, ValueError, "gate_up_weight", "small"),
    "2-D h of small": ("small", {"h": torch.randn(15, D), "x": torch.randn(15, D)}, ValueError, "h", f"(15, {D})", "(B, L, D)"),
    "4-D h of small": ("small", {"h": torch.randn(2, 3, 5, D), "x": torch.randn(2, 3, 5, D)}, ValueError, "h", f"(2, 3, 5, {D})", "(B, L, D)"),
    "L = 0 of small": ("small", {"h": torch.randn(3, 0, D), "x": torch.randn(3, 0, D)}, ValueError, "h", f"(3, 0, {D})", "L >= 1"),
    "NaN scale": ("large", {"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    "NaN adapter_scale": ("large", {"adapter_scale": float("nan")}, ValueError, "adapter_scale", "nan", "finite"),
    "adapter_scale beyond float": ("large", {"adapter_scale": -(10**400)}, ValueError, "adapter_scale", "finite"),
    "infinite input_scale": ("large", {"input_scale": float("inf")}, ValueError, "input_scale", "inf", "finite"),
    "tensor scale": ("large", {"scale": torch.ones(1)}, TypeError, "scale", "tensor", "number"),
    "heads do not divide the rank": ("large", {"heads": 3}, ValueError, "heads", "3", f"rank {R}"),
}

FACTORS = [n for n in _phm() if n not in ("x", "b_down", "b_up")]
PHM = {
    "2-D rule": ({"rule_down": torch.randn(N, N)}, ValueError, "rule_down", f"({N}, {N})", "(n, n, n)"),
    "rule that is no cube": ({"rule_down": torch.randn(N, N, N + 1)}, ValueError, "rule_down", f"({N}, {N}, {N + 1})", "(n, n, n)"),
    "n that does not divide the width": ({"rule_down": torch.randn(3, 3, 3)}, ValueError, "rule_down", "(3, 3, 3)", f"width {D}"),
    "rules of another n": ({"rule_up": torch.randn(4, 4, 4)}, ValueError, "rule_up", "(4, 4, 4)", f"({N}, {N}, {N})"),
    "part of left_down": ({"left_down": torch.randn(N, 3, K)}, ValueError, "left_down", f"({N}, 3, {K})", f"({N}, {D // N}, k)"),
    "2-D left_down": ({"left_down": torch.randn(N, D // N)}, ValueError, "left_down", f"({N}, {D // N})", "k >= 1"),
    "factor rank 0": ({"left_down": torch.randn(N, D // N, 0)}, ValueError, "left_down", f"({N}, {D // N}, 0)", "k >= 1"),
    "factor rank of right_down": ({"right_down": torch.randn(N, 2, R // N)}, ValueError, "right_down", f"({N}, 2, {R // N})", f"({N}, {K}, R/{N})"),
    "rank 0": ({"right_down": torch.randn(N, K, 0)}, ValueError, "right_down", f"({N}, {K}, 0)", f"R >= {N}"),
    "part of left_up": ({"left_up": torch.randn(N, 3, K)}, ValueError, "left_up", f"({N}, 3, {K})", f"({N}, {R // N}, {K})"),
    "part of right_up": ({"right_up": torch.randn(N, K, 3)}, ValueError, "right_up", f"({N}, {K}, 3)", f"({N}, {K}, {D // N})"),
    "length of b_down": ({"b_down": torch.randn(R + 1)}, ValueError, "b_down", f"({R + 1},)", f"({R},)"),
    "length of b_up": ({"b_up": torch.randn(1)}, ValueError, "b_up", "(1,)", f"({D},)"),
    "width of x": ({"x": torch.randn(3, 2 * D)}, ValueError, "left_down", f"({N}, {D // N}, {K})", f"({N}, {D}, k)"),
    "1-D x": ({"x": torch.randn(D)}, ValueError, "x", f"({D},)", "(..., D)"),
    "x is None": ({"x": None}, TypeError, "x: must be a tensor, not NoneType"),
    "residual is an array": ({"residual": np.zeros((3, 5, D))}, TypeError, "residual", "ndarray", "'input'"),
    "scale is no number": ({"scale": "1"}, ValueError, "scale: must be a finite number, not '1'"),
    "integer x": ({"x": torch.ones(3, D, dtype=torch.int64)}, TypeError, "x", "torch.int64", "float32"),
    "left_up is None": ({"left_up": None}, TypeError, "left_up", "NoneType", "tensor"),
    "half parameters over float32": ({n: v.half() for n, v in _phm().items() if n != "x"}, TypeError, "rule_down", "torch.float16", "torch.float32"),
    "mixed parameters": ({"right_up": _phm()["right_up"].bfloat16()}, TypeError, "right_up", "torch.bfloat16", "rule_down", "torch.float32"),
    **{f"device of {name}": ({name: _phm()[name].to("meta")}, ValueError, name, "meta", "cpu") for name in FACTORS},
    "device of residual": ({"residual": meta(3, 5, D)}, ValueError, "residual", "meta", "cpu"),
    "shape of residual": ({"residual": torch.randn(5, D)}, ValueError, "residual", f"(5, {D})", f"(3, 5, {D})"),
    "name of residual": ({"residual": "output"}, TypeError, "residual", "'output'", "'input'"),
    "unknown activation": ({"activation": "gleu"}, ValueError, "activation", "'gleu'", "gelu_new"),
    "NaN scale": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    "tensor scale": ({"scale": torch.ones(1)}, TypeError, "scale", "tensor", "number"),
    "width of a layer norm": ({"norm_before": (torch.ones(D + 1), torch.zeros(D + 1), 1e-5)}, ValueError, "norm_before", f"({D + 1},)", f"({D},)"),
}


LORA = {
    "width of w_down": ({"w_down": torch.randn(R, D + 1)}, ValueError, "w_down", f"({R}, {D + 1})", f"(R, {D})"),
    "rank 0": ({"w_down": torch.randn(0, D)}, ValueError, "w_down", f"(0, {D})", "R >= 1"),
    "width of w_up": ({"w_up": torch.randn(D, R)}, ValueError, "w_up", f"({D}, {R})", f"({E}, {R})"),
    "rank of w_up": ({"w_up": torch.randn(E, R + 1)}, ValueError, "w_up", f"({E}, {R + 1})", f"({E}, {R})"),
    "length of b_up": ({"b_up": torch.randn(D)}, ValueError, "b_up", f"({D},)", f"({E},)"),
    "rows of y": ({"y": torch.randn(3, 4, E)}, ValueError, "y", f"(3, 4, {E})", "(3, 5, out)", f"(3, 5, {D})"),
    "dimensions of y": ({"y": torch.randn(15, E)}, ValueError, "y", f"(15, {E})", "(3, 5, out)"),
    "width 0 of y": ({"y": torch.randn(3, 5, 0)}, ValueError, "y", "(3, 5, 0)", "D >= 1"),
    "dtype of y": ({"y": torch.randn(3, 5, E).half()}, TypeError, "y", "torch.float16", "torch.float32"),
    "device of y": ({"y": meta(3, 5, E)}, ValueError, "y", "meta", "cpu"),
    "y is None": ({"y": None}, TypeError, "y", "must be a tensor"),
    "scale is no number": ({"scale": "1"}, ValueError, "scale: must be a finite number, not '1'"),
    "1-D x": ({"x": torch.randn(D)}, ValueError, "x", f"({D},)", "(..., D)"),
    "integer x": ({"x": torch.ones(3, 5, D, dtype=torch.int64)}, TypeError, "x", "torch.int64", "float32"),
    "w_up is None": ({"w_up": None}, TypeError, "w_up", "NoneType", "tensor"),
    "half parameters over float32": ({n: v.half() for n, v in _lora().items() if n not in "xy"}, TypeError, "w_down", "torch.float16", "torch.float32"),
    "mixed parameters": ({"w_up": torch.randn(E, R).bfloat16()}, TypeError, "w_up", "torch.bfloat16", "torch.float32"),
    **{f"device of {name}": ({name: _lora()[name].to("meta")}, ValueError, name, "meta", "cpu") for name in ("w_down", "w_up", "b_up")},
    "NaN scale": ({"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    "tensor scale": ({"scale": torch.ones(1)}, TypeError, "scale", "tensor", "number"),
    **{f"dropout {p!r}": ({"dropout": p}, ValueError, "dropout", repr(p), "from 0 to below 1") for p in (1.0, -0.1, float("nan"), True, "0.1", None)},
    "seed of a number": ({"dropout": 0.1, "seed": 3}, TypeError, "seed", "int", "int64 tensor"),
    "dtype of seed": ({"dropout": 0.1, "seed": torch.ones(1, dtype=torch.int32)}, TypeError, "seed", "torch.int32", "int64"),
    "seed of two elements": ({"dropout": 0.1, "seed": torch.ones(2, dtype=torch.int64)}, ValueError, "seed", "(2,)", "one element"),
    "device of seed": ({"dropout": 0.1, "seed": torch.ones(1, dtype=torch.int64, device="meta")}, ValueError, "seed", "meta", "cpu"),
    "seed without dropout": ({"seed": torch.ones(1)}, TypeError, "seed", "torch.float32", "int64"),
}


NORM = {
    "length of weight": ({"weight": torch.randn(D + 1)}, ValueError, "weight", f"({D + 1},)", f"({D},)"),
    "length of bias": ({"bias": torch.randn(1)}, ValueError, "bias", "(1,)", f"({D},)"),
    "length of bias alone": ({"weight": None, "bias": torch.randn(1)}, ValueError, "bias", "(1,)", f"({D},)"),
    "weight is a number": ({"weight": 1.0}, TypeError, "weight", "float", "tensor"),
    "bias is a number": ({"bias": 0.0}, TypeError, "bias", "float", "tensor"),
    "weight without a norm": ({"norm": None, "bias": None}, ValueError, "weight", "norm None"),
    "bias without a norm": ({"norm": None, "weight": None}, ValueError, "bias", "norm None"),
    "unknown norm": ({"norm": "batch"}, ValueError, "norm", "'batch'", "'layer'", "'rms'", "None"),
    "norm is a list": ({"norm": ["rms"]}, ValueError, "norm", "['rms']"),
    "negative eps": ({"eps": -1e-5}, ValueError, "eps", "-1e-05", "negative"),
    "NaN eps": ({"eps": float("nan")}, ValueError, "eps", "nan", "finite"),
    "eps is no number": ({"eps": "1"}, ValueError, "eps: must be a finite number, not '1'"),
    "return_sum is a word": ({"return_sum": "yes"}, TypeError, "return_sum: must be True or False, not str"),
    "tensor eps": ({"eps": torch.ones(1)}, TypeError, "eps", "tensor", "number"),
    "x is None": ({"x": None}, TypeError, "x", "NoneType", "tensor"),
    "1-D x": ({"x": torch.randn(D)}, ValueError, "x", f"({D},)", "(..., D)"),
    "width 0": ({"x": torch.randn(3, 0)}, ValueError, "x", "(3, 0)", "D >= 1"),
    "integer x": ({"x": torch.ones(3, 5, D, dtype=torch.int64)}, TypeError, "x", "torch.int64", "float32"),
    "residual is a number": ({"residual": 1.0}, TypeError, "residual", "float", "tensor"),
    "shape of residual": ({"residual": torch.randn(5, D)}, ValueError, "residual", f"(5, {D})", f"(3, 5, {D})"),
    "device of residual": ({"residual": meta(3, 5, D)}, ValueError, "residual", "meta", "cpu"),
    "half residual beside float32": ({"residual": torch.randn(3, 5, D).bfloat16()}, TypeError, "residual", "torch.bfloat16", "torch.float32", "half-precision"),
    "float64 residual beside float32": ({"residual": torch.randn(3, 5, D).double()}, TypeError, "residual", "torch.float64", "torch.float32"),
    "float32 residual beside float64": ({"x": torch.randn(3, 5, D).double()}, TypeError, "residual", "torch.float32", "torch.float64"),
    "fp16 beside bf16": ({"x": torch.randn(3, 5, D).half(), "residual": torch.randn(3, 5, D).bfloat16()}, TypeError, "residual", "torch.bfloat16", "torch.float16"),
    "half parameters of a float32 sum": ({"x": torch.randn(3, 5, D).half(), "weight": torch.ones(D).half(), "bias": None}, TypeError, "weight", "torch.float16", "torch.float32"),
    "mixed parameters": ({"bias": torch.randn(D).bfloat16()}, TypeError, "bias", "torch.bfloat16", "weight", "torch.float32"),
    **{f"device of {name}": ({name: meta(D)}, ValueError, name, "meta", "cpu") for name in ("weight", "bias")},
    **{f"dropout {p!r}": ({"dropout": p}, ValueError, "dropout", repr(p), "from 0 to below 1") for p in (1.0, -0.1, float("nan"), True, "0.1", None)},
    "seed of a number": ({"dropout": 0.1, "seed": 3}, TypeError, "seed", "int", "int64 tensor"),
    "device of seed": ({"dropout": 0.1, "seed": torch.ones(1, dtype=torch.int64, device="meta")}, ValueError, "seed", "meta", "cpu"),
    "seed without dropout": ({"seed": torch.ones(1)}, TypeError, "seed", "torch.float32", "int64"),
}


def _routed() -> dict[str, Any]:
    ids = torch.zeros(3, dtype=torch.int64)
    return {"x": torch.randn(3, 5, D), "task_ids": ids, "w_down": torch.randn(2, R, D), "w_up": torch.randn(2, D, R), "b_down": torch.randn(2, R), "b_up": torch.randn(2, D)}


def _multimodal() -> dict[str, Any]:
    return {"x": torch.randn(3, 5, D), "w_down": torch.randn(R, D), "w_up": torch.randn(D, R), "w_cross": torch.randn(D, R)}


ARGUMENTS: dict[str, Any] = {
    "bottleneck": lambda: {**_bottleneck(), "residual": torch.randn(3, 5, D), "gate": torch.randn(D), "scale": torch.ones(1)},
    "gated_bottleneck": _gated,
    "phm_bottleneck": lambda: {**_phm(), "residual": torch.randn(3, 5, D)},
    "lora": lambda: {**_lora(), "dropout": 0.1, "seed": torch.ones(1, dtype=torch.int64)},
    "dropout_add_norm": _norm,
    "routed_bottleneck": lambda: {**_routed(), "residual": torch.randn(3, 5, D)},
    "multimodal_bottleneck": _multimodal,
}


@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage)")
@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "nested", "jagged"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_tensors_without_strides(op: str, kind: str) -> None:
    """Of any argument, the shape being right."""
    tried = 0
    for name, t in ARGUMENTS[op]().items():
        if not isinstance(t, Tensor) or t.dim() < (1 if kind == "sparse_coo" else 2) or (kind == "jagged" and t.dim() < 3):
            continue
        if kind in ("nested", "jagged"):
            other = torch.nested.nested_tensor(list(t.unbind()), layout=torch.jagged if kind == "jagged" else torch.strided)
        else:
            other = t.to_sparse() if kind == "sparse_coo" else t.to_sparse_csr()
        arguments = {**ARGUMENTS[op](), name: other}
        ran = backend.ran()
        with pytest.raises(TypeError, match=rf"^{name}: must be a dense tensor, not (one of layout torch.{kind}|a nested one)$"):
            getattr(functional, op)(**arguments)
        assert backend.ran() == ran
        tried += 1
    assert tried


def test_multimodal_without_x() -> None:
    norm = (torch.ones(D), torch.zeros(D), 1e-5)
    for changes in ({"x": None}, {"x": None, "norm_cross": norm}):
        _refused(functional.multimodal_bottleneck, {**_multimodal(), **changes}, TypeError, "x: must be a tensor, not NoneType")
    _refused(
        functional.multimodal_bottleneck, {**_multimodal(), "x": torch.ones(()), "norm_cross": norm}, ValueError, "x: must be (..., D) with at least two dimensions", "shape ()"
    )
    _refused(functional.multimodal_bottleneck, {**_multimodal(), "w_down": None, "norm_cross": norm}, TypeError, "w_down: must be a tensor, not NoneType")


def test_routed() -> None:
    _refused(functional.routed_bottleneck, {**_routed(), "scale": "1"}, ValueError, "scale: must be a finite number, not '1'")
    _refused(functional.routed_bottleneck, {**_routed(), "b_down": torch.randn(R)}, ValueError, f"b_down: shape ({R},) must be (2, {R})")


@pytest.mark.parametrize("case", NORM)
def test_dropout_add_norm(case: str) -> None:
    changes, kind, *says = NORM[case]
    _refused(functional.dropout_add_norm, {**_norm(), **changes}, kind, *says)


@pytest.mark.parametrize("case", LORA)
def test_lora(case: str) -> None:
    changes, kind, *says = LORA[case]
    _refused(functional.lora, {**_lora(), **changes}, kind, *says)


@pytest.mark.parametrize("case", BOTTLENECK)
def test_bottleneck(case: str) -> None:
    changes, kind, *says = BOTTLENECK[case]
    _refused(functional.bottleneck, {**_bottleneck(), **changes}, kind, *says)


@pytest.mark.parametrize("case", GATED)
def test_gated_bottleneck(case: str) -> None:
    granularity, changes, kind, *says = GATED[case]
    _refused(functional.gated_bottleneck, {**_gated(granularity), **changes}, kind, *says)


@pytest.mark.parametrize("case", PHM)
def test_phm_bottleneck(case: str) -> None:
    changes, kind, *says = PHM[case]
    _refused(functional.phm_bottleneck, {**_phm(), **changes}, kind, *says)


def test_the_unchanged_arguments_are_taken() -> None:
    """Every case above differs from a good call in what it says."""
    functional.bottleneck(**_bottleneck())
    functional.phm_bottleneck(**_phm())
    functional.lora(**_lora())
    functional.dropout_add_norm(**_norm())
    functional.lora(**_lora(), dropout=0.1, seed=torch.ones(1, dtype=torch.int64))
    for granularity in ("large", "large_full", "middleX", "middleY", "small"):
        functional.gated_bottleneck(**_gated(granularity))


def test_a_demand_that_cannot_be_met_runs_nothing() -> None:
    for name, arguments in (("triton", _bottleneck()), ("cpu", {n: v.double() for n, v in _bottleneck().items()})):
        with backend.use(name):
            _refused(functional.bottleneck, arguments, backend.BackendError, name, "bottleneck")


def test_errors_hold_under_compile_and_transforms() -> None:
    wrong = {**_bottleneck(), "w_up": torch.randn(D, R + 1)}
    with pytest.raises(ValueError, match="w_up"):
        torch.func.grad(lambda w: functional.bottleneck(**{**wrong, "w_down": w}).sum())(wrong["w_down"])
    with pytest.raises(Exception, match=re.escape("w_up: shape")):
        torch.compile(lambda: functional.bottleneck(**wrong), fullgraph=True, backend="eager")()


def test_a_parameter_that_was_offloaded() -> None:
    with pytest.raises(ValueError, match=r"w_down: is on meta, but the input is on cpu; it has no values there: adapters must stay on the device"):
        functional.bottleneck(torch.randn(2, 8), torch.randn(3, 8, device="meta"), torch.randn(8, 3))
