"""fastadapt: fused adapter layers for tuning vision-and-language models.

Three ways in: `patch` an existing transformers model, `fuse` the adapter layers that a model already has or use the drop-in modules of `fastadapt.nn`, or call the ops of
`fastadapt.functional`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastadapt import backend, functional
from fastadapt._version import __version__

if TYPE_CHECKING:
    from fastadapt import checkpoint as checkpoint
    from fastadapt import hosts as hosts
    from fastadapt import interop as interop
    from fastadapt import methods as methods
    from fastadapt import nn as nn
    from fastadapt import patching as patching
    from fastadapt import training as training
    from fastadapt.interop.fusing import fuse as fuse
    from fastadapt.interop.fusing import unfuse as unfuse
    from fastadapt.patching import Handle as Handle
    from fastadapt.patching import load as load
    from fastadapt.patching import patch as patch

__all__ = [
    "Handle", "__version__", "backend", "checkpoint", "functional", "fuse", "hosts", "interop", "load", "methods", "nn", "patch", "patching", "training", "unfuse",
]  # fmt: skip

# Loaded on first use: `import fastadapt` needs neither transformers nor triton.
_LAZY = {
    "patch": "fastadapt.patching", "Handle": "fastadapt.patching", "load": "fastadapt.patching", "fuse": "fastadapt.interop.fusing", "unfuse": "fastadapt.interop.fusing",
    "checkpoint": "", "hosts": "", "interop": "", "methods": "", "nn": "", "patching": "", "training": "",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastadapt' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name) if _LAZY[name] else import_module(f"fastadapt.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
