"""Training several tasks at once: task mixing, the published losses, metrics and parameter groups, adapter checkpoints for Hugging Face's ``Trainer``, and the demo."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastadapt.training.losses import answer_loss, draw_answer, predict_true, sequence_loss, shortlist, weighted_answer_loss
from fastadapt.training.metrics import NlvrScore, exact_match, nlvr_score, normalize_answer, retrieval_recall, vqa_accuracy
from fastadapt.training.mixing import MultiTaskLoader
from fastadapt.training.momentum import momentum_update
from fastadapt.training.optim import parameter_groups
from fastadapt.training.regularizers import Tracked, track_z

if TYPE_CHECKING:
    from fastadapt.training.trainer import AdapterCheckpoint as AdapterCheckpoint
    from fastadapt.training.trainer import AdapterTrainer as AdapterTrainer

__all__ = [
    "AdapterCheckpoint",
    "AdapterTrainer",
    "MultiTaskLoader",
    "NlvrScore",
    "Tracked",
    "answer_loss",
    "draw_answer",
    "exact_match",
    "momentum_update",
    "nlvr_score",
    "normalize_answer",
    "parameter_groups",
    "predict_true",
    "retrieval_recall",
    "sequence_loss",
    "shortlist",
    "track_z",
    "vqa_accuracy",
    "weighted_answer_loss",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: the rest needs no transformers.
    if name not in ("AdapterCheckpoint", "AdapterTrainer"):
        raise AttributeError(f"module 'fastadapt.training' has no attribute {name!r}")
    return getattr(import_module("fastadapt.training.trainer"), name)
