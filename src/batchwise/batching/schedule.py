"""The batch size as a function of examples seen. Micro-batches keep their size; there are more of them."""

import math
from itertools import pairwise

from batchwise.arguments import typed
from batchwise.batching.borders import Changes
from batchwise.ranges import PositiveInt


class BatchSizes:
    """How the batch size changes after `batch_size`. The learning rate changes with it if it follows the batch."""

    sizes: tuple[int, ...] = ()
    """The sizes that are known before training."""

    def changes(self, total: float) -> Changes:
        """Return the changes that are known before training.

        Args:
            total: number of examples in the whole training; inf if it has no end.
        """
        return ()


class Milestones(BatchSizes):
    """Other batch sizes from given points of the training on.

    A larger batch has the effect of a smaller learning rate, in fewer steps (Smith et al. 2017, "Don't decay the
    learning rate, increase the batch size", arXiv 1711.00489). With `reference_batch_size` the rate follows the batch
    instead, as it does from run to run.

    Args:
        sizes: examples per optimizer step, from each point on.
        shares: the points, as shares of the training, above 0 and below 1.
        examples: the points, as numbers of examples seen. Write either these or `shares`.

    Raises:
        ValueError: the points are not as many as the sizes, or do not rise.
    """

    @typed
    def __init__(self, sizes: list[int], shares: list[float] | None = None, examples: list[int] | None = None) -> None:
        points = examples if shares is None else shares
        name = "examples" if shares is None else "shares"
        if points is None or (shares is not None and examples is not None) or len(points) != len(sizes):
            raise ValueError(f"batch_size_schedule: write one of shares and examples, {len(sizes)} of them as of sizes")
        below = 1 if shares is not None else math.inf
        if any(a >= b for a, b in pairwise([0, *points, below])):
            raise ValueError(f"batch_size_schedule.{name} are {points}: write them rising, above 0 and below {below}")
        if any(size < 1 for size in sizes):
            raise ValueError(f"batch_size_schedule.sizes are {sizes}: write whole numbers of at least 1")
        self.sizes, self.shares, self.examples = tuple(sizes), shares, examples

    def changes(self, total: float) -> Changes:
        """Return the points as numbers of examples, each with its size."""
        if self.shares is not None and total == math.inf:
            raise ValueError("batch_size_schedule.shares are of the training: write trainer.max_epochs, or examples")
        points = self.examples if self.shares is None else [math.ceil(share * total) for share in self.shares]
        return tuple(zip(points or (), self.sizes, strict=True))


class Adaptive(BatchSizes):
    """The batch size follows the gradient noise scale: at the start of an epoch it is doubled, halved, or kept.

    A batch much smaller than the noise scale wastes steps; a much larger one wastes examples (McCandlish et al. 2018,
    arXiv 1812.06162). The noise scale grows during training. It is measured from the micro-batches of each batch, so
    there must be several, and with other micro-batches other sizes may be chosen. The chosen sizes are saved in the
    checkpoint, so a resume goes on with them.

    Args:
        most: the largest batch size. The smallest is `batch_size`.
    """

    @typed
    def __init__(self, most: PositiveInt) -> None:
        self.most = most

    def next(self, size: int, smallest: int, largest: int, noise_scale: float) -> int:
        """Return the batch size of the next epoch: `size`, half or twice of it, from `smallest` to `largest`."""
        if noise_scale >= 2 * size <= largest:
            return 2 * size
        return size // 2 if noise_scale < size > smallest else size
