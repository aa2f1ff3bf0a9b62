"""The demo's vocabulary, its four tasks, and the generic objectives its base is pretrained on.

Every example is made from a scene of `digits`, so its answer is known by construction. Tasks carry the published prompts ("vqa :", "gqa :", "nlvr :", "caption :").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadapt.training.demo.digits import CELLS, DIGITS, EMPTY, PATCHES, Scenes, draw, patch_boxes, split_index

TASKS = ("vqa", "gqa", "nlvr", "caption")
OBJECTIVES = ("caption", "region", "infill", "match")

_WORDS = (
    "vqa gqa nlvr caption match : ? . and or top bottom left right what which is are there the a digit digits at even odd how many larger smaller than of above below beside "
    "both scenes scene have has same number first second contains more largest smallest sum true false yes no not to in with picture"
)
VOCABULARY = ("<s>", "<pad>", "</s>", "<mask>", *DIGITS, *_WORDS.split(), *(f"<vis_extra_id_{i}>" for i in reversed(range(PATCHES))))
BOS, PAD, EOS, MASK = range(4)
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_SPOKEN = [w for w in VOCABULARY if not w.startswith("<")]

Sample = tuple[list[int], str, str]
"""Rows of the pictures (one or two scenes), question, answer."""


def encode(text: str) -> list[int]:
    return [_IDS[word] for word in text.split()]


def decode(ids: Tensor) -> list[str]:
    """Generated ids (N, L) as text: what stands between the start token and the first end token."""
    texts = []
    for row in ids.tolist():
        row = row[1:]
        row = row[: row.index(EOS)] if EOS in row else row
        texts.append(" ".join(VOCABULARY[i] for i in row if i != PAD))
    return texts


@dataclass(frozen=True)
class Examples:
    """N examples of one task as tensors: ``feats`` (N, V, 64), V = 4 cells of one picture or 8 of two; ``input_ids`` (N, L); ``labels`` (N, M), -100 where padded."""

    scenes: tuple[Scenes, ...]
    questions: list[str]
    answers: list[str]
    feats: Tensor
    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, rows: Tensor | slice) -> dict[str, Any]:
        """What `VLBart.forward` takes."""
        feats = self.feats[rows]
        images = feats.shape[1] // PATCHES
        boxes = torch.from_numpy(patch_boxes()).repeat(images, 1).expand(len(feats), -1, -1)
        order = torch.arange(images * PATCHES)
        ids = ((order // PATCHES)[None], (order % PATCHES)[None])
        return {"input_ids": self.input_ids[rows], "labels": self.labels[rows], "vis_inputs": (feats, boxes, *ids)}


@dataclass(frozen=True)
class Batches:
    """Whole batches of examples, shuffled anew in every pass, the same for the same seed and pass."""

    examples: Examples
    size: int
    seed: int = 0

    def __len__(self) -> int:
        return len(self.examples) // self.size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(self.examples), generator=torch.Generator().manual_seed(self.seed))
        for i in range(len(self)):
            yield self.examples.batch(order[i * self.size : (i + 1) * self.size])


def _pad(rows: list[list[int]], value: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _examples(scenes: tuple[Scenes, ...], texts: list[tuple[str, str]], blank: np.ndarray | None = None) -> Examples:
    questions, answers = [q for q, _ in texts], [a for _, a in texts]
    feats = np.concatenate([s.patches() for s in scenes], 1)
    if blank is not None:
        feats[blank] = 0.0
    return Examples(scenes, questions, answers, torch.from_numpy(feats), _pad([encode(q) for q in questions], PAD), _pad([[*encode(a), EOS] for a in answers], -100))


def _cells(digits: np.ndarray) -> list[int]:
    return np.flatnonzero(digits != EMPTY).tolist()


def caption_of(digits: np.ndarray) -> str:
    """ "seven top left and two bottom right": every digit and its cell, in reading order."""
    return " and ".join(f"{DIGITS[digits[c]]} {CELLS[c]}" for c in _cells(digits))


def _vqa(digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    cell = rng.choice(_cells(digits))
    if rng.random() < 0.6:
        return f"what is at {CELLS[cell]} ?", DIGITS[digits[cell]]
    return f"is {CELLS[cell]} even ?", "yes" if digits[cell] % 2 == 0 else "no"


def _gqa(digits: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    cells = _cells(digits)
    kind = rng.integers(3)
    beside = [(c, c + 1) for c in (0, 2) if c in cells and c + 1 in cells and (digits == digits[c + 1]).sum() == 1]
    if kind == 0 and beside:
        left, right = beside[rng.integers(len(beside))]
        return f"what is left of the {DIGITS[digits[right]]} ?", DIGITS[digits[left]]
    if kind == 1:
        return "how many digits are there ?", DIGITS[len(cells)]
    a, b = rng.permutation(cells)[:2]
    return f"is {CELLS[a]} larger than {CELLS[b]} ?", "yes" if digits[a] > digits[b] else "no"


def _nlvr(first: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> tuple[int, str, str]:
    """Which scene of ``pool`` stands second, a statement about the pair, and whether it is true: as often as not, for every kind of statement."""
    kind, wanted, which = rng.integers(3), rng.random() < 0.5, rng.integers(2)
    while True:
        j = int(rng.integers(len(pool)))
        one, two = len(_cells(first)), len(_cells(pool[j]))
        if kind == 0:
            text, truth = "both have the same number of digits", one == two
        # Nothing has more than four digits, and nothing fewer than one.
        elif kind == 1 and (one > 1 or not wanted):
            text, truth = "the first has more digits", one > two
        else:
            there = (first, pool[j])[which]
            digit = rng.choice(there[there != EMPTY]) if wanted else rng.integers(10)
            text, truth = f"the {('first', 'second')[which]} contains a {DIGITS[digit]}", bool((there == digit).any())
        if truth == wanted:
            return j, text, "true" if truth else "false"


def make(task: str, n: int, split: str, seed: int) -> Examples:
    """``n`` examples of one of the four tasks from a split's scans and layouts; the same for the same arguments."""
    if task not in TASKS:
        raise ValueError(f"task: must be one of {', '.join(TASKS)}, not {task!r}")
    rng = np.random.default_rng([seed, TASKS.index(task), split_index(split)])
    if task == "nlvr":
        first, pool = draw(n, split, rng), draw(max(n, 64), split, rng)  # a few scenes may not have the one that is wanted
        chosen = [_nlvr(digits, pool.digits, rng) for digits in first.digits]
        return _examples((first, pool[np.array([j for j, _, _ in chosen])]), [(f"nlvr : {text}", answer) for _, text, answer in chosen])
    scenes = draw(n, split, rng, least=2 if task == "gqa" else 1)
    if task == "caption":
        return _examples((scenes,), [("caption :", caption_of(d)) for d in scenes.digits])
    say: Callable[..., tuple[str, str]] = _vqa if task == "vqa" else _gqa
    return _examples((scenes,), [(f"{task} : {q}", a) for q, a in (say(d, rng) for d in scenes.digits)])


def _region(scenes: tuple[Scenes, ...], i: int, rng: np.random.Generator) -> tuple[str, str]:
    which = rng.integers(len(scenes))
    digits = scenes[which].digits[i]
    cell = rng.choice(_cells(digits))
    return f"{'' if len(scenes) == 1 else ('first ', 'second ')[which]}{CELLS[cell]}", DIGITS[digits[cell]]


def _match(digits: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> tuple[str, str]:
    """The picture's own caption, or one with a digit drawn anew, or another picture's."""
    if rng.random() < 0.5:
        return f"match : {caption_of(digits)}", "true"
    said = digits.copy()
    if rng.random() < 0.5:
        said[rng.choice(_cells(said))] = rng.integers(10)
    else:
        said = other
    return f"match : {caption_of(said)}", "true" if (said == digits).all() else "false"


def _statement(digits: np.ndarray, rng: np.random.Generator) -> str:
    """A sentence about a picture."""
    cells = _cells(digits)
    a = cells[rng.integers(len(cells))]
    kind = rng.integers(4)
    if kind == 0:
        return f"there are {DIGITS[len(cells)]} digits in the picture ."
    if kind == 1 and len(cells) > 1:
        low, high = sorted(digits[c] for c in rng.permutation(cells)[:2])
        if low != high:
            return f"{DIGITS[high]} at {CELLS[list(digits).index(high)]} is larger than {DIGITS[low]} at {CELLS[list(digits).index(low)]} ."
    if kind == 2:
        pairs = [(c, c + 1, "left of", "right of") for c in (0, 2)] + [(c, c + 2, "above", "below") for c in (0, 1)]
        pairs = [p for p in pairs if p[0] in cells and p[1] in cells]
        if pairs:
            one, two, word, back = pairs[rng.integers(len(pairs))]
            return f"{DIGITS[digits[one]]} is {word} {DIGITS[digits[two]]} ." if rng.random() < 0.5 else f"{DIGITS[digits[two]]} is {back} {DIGITS[digits[one]]} ."
    return f"the {DIGITS[digits[a]]} at {CELLS[a]} is {('even', 'odd')[digits[a] % 2]} ."


def _text(rng: np.random.Generator) -> str:
    """Text that needs no picture: counting, size, parity, or any words of the vocabulary."""
    kind = rng.integers(5)
    if kind == 0:
        start = rng.integers(7)
        return " ".join(DIGITS[start : start + rng.integers(3, 7)])
    if kind == 1:
        low, high = sorted(rng.choice(10, 2, replace=False))
        return f"{DIGITS[high]} is larger than {DIGITS[low]} ." if rng.random() < 0.5 else f"{DIGITS[low]} is smaller than {DIGITS[high]} ."
    if kind == 2:
        digit = rng.integers(10)
        return f"{DIGITS[digit]} is {('even', 'odd')[digit % 2]} ."
    return " ".join(rng.choice(_SPOKEN, rng.integers(3, 11)))


def _infill(text: str, rng: np.random.Generator) -> tuple[str, str]:
    words = text.split()
    hidden = rng.random(len(words)) < 0.3
    hidden[rng.integers(len(words))] = True
    return " ".join("<mask>" if h else w for w, h in zip(words, hidden, strict=True)), text


def make_objective(objective: str, n: int, split: str, seed: int) -> Examples:
    """``n`` examples of a pretraining objective: ``caption``; ``region``, naming a cell of one of two pictures; ``infill``, restoring masked sentences, a third of them beside a
    picture; ``match``, whether a caption fits a picture. None contains a question or statement of the four tasks."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective: must be one of {', '.join(OBJECTIVES)}, not {objective!r}")
    rng = np.random.default_rng([seed, 100 + OBJECTIVES.index(objective), split_index(split)])
    scenes = draw(n, split, rng)
    if objective == "caption":
        return _examples((scenes,), [("caption :", caption_of(d)) for d in scenes.digits])
    other = draw(n, split, rng)[rng.permutation(n)]
    if objective == "region":
        return _examples((scenes, other), [_region((scenes, other), i, rng) for i in range(n)])
    if objective == "match":
        return _examples((scenes,), [_match(d, o, rng) for d, o in zip(scenes.digits, other.digits, strict=True)])
    blank = rng.random(n) < 2 / 3
    return _examples((scenes,), [_infill(_text(rng) if b else _statement(d, rng), rng) for d, b in zip(scenes.digits, blank, strict=True)], blank)
