"""The start of a pass of a micro-batch through the network: its random numbers."""

from typing import TYPE_CHECKING

import torch

from batchwise.batching.loader import MicroBatch
from batchwise.models import place

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def begin(task: "Task", micro_batch: MicroBatch, key: int) -> None:
    """Begin a pass of a micro-batch, so that each pass draws the same random numbers.

    Random numbers of our own layers depend on the step and the example. Those of other layers also depend on where the
    micro-batch begins.
    """
    place.current = place.Place(key, micro_batch.position, micro_batch.counts, len(micro_batch))
    micro_batch.key = key
    seed_generator(task.device, key ^ micro_batch.position)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the random generators of one device and of the host, from which some layers draw even for a GPU.

    `torch.manual_seed` is slower, because it seeds all accelerators.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
