"""Which backends can run a bottleneck, and what each would take on a CUDA device (modelled)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from fastadapt.backend import Call
from fastadapt.ops import _cost
from fastadapt.ops._cost import Kernel, Model, cdiv


class Plan:
    """Reasons and launchers, one module per backend beside this file, and the modelled kernels by backend."""

    def __init__(self, package: str, models: dict[str, Callable[[Call], Model]], cuda_kernels: tuple[str, ...]) -> None:
        self.package = package
        self.models = models
        self.cuda_kernels = cuda_kernels

    def module(self, backend: str) -> Any:
        if backend == "emulated-cuda":  # tests only: the same kernels on the CPU
            return import_module(f"{self.package}.cuda").EMULATED
        return import_module(f"{self.package}.{backend}")

    def reasons(self, backend: str, call: Call) -> list[str]:
        if backend == "reference":
            return []
        return self._absent(backend, call) or list(self.module(backend).reasons(call)) or self._too_large(backend, call)

    def _absent(self, backend: str, call: Call) -> list[str]:
        try:
            self.module(backend)
        except ModuleNotFoundError as error:
            if error.name != f"{self.package}.{backend}" and not (backend == "emulated-cuda" and error.name == f"{self.package}.cuda"):
                raise
            return [f"{call.op} has no {backend} kernels"]
        return []

    def limits(self, backend: str, call: Call) -> list[str]:
        """Those of the reasons that hold on every machine with the call's architecture: a small call of bfloat16, which every kernel takes, has only the others."""
        if backend == "reference":
            return []
        if call.arch < 80:
            return [f"needs compute capability 8.0, sm_{call.arch} is older"]
        if absent := self._absent(backend, call):
            return absent
        small = call._replace(dtype=torch.bfloat16, param_dtype=torch.bfloat16, rows=64, width=64, rank=16, options=())
        here = self.reasons(backend, small)
        return [why for why in self.reasons(backend, call) if why not in here] or (_cost.cuda_limits(call) if backend == "cuda" else []) or self._too_large(backend, call)

    def kernels(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        module = self.module(backend)
        return module.forward, module.backward

    def estimate(self, backend: str, call: Call) -> _cost.Estimate | None:
        model = self.models.get(backend)
        return _cost.estimate(backend, call, model(call)) if model else None

    def _too_large(self, backend: str, call: Call) -> list[str]:
        return _cost.too_large(self.cuda_kernels, call) if backend == "cuda" else []


# The models are of a call with its own residual, both biases, gelu_new, z saved and every gradient asked for.


def reference(call: Call) -> Model:
    """Eager operations, as reference.py issues them: a test counts both."""
    s = _cost.sizes(call)
    casts = s.p != s.a
    weights = 2.0 * s.d * s.r
    forward = [
        *([_cost.pointwise("casts", 4, weights * (s.p + s.a))] if casts else []),
        _cost.gemm("z", s, s.r, s.d),
        _cost.pointwise("phi", 1, 2 * s.thin(s.r)),
        _cost.gemm("u", s, s.r, s.r),
        _cost.pointwise("residual", 1, 3 * s.wide),
    ]
    backward = [
        *([_cost.pointwise("casts", 6, 2 * weights * (s.p + s.a))] if casts else []),
        _cost.pointwise("phi", 1, 2 * s.thin(s.r)),
        _cost.pointwise("scale", 1, 2 * s.wide),
        *_cost.eager_bottleneck_backward(s, s.r),
        _cost.pointwise("residual", 1, 3 * s.wide),
        _cost.pointwise("scale of dWu and dbu", 4, weights * s.a),
    ]
    return Model(forward, backward, 3 * s.wide, 4 * s.wide)


def triton(call: Call, *, biases: bool = True) -> Model:
    s = _cost.sizes(call)
    pack, dtype = _cost.triton_weights(s, call, [s.r])
    tile = _cost.triton_tile("forward", s.r, call, dtype)
    padded, tiles = _cost.triton_rank(s.r), cdiv(s.t, tile.block_t)
    weights = 2.0 * tiles * s.d * padded * dtype.itemsize
    forward = Kernel(
        "forward", 2 * s.flops(padded), 2 * s.wide + s.thin(s.r), l2=s.wide + weights, blocks=tiles, steps=2 * cdiv(s.d, tile.block_d),
        unit=_cost.triton_unit(s), efficiency=_cost.triton_efficiency(s),
    )  # fmt: skip
    return Model([*pack, forward], [*pack, *_cost.triton_bottleneck_backward(s, call, [s.r], biases=biases)], 0.0, 2 * s.wide)


def cuda(call: Call) -> Model:
    s = _cost.sizes(call)
    pack = [_cost.pack(s, [s.r])] if _cost.cuda_needs_pack(s) else []
    r = _cost.bucket(s.r)
    tile = _cost.row_tile(r)
    blocks = cdiv(s.t, tile.rows)
    weights = 2.0 * blocks * s.d * r * s.a
    steps = cdiv(s.d, tile.depth) + cdiv(s.d, tile.columns)
    forward = Kernel("forward", 2 * s.flops(r), 2 * s.wide + s.thin(s.r), l2=s.wide + weights, blocks=blocks, steps=steps, unit="mma.sync")
    backward = [*pack, _cost.cuda_rows(s, [s.r], again=False), _cost.cuda_slabs(s, [s.r], 1), _cost.cuda_reduce(s, [s.r])]
    return Model([*pack, forward, *_cost.cuda_unpad(s, [s.r])], backward, 0.0, 2 * s.wide)


PLAN = Plan("fastadapt.ops.bottleneck", {"reference": reference, "triton": triton, "cuda": cuda}, ("forward", "rows", "slabs"))
