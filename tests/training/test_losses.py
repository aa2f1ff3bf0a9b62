"""The published losses against recorded training steps, and their edges."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fastadapt.training import answer_loss, draw_answer, predict_true, sequence_loss, shortlist, weighted_answer_loss
from tests import golden
from tests.hosts.published import converted, patched_model
from tests.tolerance import assert_matches_recorded

EPS = torch.finfo(torch.float64).eps


def test_recorded_vqa_loss() -> None:
    case = golden.load_case("vla_vqa_loss_soft_scores_bart")
    hidden, weight = case.inputs["hidden_states"].double().requires_grad_(), case.params["lm_head.weight"].double().requires_grad_()
    loss = answer_loss(hidden @ weight.T, case.inputs["target_ids"], case.inputs["scores"])
    loss.backward()
    assert_matches_recorded("loss", loss.reshape(1), case.outputs["loss"])
    assert_matches_recorded("hidden_states", hidden.grad, case.input_grads["hidden_states"])
    assert_matches_recorded("lm_head.weight", weight.grad, case.param_grads["lm_head.weight"])


def test_recorded_vqa_step_of_a_whole_model() -> None:
    case = golden.load_case("vla_vlbart_vqa_train_step_soft_scores")
    model, _ = patched_model(case, torch.float64)
    x = golden.to(case.inputs, torch.float64)
    logits = model(input_ids=x["input_ids"], vis_inputs=(x["vis_feats"], x["boxes"]), labels=x["labels"]).logits
    loss = answer_loss(logits, x["labels"], x["scores"])
    loss.backward()
    assert_matches_recorded("loss", loss.reshape(1), case.outputs["loss"])
    recorded, parameters = converted(case.param_grads, "bart"), dict(model.named_parameters())
    for name, gradient in recorded.items():
        assert_matches_recorded(name, parameters[name].grad, gradient)
    assert recorded.keys() == {name for name, p in parameters.items() if p.grad is not None}


def test_recorded_weighted_loss_of_uniadapter() -> None:
    case = golden.load_case("uni_vqa_loss_and_ranking")
    tokens, questions = case.inputs["answer_ids"].masked_fill(case.inputs["answer_mask"] == 0, -100), len(case.inputs["question_ids"])
    smoothing = case.options["label_smoothing"]
    assert_matches_recorded("answer_loss", sequence_loss(case.outputs["logits"], tokens, smoothing), case.outputs["answer_loss"])
    loss = weighted_answer_loss(case.outputs["logits"], tokens, case.inputs["weights"].double(), questions, smoothing)
    assert_matches_recorded("loss", loss.reshape(1), case.outputs["loss"])


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return logits, torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100], [6, 0, -100, -100]])


def test_answers_weigh_alike_whatever_their_length() -> None:
    logits, labels = example()
    single = [F.cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(answer_loss(logits, labels), sum(single) / 3, rtol=0, atol=4 * EPS * float(sum(single)))


def test_a_sample_without_labels_or_score_adds_nothing() -> None:
    logits, labels = example()
    labels[1] = -100
    for options in ({}, {"scores": torch.tensor([1.0, 1.0, 0.0])}):
        x = logits.clone().requires_grad_()
        loss = answer_loss(x, labels, **options)
        loss.backward()
        kept = slice(0, 3, 2) if not options else slice(0, 1)
        expected = answer_loss(logits[kept], labels[kept]) * len(labels[kept]) / 3
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=4 * EPS * float(expected))
        assert (x.grad[1] == 0).all() and (x.grad[0] != 0).all() and ((x.grad[2] == 0).all() == bool(options))
    x = logits.clone().requires_grad_()
    loss = answer_loss(x, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = example(dtype)
    for loss, exact in ((answer_loss(logits, labels), answer_loss(logits.float(), labels)), (sequence_loss(logits, labels), sequence_loss(logits.float(), labels))):
        assert loss.dtype == torch.float32 and torch.equal(loss, exact)


def test_drawn_answers_follow_their_scores() -> None:
    label = {"net": 1.0, "never": 0.0, "netting": 0.6, "mesh": 0.4}
    generator, n = torch.Generator().manual_seed(0), 2000
    drawn = Counter(draw_answer(label, generator) for _ in range(n))
    assert {answer: score for answer, score in drawn} == {"net": 1.0, "netting": 0.6, "mesh": 0.4}
    for (answer, score), count in drawn.items():
        p = score / 2
        assert abs(count - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, answer
    again, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    first = [draw_answer(label, again) for _ in range(20)]
    assert first == [draw_answer(label, torch.Generator().manual_seed(0))] + first[1:] and first != [draw_answer(label, other) for _ in range(20)]


@pytest.mark.parametrize("label", [{}, {"yes": 0.0}])
def test_nothing_to_draw(label: dict[str, float]) -> None:
    assert draw_answer(label, torch.Generator()) == ("", 0.0)


def test_true_or_false() -> None:
    logits = torch.zeros(3, 2, 5)
    logits[0, 0, 3], logits[1, 0, 4], logits[0, 1, 4], logits[1, 1, 3] = 1, 1, 1, 1
    assert predict_true(logits, true_id=3, false_id=4, host="t5").tolist() == [True, False, False]
    assert predict_true(logits, true_id=3, false_id=4, host="bart").tolist() == [False, True, False]
    assert predict_true(logits[:, :1], true_id=3, false_id=4, host="t5").tolist() == [True, False, False]


def test_sequence_loss_is_minus_the_log_probability() -> None:
    logits, tokens = example()
    p = logits.softmax(-1)
    by_hand = torch.tensor([-sum(math.log(p[n, i - 1, t]) for i, t in enumerate(row) if i > 0 and t != -100) for n, row in enumerate(tokens.tolist())], dtype=torch.float64)
    torch.testing.assert_close(sequence_loss(logits, tokens, label_smoothing=0.0), by_hand, rtol=0, atol=16 * EPS * float(by_hand.max()))
    assert sequence_loss(logits, tokens)[1] == 0, "only bos: nothing is predicted"


def test_the_published_smoothing_is_the_default() -> None:
    logits, tokens = example()
    weights = torch.tensor([0.2, 0.5, 0.3])
    assert torch.equal(sequence_loss(logits, tokens), sequence_loss(logits, tokens, 0.1))
    assert torch.equal(weighted_answer_loss(logits, tokens, weights, 2), weighted_answer_loss(logits, tokens, weights, 2, 0.1))


def test_shortlist_takes_the_likeliest_first_tokens() -> None:
    first = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([3, 17, 3, 29, 8, 11])
    got = shortlist(first, tokens, 3)
    p = first.softmax(1)
    for question, chosen in enumerate(got.tolist()):
        assert len(set(chosen)) == 3
        assert [float(p[question, tokens[c]]) for c in chosen] == sorted((float(p[question, t]) for t in tokens), reverse=True)[:3]


LOGITS, LABELS = example()


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: answer_loss(LOGITS[0], LABELS), ValueError, r"logits, labels: .*not \(4, 7\) and \(3, 4\)"),
        (lambda: answer_loss(LOGITS, LABELS[:, 1:]), ValueError, r"logits, labels: .*not \(3, 4, 7\) and \(3, 3\)"),
        (lambda: answer_loss(LOGITS[:0], LABELS[:0]), ValueError, "B > 0"),
        (lambda: answer_loss(LOGITS.long(), LABELS), TypeError, "logits: must be floating, not torch.int64"),
        (lambda: answer_loss(LOGITS, LABELS.int()), TypeError, "labels: must be int64, not torch.int32"),
        (lambda: answer_loss(LOGITS, LABELS, torch.ones(2)), ValueError, r"scores: must be \(3,\) like the batch, not \(2,\)"),
        (lambda: draw_answer({"a": 1.0, "b": -0.5}, torch.Generator()), ValueError, r"soft_labels\['b'\]: .*not -0.5"),
        (lambda: draw_answer({"a": math.inf}, torch.Generator()), ValueError, r"soft_labels\['a'\]: .*not inf"),
        (lambda: predict_true(LOGITS, 1, 2, host="gpt"), ValueError, "host: must be one of t5, bart, not 'gpt'"),
        (lambda: predict_true(LOGITS[:, :1], 1, 2, host="bart"), ValueError, r"L > 1 for bart, not \(3, 1, 7\)"),
        (lambda: predict_true(LOGITS, 7, 2, host="t5"), ValueError, "true_id: .*7, not 7"),
        (lambda: predict_true(LOGITS, 1, -1, host="t5"), ValueError, "false_id: .*not -1"),
        (lambda: sequence_loss(LOGITS, LABELS.int()), TypeError, "tokens: must be int64"),
        (lambda: sequence_loss(LOGITS, LABELS[:, 1:]), ValueError, "logits, tokens"),
        (lambda: sequence_loss(LOGITS, LABELS, 1.5), ValueError, "label_smoothing: .*not 1.5"),
        (lambda: weighted_answer_loss(LOGITS, LABELS, torch.ones(2), 2), ValueError, r"weights: must be \(3,\).*not \(2,\)"),
        (lambda: weighted_answer_loss(LOGITS, LABELS, torch.ones(3), 0), ValueError, "questions: must be at least 1, not 0"),
        (lambda: shortlist(LOGITS, LABELS[0], 1), ValueError, "first_logits, first_tokens"),
        (lambda: shortlist(LOGITS[0], torch.tensor([0, -100]), 1), ValueError, "first_tokens: must be from 0 to .*not -100 to 0"),
        (lambda: shortlist(LOGITS[0], LABELS[0], 5), ValueError, "k: must be from 1 to 4, the number of candidates, not 5"),
        (lambda: shortlist(LOGITS[0], LABELS[0], 0), ValueError, "k: .*not 0"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
