"""The order of data in many files, which are read one after the other."""

import math

import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.order import AT_ONCE, Blocks, shuffled
from batchwise.batching.permutation import Permutation
from batchwise.batching.random import mix
from batchwise.ranges import PositiveInt


class BlockShuffled(Blocks):
    """Every example once per epoch, shuffled within windows of a few files (shards), which come in random order.

    So a device reads one window after the other, and not a file for each example. The examples of a batch stand file by
    file, so that each of several devices needs few of the window's files. Any batch is known without walking to it.

    A window of all files is a uniform shuffle. With fewer, examples of one file stay near one another. This does not
    matter if each file is a random part of the data; see `worth`.

    Args:
        window: number of files that are shuffled at a time. Windows differ by at most one.

    Raises:
        ValueError: the data are not in shards.
    """

    once = True

    @typed
    def __init__(self, window: PositiveInt = 16) -> None:
        self.window = window

    def __str__(self) -> str:
        """Return the name with the window, because another window is another order."""
        return f"BlockShuffled {self.window}"

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return one block, whose batches are sorted by the places of their files in the order."""
        if self._epoch is None or self._epoch[0] != epoch:
            places = shuffled(self._key(epoch), len(self._sizes))  # file at each place
            ends = self._sizes[places].cumsum(0)
            self._epoch = epoch, places, ends, ends[self._last]
        _, places, ends, borders = self._epoch
        window = torch.searchsorted(borders, positions, right=True)
        at = torch.cat([self._within(epoch, int(each), positions[window == each]) for each in window.unique()])
        place = torch.searchsorted(ends, at, right=True)
        order = place.add_(positions // self.batch_size * len(places)).argsort(stable=True)
        at, place = at[order], place[order] % len(places)
        files = places[place]
        return self._firsts[files] + at - (ends[place] - self._sizes[files])

    def _within(self, epoch: int, window: int, positions: Tensor) -> Tensor:
        """Return where the shuffle of a window sends positions of an epoch."""
        assert self._epoch is not None
        borders = self._epoch[3]
        first, last = int(borders[window - 1]) if window else 0, int(borders[window])
        key = mix(self._key(epoch), window + 1)
        if last - first > AT_ONCE:
            return Permutation(key, last - first)(positions - first) + first
        known = self._shuffle
        if known is None or known[:2] != (epoch, window):
            known = self._shuffle = epoch, window, shuffled(key, last - first)
        return known[2][positions - first] + first

    def worth(self, batch_size: int, alike: float = 1.0) -> float:
        """Return how many examples of a uniform shuffle say as much as a batch does, on average over windows.

        With W of S files in a window, the mean over a batch of B has this variance, relative to that of one example.
        Here r is the share of the variance that is between files, and the first term that of drawing files without
        putting them back.

            r (S - W) / (W (S - 1)) + (1 - r (S - W) / (W (S - 1))) / B

        Args:
            batch_size: B.
            alike: r. 1: the examples of a file are all alike; 0: each file is a random part of the data.
        """
        files = len(self._sizes)
        window = files / len(self._last)
        apart = alike * (files - window) / (window * max(1, files - 1))
        return 1 / (apart + (1 - apart) / batch_size)

    def enough(self, batch_size: int, alike: float) -> int:
        """Return the smallest window with which a batch is worth half of its examples; see `worth`."""
        files = len(self._sizes)
        return math.ceil(alike * files / (alike + (files - 1) / max(1, batch_size - 1)))

    @property
    def at_once(self) -> int:
        """The most files of a window."""
        return -(-len(self._sizes) // len(self._last))

    def summary(self, batch_size: int) -> str:
        """Return how far this is from a uniform shuffle."""
        files, windows = len(self._sizes), len(self._last)
        if windows == 1:
            return f"all {files:,} shards are shuffled together"
        return (
            f"{files:,} shards are shuffled in {windows:,} windows of {files / windows:.3g}: if the examples of a "
            f"shard are all alike, a batch of {batch_size:,} says as much as {self.worth(batch_size):.3g} random ones"
        )

    def _setup(self) -> None:
        super()._setup()
        if self.shards is None:
            raise ValueError("BlockShuffled shuffles within shards, which these data have not: take Shuffled")
        self._sizes = self.shards.cpu().long()
        self._firsts = self._sizes.cumsum(0) - self._sizes
        files = len(self._sizes)
        windows = -(-files // self.window)
        self._last = torch.tensor([files * (number + 1) // windows - 1 for number in range(windows)])
        self._epoch: tuple[int, Tensor, Tensor, Tensor] | None = None
        self._shuffle: tuple[int, int, Tensor] | None = None
