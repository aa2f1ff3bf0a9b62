"""The activations of the ops in plain torch, with their derivatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadapt.ops._library import ACTIVATIONS


def apply(z: Tensor, activation: int) -> Tensor:
    """phi(z)."""
    name = ACTIVATIONS[activation]
    if name == "relu":
        return F.relu(z)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_new":
        return F.gelu(z, approximate="tanh")
    return F.silu(z) if name == "silu" else z


def derivative(z: Tensor, activation: int) -> Tensor:
    """phi'(z); relu'(0) = 0."""
    name = ACTIVATIONS[activation]
    if name == "relu":
        return (z > 0).to(z.dtype)
    if name == "gelu":
        return torch.special.ndtr(z) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_new":
        t = torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)
    if name == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    return torch.ones_like(z)
