"""Mixing tasks batch by batch: the published orders of VL-Adapter and VL-PET, and T5's drawing by size."""

from __future__ import annotations

import math
import numbers
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

_PLANNED, _DRAWN = ("roundrobin", "balanced"), ("proportional", "temperature")


class MultiTaskLoader:
    r"""Batches of several tasks, one task per batch, in an order that depends on the epoch alone.

    With :math:`n_i` batches in the loader of task i:

    * ``"roundrobin"`` (VL-Adapter, VL-PET) gives every batch of every loader once, in shuffled order.
    * ``"balanced"`` (VL-Adapter) plans the same number for each task, ``n_batches`` or the mean of the :math:`n_i`, and ends the epoch as soon as the task whose turn it is has
      none left.
    * ``"proportional"`` (T5, Raffel et al. 2020, section 3.5.2) draws the task of every batch anew, with probability :math:`p_i \propto \min(n_i, cap)`.
    * ``"temperature"`` (the same section) draws with :math:`p_i \propto \min(n_i, cap)^{1/T}`: T = 1 is "proportional", a large T treats all tasks alike.

    An epoch of the two that draw has ``n_batches`` batches, or :math:`\sum_i n_i`; a loader that runs out begins again.

    Args:
        loaders: for each task an iterable of batches that has a length; it is iterated anew in every epoch, after its ``set_epoch(epoch)`` if it (or its ``sampler``) has one.
        sampling: "roundrobin", "balanced", "proportional" or "temperature".
        n_batches: with "balanced" the batches planned for each task, with "proportional" and "temperature" those of the whole epoch.
        shuffle: False takes the tasks one after the other, the last one first, as the published code does; not where tasks are drawn.
        cap: the largest size, in batches, that counts, with "proportional" and "temperature" (T5's artificial limit K).
        temperature: T, with "temperature" only, which needs it.

    Raises:
        ValueError: no loaders, an unknown ``sampling``, a number that is not positive, or an option that ``sampling`` does not have; while iterating, a loader that gives
            fewer batches than its length.

    >>> list(MultiTaskLoader({"vqa": ["a", "b"], "nlvr": ["c"]}))
    [('vqa', 'a'), ('nlvr', 'c'), ('vqa', 'b')]
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Any]],
        *,
        sampling: Literal["roundrobin", "balanced", "proportional", "temperature"] = "roundrobin",
        n_batches: int | None = None,
        shuffle: bool = True,
        cap: int | None = None,
        temperature: float | None = None,
    ) -> None:
        if not loaders:
            raise ValueError("loaders: must name at least one task")
        if sampling not in _PLANNED + _DRAWN:
            raise ValueError(f"sampling: must be one of {', '.join(map(repr, _PLANNED + _DRAWN))}, not {sampling!r}")
        if n_batches is not None and sampling == "roundrobin":
            raise ValueError(f"n_batches: is {n_batches}; 'roundrobin' takes every batch once")
        if not shuffle and sampling in _DRAWN:
            raise ValueError(f"shuffle: is False; {sampling!r} draws the tasks, so it must be True")
        if cap is not None and sampling in _PLANNED:
            raise ValueError(f"cap: is {cap}; must be None with {sampling!r}, which does not draw by size")
        if (temperature is None) == (sampling == "temperature"):
            raise ValueError(f"temperature: is {temperature}; must be a number with 'temperature' and None otherwise; sampling is {sampling!r}")
        for name, value in (("n_batches", n_batches), ("cap", cap), ("temperature", temperature)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: must be positive, not {value}")
        if n_batches is not None and not isinstance(n_batches, numbers.Integral):
            raise ValueError(f"n_batches: must be a whole number, not {n_batches!r}")
        self.loaders = dict(loaders)
        self.sampling, self.n_batches, self.shuffle, self.cap, self.temperature = sampling, n_batches, shuffle, cap, temperature
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is; every iteration moves on to the next one."""
        self.epoch = int(epoch)

    def probabilities(self) -> dict[str, float]:
        """Each task's share of the batches that are drawn or planned; all 0 if every loader is empty."""
        lengths = self._lengths()
        if self.sampling == "balanced":
            return dict.fromkeys(lengths, 1 / len(lengths))
        cap, exponent = self.cap or math.inf, 1 / (self.temperature or 1)
        largest = min(max(lengths.values()), cap)  # by which all are divided: a small temperature's powers would overflow
        weights = {task: (min(n, cap) / largest) ** exponent if n else 0.0 for task, n in lengths.items()}
        return {task: weight / (sum(weights.values()) or 1) for task, weight in weights.items()}

    def order(self, epoch: int) -> list[str]:
        """The tasks of an epoch in the order in which they are planned."""
        lengths = self._lengths()
        if self.sampling in _DRAWN:
            if not any(lengths.values()):
                return []
            return random.Random(epoch).choices(list(lengths), list(self.probabilities().values()), k=self.n_batches or sum(lengths.values()))
        if self.sampling == "balanced":
            lengths = dict.fromkeys(lengths, self.n_batches or sum(lengths.values()) // len(lengths))
        tasks = [task for task, n in lengths.items() for _ in range(n)]
        if self.shuffle:
            random.Random(epoch).shuffle(tasks)
        return tasks[::-1]

    def __len__(self) -> int:
        """Batches planned for an epoch; a balanced epoch may end earlier."""
        return len(self.order(self.epoch))

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        for loader in self.loaders.values():
            for part in (loader, getattr(loader, "sampler", None)):
                if (set_epoch := getattr(part, "set_epoch", None)) is not None:
                    set_epoch(epoch)
        start = self._again if self.sampling in _DRAWN else lambda task: iter(self.loaders[task])
        batches, lengths = {task: start(task) for task in self.loaders}, self._lengths()
        given = dict.fromkeys(lengths, 0)
        for task in self.order(epoch):
            try:
                batch = next(batches[task])
            except StopIteration:
                if given[task] < lengths[task]:
                    raise ValueError(f"loaders[{task!r}]: has the length {lengths[task]} but gave {given[task]} batches") from None
                return
            given[task] += 1
            yield task, batch

    def _lengths(self) -> dict[str, int]:
        return {task: len(loader) for task, loader in self.loaders.items()}  # type: ignore[arg-type]

    def _again(self, task: str) -> Iterator[Any]:
        """The task's batches over and over."""
        while True:
            empty = True
            for batch in self.loaders[task]:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"loaders[{task!r}]: has the length {self._lengths()[task]} but gave no batch")
