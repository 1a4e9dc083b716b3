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
        """Return the sums with more targets. Values on a CPU become numbers."""
        if isinstance(loss, Tensor):
            is_first = not isinstance(self.loss, Tensor) and self.loss == 0
            loss = loss.item() if loss.is_cpu else loss.detach().to(widest(loss.device), copy=is_first)
            if is_first:  # to add zero would take another kernel
                return Sums(loss, self.count + count)
        return Sums(self.loss + loss, self.count + count)

    def per_target(self) -> Number:
        """Return the mean loss, or zero if there is no target. Nothing waits."""
        return self.loss / (self.count + (self.count == 0))

    def mean(self) -> float:
        """Return the mean loss, or nan if there is no target. This waits for the device."""
        return float(self.loss / self.count) if self.count else float("nan")


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
