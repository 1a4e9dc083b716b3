"""Orders that look at the examples: at their classes, their lengths or their weights."""

import math

import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.order import Blocks, Order, Shuffled
from batchwise.batching.random import mix, permute, uniform
from batchwise.ranges import PositiveInt


class Stratified(Blocks):
    """Every example once per epoch, and every batch a miniature of the data set.

    Take N examples, of which n are in a class. A batch of B then has B n / N examples of that class, rounded down or
    up. The same holds for the short last batch of R.

    This is always possible. Lay the examples out class after class. Every (N / R)-th goes to the last batch, which so
    gets R n / N of a class, rounded down or up. The rest is dealt like cards to the N // B other batches. Of m
    neighbours each batch gets m / (N // B), rounded down or up, which lies between the same integers as B n / N.
    (Wrap-around rule, McNaughton 1959, "Scheduling with deadlines and loss functions".)

    The order of the classes, of the examples in a class and of the places in a batch is random. Memory: O(examples).
    """

    once = True

    def _setup(self) -> None:
        super()._setup()
        self._class = self._classes()

    def _block_size(self) -> int:
        return self.examples

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return the whole epoch."""
        key = self._key(epoch)
        batches, rest = divmod(self.examples, self.batch_size)
        deck = shuffle_within(mix(key, 0), positions, mix(key, 1, self._class))
        last = (torch.arange(rest, device="cpu") * self.examples + mix(key, 2) % self.examples) // max(rest, 1)
        dealt = torch.ones_like(deck, dtype=torch.bool).index_fill_(0, last, False)
        rows = deck[dealt].view(self.batch_size, batches).T
        # Neighbours in the deck go to batches far apart: steps of the golden ratio spread any run of them evenly.
        turn = torch.arange(batches, device="cpu", dtype=torch.float64) * (math.sqrt(5) - 1) / 2
        rows = rows[((turn + mix(key, 3) * 2.0**-63) % 1).argsort()]
        order = torch.cat([rows.flatten(), deck[last]])
        return order[shuffle_within(mix(key, 4), positions, positions // self.batch_size)]


class Balanced(Blocks):
    """Every class equally often: in any batch the counts of two classes differ by at most one.

    An epoch has as many positions as there are examples, but it is not one pass over them. Of N examples in C classes,
    each class has N / C positions, rounded down or up. The examples of a rare class are repeated: all of them come
    before any comes again, each time in a new order. Of a frequent class only some examples come, in each epoch others.
    """

    def _setup(self) -> None:
        super()._setup()
        classes = self._classes()
        self._members = classes.argsort(stable=True)  # class after class
        self._count = classes.bincount()
        self._first = self._count.cumsum(0) - self._count

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return one block."""
        # The classes take turns in one order for the whole epoch: then any run of positions is balanced.
        key = self._key(epoch)
        classes = len(self._count)
        turn, draw = positions % classes, positions // classes
        label = permute(mix(key, 0), classes, torch.arange(classes, device="cpu"))[turn]
        count = self._count[label]
        member = permute(mix(key, 1, label, draw // count), count, draw % count)
        order = self._members[self._first[label] + member]
        return order[shuffle_within(mix(key, 2), positions, positions // self.batch_size)]


class Bucketed(Blocks):
    """Every example once per epoch, in batches of sequences of similar length. There is less padding, at a price.

    The shuffled order is cut into windows. The examples of a window are sorted by length and cut into batches, which
    come in random order. An epoch still has every example once, but a batch is no random sample: its sequences are all
    long or all short. If long and short ones teach different things, the gradient of a batch is biased. A batch that is
    sorted only within itself, as all are, has no such bias.

    Args:
        window: number of examples that are sorted at a time, rounded down to whole batches.

    Raises:
        ValueError: there are no lengths.
    """

    once = True

    @typed
    def __init__(self, window: PositiveInt = 4096) -> None:
        self.window = window

    def _setup(self) -> None:
        super()._setup()
        if self.lengths is None:
            raise ValueError("Bucketed looks at the lengths of sequences, which these data have not: take Shuffled")
        self._shuffled = Shuffled().prepare(self.examples, self.batch_size, self.seed)

    def _block_size(self) -> int:
        return max(self.window // self.batch_size, 1) * self.batch_size

    def compute(self, epoch: int, positions: Tensor) -> Tensor:
        """Return one window."""
        assert self.lengths is not None
        order = self._shuffled.indices(epoch, int(positions[0]), int(positions[-1]) + 1)
        full = len(order) // self.batch_size * self.batch_size  # the short last batch of the epoch stays as it is
        by_length = order[:full][self.lengths[order[:full]].argsort(stable=True)].view(-1, self.batch_size)
        batches = mix(self._key(epoch), 1, positions[: len(by_length)]).argsort()
        return torch.cat([by_length[batches].flatten(), order[full:]])


class Weighted(Order):
    """Each position draws an example with replacement. Example i has the probability w_i / sum(w).

    Args:
        weights: one per example; or one per class 0 to C-1, which is then the weight of every example of that class
            (1 / class size makes the classes equally likely). They need not sum to one.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or there are neither as many as examples nor as
            classes.
    """

    @typed
    def __init__(self, weights: list[float]) -> None:
        wrong = [weight for weight in weights if not 0 <= weight < math.inf]
        if wrong or not sum(weights):
            raise ValueError(
                f"data.order.weights has {(wrong or weights)[:8]}: they must be finite, not negative, and "
                "not all zero, so write numbers from 0, and one above 0"
            )
        self.weights = weights

    def indices(self, epoch: int, start: int, stop: int) -> Tensor:
        """Return one draw per position: the inverse of the cumulative distribution at a uniform number."""
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


def shuffle_within(key: int, positions: Tensor, groups: Tensor) -> Tensor:
    """Return the indices that sort positions by group, in random order within a group, int64 [positions]."""
    order = mix(key, positions).argsort()
    return order[groups[order].argsort(stable=True)]
