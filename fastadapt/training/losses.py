"""Losses and answer choice of the published training loops of VL-Adapter, VL-PET and UniAdapter, as plain functions over logits.

A caption's loss is the mean cross entropy that transformers models return themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_ANSWER_POSITION = {"t5": 0, "bart": 1}


def answer_loss(logits: Tensor, labels: Tensor, scores: Tensor | None = None) -> Tensor:
    r"""The loss of every task that answers with text (VL-Adapter, section 3.1; VQA, GQA, NLVR2, TVQA, How2QA and the video captions; VL-PET alike).

    .. math:: \frac{1}{B} \sum_b s_b \, \frac{\sum_{l:\, t_{bl} \ne -100} -\log softmax(logits_{bl})_{t_{bl}}}{\max(1, |\{l : t_{bl} \ne -100\}|)}

    Each sample's mean over its own tokens, times the answer's score: short answers weigh as much as long ones, and samples of score 0 count in B.

    Args:
        logits: (B, L, V), floating; half precision is computed in fp32.
        labels: (B, L), int64; -100 is ignored. A sample without any label adds 0.
        scores: (B,), the drawn answers' soft scores, for VQA (`draw_answer`); None: all 1.

    Returns:
        A scalar, in fp32 or fp64.

    Raises:
        ValueError: a shape that does not fit, or no samples.
        TypeError: logits that are not floating, or labels that are not int64.
    """
    token_losses = _token_losses(logits, labels)
    losses = token_losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
    if scores is not None:
        if scores.shape != losses.shape:
            raise ValueError(f"scores: must be ({len(losses)},) like the batch, not {tuple(scores.shape)}")
        losses = losses * scores.to(losses.dtype)
    return losses.mean()


def draw_answer(soft_labels: Mapping[str, float], generator: torch.Generator) -> tuple[str, float]:
    r"""A training answer for VQA, drawn anew in every epoch: answer a with probability :math:`s_a / \sum s`, as in VL-Adapter and VL-PET.

    Args:
        soft_labels: the answers' soft scores, for instance ``{"net": 1.0, "netting": 0.6}``.
        generator: a seeded generator on the CPU; each data worker needs its own.

    Returns:
        The answer and its score, `answer_loss`'s ``scores``; ``("", 0.0)`` where no answer has a positive score, so that the sample adds nothing to the loss.

    Raises:
        ValueError: a score that is negative or not finite.
    """
    for answer, score in soft_labels.items():
        if not 0 <= score < math.inf:
            raise ValueError(f"soft_labels[{answer!r}]: must be finite and not negative, not {score}")
    if not any(soft_labels.values()):
        return "", 0.0
    drawn = int(torch.multinomial(torch.tensor(list(soft_labels.values()), dtype=torch.float64), 1, generator=generator))
    return list(soft_labels.items())[drawn]


def predict_true(logits: Tensor, true_id: int, false_id: int, *, host: Literal["bart", "t5"]) -> Tensor:
    """NLVR2's prediction without generation (VL-Adapter): is "true" likelier than "false" at the first answer position?

    Args:
        logits: (B, L, V) of the decoder. The answer is at position 0 with T5 and at position 1, behind ``<s>``, with BART; tokens from there on are not looked at.
        true_id, false_id: the first tokens of "true" and "false".
        host: "bart" or "t5".

    Returns:
        (B,), bool: the logit of "true" is the greater one.

    Raises:
        ValueError: an unknown host, too few positions, or an id outside the vocabulary.
    """
    if host not in _ANSWER_POSITION:
        raise ValueError(f"host: must be one of {', '.join(_ANSWER_POSITION)}, not {host!r}")
    position = _ANSWER_POSITION[host]
    if logits.dim() != 3 or logits.shape[1] <= position:
        raise ValueError(f"logits: must be (B, L, V) with L > {position} for {host}, not {tuple(logits.shape)}")
    for name, token in (("true_id", true_id), ("false_id", false_id)):
        if not 0 <= token < logits.shape[2]:
            raise ValueError(f"{name}: must be a token of the vocabulary of {logits.shape[2]}, not {token}")
    return logits[:, position, true_id] > logits[:, position, false_id]


def sequence_loss(logits: Tensor, tokens: Tensor, label_smoothing: float = 0.1) -> Tensor:
    r"""The loss of each whole answer under a causal decoder, with UniAdapter's VQA head (BLIP's): a sum, so that ``-sequence_loss`` ranks candidates by log probability.

    .. math:: loss_n = \sum_{l \ge 1:\, t_{nl} \ne -100} (1 - \epsilon)\,(-\log p_{n,l-1}(t_{nl})) + \frac{\epsilon}{V} \sum_v -\log p_{n,l-1}(v)

    Args:
        logits: (N, L, V), floating; those of position l - 1 predict token l.
        tokens: (N, L), int64, the answers that the decoder read, -100 in place of padding; column 0 (``bos``) is not predicted.
        label_smoothing: :math:`\epsilon`, published as 0.1, in training and in ranking.

    Returns:
        (N,), in fp32 or fp64.

    Raises:
        ValueError: a shape that does not fit, no answers, or a ``label_smoothing`` outside 0 to 1.
        TypeError: logits that are not floating, or tokens that are not int64.
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: must be from 0 to 1, not {label_smoothing}")
    losses = _token_losses(logits, tokens, "tokens", label_smoothing, shift=1)
    return losses.sum(1)


def weighted_answer_loss(logits: Tensor, tokens: Tensor, weights: Tensor, questions: int, label_smoothing: float = 0.1) -> Tensor:
    r"""UniAdapter's VQA loss over all answers of a batch of questions: :math:`\frac{1}{questions} \sum_n w_n \, loss_n` with `sequence_loss`.

    Args:
        logits, tokens, label_smoothing: see `sequence_loss`; the answers of all questions, one after the other.
        weights: (N,), each answer's share of its question's ten answers.
        questions: the number of questions in the batch.

    Returns:
        A scalar, in fp32 or fp64.

    Raises:
        ValueError, TypeError: see `sequence_loss`; also weights of another shape, or ``questions`` below 1.
    """
    if questions < 1:
        raise ValueError(f"questions: must be at least 1, not {questions}")
    losses = sequence_loss(logits, tokens, label_smoothing)
    if weights.shape != losses.shape:
        raise ValueError(f"weights: must be ({len(losses)},), one for each answer, not {tuple(weights.shape)}")
    return (weights.to(losses.dtype) * losses).sum() / questions


def shortlist(first_logits: Tensor, first_tokens: Tensor, k: int) -> Tensor:
    """The first half of UniAdapter's rank inference: the k candidate answers whose first tokens are the likeliest.

    The second half reads these candidates with the decoder and takes the likeliest::

        chosen = shortlist(first_logits, candidates[:, 1], k)                       # (B, k)
        losses = sequence_loss(decode(candidates[chosen].flatten(0, 1)), ...)       # (B * k,)
        answers = chosen.gather(1, losses.view_as(chosen).argmin(1, keepdim=True))  # (B, 1)

    Args:
        first_logits: (B, V), the decoder's logits behind ``bos``.
        first_tokens: (N,), int64, the candidates' first tokens.
        k: published as 128.

    Returns:
        (B, k), int64: numbers of candidates, the likeliest first.

    Raises:
        ValueError: a shape that does not fit, a token outside the vocabulary, or a k outside 1 to N.
    """
    if first_logits.dim() != 2 or first_tokens.dim() != 1:
        raise ValueError(f"first_logits, first_tokens: must be (B, V) and (N,), not {tuple(first_logits.shape)} and {tuple(first_tokens.shape)}")
    if not 1 <= k <= len(first_tokens):
        raise ValueError(f"k: must be from 1 to {len(first_tokens)}, the number of candidates, not {k}")
    if first_tokens.min() < 0 or first_tokens.max() >= first_logits.shape[1]:
        raise ValueError(f"first_tokens: must be from 0 to {first_logits.shape[1] - 1}, not {int(first_tokens.min())} to {int(first_tokens.max())}")
    return first_logits[:, first_tokens].topk(k, dim=1).indices


def _token_losses(logits: Tensor, labels: Tensor, name: str = "labels", label_smoothing: float = 0.0, shift: int = 0) -> Tensor:
    """(B, L - shift) cross entropies, 0 at ignored labels."""
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or len(logits) == 0:
        raise ValueError(f"logits, {name}: must be (B, L, V) and (B, L) with B > 0, not {tuple(logits.shape)} and {tuple(labels.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits: must be floating, not {logits.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: must be int64, not {labels.dtype}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing).view_as(labels)
