"""Batchwise: the batch you write is the batch you train on."""

from importlib import import_module
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchwise.batching.loader import Batch, MicroBatch
    from batchwise.batching.order import Order
    from batchwise.batching.plan import BatchPlan
    from batchwise.batching.ragged import Ragged
    from batchwise.data.augment import Augmentation
    from batchwise.data.module import DataModule
    from batchwise.optim.schedule import Schedule
    from batchwise.run.loading import load
    from batchwise.run.python import Trainer
    from batchwise.tasks.task import Task

__version__ = "0.2.0"
STARTED = perf_counter()
"""When this process began, as near as the package knows."""

_HOMES = {
    "Augmentation": "data.augment",
    "Batch": "batching.loader",
    "BatchPlan": "batching.plan",
    "DataModule": "data.module",
    "MicroBatch": "batching.loader",
    "Order": "batching.order",
    "Ragged": "batching.ragged",
    "Schedule": "optim.schedule",
    "Task": "tasks.task",
    "Trainer": "run.python",
    "load": "run.loading",
}
__all__ = [
    "Augmentation",
    "Batch",
    "BatchPlan",
    "DataModule",
    "MicroBatch",
    "Order",
    "Ragged",
    "Schedule",
    "Task",
    "Trainer",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: importing Lightning takes seconds, which `--help` has not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'batchwise' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(f"batchwise.{_HOMES[name]}"), name)
    return value
