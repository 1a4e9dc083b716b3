"""The batch plan: one batch size, cut into devices, micro-batches and steps by arithmetic alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import NamedTuple

from batchwise.batching.borders import Borders, BySize, Changes


class Part(NamedTuple):
    """One micro-batch of one device: positions [start, stop).

    `counts` is False where a device has nothing to do. It then runs one example with weight zero, because every device
    must take part in equally many forward and backward passes.
    """

    start: int
    stop: int
    counts: bool = True


def cut(total: int, parts: int) -> list[int]:
    """Return the `parts + 1` borders of parts of 0 to `total` whose sizes differ by at most one."""
    return [total * i // parts for i in range(parts + 1)]


def _units(size: int, unit: int) -> int:
    """Return the number of units in `size` examples, rounded, and at least one."""
    full, rest = divmod(size, unit)
    return max(1, full + (2 * rest >= unit))


def _positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: write a whole number of at least 1")


@dataclass(frozen=True)
class BatchPlan:
    """How each batch of `batch_size` examples is executed. Nothing here changes what is computed.

    Args:
        examples: positions in one epoch. For most orders this is the number of training examples.
        batch_size: examples per optimizer step, over all devices together.
        devices: data-parallel processes, over all nodes.
        micro_batch_size: most examples on one device at once. None: the device's whole share.
        drop_last: leave out the short batch at the end of an epoch. By default it is trained on, exactly.
        unit: number of examples that must stay together (a ghost batch). Shares and micro-batches are whole units. A
            remainder of less than half a unit joins the unit before it.
        limit: number of batches of `batch_size` after which an epoch ends. None: no limit.
        changes: later batch sizes, each from a number of examples seen on. Micro-batches keep their size.

    Raises:
        ValueError: a number is below 1, or there is no step to take.
    """

    examples: int
    batch_size: int
    devices: int = 1
    micro_batch_size: int | None = None
    drop_last: bool = False
    unit: int = 1
    limit: int | None = None
    changes: Changes = ()

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise ValueError("the training split has no examples: give it some, or check where it is read from")
        _positive(batch_size=self.batch_size, micro_batch_size=self.micro_batch_size, devices=self.devices)
        _positive(unit=self.unit, limit=self.limit)
        if self.micro_batch_size is not None and self.micro_batch_size < self.unit:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}, but {self.unit} examples must stay together: "
                f"write at least {self.unit}"
            )
        largest = max([self.batch_size, *(size for _, size in self.changes)])
        if self.drop_last and largest > self.positions:
            raise ValueError(
                f"batch_size is {largest} with drop_last, but there are only {self.positions} examples: no step "
                f"would be taken; write at most {self.positions}, or drop_last: false"
            )

    @classmethod
    def derive(
        cls,
        *,
        examples: int,
        batch_size: int | None,
        micro_batch_size: int | None,
        accumulate_grad_batches: int | None,
        devices: int,
        drop_last: bool = False,
        unit: int = 1,
        limit: int | None = None,
    ) -> "BatchPlan":
        """Make the plan from any two of batch size, micro-batch size and accumulation, or from three that agree.

        Raises:
            ValueError: too few are given, or they contradict one another.
        """
        _positive(batch_size=batch_size, micro_batch_size=micro_batch_size, devices=devices, unit=unit)
        _positive(accumulate_grad_batches=accumulate_grad_batches)

        def plan(batch_size: int, micro_batch_size: int | None) -> BatchPlan:
            return cls(examples, batch_size, devices, micro_batch_size, drop_last, unit, limit)

        if batch_size is None:
            if micro_batch_size is None or accumulate_grad_batches is None:
                raise ValueError(
                    "data.batch_size is not set: write the number of examples per optimizer step, over all devices"
                )
            return plan(micro_batch_size * accumulate_grad_batches * devices, micro_batch_size)
        if accumulate_grad_batches is None:
            return plan(batch_size, micro_batch_size)

        def accumulation(micro_batch_size: int) -> int:
            return ceil(share / (micro_batch_size // unit))

        share = ceil(_units(batch_size, unit) / devices)
        fitting = ceil(share / accumulate_grad_batches) * unit
        size = fitting if micro_batch_size is None else micro_batch_size
        if size >= unit and accumulation(size) != accumulate_grad_batches:
            remedies = [f"accumulate_grad_batches {accumulation(size)}"]
            if micro_batch_size is None and size > unit:
                remedies += [f"accumulate_grad_batches {accumulation(size - unit)}"]
            if accumulation(fitting) == accumulate_grad_batches:
                remedies += [f"micro_batch_size {fitting}"]
            remedies += [f"batch_size {size * accumulate_grad_batches * devices}"]
            raise ValueError(
                f"batch_size {batch_size} on {devices} device(s) cannot be {accumulate_grad_batches} micro-batches of "
                f"{'equal size' if micro_batch_size is None else f'at most {size}'} "
                f"(accumulate_grad_batches {accumulate_grad_batches}): write {', or '.join(remedies)}"
            )
        return plan(batch_size, size)

    @property
    def positions(self) -> int:
        """Number of positions of an epoch that its batches are cut from."""
        return self.examples if self.limit is None else min(self.examples, self.limit * self.batch_size)

    @cached_property
    def borders(self) -> Borders:
        """Where the batches of the training begin and end."""
        return BySize(self.positions, self.batch_size, self.changes, self.drop_last)

    def epoch(self, step: int) -> int:
        """Return the epoch of an optimizer step; both count from 0."""
        return self.borders.epoch(step)

    def first_step(self, epoch: int) -> int:
        """Return the first optimizer step of an epoch, which is the number of steps before it."""
        return self.borders.before(epoch)[0]

    def begins_epoch(self, step: int) -> bool:
        """Return whether a step is the first of its epoch."""
        return step == self.first_step(self.epoch(step))

    def steps_in(self, epoch: int) -> int:
        """Return the number of optimizer steps in an epoch. Epochs differ if the batch size changes."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in the first epoch."""
        return self.steps_in(0)

    @property
    def last_batch(self) -> int:
        """Examples in the last batch of the first epoch."""
        start, stop = self.bounds(self.steps_per_epoch - 1)
        return stop - start

    @cached_property
    def examples_per_epoch(self) -> int:
        """Examples trained on in the first epoch."""
        return self.borders.before(1)[1]

    @property
    def share(self) -> int:
        """Most examples of one batch on one device."""
        return max(sum(part.stop - part.start for part in parts if part.counts) for parts in self._all_parts())

    @property
    def largest_micro_batch(self) -> int:
        """Most examples on one device at once."""
        return max(part.stop - part.start for parts in self._all_parts() for part in parts)

    @property
    def smallest_micro_batch(self) -> int:
        """Fewest examples on one device at once."""
        return min(part.stop - part.start for parts in self._all_parts() for part in parts)

    @property
    def accumulation(self) -> int:
        """Micro-batches that each device runs per optimizer step (fewer in a short last batch)."""
        return len(self.parts(0, 0))

    def bounds(self, step: int) -> tuple[int, int]:
        """Return the positions [start, stop) in the epoch's order that optimizer step `step` (from 0) trains on."""
        epoch = self.borders.epoch(step)
        return self.borders.bounds(epoch, step - self.borders.before(epoch)[0])

    def size_at(self, step: int) -> int:
        """Return the nominal batch size of a step. At the end of an epoch its batch may be smaller."""
        seen = self.examples_at(step) if self.changes else 0
        return [self.batch_size, *(size for point, size in self.changes if point <= seen)][-1]

    def examples_at(self, steps: int) -> int:
        """Return the number of examples seen after `steps` optimizer steps."""
        epoch = self.borders.epoch(steps)
        first, seen = self.borders.before(epoch)
        return seen + self.borders.bounds(epoch, steps - first)[0]

    def parts(self, step: int, rank: int) -> list[Part]:
        """Return the micro-batches that device `rank` runs at optimizer step `step`, in order.

        Every device gets equally many. Their sizes differ by at most one unit, over all devices.
        """
        start, stop = self.bounds(step)
        parts = self.parts_of(stop - start, rank)
        return [Part(start + part.start, start + part.stop, part.counts) for part in parts]

    def parts_of(self, size: int, rank: int) -> list[Part]:
        """Return the micro-batches of device `rank` in a batch of `size` examples, by positions within the batch."""
        parts = self._known_parts.get((size, rank))
        if parts is None:
            parts = self._known_parts[size, rank] = self._cut(size, rank)
        return parts

    @cached_property
    def _known_parts(self) -> dict[tuple[int, int], list[Part]]:
        return {}

    def _cut(self, size: int, rank: int) -> list[Part]:
        units = _units(size, self.unit)
        shares = cut(units, self.devices)
        most = self.micro_batch_size
        if most is None and self.changes:  # so that later, larger batches need no more memory
            most = ceil(_units(self.batch_size, self.unit) / self.devices) * self.unit
        per_micro_batch = units if most is None else most // self.unit
        micro_batches = ceil(ceil(units / self.devices) / per_micro_batch)
        first, last = shares[rank], shares[rank + 1]
        borders = [first + border for border in cut(last - first, micro_batches)]
        positions = [size if border == units else border * self.unit for border in borders]
        return [Part(a, b) if b > a else Part(0, 1, counts=False) for a, b in pairwise(positions)]

    def table(self, total_steps: float) -> dict[str, float]:
        """Return the figures that are printed and logged before training."""
        return {
            "examples": self.examples,
            "batch_size": self.batch_size,
            **{f"after {seen:,} examples": size for seen, size in self.changes},
            "devices": self.devices,
            "share": self.share,
            "micro_batch_size": self.largest_micro_batch,
            "accumulate_grad_batches": self.accumulation,
            "steps_per_epoch": self.steps_per_epoch,
            "last_batch": self.last_batch,
            "total_steps": total_steps,
        }

    def _all_parts(self) -> Iterator[list[Part]]:
        """Yield the parts of full batches and of the last one, whose micro-batches may be larger."""
        for size in {min(self.batch_size, self.positions), self.last_batch, *(size for _, size in self.changes)}:
            yield from (self.parts_of(size, rank) for rank in range(self.devices))
