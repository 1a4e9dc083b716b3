"""Examples of shards, a micro-batch at a time, while the shards that come next are fetched in the background."""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batchwise.batching.fetch import Read, Request
from batchwise.batching.workers import Workers
from batchwise.sources.shard_cache import Cache, note_use
from batchwise.sources.shard_files import Bytes, opened
from batchwise.sources.shard_index import Shard

FETCHED_AT_ONCE = 4
"""Shards that each process fetches side by side."""
KNOWN = 1024
"""The most micro-batches that are asked for in advance."""
OPEN = 64
"""The most shards that a process keeps open besides those of the last micro-batch."""
Values = dict[str, np.ndarray | list[memoryview]]
"""The columns of some examples: arrays [N, ...], or the bytes of each."""
Columns = dict[str, np.ndarray | Bytes]
"""The columns of a shard."""
Part = tuple[np.ndarray, Columns, np.ndarray]
"""Places in a micro-batch, the shard that has their examples, and their rows there, int64 [N] each."""


@dataclass
class Opened:
    """A shard that is mapped into memory."""

    path: Path
    """Its file in the cache."""
    columns: Columns
    touched: float = -math.inf
    """When the cache was last told that it is in use."""


class ShardSet(Dataset):
    """The examples of some shards, one shard after the other.

    Args:
        shards: in order.
        cache: has them on this machine.
        fields: makes the fields of a micro-batch from the columns of its examples.
    """

    def __init__(self, shards: list[Shard], cache: Cache, fields: Callable[[Values], tuple[Any, ...]]) -> None:
        self.files, self.cache, self.fields = shards, cache, fields
        sizes = np.array([shard.examples for shard in shards])
        self.ends = sizes.cumsum()
        self._firsts = self.ends - sizes
        self._open: dict[int, Opened] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __getitem__(self, number: int) -> tuple[Any, ...]:
        """Return the fields of one example."""
        return tuple(field[0] for field in self.__getitems__([number]))

    def __getitems__(self, numbers: list[int]) -> tuple[Any, ...]:
        """Return the fields of some examples, [N, ...] each."""
        which, rows = self.find(np.asarray(numbers))
        shards, places, counts = np.unique(which, return_inverse=True, return_counts=True)
        each = np.split(places.argsort(kind="stable"), counts.cumsum()[:-1])
        found = [(where, self._columns(shard), rows[where]) for shard, where in zip(shards.tolist(), each, strict=True)]
        self._close(len(found))
        return self.fields({name: _gathered(found, name, len(rows)) for name in self.cache.columns})

    def find(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the shard of each example, and its row there, int64 [N] each."""
        which = np.searchsorted(self.ends, index, side="right")
        return which, index - self._firsts[which]

    def _columns(self, shard: int) -> Columns:
        if shard not in self._open:
            path, table = self.cache.open(self.files[shard])
            self._open[shard] = Opened(path, opened(table))
        one = self._open[shard] = self._open.pop(shard)  # the last one is that which was used last
        if monotonic() - one.touched > 1:
            one.touched = monotonic()
            with suppress(FileNotFoundError):  # it was deleted, but stays readable
                note_use(one.path)
        return one.columns

    def _close(self, used: int) -> None:
        """Close what has been deleted from the cache, so that the disk gets its room back, and what is one too many."""
        others = list(self._open)[:-used]
        for place, shard in enumerate(others):
            if len(others) - place > OPEN or not self._open[shard].path.exists():
                del self._open[shard]


def _gathered(found: list[Part], name: str, count: int) -> np.ndarray | list[memoryview]:
    """Return a column of all examples, each at its place."""
    first = found[0][1][name]
    if isinstance(first, Bytes):
        values = [memoryview(b"")] * count
        for where, columns, rows in found:
            for place, value in zip(where.tolist(), columns[name][rows], strict=True):
                values[place] = value
        return values
    if len(found) == 1:
        return first[found[0][2]]
    array = np.empty((count, *first.shape[1:]), first.dtype)
    for where, columns, rows in found:
        column: Any = columns[name]
        if where[-1] - where[0] + 1 == len(where):  # neighbours, as `BlockShuffled` has them: one copy
            np.take(column, rows, 0, array[where[0] : where[-1] + 1], "clip")
        else:
            array[where] = column[rows]
    return array


class Shelf:
    """Feeds the examples of shards. It knows the coming requests, and fetches their shards in the background.

    Args:
        dataset: the examples.
        num_workers: processes that decode.
        max_unreadable: the most examples that may be unreadable.
        ahead: the most bytes of shards that are fetched in advance.
    """

    def __init__(self, dataset: ShardSet, num_workers: int, max_unreadable: int, ahead: int) -> None:
        self.dataset, self.ahead = dataset, ahead
        self.shards = torch.tensor([shard.examples for shard in dataset.files])
        self._workers = Workers(dataset, num_workers, max_unreadable)

    def __len__(self) -> int:
        return len(self.dataset)

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return f"from {len(self.shards):,} shards, {self._workers}"

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield each micro-batch of each request, in order."""
        return self._workers.stream(self._known(requests), seed)

    def files_of(self, index: Tensor) -> list[int]:
        """Return the shards of some examples, each once."""
        return np.unique(self.dataset.find(index.numpy())[0]).tolist()

    def _known(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield each micro-batch as a request. Some are asked for in advance, and their shards are fetched."""
        iterator, coming = _one_by_one(requests), deque[tuple[Request, list[int]]]()
        users, due, over = Counter[int](), SimpleQueue[int](), Event()
        files, size = self.dataset.files, 0
        for _ in range(FETCHED_AT_ONCE):
            Thread(target=self._fetch, args=(due, over), daemon=True).start()
        try:
            while True:
                while size <= self.ahead and len(coming) < KNOWN and (request := next(iterator, None)) is not None:
                    coming.append((request, self.files_of(request.index)))
                    for file in coming[-1][1]:
                        if not users[file]:
                            due.put(file)
                            size += files[file].size
                        users[file] += 1
                if not coming:
                    return
                request, used = coming.popleft()
                yield request
                for file in used:
                    users[file] -= 1
                    size -= 0 if users[file] else files[file].size
        finally:
            over.set()
            for _ in range(FETCHED_AT_ONCE):
                due.put(-1)

    def _fetch(self, due: SimpleQueue[int], over: Event) -> None:
        while (file := due.get()) >= 0 and not over.is_set():
            with suppress(Exception):  # whoever needs it will try again, and say what is wrong
                self.dataset.cache.prepare(self.dataset.files[file])


def _one_by_one(requests: Iterable[Request]) -> Iterator[Request]:
    for index, sizes, positions in requests:
        yield from map(Request.one, index.split(sizes), positions)
