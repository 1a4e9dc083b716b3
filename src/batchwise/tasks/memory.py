"""Steps that run out of memory. On one device, the batch is run again in smaller micro-batches."""

from typing import TYPE_CHECKING

import torch

from batchwise.batching.loader import Batch
from batchwise.errors import TrainingStopped
from batchwise.host import release_memory

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that a device or the machine is out of memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def stop_if_another_ran_out(task: "Task", error: RuntimeError) -> None:
    """Raise TrainingStopped if the error is only a consequence: another process of this run is out of memory."""
    if task.trainer.world_size > 1 and task.data.ran_out_of_memory():
        raise TrainingStopped("another process ran out of memory", everywhere=True) from error


def halve(task: "Task", batch: Batch, message: str) -> None:
    """Cut a batch that ran out of memory into micro-batches of half the size, and keep this size as the limit.

    Args:
        task: its data module keeps the limit.
        batch: ran out of memory; it is cut.
        message: text of the error.

    Raises:
        TrainingStopped: a micro-batch cannot be smaller, or there are several devices. They wait for one another in
            the backward pass, so a batch cannot be run again.
    """
    data, trainer = task.data, task.trainer
    assert data.plan is not None
    size, unit = batch.largest(), data.plan.unit
    half = max(1, size // 2 // unit) * unit
    batch.cut(half, unit)
    if batch.largest() >= size:
        raise TrainingStopped(
            f"out of memory with {size} example(s) at once, which cannot be cut further ({message}): "
            "write a smaller model or input"
        )
    data.micro_batch_limit = half
    where = f"step {trainer.global_step}: out of memory with micro-batches of {size} examples"
    if trainer.world_size > 1:
        data.limit_file.parent.mkdir(parents=True, exist_ok=True)
        data.limit_file.write_text(str(half))
        raise TrainingStopped(f"{where} ({message}): the same command with --ckpt_path last goes on with {half}")
    release_memory(task.device)
    print(f"{where}: the batch is run again in micro-batches of {half}; its result is the same", flush=True)
