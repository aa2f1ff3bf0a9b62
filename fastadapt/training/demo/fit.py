"""The demo's training loop and scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fastadapt.training.demo.tasks import Examples, decode


def fit(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[tuple[str, dict[str, Any]]],
    steps: int,
    lr: float,
    *,
    name: str = "train",
    enter: Callable[[str], Any] | None = None,
    progress: bool = True,
) -> list[float]:
    """The losses of ``steps`` steps of AdamW with the published schedule: linear warm-up over a tenth, linear decay to zero, weight decay 0.01, gradients clipped at norm 5.

    Args:
        batches: pairs of a task and what ``model`` takes.
        enter: for a patched model: ``handle.set_task``, called with each batch's task.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=1e-6, weight_decay=0.01, fused=True)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(1, steps - warm)))
    model.train()
    losses: list[float] = []
    with tqdm(total=steps, desc=f"{name:>12}", disable=not progress, leave=True, mininterval=0.5) as bar:
        for task, batch in batches:
            if enter is not None:
                enter(task)
            loss = model(**batch).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", task=task, refresh=False)
            bar.update()
            if len(losses) == steps:
                break
    model.eval()
    return losses


@torch.no_grad()
def answers(model: nn.Module, examples: Examples, size: int = 256) -> list[str]:
    """The model's greedy answers."""
    model.eval()
    said: list[str] = []
    for start in range(0, len(examples), size):
        batch = examples.batch(slice(start, start + size))
        labels = batch.pop("labels")
        said += decode(model.generate(**batch, max_new_tokens=labels.shape[1], num_beams=1, do_sample=False))  # type: ignore[operator]
    return said


def exact(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Exact matches in percent."""
    return 100.0 * sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def majority(train: Examples, test: Examples) -> float:
    """Score of the most frequent training answer."""
    best = Counter(train.answers).most_common(1)[0][0]
    return exact([best] * len(test), test.answers)


def question_only(train: Examples, test: Examples) -> float:
    """Score of each question's most frequent training answer, without looking at a picture; an unseen question gets the most frequent answer of all."""
    best = Counter(train.answers).most_common(1)[0][0]
    seen: dict[str, Counter[str]] = {}
    for question, answer in zip(train.questions, train.answers, strict=True):
        seen.setdefault(question, Counter())[answer] += 1
    return exact([seen[q].most_common(1)[0][0] if q in seen else best for q in test.questions], test.answers)
