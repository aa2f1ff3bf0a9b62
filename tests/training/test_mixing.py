"""Task mixing against the recorded order of the published loop, and its edges."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
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


SIZES = {"vqa": range(60), "gqa": range(30), "nlvr": range(10), "empty": range(0)}


@pytest.mark.parametrize(
    "options, weights",
    [
        ({"sampling": "proportional"}, [60, 30, 10, 0]),
        ({"sampling": "proportional", "cap": 20}, [20, 20, 10, 0]),
        ({"sampling": "temperature", "temperature": 2.0}, [60**0.5, 30**0.5, 10**0.5, 0]),
        ({"sampling": "temperature", "temperature": 2.0, "cap": 20}, [20**0.5, 20**0.5, 10**0.5, 0]),
        ({"sampling": "temperature", "temperature": 1.0}, [60, 30, 10, 0]),
        ({"sampling": "temperature", "temperature": math.inf}, [1, 1, 1, 0]),
        ({"sampling": "temperature", "temperature": 1e-3}, [1, 0, 0, 0]),
        ({"sampling": "roundrobin"}, [60, 30, 10, 0]),
        ({"sampling": "balanced"}, [1, 1, 1, 1]),
    ],
)
def test_probabilities(options: dict[str, Any], weights: list[float]) -> None:
    mixed = MultiTaskLoader(SIZES, **options)
    assert list(mixed.probabilities().values()) == pytest.approx([w / sum(weights) for w in weights], rel=1e-14)


@pytest.mark.parametrize("options", [{"sampling": "proportional"}, {"sampling": "temperature", "temperature": 2.0}, {"sampling": "proportional", "cap": 15}])
def test_drawn_tasks_follow_the_probabilities(options: dict[str, Any]) -> None:
    n = 20_000
    mixed = MultiTaskLoader(SIZES, n_batches=n, **options)
    drawn = Counter(mixed.order(epoch=3))
    for task, p in mixed.probabilities().items():
        assert abs(drawn[task] - n * p) <= 4 * (n * p * (1 - p)) ** 0.5, task


def test_draws_depend_on_the_epoch_alone() -> None:
    def mixed() -> MultiTaskLoader:
        return MultiTaskLoader(SIZES, sampling="temperature", temperature=2.0)

    one, other = mixed(), mixed()
    epochs = [list(one), list(one)]
    assert epochs[0] != epochs[1] and len(epochs[0]) == len(other) == 100
    random.seed(1)
    other.set_epoch(1)
    assert list(other) == epochs[1]


def test_a_drawn_task_that_runs_out_begins_again() -> None:
    mixed = list(MultiTaskLoader({"a": ["x", "y"], "b": ["z"]}, sampling="temperature", temperature=math.inf, n_batches=40))
    assert len(mixed) == 40
    given = [batch for task, batch in mixed if task == "a"]
    assert len(given) > 4 and given == ["x", "y"] * (len(given) // 2) + ["x"] * (len(given) % 2)
    assert {batch for task, batch in mixed if task == "b"} == {"z"}


@pytest.mark.parametrize("options", [{}, {"sampling": "balanced"}, {"sampling": "proportional"}, {"sampling": "temperature", "temperature": 3.0}])
def test_one_task_and_no_batches(options: dict[str, Any]) -> None:
    assert list(MultiTaskLoader({"a": "xyz"}, **options)) == [("a", "x"), ("a", "y"), ("a", "z")]
    assert list(MultiTaskLoader({"a": "", "b": ""}, **options)) == []


def test_a_loader_that_breaks_its_word() -> None:
    class Empty:
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(ValueError, match=r"loaders\['a'\]: has the length 2 but gave no batch"):
        list(MultiTaskLoader({"a": Empty()}, sampling="proportional"))


@pytest.mark.parametrize(
    "call, message",
    [
        ({"loaders": {}}, "loaders"),
        ({"sampling": "fair"}, "sampling.*'fair'"),
        ({"n_batches": 3}, "n_batches: is 3"),
        ({"n_batches": 0, "sampling": "balanced"}, "n_batches: must be positive, not 0"),
        ({"n_batches": 2.5, "sampling": "proportional"}, "n_batches: must be a whole number, not 2.5"),
        ({"cap": 3}, "cap: is 3.*'roundrobin'"),
        ({"cap": -1, "sampling": "proportional"}, "cap: must be positive, not -1"),
        ({"sampling": "temperature"}, "temperature: is None"),
        ({"sampling": "proportional", "temperature": 2.0}, "temperature: is 2.0.*'proportional'"),
        ({"sampling": "temperature", "temperature": 0.0}, "temperature: must be positive, not 0.0"),
        ({"sampling": "temperature", "temperature": math.nan}, "temperature: must be positive, not nan"),
        ({"sampling": "proportional", "shuffle": False}, "shuffle: is False"),
    ],
)
def test_errors(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskLoader(**{"loaders": {"a": [1]}, **call})


class Short:
    """Says it has more batches than it gives."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2])


@pytest.mark.parametrize("sampling", ["roundrobin", "balanced"])
def test_a_loader_that_gives_fewer_batches_than_it_has(sampling: Any) -> None:
    loader = MultiTaskLoader({"a": [0] * 3, "b": Short()}, sampling=sampling, n_batches=None if sampling == "roundrobin" else 3)
    with pytest.raises(ValueError, match=r"loaders\['b'\]: has the length 3 but gave 2 batches"):
        list(loader)


def test_epochs_of_numpy() -> None:
    loader = MultiTaskLoader({"a": [1, 2], "b": [3]})
    loader.set_epoch(np.int64(2))
    got = list(loader)
    loader.set_epoch(2)
    assert got == list(loader)
