"""Sums of losses and targets over micro-batches and devices."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from batchwise.batching.device import number_on, widest
from batchwise.batching.gradients import Number

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


class Sums(NamedTuple):
    """Sums over targets: numbers on the host, or tensors on the device."""

    loss: Number = 0.0
    count: Number = 0.0
    stops: Number = 0.0
    """Number of devices that were asked to stop."""
    logs: Number = 0.0
    """Number of devices on which something was logged."""

    def plus(self, loss: Number, count: Number) -> "Sums":
        """Return the sums with more targets, in the widest floats. Values on a CPU become numbers."""
        return Sums(_added(self.loss, loss), _added(self.count, count))

    def per_target(self) -> Number:
        """Return the mean loss, or zero if there is no target. Nothing waits."""
        return self.loss / (self.count + (self.count == 0))

    def mean(self) -> float:
        """Return the mean loss, or nan if there is no target. This waits for the device."""
        return float(self.loss / self.count) if self.count else float("nan")


def _added(total: Number, value: Number) -> Number:
    """Return a sum and one more value. In single precision, a sum of 2**24 could not count one more target."""
    is_first = not isinstance(total, Tensor) and total == 0
    if isinstance(value, Tensor):
        value = value.item() if value.is_cpu else value.detach().to(widest(value.device), copy=is_first)
    return value if is_first else total + value  # to add zero would take another kernel


def reduce(task: "Task", values: Tensor) -> Tensor:
    """Return the sum of a tensor over all devices."""
    total = task.trainer.strategy.reduce(values, reduce_op="sum")
    assert isinstance(total, Tensor)
    return total


def reduce_sums(task: "Task", sums: Sums) -> Sums:
    """Return the sums over all devices: numbers on a CPU; else tensors on the device, so that nothing waits."""
    if task.trainer.world_size > 1:
        values = torch.stack([number_on(task.device, value) for value in sums])
        sums = Sums(*reduce(task, values).unbind())
        if task.device.type == "cpu":
            sums = Sums(*(float(value) for value in sums))
    return sums
