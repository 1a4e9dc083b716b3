"""Tensors that stay where they are on the device, so that recorded steps find them there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from batchwise.batching.gradients import parameters
from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import rebuild
from batchwise.errors import TrainingStopped
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.sums import Sums

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

Replay = Callable[[], Any]


class Unfit(Exception):
    """The step cannot be recorded; the message says why."""


class Fixed:
    """Tensors that stay where they are, on the device. The recordings read and write them.

    Args:
        task: is in training.
        optimizer: has made a step, with the gradients that the parameters still have.
    """

    def __init__(self, task: "Task", optimizer: Optimizer) -> None:
        device = task.device

        def number(dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        self.gradients = {one: torch.zeros_like(one) for one in parameters(optimizer) if one.grad is not None}
        self.key, self.first = number(torch.int64), number(torch.int64)
        self.size, self.loss, self.count = number(), number(), number()
        self.sums = Sums(number(), number())
        """Of the last step."""
        self.rates = [number(torch.float32) for _ in optimizer.param_groups]  # PyTorch's fused kernels take float32
        self.skipped = number(torch.float32)
        """Whether the step is skipped: 0 or 1."""
        self._position = 0
        self._known: list[float] = []
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def set(self, key: int, size: int, optimizer: Optimizer) -> None:
        """Set what is new in a step."""
        self.key.fill_(key)
        known = [size, *(float(group["lr"]) for group in optimizer.param_groups)]  # a tensor changes in place
        if known != self._known:
            self._known = known
            for tensor, value in zip([self.size, *self.rates], known, strict=True):
                tensor.fill_(value)

    def start(self, position: int) -> None:
        """Begin a micro-batch."""
        if position != self._position:
            self._position = position
            self.first.fill_(position)

    def zero(self) -> None:
        """Begin a step without gradients and sums."""
        torch._foreach_zero_([*self.gradients.values(), self.loss, self.count])  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def own_gradients(self) -> Iterator[None]:
        """Give the parameters these gradients."""
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        try:
            yield
        finally:
            for parameter in self.gradients:
                parameter.grad = None

    @contextmanager
    def own_rates(self, optimizer: Optimizer) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device."""
        before = [dict(group) for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, values in zip(optimizer.param_groups, before, strict=True):
                group.update(values)

    def graph(self, run: Callable[[], None]) -> Replay:
        """Record what a function does on the device, without doing it.

        Raises:
            TrainingStopped: CUDA does not record it. PyTorch's stream and generators are in between then.
        """
        if self._pool is None:  # there are no graphs: the same, by Python

            def replay() -> None:
                with self.own_gradients():
                    run()

            return replay
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error.__context__ or error).splitlines()[0]  # the end of a recording hides what broke it
            remedy = "the same command with --ckpt_path last --trainer.capture null goes on"
            raise TrainingStopped(f"trainer.capture: CUDA does not record this step ({reason}): {remedy}") from error
        return graph.replay


class Recorded(NamedTuple):
    """A recorded micro-batch.

    Args:
        tensors: what it reads; they stay where they are.
        replay: runs it forward and backward.
        count: number of its targets; None: only the device knows it.
    """

    tensors: list[Tensor]
    replay: Replay
    count: float | None

    def take(self, batch: MicroBatch) -> None:
        """Copy another micro-batch to the tensors.

        Raises:
            Unfit: it has another shape.
        """
        new = tensors_of(batch)
        if any(
            one.shape != other.shape or one.dtype != other.dtype for one, other in zip(self.tensors, new, strict=False)
        ):
            raise Unfit("transform, or an augmentation, gives examples of another shape in each step")
        for one, value in zip(self.tensors, [*new, batch.index], strict=False):
            one.copy_(value, non_blocking=True)


def tensors_of(batch: MicroBatch) -> list[Tensor]:
    """Return the tensors of the examples.

    Raises:
        Unfit: they have parts that are no tensors.
    """
    found: list[Any] = []
    rebuild((batch.inputs, batch.targets, batch.weights), found.append)
    if any(not isinstance(leaf, Tensor | None) for leaf in found):
        raise Unfit("the examples have parts that are no tensors")
    return [leaf for leaf in found if leaf is not None]


def shape_of(batch: MicroBatch) -> Any:
    """Return what micro-batches must share to be run by one recording."""
    return len(batch), batch.counts, tuple((one.shape, one.dtype) for one in tensors_of(batch))
