"""Where batches begin and end: the epoch of each optimizer step, and its positions in that epoch."""

from bisect import bisect_right
from math import ceil
from operator import attrgetter
from typing import NamedTuple, Protocol

Changes = tuple[tuple[int, int], ...]
"""Pairs of (examples seen, batch size from there on), rising."""


class Borders(Protocol):
    """The batches of a training run. Steps, epochs and positions count from 0."""

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        ...

    def before(self, epoch: int) -> tuple[int, int]:
        """Return the numbers of steps done and of examples seen before an epoch."""
        ...

    def bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """Return the positions [start, stop) of an epoch that its batch `number` trains on."""
        ...


class _Run(NamedTuple):
    """Batches of one size: the number of the first one in its epoch, and the position where it starts."""

    number: int
    start: int
    size: int


class _Epoch(NamedTuple):
    first: int
    """Its first step."""
    seen: int
    """Examples seen before it."""
    steps: int
    stop: int
    """Number of positions that are trained on."""
    runs: list[_Run]


class BySize:
    """Batches of a number of examples, which may change after given numbers of examples seen.

    Epochs up to the last change are computed one by one. All later epochs are alike, so they are arithmetic.

    Args:
        positions: number of positions in an epoch.
        batch_size: examples per batch at first.
        changes: later batch sizes. A change takes effect at the first batch that begins there or later.
        drop_last: leave out the short batch at the end of an epoch.
    """

    def __init__(self, positions: int, batch_size: int, changes: Changes = (), drop_last: bool = False) -> None:
        self.positions, self.sizes, self.drop_last = positions, [(0, batch_size), *changes], drop_last
        self._epochs = [self._walk(0, 0)]
        while (last := self._epochs[-1]).steps and last.seen < self.sizes[-1][0]:
            self._epochs.append(self._walk(last.first + last.steps, last.seen + last.stop))

    def _walk(self, first: int, seen: int) -> _Epoch:
        number = start = 0
        runs: list[_Run] = []
        while start < self.positions:
            which = bisect_right(self.sizes, seen + start, key=lambda change: change[0]) - 1
            size, changes = self.sizes[which][1], self.sizes[which + 1 :]
            rest = self.positions - start
            left = rest // size if self.drop_last else ceil(rest / size)
            steps = min(left, ceil((changes[0][0] - seen - start) / size)) if changes else left
            if steps == 0:
                break
            runs.append(_Run(number, start, size))
            number, start = number + steps, min(start + steps * size, self.positions)
        return _Epoch(first, seen, number, start, runs)

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        last = self._epochs[-1]
        if step >= last.first:
            return len(self._epochs) - 1 + (step - last.first) // last.steps
        return bisect_right(self._epochs, step, key=attrgetter("first")) - 1

    def before(self, epoch: int) -> tuple[int, int]:
        """Return the numbers of steps done and of examples seen before an epoch."""
        known = len(self._epochs) - 1
        one, more = self._epochs[min(epoch, known)], max(0, epoch - known)
        return one.first + more * one.steps, one.seen + more * one.stop

    def bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """Return the positions [start, stop) of an epoch that its batch `number` trains on."""
        first, start, size = self._run(epoch, number)
        start += (number - first) * size
        return start, min(start + size, self.positions)

    def _run(self, epoch: int, number: int) -> _Run:
        runs = (self._epochs[epoch] if epoch < len(self._epochs) else self._epochs[-1]).runs
        return runs[0] if len(runs) == 1 else runs[bisect_right(runs, number, key=attrgetter("number")) - 1]
