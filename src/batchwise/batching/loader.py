"""The loaders: one item of training is one optimizer step, and each example of an evaluation is read once."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from math import ceil
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from batchwise.batching.device import exact, send
from batchwise.batching.fetch import DataError, Example, Fetch, Request
from batchwise.batching.order import Order
from batchwise.batching.plan import BatchPlan, Part, cut
from batchwise.batching.random import keyed, mix
from batchwise.batching.structure import as_floats, on_tensors, part, pick, tensors
from batchwise.batching.tokens import SequencePlan


@dataclass(slots=True)
class MicroBatch:
    """Examples that go through the network together: one micro-batch.

    Args:
        inputs: what the network takes, [N, ...]; a tuple or a dict of such where the data has several inputs. A list
            holds one value per example.
        targets: [N, ...] or nested in the same way, or None where there are none.
        index: numbers of the examples within their split, int64 [N], on the host.
        weights: factors of the examples' losses, [N]; None: all one.
        position: position of the first example in the batch.
        epoch: number of the epoch, from 0. With `index` it is the key of an example's random numbers.
        counts: False where a device has nothing to do and the examples only keep it in step.
        key: a number for (seed, step) in training; 0 in evaluation.
    """

    inputs: Any
    targets: Any
    index: Tensor
    weights: Tensor | None = None
    position: int = 0
    epoch: int = 0
    counts: bool = True
    key: int = 0

    def __len__(self) -> int:
        return self.index.size(0)

    def copy(self) -> "MicroBatch":
        """Return another micro-batch with the same tensors. `dataclasses.replace` takes several times as long."""
        places = self.position, self.epoch, self.counts, self.key
        return MicroBatch(self.inputs, self.targets, self.index, self.weights, *places)

    def rand(self, name: str, *shape: int | tuple[int, ...]) -> Tensor:
        """Return uniform numbers in [0, 1) for each example, [N, *shape], on the device of the inputs.

        `shape` is that of one example: numbers, or one tuple of them.

        In training they are a function of seed, step, position in the batch and `name`; in evaluation of example and
        `name`. So they are the same in any micro-batches, on any devices and after any resume.
        """
        return self._drawn(name, shape, False)

    def randn(self, name: str, *shape: int | tuple[int, ...]) -> Tensor:
        """Return numbers of the standard normal distribution, [N, *shape], drawn as those of `rand`."""
        return self._drawn(name, shape, True)

    def _drawn(self, name: str, shape: tuple[Any, ...], normal: bool) -> Tensor:
        if not isinstance(name, str):
            raise TypeError(f"batch.rand and batch.randn take a name first, which is a text: it is {name!r}")
        if len(shape) == 1 and isinstance(shape[0], tuple | list):
            shape = tuple(shape[0])
        device = next((tensor.device for tensor in tensors((self.inputs, self.targets))), torch.device("cpu"))
        home = exact(device)
        in_training = isinstance(self.key, Tensor) or self.key != 0
        where = self.position + torch.arange(len(self), device=home) if in_training else send(self.index, home)
        return send(keyed(self.key, name, where, shape, normal, torch.get_default_dtype()), device)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch with its tensors on `device`. `index` stays on the host."""
        return self._map(lambda tensor: send(tensor, device))

    def cast(self, dtype: torch.dtype) -> "MicroBatch":
        """Return the micro-batch with all floats of inputs and targets in one type; whole numbers stay as they are."""
        inputs, targets = as_floats(self.inputs, dtype), as_floats(self.targets, dtype)
        same = inputs is self.inputs and targets is self.targets
        return self if same else replace(self, inputs=inputs, targets=targets)

    def take(self, places: Tensor) -> "MicroBatch":
        """Return the examples at some places in the micro-batch, int64 [N]."""
        return self._of(lambda value: pick(value, places), self.index[places], self.position)

    def split(self, size: int, unit: int = 1) -> list["MicroBatch"]:
        """Return parts of at most `size` examples, in whole units. The last may be longer by half a unit."""
        starts = range(0, max(1, len(self) - (unit - 1) // 2), size)
        return [
            self._of(lambda value, a=a, b=b: part(value, a, b), self.index[a:b], self.position + a)
            for a, b in pairwise([*starts, len(self)])
        ]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "MicroBatch":
        """Return the micro-batch with a function applied to each tensor, also within lists."""
        return self._of(lambda value: on_tensors(value, function), self.index, self.position)

    def _of(self, function: Callable[[Any], Any], index: Tensor, position: int) -> "MicroBatch":
        inputs, targets, weights = function(self.inputs), function(self.targets), function(self.weights)
        return MicroBatch(inputs, targets, index, weights, position, self.epoch, self.counts, self.key)


class Batch:
    """This device's share of one batch: one item of the training loader, one optimizer step.

    It is no dataclass, because Lightning's mixed precision would walk through it and copy it at each step.

    Args:
        step: number of the optimizer step, from 0, over the whole training.
        epoch: number of the epoch, from 0.
        size: number of examples in the batch, over all devices.
        micro_batches: the micro-batches of this device, in order, on the host.
    """

    __slots__ = ("epoch", "micro_batches", "size", "step")

    def __init__(self, step: int, epoch: int, size: int, micro_batches: list[MicroBatch]) -> None:
        self.step, self.epoch, self.size, self.micro_batches = step, epoch, size, micro_batches

    def __len__(self) -> int:
        """Return the number of examples on this device. `size` is that of all devices."""
        return sum(map(len, self.micro_batches))

    def cut(self, limit: int, unit: int = 1) -> None:
        """Cut micro-batches of more than `limit` examples into smaller ones of whole units."""
        self.micro_batches = [part for micro_batch in self.micro_batches for part in micro_batch.split(limit, unit)]

    def largest(self) -> int:
        """Return the number of examples in the largest micro-batch."""
        return max(len(micro_batch) for micro_batch in self.micro_batches)


def make_batch(fields: Example, index: Tensor, weights: Tensor | None = None, *place: Any) -> MicroBatch:
    """Return a micro-batch of fields: inputs first, targets last. A single field is inputs without targets."""
    if len(fields) == 2:
        return MicroBatch(*fields, index, weights, *place)
    *inputs, targets = fields if len(fields) > 1 else (*fields, None)
    return MicroBatch(inputs[0] if len(inputs) == 1 else tuple(inputs), targets, index, weights, *place)


def read(fetch: Fetch, index: Tensor, position: int = 0) -> MicroBatch:
    """Return the examples with the numbers `index`, int64 [N], as one micro-batch on the host.

    Args:
        fetch: the source of the examples.
        index: numbers of the examples.
        position: position of the first one in its batch.
    """
    fields, _ = next(iter(fetch.stream([Request.one(index, position)])))
    return make_batch(fields, index, None, position)


class TrainLoader:
    """Yields this device's share of each batch, from any step to the end of its epoch.

    It is a plain iterable and no `DataLoader`, so that Lightning leaves it alone. Its length is that of the current
    epoch, even if iteration starts late.

    Args:
        plan: the sizes.
        order: the order of each epoch, over the positions of the plan.
        fetch: the source of the examples.
        rank: number of this device.
        position: returns the number of optimizer steps done. It is called when iteration starts.
    """

    waited = 0.0
    """Seconds that training has waited for examples so far."""

    def __init__(self, plan: BatchPlan, order: Order, fetch: Fetch, rank: int, position: Callable[[], int]) -> None:
        self.plan, self.order, self.fetch, self.rank, self.position = plan, order, fetch, rank, position

    def __len__(self) -> int:
        return self.plan.steps_in(self.plan.epoch(self.position()))

    def __iter__(self) -> Iterator[Batch]:
        first = self.position()
        epoch, length = self.plan.epoch(first), max(1, _ASKED // self.plan.batch_size)
        last = self.plan.first_step(epoch + 1)
        runs = [range(step, min(step + length, last)) for step in range(first, last, length)]
        # Steps that were requested and have not been yielded: some sources consume requests ahead of time.
        asked: deque[list[_Step]] = deque()

        def requests() -> Iterator[Request]:
            for run in runs:
                request, steps = self._request(epoch, run)
                asked.append(steps)
                yield request

        reads = iter(self.fetch.stream(requests(), seed=mix(self.order.seed, epoch)))
        for _ in runs:
            asking = perf_counter()
            examples = chain([next(reads)], reads)  # once the first one is there, its run was requested
            for step, size, parts in asked.popleft():
                micro_batches = []
                for (start, _, counts), index in parts:
                    fields, weights = next(examples)
                    weights = weights if counts else torch.zeros(len(index))
                    micro_batches.append(make_batch(fields, index, weights, start, epoch, counts))
                self.waited += perf_counter() - asking
                yield Batch(step, epoch, size, micro_batches)
                asking = perf_counter()

    def _request(self, epoch: int, run: range) -> tuple[Request, list["_Step"]]:
        """Return the request for this device's shares of some batches, and these shares."""
        sizes, positions, slices, shares, indices = [], [], [], [], []
        plan, before = self.plan, self.plan.first_step(epoch)
        for step in run:
            first, last = plan.borders.bounds(epoch, step - before)
            if isinstance(plan, SequencePlan):
                batch, parts = plan.arrange(self.order.indices(epoch, first, last), self.rank)
                indices += [batch[start:stop] for start, stop, _ in parts]
            else:
                parts = plan.parts_of(last - first, self.rank)
            shares.append((step, last - first, parts))
            for start, stop, _ in parts:
                sizes.append(stop - start)
                positions.append(first + start)
                if slices and slices[-1][1] == first + start:
                    slices[-1][1] = first + stop
                else:
                    slices.append([first + start, first + stop])
        indices = indices or [self.order.indices(epoch, start, stop) for start, stop in slices]
        index = indices[0] if len(indices) == 1 else torch.cat(indices)
        each = iter(index.split_with_sizes(sizes))
        steps = [(step, size, list(zip(parts, each, strict=False))) for step, size, parts in shares]
        return Request(index, sizes, positions), steps


_Step = tuple[int, int, list[tuple[Part, Tensor]]]
"""Number of the step, size of its batch, and this device's micro-batches with the numbers of their examples."""

_ASKED = 8192
"""Examples of whole batches per request."""


class EvalLoader:
    """Yields each example of a split exactly once over all devices, in contiguous shards.

    There is no padding and no duplicate. Every device gets equally many micro-batches, because some strategies
    synchronise in each forward pass.

    Args:
        fetch: the source of the examples.
        batch_size: most examples on one device at once.
        rank: number of this device.
        devices: number of devices.
        examples: how many there are, the first of the split; None: all.

    Raises:
        ValueError: there are fewer examples than devices.
    """

    def __init__(
        self, fetch: Fetch, batch_size: int, rank: int = 0, devices: int = 1, examples: int | None = None
    ) -> None:
        examples = len(fetch) if examples is None else examples
        if examples < devices:
            raise ValueError(
                f"{examples} examples cannot be evaluated on {devices} devices: use at most {examples} devices"
            )
        shards = cut(examples, devices)
        # Equally many on each device, and none empty. If devices have one example or two, a micro-batch may have two.
        batches = min(ceil(ceil(examples / devices) / batch_size), examples // devices)
        self.fetch = fetch
        self.borders = [shards[rank] + border for border in cut(shards[rank + 1] - shards[rank], batches)]

    def __len__(self) -> int:
        return len(self.borders) - 1

    def __iter__(self) -> Iterator[MicroBatch]:
        ranges = list(pairwise(self.borders))
        examples = self.fetch.stream(Request.one(torch.arange(a, b), a) for a, b in ranges)
        for a, b in ranges:
            fields, weights = next(examples)
            if weights is not None:
                raise DataError("an example of an evaluation split cannot be read: evaluation is over all or none")
            yield make_batch(fields, torch.arange(a, b))
