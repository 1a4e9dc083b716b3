"""Embeddings that are brought together: those of a batch over micro-batches and devices, those of a group."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.plan import cut
from batchwise.batching.structure import leaves, tensors
from batchwise.tasks.losses import described
from batchwise.tasks.sums import reduce

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


class Ahead(NamedTuple):
    """What the first pass has found of the whole batch. It is the same on all devices."""

    losses: Tensor
    """Of each example, [B]."""
    weights: Tensor
    """Of these losses, [B]."""
    gradients: list[Tensor]
    """Of the sum of weighted losses with respect to the embeddings, [B, ...] each."""
    own: list[tuple[nn.Parameter, Tensor]]
    """Parameters that the loss itself uses, such as a temperature, with their gradients of that sum."""
    answers: tuple[Tensor, Tensor] | None
    """Of retrieval, and their weights, [B]; None: not wanted."""
    parts: int
    """Micro-batches over all devices, with those that stand in."""


class Groups:
    """The embeddings of an evaluation, while their groups are not complete.

    Args:
        examples: of the split, over all devices.
        size: most examples of a group.
    """

    def __init__(self, examples: int, size: int) -> None:
        self.borders = cut(examples, ceil(examples / size))
        self.seen = 0
        """Where the newest batch ended."""
        self._pieces: dict[int, list[MicroBatch]] = {}
        self._newest: MicroBatch | None = None

    def add(self, batch: MicroBatch) -> Iterator[MicroBatch]:
        """Take consecutive examples with their embeddings; yield the groups that they complete."""
        first = int(batch.index[0])
        self.seen, number = first + len(batch), bisect_right(self.borders, first) - 1
        while self.borders[number] < self.seen:
            start, stop = self.borders[number : number + 2]
            own = torch.arange(max(start, first), min(stop, self.seen)) - first
            self._newest = replace(batch.take(own), position=max(start, first) - start)
            pieces = [*self._pieces.pop(number, []), self._newest]
            if sum(map(len, pieces)) == stop - start:
                yield join(stop - start, pieces)
            else:
                self._pieces[number] = pieces
            number += 1

    def rest(self, task: "Task") -> Iterator[MicroBatch]:
        """Yield the groups whose examples are on several devices, on all of them alike."""
        has = torch.zeros(len(self.borders), device=task.device)
        has[list(self._pieces)] = 1
        for number in reduce(task, has).nonzero().flatten().tolist():
            assert self._newest is not None
            pieces = self._pieces.get(number) or [replace(self._newest, counts=False)]
            yield join(self.borders[number + 1] - self.borders[number], pieces, lambda rows: reduce(task, rows))


def checked(given: Any, examples: int, name: str) -> tuple[Tensor, ...]:
    """Return what `embed` of a task called `name` gave for some examples, in single precision at least.

    Raises:
        ValueError: it is not one embedding per example.
    """
    embeddings = given if isinstance(given, tuple | list) else (given,)
    for each in embeddings:
        if not isinstance(each, Tensor) or each.ndim < 2 or len(each) != examples:
            raise ValueError(
                f"{name}.embed gave {described(each)} for {examples} examples: return one embedding per example, "
                "[N, D], or a tuple of such"
            )
    return tuple(each if each.dtype.itemsize >= 4 else each.float() for each in embeddings)


def refuse_lists(targets: Any) -> None:
    """Raise ValueError for targets that cannot be brought together over devices."""
    for name, leaf in leaves(targets, "targets"):
        if isinstance(leaf, list):
            raise ValueError(
                f"{name} is a list, but the examples of a batch are compared over all devices by tensors: write a "
                "tensor, or leave it out in transform"
            )


def join(size: int, parts: list[MicroBatch], add: Callable[[Tensor], Tensor] = lambda rows: rows) -> MicroBatch:
    """Return parts as one batch: tensors [size, ...], with each part at its position, and weight zero where none is.

    Args:
        size: examples of the whole.
        parts: of this device; those that do not count only show of which types the others are.
        add: adds a tensor over all devices that have other parts.
    """
    wholes, weighted = [], list(map(_weighted, parts))
    for column in zip(*(tensors((one.inputs, one.targets, one.weights)) for one in weighted), strict=True):
        whole = column[0].new_zeros(size, *column[0].shape[1:])
        for part, rows in zip(parts, column, strict=True):
            if part.counts:
                whole[part.position : part.position + len(part)] = rows
        wholes.append(add(whole.byte()).bool() if whole.dtype == torch.bool else add(whole))
    each = iter(wholes)
    whole = weighted[0]._map(lambda _: next(each))
    return replace(whole, index=torch.arange(size), position=0, counts=True)


def _weighted(batch: MicroBatch) -> MicroBatch:
    """Return the batch with weights, which are of one type on all devices."""
    like = batch.inputs[0]
    weights = like.new_ones(len(batch)) if batch.weights is None else batch.weights.to(like)
    return replace(batch, weights=weights)


def present(batch: MicroBatch) -> tuple[MicroBatch, Tensor | None]:
    """Return the examples whose weight is not zero, and their places; None: it is all of them."""
    if batch.weights is None or bool((here := batch.weights != 0).all()):
        return batch, None
    rows = here.nonzero().squeeze(1)
    return batch.take(rows.cpu()), rows


def spread(values: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Return values at their places among `count`, with zeros elsewhere."""
    return values if rows is None else values.new_zeros(count).index_put((rows,), values)
