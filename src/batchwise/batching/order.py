"""The order of an epoch: which example stands at which position, a pure function of (seed, epoch)."""

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.random import mix, permute, uniform

_STREAM = int.from_bytes(b"order", "big")  # keeps these random numbers apart from others keyed by the same seed
_BLOCK = 2**14  # positions computed at a time: 128 KiB, a few milliseconds
_WHOLE = 2**20  # most examples that are shuffled at once: 8 MiB, 30 ms, and twenty times as fast


class Order:
    """The order of an epoch, which can be asked for any slice. One's own order overrides only `indices`.

    An order keeps no state that changes an answer, and touches no global generator.
    """

    examples: int
    batch_size: int
    seed: int
    labels: Tensor | None
    lengths: Tensor | None
    once: bool = False
    """An epoch has no example twice, so what is drawn for it need not depend on its position."""
    copies: int = 1
    """Positions side by side that hold the same example."""

    def prepare(
        self,
        examples: int,
        batch_size: int,
        seed: int,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Self:
        """Say what is to be ordered, once, before the first `indices`.

        Args:
            examples: number of examples in the data set.
            batch_size: examples per optimizer step, over all devices together.
            seed: any integer.
            labels: class of each example, integers [examples], for the orders that look at classes.
            lengths: tokens of each example, int64 [examples], for the order that looks at them.

        Raises:
            ValueError: for a number below one, labels that are not one integer per example, or what the order needs
                and is not given.
        """
        if examples < 1 or batch_size < 1:
            raise ValueError(f"an order needs at least 1 example and batch_size 1, not {examples} and {batch_size}")
        if labels is not None and (labels.shape != (examples,) or labels.is_floating_point()):
            raise ValueError(f"give labels as integers [{examples}], not {labels.dtype} {list(labels.shape)}")
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self.labels, self.lengths = labels, lengths
        self._setup()
        return self

    def __len__(self) -> int:
        """Positions in one epoch."""
        return self.examples

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """The examples at positions start to stop (exclusive) of an epoch, int64 [stop - start], on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define indices(epoch, start, stop)")

    def _setup(self) -> None:
        """What an order works out once from the numbers given to `prepare`."""

    def _key(self, epoch: int) -> int:
        return mix(self.seed, _STREAM, epoch)

    def _positions(self, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"positions {start} to {stop} are not in this epoch: ask within 0 to {len(self)}")
        return torch.arange(start, stop, device="cpu")

    def _classes(self) -> Tensor:
        """Labels as class numbers 0 to C-1 without gaps, int64 [examples]."""
        if self.labels is None:
            raise ValueError(f"{type(self).__name__} looks at classes: give labels, or take Shuffled")
        return self.labels.cpu().unique(return_inverse=True)[1]


class Sequential(Order):
    """The examples as they are stored, every epoch."""

    once = True

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """The positions themselves."""
        return self._positions(start, stop)


class _Blocks(Order):
    """Computes a block of whole batches at a time and keeps the last one, since a batch alone costs almost as much."""

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
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
        kept = self._kept  # read and replaced whole: a second thread can at worst make us compute a block again
        if kept is None or kept[:2] != (epoch, first):
            positions = self._positions(first, min(first + self._block_size(), len(self)))
            kept = self._kept = epoch, first, self._compute(self._key(epoch), positions)
        return kept[2]

    def _compute(self, key: int, positions: Tensor) -> Tensor:
        """The examples at the positions of one block, int64 [positions], in the epoch with this key."""
        raise NotImplementedError


class Shuffled(_Blocks):
    """Every example once per epoch in random order.

    Up to a million examples are shuffled at once. Beyond that the order is a permutation computed position by position,
    in memory that does not grow with the data.
    """

    once = True

    def _block_size(self) -> int:
        return self.examples if self.examples <= _WHOLE else super()._block_size()

    def _compute(self, key: int, positions: Tensor) -> Tensor:
        if self.examples <= _WHOLE:
            # NumPy's oldest generator is the only one whose numbers are promised to stay what they are (NEP 19).
            generator = np.random.RandomState([key >> 32, key % 2**32])
            return torch.from_numpy(generator.permutation(self.examples)).long()
        return permute(key, self.examples, positions)


class Stratified(_Blocks):
    """Every example once per epoch, and every batch a miniature of the data set.

    Of N examples, n in a class, a batch of B has B n / N of that class rounded down or up: less than one off, in the
    short last batch of R too. That can always be had: lay the examples out class after class. Every (N / R)-th goes to
    the last batch, which so has R n / N of a class rounded down or up. The rest is dealt like cards to the N // B other
    batches, and of m neighbours each gets m / (N // B) rounded down or up, which lies between the same whole numbers as
    B n / N. (Wrap-around rule, McNaughton 1959, "Scheduling with deadlines and loss functions".)

    Random are the order of the classes, of the examples in a class, and of the places in a batch. Memory: O(examples).
    """

    once = True

    def _setup(self) -> None:
        super()._setup()
        self._class = self._classes()

    def _block_size(self) -> int:
        return self.examples

    def _compute(self, key: int, positions: Tensor) -> Tensor:
        batches, rest = divmod(self.examples, self.batch_size)
        deck = _shuffle_within(mix(key, 0), positions, mix(key, 1, self._class))
        last = (torch.arange(rest, device="cpu") * self.examples + mix(key, 2) % self.examples) // max(rest, 1)
        dealt = torch.ones_like(deck, dtype=torch.bool).index_fill_(0, last, False)
        rows = deck[dealt].view(self.batch_size, batches).T
        # Neighbours in the deck go to batches far apart: steps of the golden ratio spread any run of them evenly.
        turn = torch.arange(batches, device="cpu", dtype=torch.float64) * (math.sqrt(5) - 1) / 2
        rows = rows[((turn + mix(key, 3) * 2.0**-63) % 1).argsort()]
        order = torch.cat([rows.flatten(), deck[last]])
        return order[_shuffle_within(mix(key, 4), positions, positions // self.batch_size)]


class Balanced(_Blocks):
    """Classes equally often: in any batch their counts differ by at most one.

    An epoch has as many positions as there are examples, but is not one pass over them: of N examples in C classes,
    each class stands at N / C positions (rounded down or up). The examples of a rarer class come again, all of them
    before any comes once more, each time in a new order; of a more frequent class only some come, in each epoch others.
    """

    def _setup(self) -> None:
        super()._setup()
        classes = self._classes()
        self._members = classes.argsort(stable=True)  # class after class
        self._count = classes.bincount()
        self._first = self._count.cumsum(0) - self._count

    def _compute(self, key: int, positions: Tensor) -> Tensor:
        # The classes take turns in one order for the whole epoch: then any run of positions is balanced.
        classes = len(self._count)
        turn, draw = positions % classes, positions // classes
        label = permute(mix(key, 0), classes, turn)
        count = self._count[label]
        member = permute(mix(key, 1, label, draw // count), count, draw % count)
        order = self._members[self._first[label] + member]
        return order[_shuffle_within(mix(key, 2), positions, positions // self.batch_size)]


class Bucketed(_Blocks):
    """Every example once per epoch, in batches of like length: for sequences, whose padding falls, at a price.

    The shuffled order is cut into windows; those of a window are sorted by length and cut into batches, which come in
    random order. So an epoch is as it should be, but a batch is not a random sample: it has long sequences or short
    ones, and where they differ in what they teach, its gradient is biased towards them, and consecutive steps differ by
    more than random ones. A batch that is only sorted within itself, as all are, has no such bias.

    Args:
        window: examples that are sorted together; in whole batches.
    """

    once = True

    def __init__(self, window: int = 4096) -> None:
        if window < 1:
            raise ValueError(f"window is {window}: take a number of examples, of many batches")
        self.window = window

    def _setup(self) -> None:
        super()._setup()
        if self.lengths is None:
            raise ValueError("Bucketed looks at the lengths of sequences, which these data have not: take Shuffled")

    def _block_size(self) -> int:
        return max(self.window // self.batch_size, 1) * self.batch_size

    def _compute(self, key: int, positions: Tensor) -> Tensor:
        assert self.lengths is not None
        order = permute(mix(key, 0), self.examples, positions)
        whole = len(order) // self.batch_size * self.batch_size  # the short last batch of the epoch stays as it is
        by_length = order[:whole][self.lengths[order[:whole]].argsort(stable=True)].view(-1, self.batch_size)
        batches = mix(key, 1, positions[: len(by_length)]).argsort()
        return torch.cat([by_length[batches].flatten(), order[whole:]])


class Weighted(Order):
    """Every position draws an example anew, with replacement, example i with probability w_i / sum(w).

    Args:
        weights: one per example; or one per class 0 to C-1 of the labels, which is then the weight of every example of
            that class (1 / class size makes classes equally likely). They need not sum to one.
    """

    def __init__(self, weights: list[float]) -> None:
        if not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
            raise ValueError("weights must be finite, not negative, and not all zero")
        self.weights = weights

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Inverts the cumulative distribution at one uniform number per position."""
        u = uniform(self._key(epoch), self._positions(start, stop))
        return torch.searchsorted(self._cumulative, u * self._cumulative[-1], right=True)  # right: over weights of zero

    def _setup(self) -> None:
        weights = torch.tensor(self.weights, dtype=torch.float64, device="cpu")
        if len(weights) != self.examples:
            classes = torch.tensor([-1]) if self.labels is None else self.labels.cpu().long()
            number = int(classes.max()) + 1
            if len(weights) != number or classes.min() < 0:
                wanted = f"{self.examples}, one per example" + (f", or {number}, one per class" if number else "")
                raise ValueError(f"{len(weights)} weights: give {wanted}")
            weights = weights[classes]
        self._cumulative = weights.cumsum(0)


class Repeated(Order):
    """Shuffled, but with each example k times in its batch, to be augmented in k ways.

    Hoffer et al. 2020, "Augment your batch" (arXiv 1901.09335). The copies stand side by side, in the short last batch
    too, so that a micro-batch can read an example once. An epoch has k times as many positions as examples.
    Augmentation must be keyed by the position in the batch, not by the example, or the copies come out equal.

    Args:
        k: copies of each example; divides batch_size.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"k is the number of copies of each example: take 1 or more, not {k}")
        self.k = self.copies = k

    def __len__(self) -> int:
        return self.k * self.examples

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Position p holds the example at position p // k of the shuffled order."""
        positions, first = self._positions(start, stop) // self.k, start // self.k
        return self._once.indices(epoch, first, -(-stop // self.k))[positions - first]

    def _setup(self) -> None:
        if self.batch_size % self.k:
            below = self.batch_size // self.k * self.k
            nearest = f"{below} or {below + self.k}" if below else f"{self.k}"
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of k = {self.k} copies: take {nearest}")
        self._once = Shuffled().prepare(self.examples, self.batch_size // self.k, self.seed)


def _shuffle_within(key: int, positions: Tensor, groups: Tensor) -> Tensor:
    """What sorts positions by their group number, in random order within a group, int64 [positions]."""
    order = mix(key, positions).argsort()
    return order[groups[order].argsort(stable=True)]
