"""Task mixing against the recorded order of the published loop, and its edges."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastadapt.training import MultiTaskLoader
from tests.golden import FOLDER

RUNS = json.loads((FOLDER / "loop_multitask_order.json").read_text())["runs"]


@pytest.mark.parametrize("run", RUNS, ids=[f"{run['sampling']}-{len(run['loaders'])}-{sum(n for _, n in run['loaders'])}" for run in RUNS])
def test_recorded_order(run: dict[str, Any]) -> None:
    mixed = MultiTaskLoader({task: range(n) for task, n in run["loaders"]}, sampling=run["sampling"], n_batches=run.get("n_batches"))
    for recorded in run["epochs"]:
        assert mixed.order(recorded["epoch"]) == recorded["order"]
        mixed.set_epoch(recorded["epoch"])
        assert len(mixed) == len(recorded["order"])
        got = [list(pair) for pair in mixed]
        assert got == recorded["batches"]
        assert len(recorded["order"]) - len(got) == recorded["leftover"]


def test_epochs_follow_each_other() -> None:
    mixed = MultiTaskLoader({"a": range(5), "b": range(5)})
    first, second = [task for task, _ in mixed], [task for task, _ in mixed]
    assert first == mixed.order(0) and second == mixed.order(1) and first != second


def test_balanced_n_batches() -> None:
    mixed = MultiTaskLoader({"a": range(9), "b": range(4)}, sampling="balanced", n_batches=4)
    assert sorted(task for task, _ in mixed) == ["a"] * 4 + ["b"] * 4


def test_unshuffled_takes_the_last_task_first() -> None:
    assert [task for task, _ in MultiTaskLoader({"a": range(2), "b": range(1)}, shuffle=False)] == ["b", "a", "a"]


def test_tells_loaders_and_samplers_the_epoch() -> None:
    class Loader(list):  # type: ignore[type-arg]
        def __init__(self) -> None:
            super().__init__([1])
            self.seen: list[int] = []
            self.sampler = type("Sampler", (), {"set_epoch": lambda _, epoch: self.seen.append(10 + epoch)})()

        def set_epoch(self, epoch: int) -> None:
            self.seen.append(epoch)

    loader = Loader()
    mixed = MultiTaskLoader({"a": loader})
    mixed.set_epoch(7)
    assert list(mixed) == [("a", 1)] and loader.seen == [7, 17]


@pytest.mark.parametrize(
    "call, message",
    [({"loaders": {}}, "loaders"), ({"loaders": {"a": [1]}, "sampling": "fair"}, "sampling.*'fair'"), ({"loaders": {"a": [1]}, "n_batches": 3}, "n_batches")],
)
def test_errors(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskLoader(**call)
