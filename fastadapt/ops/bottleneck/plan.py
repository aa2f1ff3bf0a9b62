"""Which backends can run a bottleneck."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fastadapt.backend import Call


class Plan:
    """Reasons and launchers, one module per backend beside this file."""

    def __init__(self, package: str) -> None:
        self.package = package

    def module(self, backend: str) -> Any:
        return import_module(f"{self.package}.{backend}")

    def reasons(self, backend: str, call: Call) -> list[str]:
        return [] if backend == "reference" else self.module(backend).reasons(call)

    def kernels(self, backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        module = self.module(backend)
        return module.forward, module.backward


PLAN = Plan("fastadapt.ops.bottleneck")
