"""Metrics against recorded scores and hand-made examples."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from fastadapt.training import exact_match, nlvr_score, normalize_answer, retrieval_recall, vqa_accuracy
from tests.golden import FOLDER

RECORDED = json.loads((FOLDER / "loop_vqa_accuracy.json").read_text())
QUESTIONS = RECORDED["questions"]


@pytest.mark.parametrize("question", QUESTIONS, ids=[repr(q["prediction"]) for q in QUESTIONS])
def test_recorded_vqa_accuracy(question: dict[str, Any]) -> None:
    assert normalize_answer(question["prediction"]) == question["prediction_compared"]
    got = vqa_accuracy([question["prediction"]], [question["answers"]])
    assert got == pytest.approx(question["accuracy_percent_unrounded"], rel=1e-14)


def test_recorded_vqa_accuracy_of_all_and_of_each_type() -> None:
    def score(questions: list[dict[str, Any]]) -> float:
        return round(vqa_accuracy([q["prediction"] for q in questions], [q["answers"] for q in questions]), 2)

    assert score(QUESTIONS) == RECORDED["overall"]
    for key, recorded in (("type", RECORDED["per_question_type"]), ("kind", RECORDED["per_answer_type"])):
        assert {name: score([q for q in QUESTIONS if q[key] == name]) for name in recorded} == recorded


@pytest.mark.parametrize(
    "answer, normalized",
    [
        ("The two cats, dont know!", "2 cats don't know"),
        ("None", "0"),
        ("TEN", "10"),
        ("a", ""),
        ("", ""),
        ("1,000 - 2", "1000 2"),
        ("1,000-2", "10002"),
        ("left-right", "left right"),
        ("x-y z- w", "xy z w"),
        ("x-y z -w", "xy z w"),
        ("x-y z-\tw", "xy z w"),
        ("3.5", "3.5"),
        (".5 m.", ".5 m"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("yall'd've", "y'all'd've"),
        ("what's", "what's"),
        ("wed", "wed"),
        ("a\tb\nc", "b c"),
        ("{x}", "x"),
    ],
)
def test_normalized_answers(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize("n, percent", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (9, 100), (10, 100)])
def test_leave_one_out(n: int, percent: float) -> None:
    assert vqa_accuracy(["yes"], [["yes"] * n + ["no"] * (10 - n)]) == pytest.approx(percent, rel=1e-14)


def test_human_answers_are_cleaned_only_if_they_differ() -> None:
    """So does the official evaluation, which also leaves the space in that a mark at the end becomes."""
    assert vqa_accuracy(["u.s."], [["u.s."] * 10]) == 0
    assert vqa_accuracy(["u.s."], [["u.s."] * 9 + ["no"]]) == 100
    assert vqa_accuracy(["yes!"], [["yes!"] * 9 + ["no"]]) == 0


def test_exact_match() -> None:
    assert exact_match(["a", "b", "c", "C"], ["a", "b", "d", "c"]) == 50
    assert type(score := exact_match(torch.tensor([1, 2]), torch.tensor([1, 3]))) is float and score == 50


def test_nlvr_consistency_counts_sentences() -> None:
    score = nlvr_score([True, True, False, True], [False, True, False, True], ["s", "s", "t", "u"])
    assert score.accuracy == 75 and score.consistency == pytest.approx(200 / 3, rel=1e-14)
    assert nlvr_score(torch.tensor([True, False]), torch.tensor([1, 0]), [1, 1]) == (100, 100)
    assert nlvr_score([1, 0], np.array([True, True]), torch.tensor([7, 7])) == (50, 0)


def brute_force(similarity: list[list[float]], owners: list[int], k: int) -> tuple[float, float]:
    texts = [any(owners[t] == i for t in sorted(range(len(owners)), key=lambda t: -row[t])[:k]) for i, row in enumerate(similarity)]
    images = [owner in sorted(range(len(similarity)), key=lambda i: -similarity[i][t])[:k] for t, owner in enumerate(owners)]
    return 100 * sum(texts) / len(texts), 100 * sum(images) / len(images)


def test_retrieval_against_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    owners = [0, 0, 1, 2, 2, 2, 3, 4, 5, 5]
    similarity = torch.randn(6, 10, generator=generator) + 0.8 * torch.nn.functional.one_hot(torch.tensor(owners), 6).T
    got = retrieval_recall(similarity, owners, ks=(1, 2, 4, 20))
    for k in (1, 2, 4, 20):
        assert (got[f"TR@{k}"], got[f"IR@{k}"]) == pytest.approx(brute_force(similarity.tolist(), owners, k), rel=1e-14)
    assert 0 < got["TR@1"] < got["TR@4"] <= got["TR@20"] == 100 and 0 < got["IR@1"] < got["IR@4"]
    assert got["TR mean"] == pytest.approx(sum(got[f"TR@{k}"] for k in (1, 2, 4, 20)) / 4, rel=1e-14)
    assert got["mean"] == pytest.approx((got["TR mean"] + got["IR mean"]) / 2, rel=1e-14)
    assert list(retrieval_recall(similarity, torch.tensor(owners))) == ["TR@1", "TR@5", "TR@10", "IR@1", "IR@5", "IR@10", "TR mean", "IR mean", "mean"]


def test_equal_scores_find_nothing() -> None:
    got = retrieval_recall(torch.zeros(4, 8), [0, 0, 1, 1, 2, 2, 3, 3], ks=(1, 3, 4, 7))
    assert [got[f"IR@{k}"] for k in (1, 3, 4)] == [0, 0, 100] and [got[f"TR@{k}"] for k in (1, 4, 7)] == [0, 0, 100]
    assert retrieval_recall(torch.tensor([[3, 1], [1, 3]]), [0, 1], ks=(1,))["mean"] == 100  # scores that are whole numbers
    dropped = torch.full((2, 2), -torch.inf)
    assert retrieval_recall(dropped, [0, 1], ks=(1,))["mean"] == 0


def test_one_image_with_one_caption() -> None:
    assert set(retrieval_recall(torch.zeros(1, 1), [0]).values()) == {100.0}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: exact_match([], []), "predictions, targets: .*not 0, 0"),
        (lambda: exact_match(["a"], []), "predictions, targets: .*not 1, 0"),
        (lambda: nlvr_score([True], [True], ["a", "b"]), "predictions, labels, sentences: .*not 1, 1, 2"),
        (lambda: nlvr_score(["False"], [True], ["a"]), "predictions: must be bools, or 0 and 1, not 'False'"),
        (lambda: nlvr_score([True], torch.tensor([2]), ["a"]), "labels: must be bools, or 0 and 1, not 2"),
        (lambda: vqa_accuracy(["a"], []), "predictions, answers: .*not 1, 0"),
        (lambda: vqa_accuracy(["a", "b"], [["a"], []]), r"answers\[1\]: .*not \[\]"),
        (lambda: vqa_accuracy(["a"], ["abc"]), r"answers\[0\]: must be a list .*not 'abc'"),
        (lambda: retrieval_recall(torch.zeros(2, 3), [0, 1]), r"similarity, image_of_caption: .*not \(2, 3\) and \(2,\)"),
        (lambda: retrieval_recall(torch.zeros(0, 0), []), "similarity, image_of_caption"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [0, 1], ks=(0, 1)), r"ks: .*not \[0, 1\]"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [0, 1], ks=()), r"ks: .*not \[\]"),
        (lambda: retrieval_recall(torch.tensor([[torch.nan]]), [0]), "similarity: must not hold NaN"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [0, 2]), "image_of_caption: must be from 0 to 1, not 0 to 2"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [-1, 0]), "image_of_caption: must be from 0 to 1, not -1 to 0"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [0.0, 1.0]), "image_of_caption: must be whole numbers, not torch.float32"),
        (lambda: retrieval_recall(torch.zeros(2, 2), [0, 0]), "image_of_caption: no caption of image 1"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
