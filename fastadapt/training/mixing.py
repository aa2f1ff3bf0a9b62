"""Mixing tasks batch by batch, in the order of the published training loops of VL-Adapter and VL-PET."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal


class MultiTaskLoader:
    """Batches of several tasks, one task per batch, in an order that depends on the epoch alone.

    ``"roundrobin"`` gives every batch of every loader once. ``"balanced"`` plans the same number for each task, ``n_batches`` or the mean number of batches, and ends the epoch as
    soon as the task whose turn it is has none left.

    Args:
        loaders: for each task an iterable of batches that has a length; it is iterated anew in every epoch, after its ``set_epoch(epoch)`` if it (or its ``sampler``) has one.
        sampling: "roundrobin" or "balanced".
        n_batches: batches planned for each task, with "balanced" only.
        shuffle: False takes the tasks one after the other, the last one first, as the published code does.

    Raises:
        ValueError: no loaders, an unknown ``sampling``, or ``n_batches`` without "balanced".

    >>> list(MultiTaskLoader({"vqa": ["a", "b"], "nlvr": ["c"]}))
    [('nlvr', 'c'), ('vqa', 'a'), ('vqa', 'b')]
    """

    def __init__(
        self, loaders: Mapping[str, Iterable[Any]], *, sampling: Literal["roundrobin", "balanced"] = "roundrobin", n_batches: int | None = None, shuffle: bool = True
    ) -> None:
        if not loaders:
            raise ValueError("loaders: must name at least one task")
        if sampling not in ("roundrobin", "balanced"):
            raise ValueError(f"sampling: must be 'roundrobin' or 'balanced', not {sampling!r}")
        if n_batches is not None and sampling != "balanced":
            raise ValueError(f"n_batches: only with sampling='balanced', which is {sampling!r}")
        self.loaders = dict(loaders)
        self.sampling, self.n_batches, self.shuffle = sampling, n_batches, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is; every iteration moves on to the next one."""
        self.epoch = epoch

    def order(self, epoch: int) -> list[str]:
        """The tasks of an epoch in the order in which they are planned."""
        lengths = {task: len(loader) for task, loader in self.loaders.items()}  # type: ignore[arg-type]
        if self.sampling == "balanced":
            each = sum(lengths.values()) // len(lengths) if self.n_batches is None else self.n_batches
            lengths = dict.fromkeys(lengths, each)
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
        batches = {task: iter(loader) for task, loader in self.loaders.items()}
        for task in self.order(epoch):
            try:
                batch = next(batches[task])
            except StopIteration:
                return
            yield task, batch
