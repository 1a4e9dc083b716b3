"""The examples of a split as they are stored: their values, copies, classes and faults."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import compress
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Shuffled
from batchwise.batching.plan import BatchPlan
from batchwise.batching.structure import leaves, on_tensors, shape, tensors

BLOCK = 64  # examples read at a time
EXAMPLES = 1_000_000  # most examples of a split that are looked at


def fields(inputs: object) -> list[Tensor | list]:
    """Return the tensors [N, ...] in nested inputs, and the lists of one value per example.

    Raises:
        ValueError: there is no tensor among them.
    """
    found = [leaf for _, leaf in leaves(inputs) if isinstance(leaf, Tensor | list)]
    if not any(True for _ in tensors(found)):
        raise ValueError(f"there is no tensor among the inputs, but {shape(inputs)}: inspect looks at tensors")
    return found


def main_field(inputs: object) -> Tensor | list:
    """Return the tensor of the inputs with the most dimensions, which a picture can show; else a list."""
    found = fields(inputs)
    whole = [field for field in found if isinstance(field, Tensor)]
    return max(whole, key=lambda field: field.ndim) if whole else found[0]


def hashes(inputs: object) -> list[int]:
    """Return a hash of the exact content of each example. It has 64 bits, so no two are equal by chance."""
    whole = [field for field in fields(inputs) if isinstance(field, Tensor)]
    count = len(fields(inputs)[0])
    flat = [field.reshape(count, -1).contiguous().view(torch.uint8) for field in whole if field.numel()]
    # Padding of tokens (all bits set) is left out, because it depends on the other sequences of the micro-batch.
    rows = [row.tobytes().rstrip(b"\xff") for row in torch.cat(flat, 1).cpu().numpy()] if flat else [b""] * count
    for values in fields(inputs):
        if isinstance(values, list):
            rows = [row + _bytes(value) for row, value in zip(rows, values, strict=True)]
    return list(map(hash, rows))


def _bytes(value: object) -> bytes:
    """Return the content of the value of one example, with the shapes of its tensors."""

    def content(tensor: Tensor) -> tuple[torch.Size, bytes]:
        return tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()

    return repr(on_tensors(value, content)).encode()


def classes_of(targets: object) -> list[int]:
    """Return the class of each example, or nothing if targets are not whole numbers [N]."""
    if not isinstance(targets, Tensor) or targets.ndim != 1 or targets.is_floating_point():
        return []
    return targets.tolist()


class Values:
    """Range, mean and std of the finite values: of each column of a table, [F], or else of all together, [].

    Args:
        text: the values are sequences of unequal length, and no table.
    """

    def __init__(self, text: bool = False) -> None:
        self.text = text
        self.table = False
        """Whether the newest batch was rows of a table."""
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.sum = self.squares = self.count = torch.tensor(0.0, dtype=torch.float64)

    def add(self, inputs: object) -> tuple[Tensor, Tensor]:
        """Take a batch. Return which examples hold a value that is not finite, and which hold one value only, [N]."""
        self.table = isinstance(inputs, Tensor) and inputs.ndim == 2 and not self.text
        parts = []
        for values in fields(inputs):
            if isinstance(values, Tensor) and values[:1].numel():
                rows = values.detach().reshape(len(values), -1).cpu()
                # A column may hold large numbers that differ by little; images have many numbers.
                rows = rows.double() if self.table else rows.float()
                parts.append(self._add(rows))
            elif isinstance(values, list) and any(True for _ in tensors(values)):
                each = [self._add(one[None]) if len(one) else _NOTHING for one in map(_flat, values)]
                parts.append(tuple(map(torch.cat, zip(*each, strict=True))))
        lowest, highest, not_finite = map(torch.stack, zip(*parts, strict=True))
        return not_finite.any(0), lowest.amin(0) == highest.amax(0)

    def _add(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take values [N, F], and return of each row the lowest, the highest, and whether one is not finite."""
        lowest, highest = rows.amin(1), rows.amax(1)
        not_finite = ~(lowest.isfinite() & highest.isfinite())
        axis, count = (0, torch.full(rows.shape[1:], len(rows))) if self.table else ((0, 1), rows.numel())
        lows = highs = known = rows
        if not_finite.any():
            finite = rows.isfinite()
            lows, highs, known = (rows.where(finite, other) for other in (torch.inf, -torch.inf, 0))
            count = finite.sum(axis)
        self.low, self.high = self.low.minimum(lows.amin(axis)), self.high.maximum(highs.amax(axis))
        self.sum = self.sum + known.sum(axis).double()
        self.squares = self.squares + torch.linalg.vector_norm(known, dim=axis).double().square()
        self.count = self.count + count
        return lowest, highest, not_finite

    def __str__(self) -> str:
        mean = self.sum.sum() / self.count.sum()
        std = (self.squares.sum() / self.count.sum() - mean**2).clamp_min(0).sqrt()
        return f"{self.low.min():.4g} to {self.high.max():.4g}, mean {mean:.3g}, std {std:.3g}"


_NOTHING = (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), torch.tensor([False]))


def _flat(value: object) -> Tensor:
    """Return all numbers in the value of one example, float32 [F]."""
    return torch.cat([torch.zeros(0), *(tensor.detach().cpu().flatten().float() for tensor in tensors(value))])


@dataclass
class Look:
    """The facts about a split. The lists are over the examples that were looked at.

    Args:
        split: its name.
        total: examples that it has.
        text: its inputs are sequences of unequal length.
    """

    split: str
    total: int
    text: bool = False
    examples: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    not_finite: list[int] = field(default_factory=list)
    uniform: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = Values(self.text)

    def read(self, fetch: Fetch, seconds: float) -> "Look":
        """Look for so many seconds, in random order, because data is often stored sorted."""
        order = Shuffled().prepare(self.total, BLOCK, seed=0)
        end = perf_counter() + seconds
        for item in TrainLoader(BatchPlan(self.total, BLOCK, limit=EXAMPLES // BLOCK), order, fetch, 0, lambda: 0):
            (batch,) = item.micro_batches
            # Another example stands in for one that cannot be read; it is no copy.
            there = [True] * len(batch) if batch.weights is None else batch.weights.bool().tolist()
            not_finite, uniform = (mask.tolist() for mask in self.values.add(batch.inputs))
            numbers = batch.index.tolist()
            self.examples += compress(numbers, there)
            self.hashes += compress(hashes(batch.inputs), there)
            self.classes += compress(classes_of(batch.targets), there)
            self.not_finite += compress(numbers, not_finite)
            self.uniform += compress(numbers, uniform)
            if perf_counter() > end:
                break
        return self

    def sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """Return examples and hashes, in the order of the examples."""
        order = np.argsort(self.examples)
        return np.array(self.examples)[order], np.array(self.hashes)[order]

    def copies(self) -> list[tuple[int, int]]:
        """Return the examples with the inputs of an earlier one, each with the first that has them."""
        numbers, keys = self.sorted()
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        firsts = numbers[first[which]]
        again = firsts != numbers
        return list(zip(numbers[again].tolist(), firsts[again].tolist(), strict=True))

    def leaks(self, other: "Look") -> Iterator[str]:
        """Yield a line if examples of this split have the inputs of examples of another."""
        (numbers, keys), (others, their_keys) = self.sorted(), other.sorted()
        known, first = np.unique(their_keys, return_index=True)
        place = np.searchsorted(known, keys).clip(max=len(known) - 1)
        shared = np.flatnonzero(known[place] == keys)
        if len(shared):
            yield (
                f"{len(shared):,} of {len(keys):,} {self.split} examples are in {other.split} too, such as "
                f"{numbers[shared[0]]}, which is {others[first[place[shared[0]]]]} there"
            )

    def problems(self) -> Iterator[str]:
        """Yield a line for each fault of the split."""
        count, columns = f"{len(self.examples):,} {self.split} examples", self.values.low.numel()
        if self.not_finite:
            some = f"such as example {min(self.not_finite)}"
            yield f"{len(self.not_finite):,} of {count} hold a value that is not finite, {some}"
        if len(set(self.hashes)) == 1 < len(self.hashes):
            yield f"all {count} have the same inputs: nothing can be learnt from them"
            return
        if copies := self.copies():
            yield f"{len(copies):,} of {count} are copies, such as {copies[0][0]} of {copies[0][1]}"
        if self.uniform and not self.values.table:
            some = f"such as example {min(self.uniform)}"
            yield f"{len(self.uniform):,} of {count} are one value throughout, {some}"
        constant = (self.values.low == self.values.high).nonzero().flatten().tolist() if self.values.table else []
        if constant:
            some = ", ".join(map(str, constant[:8])) + (", ..." if len(constant) > 8 else "")
            yield f"{len(constant)} of {columns} columns are the same in all {count}: {some}"
