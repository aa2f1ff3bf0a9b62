"""The demo's data: held-out scans and layouts, determinism, and answers derived a second time from the pixels' own digits."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fastadapt.training.demo import digits as D
from fastadapt.training.demo.fit import exact, majority, question_only
from fastadapt.training.demo.tasks import EOS, OBJECTIVES, PAD, TASKS, VOCABULARY, Batches, Examples, decode, encode, make, make_objective

WORDS = dict(zip(D.DIGITS, range(10), strict=True))
TARGETS = load_digits().target


def cells(examples: Examples, picture: int, i: int) -> dict[str, int]:
    """Cell to digit, from the labels of the scans that the picture is made of."""
    return {D.CELLS[c]: int(TARGETS[s]) for c, s in enumerate(examples.scenes[picture].scans[i]) if s >= 0}


def yes(truth: bool) -> str:
    return "yes" if truth else "no"


def true(truth: bool) -> str:
    return "true" if truth else "false"


def expected(question: str, seen: list[dict[str, int]]) -> str:
    """The answer to a task's or objective's question, by reading it."""
    first = seen[0]
    where = "(top left|top right|bottom left|bottom right)"
    if found := re.fullmatch(f"vqa : what is at {where} \\?", question):
        return D.DIGITS[first[found[1]]]
    if found := re.fullmatch(f"vqa : is {where} even \\?", question):
        return yes(first[found[1]] in (0, 2, 4, 6, 8))
    if found := re.fullmatch(r"gqa : what is left of the (\w+) \?", question):
        (row,) = {cell.split()[0] for cell, digit in first.items() if digit == WORDS[found[1]]}
        assert first[f"{row} right"] == WORDS[found[1]]
        return D.DIGITS[first[f"{row} left"]]
    if question == "gqa : how many digits are there ?":
        return D.DIGITS[len(first)]
    if found := re.fullmatch(f"gqa : is {where} larger than {where} \\?", question):
        assert found[1] != found[2]
        return yes(first[found[1]] > first[found[2]])
    if question == "nlvr : both have the same number of digits":
        return true(len(first) == len(seen[1]))
    if question == "nlvr : the first has more digits":
        return true(len(first) > len(seen[1]))
    if found := re.fullmatch(r"nlvr : the (first|second) contains a (\w+)", question):
        return true(WORDS[found[2]] in seen[found[1] == "second"].values())
    said = " and ".join(f"{D.DIGITS[digit]} {cell}" for cell, digit in first.items())
    if question == "caption :":
        return said
    if question.startswith("match : "):
        return true(question == f"match : {said}")
    if found := re.fullmatch(f"(first |second )?{where}", question):
        return D.DIGITS[seen[found[1] == "second "][found[2]]]
    raise AssertionError(f"unknown question {question!r}")


@pytest.mark.parametrize("name", [*TASKS, *(f"objective {o}" for o in OBJECTIVES if o != "infill")])
@pytest.mark.parametrize("split", D.SPLITS)
def test_answers(name: str, split: str) -> None:
    examples = make_objective(name.split()[1], 300, split, 3) if " " in name else make(name, 300, split, 3)
    for i, (question, answer) in enumerate(zip(examples.questions, examples.answers, strict=True)):
        assert answer == expected(question, [cells(examples, k, i) for k in range(len(examples.scenes))]), question


def test_statements_of_the_infill_objective_are_true() -> None:
    examples, kinds = make_objective("infill", 600, "train", 3), set()
    beside = examples.feats.flatten(1).any(1)
    assert 0.25 < beside.float().mean() < 0.42
    for i, (masked, text) in enumerate(zip(examples.questions, examples.answers, strict=True)):
        words = text.split()
        assert "<mask>" in masked and all(m in ("<mask>", w) for m, w in zip(masked.split(), words, strict=True))
        seen = cells(examples, 0, i)
        n = [WORDS[w] for w in words if w in WORDS]
        if not beside[i]:
            continue
        if re.match("there are", text):
            kinds.add("count")
            assert len(seen) == n[0]
        elif found := re.fullmatch(r"the (\w+) at (\w+ \w+) is (even|odd) \.", text):
            kinds.add("parity")
            assert seen[found[2]] == WORDS[found[1]] and (found[3] == "odd") == bool(WORDS[found[1]] & 1)
        elif found := re.fullmatch(r"\w+ at (\w+ \w+) is larger than \w+ at (\w+ \w+) \.", text):
            kinds.add("size")
            assert [seen[found[1]], seen[found[2]]] == n and n[0] > n[1]
        else:
            kinds.add("place")
            one, relation, two = re.fullmatch(r"(\w+) is (left of|right of|above|below) (\w+) \.", text).groups()  # type: ignore[union-attr]
            column = {"left of": ("left", "right"), "right of": ("right", "left")}
            row = {"above": ("top", "bottom"), "below": ("bottom", "top")}
            if relation in column:
                pairs = [tuple(f"{r} {c}" for c in column[relation]) for r in ("top", "bottom")]
            else:
                pairs = [tuple(f"{r} {c}" for r in row[relation]) for c in ("left", "right")]
            assert any(seen.get(a) == WORDS[one] and seen.get(b) == WORDS[two] for a, b in pairs)
    assert kinds == {"count", "parity", "size", "place"}


def test_pretraining_never_asks_a_question_of_the_tasks() -> None:
    asked = {q.split(" : ", 1)[1] for task in ("vqa", "gqa", "nlvr") for q in make(task, 2000, "train", 0).questions}
    for objective in OBJECTIVES:
        examples = make_objective(objective, 2000, "train", 0)
        texts = " | ".join(q + " | " + a for q, a in zip(examples.questions, examples.answers, strict=True))
        assert not [q for q in asked if q in texts]
        assert objective == "infill" or not any(prompt in texts for prompt in ("vqa :", "gqa :", "nlvr :"))


def test_scans_and_layouts_are_held_out() -> None:
    pools = [set(D.scans_of(split).tolist()) for split in D.SPLITS]
    assert sum(map(len, pools)) == len(set.union(*pools)) == 1797
    for pool in pools:
        assert set(TARGETS[sorted(pool)]) == set(range(10))
    layouts = []
    for split, pool in zip(D.SPLITS, pools, strict=True):
        scenes = [s for task in TASKS for s in make(task, 500, split, 1).scenes] + [s for o in OBJECTIVES for s in make_objective(o, 500, split, 1).scenes]
        assert {int(s) for scene in scenes for s in scene.scans.flat if s >= 0} <= pool
        layouts.append({tuple(row) for scene in scenes for row in scene.digits.tolist()})
        assert {sum(d != D.EMPTY for d in row) for row in layouts[-1]} == {1, 2, 3, 4}
    assert not (layouts[0] & layouts[1] or layouts[0] & layouts[2] or layouts[1] & layouts[2])


def test_pictures_are_the_scans() -> None:
    scenes = D.draw(20, "test", np.random.default_rng(0))
    images, pixels, patches, boxes = load_digits().images / 16, scenes.pixels(), scenes.patches(), D.patch_boxes()
    for i in range(20):
        for cell, scan in enumerate(scenes.scans[i]):
            x1, x2, y1, y2 = (boxes[cell] * 16).astype(int)
            want = images[scan] if scan >= 0 else np.zeros((8, 8))
            assert np.allclose(pixels[i, y1:y2, x1:x2], want) and np.allclose(patches[i, cell], want.ravel())
            assert D.CELLS[cell] == f"{'top' if y1 == 0 else 'bottom'} {'left' if x1 == 0 else 'right'}"


@pytest.mark.parametrize("task", TASKS)
def test_deterministic_for_a_seed(task: str) -> None:
    one, same, other = make(task, 64, "train", 5), make(task, 64, "train", 5), make(task, 64, "train", 6)
    assert one.questions == same.questions and one.answers == same.answers and torch.equal(one.feats, same.feats)
    assert not torch.equal(one.feats, other.feats)
    first, again = list(Batches(one, 16, 1)), list(Batches(same, 16, 1))
    assert len(first) == 4 and all(torch.equal(a["labels"], b["labels"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["labels"], next(iter(Batches(one, 16, 2)))["labels"])


def test_one_pair_of_scenes() -> None:
    """The second is drawn until it makes the statement as true as is wanted: from one scene alone it may never come."""
    assert all(len(make("nlvr", 1, "train", seed).questions) == 1 for seed in range(8))


def test_batches() -> None:
    pair, single = make("nlvr", 8, "val", 0), make("vqa", 8, "val", 0)
    batch = pair.batch(slice(0, 4))
    feats, boxes, img, obj = batch["vis_inputs"]
    assert feats.shape == (4, 8, 64) and boxes.shape == (4, 8, 4) and img.tolist() == [[0] * 4 + [1] * 4] and obj.tolist() == [[0, 1, 2, 3] * 2]
    assert single.batch(slice(0, 4))["vis_inputs"][0].shape == (4, 4, 64)
    assert all((row == PAD).nonzero().flatten().tolist() == list(range(len(encode(q)), len(row))) for row, q in zip(pair.input_ids, pair.questions, strict=True))


def test_words() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    ids = torch.tensor([[EOS, *encode("seven top left"), EOS, PAD], [EOS, EOS, PAD, PAD, PAD, PAD], [EOS, *encode("top top top top top")]])
    assert decode(ids) == ["seven top left", "", "top top top top top"]


def test_baselines() -> None:
    def fake(pairs: list[tuple[str, str]]) -> Examples:
        empty = torch.zeros(0)
        return Examples((), [q for q, _ in pairs], [a for _, a in pairs], empty, empty, empty)

    train, test = fake([("a", "1"), ("a", "1"), ("a", "2"), ("b", "2"), ("b", "2")]), fake([("a", "1"), ("b", "2"), ("b", "1"), ("c", "2")])
    assert majority(train, test) == 50.0 and question_only(train, test) == 75.0
    assert exact(["x", "y"], ["x", "z"]) == 50.0


def test_errors() -> None:
    with pytest.raises(ValueError, match="task: must be one of vqa"):
        make("caption2", 4, "train", 0)
    with pytest.raises(ValueError, match="split: must be one of train"):
        make("vqa", 4, "dev", 0)
    with pytest.raises(ValueError, match="objective"):
        make_objective("vqa", 4, "train", 0)
