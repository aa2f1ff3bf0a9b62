"""fastadapt: fused adapter layers for tuning vision-and-language models."""

from fastadapt import backend, functional

__version__ = "0.1.0"
__all__ = ["__version__", "backend", "functional"]
