"""Batches of sequences: sizes in tokens, and micro-batches of similar lengths, which need little padding."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch import Tensor

from batchwise.batching.borders import Borders, BySize
from batchwise.batching.order import Order
from batchwise.batching.plan import BatchPlan, Part


class ByTokens:
    """Batches of equally many tokens. Every epoch has the same number of batches, and none is short.

    The tokens of an epoch, in its order, are cut into equal parts. A sequence belongs to the part that contains its
    middle. So no sequence is cut, and a batch differs from the equal part by at most half a sequence at either end.

    Args:
        positions: number of positions in an epoch.
        steps: batches per epoch, at most as many as positions.
        lengths: returns the tokens of the examples of an epoch, in its order, int64 [positions].
    """

    def __init__(self, positions: int, steps: int, lengths: Callable[[int], Tensor]) -> None:
        self.positions, self.steps, self.lengths = positions, steps, lengths
        self._kept: tuple[int, list[int]] = -1, []

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to."""
        return step // self.steps

    def before(self, epoch: int) -> tuple[int, int]:
        """Return the numbers of steps done and of examples seen before an epoch."""
        return epoch * self.steps, epoch * self.positions

    def bounds(self, epoch: int, number: int) -> tuple[int, int]:
        """Return the positions [start, stop) of an epoch that its batch `number` trains on."""
        kept = self._kept  # read once and replaced as a whole, because threads call this
        if kept[0] != epoch:
            kept = self._kept = epoch, self._cut(self.lengths(epoch))
        return kept[1][number], kept[1][number + 1]

    def _cut(self, lengths: Tensor) -> list[int]:
        ends, count = lengths.cumsum(0), torch.arange(self.steps + 1)
        # Twice the middle of each sequence is compared with twice the borders, so that all numbers are integers.
        borders = torch.searchsorted((2 * ends - lengths) * self.steps, 2 * ends[-1] * count)
        # No batch is empty, whatever the lengths are.
        borders = torch.maximum((borders - count).cummax(0).values + count, count)
        borders = torch.minimum(borders, self.positions - self.steps + count).tolist()
        return [*borders[:-1], self.positions]


@dataclass(frozen=True, kw_only=True)
class SequencePlan(BatchPlan):
    """A batch plan for sequences. Within each batch they are sorted by length, the longest first, and then cut.

    The batch and its gradient stay the same; there is less padding. Micro-batches are dealt to the devices in turn, so
    that all devices have about the same work at the same time.

    Args:
        lengths: tokens of each example, int64 [examples].
        order: the order of each epoch.
        batch_tokens: tokens per optimizer step, over all devices together. `batch_size` is then the mean number of
            examples in them.
        micro_batch_tokens: most tokens on one device at once, with padding. None: only `micro_batch_size` limits.

    Raises:
        ValueError: a sequence is longer than a batch or micro-batch, or the plan does not allow sequences.
    """

    lengths: Tensor = field(compare=False, repr=False)
    order: Order = field(compare=False, repr=False)
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None

    @classmethod
    def of(cls, plan: BatchPlan, lengths: Tensor, order: Order, **tokens: Any) -> "SequencePlan":
        """Return a plan of examples as a plan of sequences. `tokens` are its sizes in tokens."""
        return cls(
            **{each.name: getattr(plan, each.name) for each in fields(plan)}, lengths=lengths, order=order, **tokens
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = int(self.lengths.argmax())
        for name in ("batch_tokens", "micro_batch_tokens"):
            most = getattr(self, name)
            if most is not None and most < self.lengths[longest]:
                raise ValueError(
                    f"data.{name} is {most}, but example {longest} has {self.lengths[longest]} tokens: write at least "
                    "as many, or cut it"
                )
        if self.unit > 1:
            raise ValueError("model.ghost_batch_size would mix the padding of sequences in: leave it out")
        if self.batch_tokens and self.changes:
            raise ValueError("data.batch_size_schedule is in examples: write data.batch_size, not data.batch_tokens")

    @cached_property
    def _unlimited_steps(self) -> int:
        """Batches of `batch_tokens` in an epoch without a limit; if the order draws examples, on average."""
        tokens = int(self.lengths.sum()) * self.examples / len(self.lengths)
        return max(1, min(ceil(tokens / (self.batch_tokens or 1)), self.examples))

    @property
    def positions(self) -> int:
        """Number of positions of an epoch that its batches are cut from."""
        if self.batch_tokens is None or self.limit is None:
            return super().positions
        return max(1, self.examples * min(self.limit, self._unlimited_steps) // self._unlimited_steps)

    @cached_property
    def borders(self) -> Borders:
        """Where the batches of the training begin and end."""
        if self.batch_tokens is None:
            return BySize(self.positions, self.batch_size, self.changes, self.drop_last)
        steps = min(self._unlimited_steps, self.limit or self._unlimited_steps)
        return ByTokens(self.positions, steps, self._lengths_in)

    def _lengths_in(self, epoch: int) -> Tensor:
        """Return the tokens of the examples of an epoch, in its order, int64 [positions]."""
        return self.lengths[self.order.indices(epoch, 0, self.positions)]

    def arrange(self, index: Tensor, rank: int) -> tuple[Tensor, list[Part]]:
        """Return the sorted examples of a batch, and the micro-batches of device `rank` in it."""
        lengths, places = self.lengths[index].clamp(min=1).sort(descending=True, stable=True)
        pieces = list(pairwise(self._cut_sorted(lengths.tolist())))
        own = [Part(start, stop) for start, stop in pieces[rank :: self.devices]]
        if len(own) < ceil(len(pieces) / self.devices):
            own.append(Part(len(index) - 1, len(index), counts=False))
        return index[places], own

    def _cut_sorted(self, lengths: list[int]) -> list[int]:
        """Return the borders of micro-batches: as few per device as possible, and then as equal as possible."""
        size, longest = len(lengths), lengths[0]
        most = self.micro_batch_size or size
        tokens = self.micro_batch_tokens or size * longest
        fewest = len(_fill(lengths, most, tokens)) - 1
        pieces = ceil(fewest / self.devices) * self.devices
        if pieces == 1:
            return [0, size]
        budgets = range(max(longest, sum(lengths) // pieces), tokens + 1)
        enough = bisect_left(budgets, True, key=lambda tokens: len(_fill(lengths, most, tokens)) - 1 <= pieces)
        return _fill(lengths, most, budgets[enough])

    @property
    def accumulation(self) -> int:
        """Micro-batches that each device runs per optimizer step, at least, on average."""
        tokens = self.batch_tokens or self.batch_size * int(self.lengths.sum()) / len(self.lengths)
        most = self.micro_batch_tokens
        return max(super().accumulation, ceil(tokens / self.devices / most) if most else 1)

    def table(self, total_steps: float) -> dict[str, float]:
        """Return the figures that are printed and logged before training."""
        figures = {
            "examples": self.examples,
            "tokens": int(self.lengths.sum()),
            "batch_tokens": self.batch_tokens,
            "batch_size": self.batch_size,
            **{f"after {seen:,} examples": size for seen, size in self.changes},
            "devices": self.devices,
            "micro_batch_tokens": self.micro_batch_tokens,
            "micro_batch_size": self.micro_batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": total_steps,
        }
        return {name: value for name, value in figures.items() if value is not None}


def _fill(lengths: list[int], most: int, tokens: int) -> list[int]:
    """Return the borders of micro-batches of sorted sequences, each as large as allowed."""
    borders = [0]
    while borders[-1] < len(lengths):
        fitting = tokens // lengths[borders[-1]]  # all are padded to the length of the first
        borders.append(min(borders[-1] + max(1, min(most, fitting)), len(lengths)))
    return borders
