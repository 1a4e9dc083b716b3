"""Sequences of unequal length, stored one after the other. A micro-batch is one gather, padded to its longest."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.fetch import InMemory, Read, Request, as_tensor, select

PADDING = -1
"""The value after the end of a sequence of integers. A sequence of floats is padded with 0."""


class Ragged:
    """Sequences in memory or in a memory-mapped file, as a source of examples.

    Example i is `values[offsets[i]:offsets[i + 1]]`. A micro-batch of N examples, of which the longest has T values, is
    its sequences [N, T] (or [N, T, F]), then the other fields [N, ...].

    Args:
        values: all sequences, one after the other, [total] or [total, F]: floats, or integers of any type, which are
            returned as int32.
        offsets: where each sequence begins, and where the last one ends, int64 [examples + 1].
        *others: other fields of each example, such as labels, [examples, ...]; dicts, tuples and lists of one value per
            example too.
        empty: what becomes of sequences without values, over which a mean is not a number: refuse (before training),
            drop (the others are numbered anew), or keep (their losses must be finite, or have the weight 0).

    Raises:
        ValueError: the offsets are no rising positions within the values, or the other fields differ in length.
    """

    @typed
    def __init__(
        self,
        values: Tensor | np.ndarray | Sequence,
        offsets: Tensor | np.ndarray | Sequence,
        *others: Any,
        empty: Literal["refuse", "drop", "keep"] = "refuse",
    ) -> None:
        self.empty = empty
        self.mapped = isinstance(values, np.memmap)
        self.values = as_tensor(values)  # type: ignore[arg-type]  # which takes lists
        self.offsets = as_tensor(offsets).long()  # type: ignore[arg-type]
        self.lengths = self.offsets.diff()
        """Values of each example, int64 [examples]."""
        ends = len(self.offsets) > 0 and self.offsets[0] >= 0 and self.offsets[-1] <= len(self.values)
        if not ends or bool((self.lengths < 0).any()):
            raise ValueError(
                f"the offsets of {len(self.values)} values are not their borders: write where each sequence begins, "
                "and at last the end, in rising order"
            )
        self._others = InMemory((self.lengths, *others))  # which checks that the lengths are equal
        if empty == "drop" and not bool(self.lengths.all()):
            some = self.lengths.nonzero().squeeze(1)
            # Where an empty sequence begins, the next one does.
            self.offsets = torch.cat([self.offsets[some], self.offsets[-1:]])
            self.lengths = self.offsets.diff()
            self._others = InMemory(tuple(select(field, some) for field in self._others.fields))
        self.fields = (self.values, *self._others.fields[1:])

    def __len__(self) -> int:
        return len(self.lengths)

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return "mapped" if self.mapped else "ragged"

    @property
    def nbytes(self) -> int:
        """Bytes of all examples."""
        return self.values.nbytes + self.offsets.nbytes + self._others.nbytes - self.lengths.nbytes

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield the padded sequences and the other fields of each micro-batch."""
        for request in requests:
            for index in request.index.split_with_sizes(request.sizes):
                others = (select(field, index) for field in self.fields[1:])
                yield (self._padded(index), *others), None

    def _padded(self, index: Tensor) -> Tensor:
        lengths, firsts = self.lengths.index_select(0, index), self.offsets.index_select(0, index)
        longest = max(1, int(lengths.max()))  # of sequences that are all empty, one place each
        ends = lengths.cumsum(0)
        where = np.repeat((firsts - ends + lengths).numpy(), lengths.numpy()) + np.arange(int(ends[-1]))
        values = self.values.numpy()  # which is not kept, because the memory of a tensor may move
        integers = values.dtype.kind in "iub"
        shape, dtype = (len(index), longest, *values.shape[1:]), np.int32 if integers else values.dtype
        padded = np.full(shape, PADDING if integers else 0, dtype)
        padded[(torch.arange(longest) < lengths[:, None]).numpy()] = values.take(where, 0)
        return torch.from_numpy(padded)
