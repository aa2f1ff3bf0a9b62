"""Training several tasks at once: task mixing, and the demo."""

from fastadapt.training.mixing import MultiTaskLoader

__all__ = ["MultiTaskLoader"]
