"""The classes of batches against those of the data set."""

from collections.abc import Iterator

import numpy as np


class Classes:
    """The shares of the classes in the data set and in each batch.

    The distance of a batch is the total variation: half the sum of the absolute differences of the shares, from 0 to 1.

    Args:
        data: the class of each example.
        batches: for each batch, the class of each of its examples.
    """

    def __init__(self, data: list[int], batches: list[list[int]]) -> None:
        self.names, codes = np.unique(np.concatenate([data, *batches]), return_inverse=True)
        whole, *parts = np.split(codes, np.cumsum([len(data), *map(len, batches)])[:-1])
        self.data = self._shares(whole)
        """The share of each class, [classes]; and below, in each batch, [batches, classes]."""
        self.batches = np.stack([self._shares(part) for part in parts])
        self.distances = self._distances(self.batches)
        draw = np.random.default_rng(0)
        drawn = [draw.choice(whole, min(len(part), len(whole)), replace=False) for part in parts]
        self.by_chance = self._distances(np.stack([self._shares(part) for part in drawn])).mean()

    def _shares(self, codes: np.ndarray) -> np.ndarray:
        return np.bincount(codes, minlength=len(self.names)) / len(codes)

    def _distances(self, shares: np.ndarray) -> np.ndarray:
        return np.abs(shares - self.data).sum(1) / 2

    def __str__(self) -> str:
        return (
            f"{len(self.names)}; total variation from data set to batch {self.distances.mean():.3f} (at most "
            f"{self.distances.max():.3f}), to a random batch {self.by_chance:.3f}"
        )

    def problems(self, order: str) -> Iterator[str]:
        """Yield a line if batches are less like the data set than random batches. Some orders intend this."""
        if (distance := self.distances.mean()) > 2 * self.by_chance:
            yield (
                f"the classes of a batch are {distance:.2f} from those of the data set (total variation), those of a "
                f"random batch {self.by_chance:.2f}: data.order is {order}"
            )
