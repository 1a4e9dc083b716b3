"""A random permutation of any size, computed only where it is asked for."""

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.random import mix

_ROUNDS = 16  # with 4 rounds, a chi-square test over a million neighbours still sees a pattern; with 5 it sees none


class Permutation:
    """A random permutation of 0 to size-1, a pure function of a key.

    Write the numbers into a square, row by row. In a round, each column is rotated by a random amount of its own; then
    rows and columns change places. This is a Feistel network (Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains") whose round functions are tables of random numbers. The square has up to 2 * side cells too many: a number
    that ends in one of them goes through the rounds again ("cycle walking", same paper).

    Two numbers keep their distance through two rounds with a probability of about 1 / side, so through all 16 with one
    of about size**-4. Memory: 128 bytes * side, which is 4 MB for a billion numbers.

    Args:
        key: names the permutation.
        size: number of things permuted. At least a thousand, because a tiny square has too few rotations: for fewer
            there is `random.permute`.
    """

    def __init__(self, key: int, size: int) -> None:
        self.size, self.side = size, isqrt(size - 1) + 1
        rounds, lines = torch.arange(_ROUNDS, device="cpu"), torch.arange(self.side, device="cpu")
        self._turns = (mix(key, rounds[:, None], lines) % self.side).numpy()

    def __call__(self, positions: Tensor) -> Tensor:
        """Return where the permutation sends positions in [0, size), int64 [N], on the CPU."""
        numbers = self._rounds(positions.numpy())
        while len(outside := np.flatnonzero(numbers >= self.size)):
            numbers[outside] = self._rounds(numbers[outside])
        return torch.from_numpy(numbers)

    def _rounds(self, numbers: np.ndarray) -> np.ndarray:
        rows, columns = np.divmod(numbers, self.side)
        for turn in self._turns:
            turned = rows + turn[columns]
            below = turned - self.side
            # Modulo side: an unsigned number below zero is huge. A third of the time that np.where takes.
            rows, columns = columns, np.minimum(turned.view(np.uint64), below.view(np.uint64)).view(np.int64)
        return rows * self.side + columns
