"""Metrics of the published evaluations, in percent, that no well-kept library has.

Captions (COCO, TVC, YC2C) are scored by CIDEr and its companions: use pycocoevalcap, which wraps the official scripts; BLEU is in sacrebleu.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
# The evaluation puts back one forgotten apostrophe in these words, and takes one out of a single word.
_CONTRACTIONS = """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't
    couldn't've hadn't've mightn't've shouldn't've wouldn't've could've might've must've not've should've would've
    he'd he's it'd it'll they'd they'll they're they've we've you'd you'll you're you've he'd've it'd've she'd've they'd've we'd've you'd've
    somebody'll somebody's someone'd someone'll someone's something'd something'll somebody'd've someone'd've something'd've
    how'd how'll how's that's there'd there're there's there'd've what'll what're what's what've when's where'd where's where've who'd who'll who's who've who'd've
    why'll why're why's ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at
""".split()
_REPAIRED = {word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


class NlvrScore(NamedTuple):
    """NLVR2's scores in percent."""

    accuracy: float
    consistency: float


def exact_match(predictions: Sequence[Any], targets: Sequence[Any]) -> float:
    """How many predictions equal their targets, in percent: GQA's accuracy over strings, NLVR2's, TVQA's and How2QA's.

    Raises:
        ValueError: different lengths, or nothing to score.
    """
    _check_lengths(predictions=predictions, targets=targets)
    return _percent(bool(prediction == target) for prediction, target in zip(_plain(predictions), _plain(targets), strict=True))


def nlvr_score(predictions: Sequence[bool], labels: Sequence[bool], sentences: Sequence[Hashable]) -> NlvrScore:
    """NLVR2 (Suhr et al. 2019): accuracy over the pairs of a sentence and two images, and consistency, the share of distinct sentences that are judged right every time.

    Args:
        predictions, labels: is the sentence true? (`fastadapt.training.predict_true`) Bools, or 0 and 1.
        sentences: the sentences or their ids.

    Raises:
        ValueError: different lengths, nothing to score, or a judgement that is none.
    """
    _check_lengths(predictions=predictions, labels=labels, sentences=sentences)
    judged, true, ids = (_plain(values) for values in (predictions, labels, sentences))
    for name, values in (("predictions", judged), ("labels", true)):
        if wrong := [value for value in values if value not in (False, True)]:
            raise ValueError(f"{name}: must be bools, or 0 and 1, not {wrong[0]!r}")
    right = [prediction == label for prediction, label in zip(judged, true, strict=True)]
    always = dict.fromkeys(ids, True)
    for sentence, good in zip(ids, right, strict=True):
        always[sentence] &= good
    return NlvrScore(_percent(right), _percent(always.values()))


def normalize_answer(answer: str) -> str:
    """An answer as the official VQA evaluation compares it: no punctuation, lower case, digits for number words up to ten, no articles, contractions with their apostrophe.

    >>> normalize_answer("The two cats, dont know!")
    "2 cats don't know"
    """
    text = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip())
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_REPAIRED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    r"""VQA's soft accuracy in percent (Antol et al. 2015, section 3), with the official normalisation and leave-one-out rule.

    For each question the mean over its ten human answers i of :math:`\min(1, |\{j \ne i : answer_j = prediction\}| / 3)`, then the mean over the questions. As in the official
    evaluation the prediction is normalised (`normalize_answer`), while the human answers only lose their punctuation, and only if they are not all equal.

    Args:
        predictions: one answer for each question.
        answers: the human answers to each question, at least one.

    Raises:
        ValueError: different lengths, nothing to score, or a question without human answers.
    """
    _check_lengths(predictions=predictions, answers=answers)
    return _percent(_soft_accuracy(prediction, humans, n) for n, (prediction, humans) in enumerate(zip(predictions, answers, strict=True)))


def retrieval_recall(similarity: Tensor, image_of_caption: Tensor | Sequence[int], ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall at K in percent, as in UniAdapter's tables: ``"TR@K"``, one of the image's captions is among the K that score highest for it; ``"IR@K"``, the caption's image
    is among the K that score highest for it; ``"TR mean"`` and ``"IR mean"`` over the K, and ``"mean"`` of the two.

    Of equal scores the wrong candidate counts as the better one, so a model whose scores are all alike finds nothing.

    Args:
        similarity: (images, captions), for instance matching logits; pairs that a first stage dropped hold one value below all others.
        image_of_caption: (captions,), the row of each caption's image; every image has at least one.
        ks: the K.

    Raises:
        ValueError: a shape that does not fit, NaN, an index outside the images, an image without captions, or a K below 1.
    """
    owners = torch.as_tensor(image_of_caption, device=similarity.device)
    similarity = similarity if similarity.is_floating_point() else similarity.double()
    if similarity.dim() != 2 or similarity.numel() == 0 or owners.shape != similarity.shape[1:]:
        raise ValueError(f"similarity, image_of_caption: must be (images, captions) and (captions,), not {tuple(similarity.shape)} and {tuple(owners.shape)}")
    if owners.is_floating_point() or owners.dtype == torch.bool:
        raise ValueError(f"image_of_caption: must be whole numbers, not {owners.dtype}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: must be positive numbers, not {list(ks)}")
    if similarity.isnan().any():
        raise ValueError("similarity: must not hold NaN")
    images = torch.arange(len(similarity), device=similarity.device)
    if owners.min() < 0 or owners.max() >= len(images):
        raise ValueError(f"image_of_caption: must be from 0 to {len(images) - 1}, not {int(owners.min())} to {int(owners.max())}")
    own = owners == images[:, None]
    if not own.any(1).all():
        raise ValueError(f"image_of_caption: no caption of image {int(own.any(1).logical_not().nonzero()[0])}")
    best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    mine = similarity[owners, torch.arange(len(owners), device=owners.device)]
    ranks = {"TR": ((similarity >= best) & ~own).sum(1), "IR": ((similarity >= mine) & ~own).sum(0)}
    recalls = {f"{way}@{k}": _percent((rank < k).tolist()) for way, rank in ranks.items() for k in ks}
    means = {f"{way} mean": sum(recalls[f"{way}@{k}"] for k in ks) / len(ks) for way in ranks}
    return recalls | means | {"mean": sum(means.values()) / len(means)}


def _without_punctuation(text: str) -> str:
    """A mark next to a space, or any mark in a text with a number such as 10,000, disappears; other marks become spaces; full stops stay in front of digits only."""
    stripped = text
    for mark in _MARKS:
        gone = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        stripped = stripped.replace(mark, "" if gone else " ")
    return re.sub(r"\.(?!\d)", "", stripped)


def _soft_accuracy(prediction: str, humans: Sequence[str], question: int) -> float:
    if isinstance(humans, str) or not humans:
        raise ValueError(f"answers[{question}]: must be a list of at least one answer, not {humans!r}")
    if len(set(humans)) > 1:
        humans = [_without_punctuation(human) for human in humans]
    prediction = normalize_answer(prediction)
    matches = [human == prediction for human in humans]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _plain(values: Sequence[Any]) -> list[Any]:
    """Tensors of one number as that number: two that are equal are two keys of a dictionary."""
    return [value.item() if isinstance(value, Tensor) else value for value in values]


def _check_lengths(**sequences: Sequence[Any]) -> None:
    lengths = {name: len(sequence) for name, sequence in sequences.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ValueError(f"{', '.join(lengths)}: must have the same length, at least 1, not {', '.join(map(str, lengths.values()))}")


def _percent(shares: Iterable[float]) -> float:
    shares = list(shares)
    return 100.0 * sum(shares) / len(shares)
