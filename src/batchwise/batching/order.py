"""The order of an epoch: which example stands at which position, a pure function of (seed, epoch)."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.permutation import Permutation
from batchwise.batching.random import mix
from batchwise.ranges import PositiveInt

_STREAM = int.from_bytes(b"order", "big")  # salt that separates these random numbers from others with the same seed
_BLOCK = 2**14  # positions computed at a time: 128 KiB, about a millisecond
AT_ONCE = 2**20
"""Most examples that are shuffled in one piece: 8 MiB, 30 ms."""

Sources = dict[str, range | Tensor]
"""The examples of each source, by its name: a range, or int64 [examples of the source]."""


class Order:
    """The order of an epoch. It can be asked for any slice. An order of your own overrides only `indices`.

    An order keeps no state that changes an answer, and touches no global generator.
    """

    examples: int
    batch_size: int
    seed: int
    labels: Tensor | None
    lengths: Tensor | None
    sources: Sources | None
    shards: Tensor | None
    once: bool = False
    """True where an epoch has no example twice. What is drawn for an example then need not depend on its position."""
    copies: int = 1
    """Number of neighbouring positions that hold the same example."""

    def prepare(
        self,
        examples: int,
        batch_size: int,
        seed: int,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        sources: Sources | None = None,
        shards: Tensor | None = None,
    ) -> Self:
        """Set what is to be ordered. Call it once, before the first `indices`.

        Args:
            examples: number of examples in the data set.
            batch_size: examples per optimizer step, over all devices together.
            seed: any integer.
            labels: class of each example, integers [examples]. Some orders need it.
            lengths: tokens of each example, int64 [examples]. `Bucketed` needs it.
            sources: examples of each source. `Mixture` needs them.
            shards: number of examples in each file of the data set, int64 [shards]. `BlockShuffled` needs it.

        Raises:
            ValueError: a number is below one, the labels are no tensor of one integer per example, or the order needs
                labels, lengths, sources or shards that are not given.
        """
        if examples < 1 or batch_size < 1:
            raise ValueError(f"an order needs at least 1 example and batch_size 1, not {examples} and {batch_size}")
        for name, given in (("labels", labels), ("lengths", lengths), ("shards", shards)):
            if given is not None and not isinstance(given, Tensor):
                kind = type(given).__name__
                raise ValueError(f"{name} are of type {kind}: give a tensor of integers, torch.as_tensor({name})")
        if labels is not None and (labels.shape != (examples,) or labels.is_floating_point()):
            raise ValueError(f"give labels as integers [{examples}], not {labels.dtype} {list(labels.shape)}")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.labels, self.lengths, self.sources, self.shards = labels, lengths, sources, shards
        self._setup()
        return self

    def __len__(self) -> int:
        """Return the number of positions in one epoch."""
        return self.examples

    def __str__(self) -> str:
        """Return the name of the order. Training goes on only with an order of the same name."""
        return type(self).__name__

    def summary(self, batch_size: int) -> str | None:
        """Return a line to print before training; None: there is nothing to say. The order has been prepared."""
        return None

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return the examples at positions start to stop (exclusive) of an epoch, int64 [stop - start], on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define indices(epoch, start, stop)")

    def _setup(self) -> None:
        """Compute once what depends only on the arguments of `prepare`."""

    def _key(self, epoch: int) -> int:
        return mix(self.seed, _STREAM, epoch)

    def _positions(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"positions {start} to {stop} are not in this epoch: ask within 0 to {len(self)}")
        return torch.arange(start, stop, device="cpu")

    def _classes(self) -> Tensor:
        """Return the labels as class numbers 0 to C-1 without gaps, int64 [examples]."""
        if self.labels is None:
            raise ValueError(f"{type(self).__name__} looks at classes: give labels, or take Shuffled")
        return self.labels.cpu().unique(return_inverse=True)[1]


class Sequential(Order):
    """The examples as they are stored, every epoch."""

    once = True

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return the positions themselves."""
        return self._positions(start, stop)


class Blocks(Order):
    """An order that is computed in blocks of whole batches. The last block is kept, because a batch alone costs much.

    A subclass overrides `compute`.
    """

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return the examples at the positions of one block of an epoch, int64 [positions]."""
        raise NotImplementedError

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return a slice of a block, or of several."""
        kept = self._kept
        if kept is not None and kept[0] == epoch and kept[1] <= start < stop <= kept[1] + len(kept[2]):
            return kept[2][start - kept[1] : stop - kept[1]]
        positions, size = self._positions(start, stop), self._block_size()
        firsts = range(start // size * size, stop, size) if start < stop else ()
        parts = [self._block(epoch, first)[max(start - first, 0) : stop - first] for first in firsts]
        return torch.cat(parts) if parts else positions

    def _setup(self) -> None:
        self._kept: tuple[int, int, Tensor] | None = None

    def _block_size(self) -> int:
        return max(_BLOCK // self.batch_size, 1) * self.batch_size

    def _block(self, epoch: int, first: int) -> Tensor:
        kept = self._kept  # read once and replaced as a whole: at worst, a second thread computes a block again
        if kept is None or kept[:2] != (epoch, first):
            positions = self._positions(first, min(first + self._block_size(), len(self)))
            kept = self._kept = epoch, first, self.compute(epoch, positions)
        return kept[2]


class Shuffled(Blocks):
    """Every example once per epoch, in random order.

    Up to a million examples are shuffled in one piece. Beyond that the order is a `Permutation`, which is computed
    block by block: the first batch of a billion examples takes milliseconds and megabytes.
    """

    once = True

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return one block of the shuffled examples."""
        if self.examples <= AT_ONCE:
            return shuffled(self._key(epoch), self.examples)
        known = self._permutation
        if known is None or known[0] != epoch:
            known = self._permutation = epoch, Permutation(self._key(epoch), self.examples)
        return known[1](positions)

    def _setup(self) -> None:
        super()._setup()
        self._permutation: tuple[int, Permutation] | None = None

    def _block_size(self) -> int:
        return self.examples if self.examples <= AT_ONCE else super()._block_size()


class Repeated(Order):
    """Shuffled, with each example k times in its batch, so that it can be augmented in k ways.

    Hoffer et al. 2020, "Augment your batch" (arXiv 1901.09335). The copies stand side by side, also in the short last
    batch. An epoch has k times as many positions as examples. Augmentation must be keyed by the position in the batch
    and not by the example: else the copies come out equal.

    Args:
        k: copies of each example; divides batch_size.
    """

    @typed
    def __init__(self, k: PositiveInt) -> None:
        self.k = self.copies = k

    def __len__(self) -> int:
        return self.k * self.examples

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return, for each position p, the example at position p // k of the shuffled order."""
        positions, first = self._positions(start, stop) // self.k, start // self.k
        return self._once.indices(epoch, first, -(-stop // self.k))[positions - first]

    def _setup(self) -> None:
        if self.batch_size % self.k:
            below = self.batch_size // self.k * self.k
            nearest = f"{below} or {below + self.k}" if below else f"{self.k}"
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of k = {self.k} copies: take {nearest}")
        self._once = Shuffled().prepare(self.examples, self.batch_size // self.k, self.seed)


def shuffled(key: int, count: int) -> Tensor:
    """Return the numbers 0 to count-1 in a random order that the key names, int64 [count]."""
    # NumPy's oldest generator is the only one whose numbers are promised to stay what they are (NEP 19).
    return torch.from_numpy(np.random.RandomState([key >> 32, key % 2**32]).permutation(count)).long()
