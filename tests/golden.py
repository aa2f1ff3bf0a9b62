"""Recorded tensors of the published research code: inputs, parameters, outputs and gradients in fp64 (see ``data/golden/README.md``)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True)
class Case:
    """One recorded case. Inputs, parameters and cotangents are float32 numbers; outputs and gradients are float64."""

    id: str
    entry: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Tensor] = field(default_factory=dict)
    """The complete original state dict, aliases included."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    outputs32: dict[str, Tensor] = field(default_factory=dict)
    cotangents: dict[str, Tensor] = field(default_factory=dict)
    input_grads: dict[str, Tensor] = field(default_factory=dict)
    param_grads: dict[str, Tensor] = field(default_factory=dict)
    """By the first name of a shared parameter."""
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return self.entry["options"]

    @property
    def flags(self) -> str:
        """The published command-line flags."""
        return self.options.get("flags", "")


_SECTIONS = {"in": "inputs", "param": "params", "out": "outputs", "out32": "outputs32", "cot": "cotangents", "grad_in": "input_grads", "grad": "param_grads", "extra": "extra"}


@cache
def index() -> dict[str, dict[str, Any]]:
    """The index entries by case id."""
    return {entry["id"]: entry for entry in json.loads((FOLDER / "index.json").read_text())}


def case_ids(prefix: str = "") -> list[str]:
    return [name for name in index() if name.startswith(prefix)]


def load_case(case_id: str) -> Case:
    """Reads one case anew, so that a test may change its tensors."""
    entry = index()[case_id]
    sections: dict[str, dict[str, Tensor]] = {name: {} for name in _SECTIONS.values()}
    for key, tensor in load_file(FOLDER / entry["file"]).items():
        section, name = key.split("/", 1)
        sections[_SECTIONS[section]][name] = tensor
    for alias, key in entry.get("aliases", {}).items():
        sections["params"][alias] = sections["params"][key]
    return Case(case_id, entry, **sections)


def to(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating tensors in ``dtype``, integer ones as they are."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
