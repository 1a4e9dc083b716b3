"""How fast examples are fed: ours against a plain DataLoader, the bare gather, and a copy of the same bytes.

60,000 x 784 bytes, batches of 64 and of 256, whole epochs, nothing else done with the batch. The bare loop of
`index_select` is the practical limit; the copy is the physical one.

    python scripts/lab/bench_feed.py
"""

import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import bench
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from batchwise.batching.fetch import Fetch, make_fetch
from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Shuffled
from batchwise.batching.plan import BatchPlan

EXAMPLES, BYTES = 60_000, 784


def ours(fetch: Fetch, batch_size: int) -> Callable[[], float]:
    """Return a run over one epoch of the training loader, as a task would see it."""
    plan = BatchPlan(len(fetch), batch_size)
    epoch = count()
    order = Shuffled().prepare(len(fetch), batch_size, seed=0)
    return timed(TrainLoader(plan, order, fetch, 0, lambda: next(epoch) * plan.steps_per_epoch), len(fetch))


def timed(loader: object, examples: int) -> Callable[[], float]:
    """Return a run that gives examples per second."""

    def run() -> float:
        start = time.perf_counter()
        for _ in loader:  # type: ignore[attr-defined]
            pass
        return examples / (time.perf_counter() - start)

    return run


class Gather:
    """The bare loop."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size

    def __iter__(self):
        for index in torch.randperm(len(self.inputs)).split(self.batch_size):
            yield self.inputs.index_select(0, index), self.targets.index_select(0, index)


class Copy(Gather):
    """The same bytes, in order."""

    def __iter__(self):
        for start in range(0, len(self.inputs), self.batch_size):
            stop = start + self.batch_size
            yield self.inputs[start:stop].clone(), self.targets[start:stop].clone()


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__, pairs=7)
    examples = int(EXAMPLES * given.scale)
    inputs = torch.randint(0, 256, (examples, BYTES), dtype=torch.uint8)
    targets = torch.randint(0, 10, (examples,))
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(path := Path(folder) / "inputs.npy", inputs.numpy())
        mapped = make_fetch((np.load(path, mmap_mode="r"), targets))
        for batch_size in (64, 256):
            measured = bench.interleave(
                {
                    "bare index_select loop": timed(Gather(inputs, targets, batch_size), examples),
                    "ours, in memory": ours(make_fetch((inputs, targets)), batch_size),
                    "ours, memory map": ours(mapped, batch_size),
                    "memory copy": timed(Copy(inputs, targets, batch_size), examples),
                    "DataLoader": timed(DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True), examples),
                },
                given.pairs,
            )
            title = f"batch {batch_size}"
            figures[title] = bench.report(title, "examples/s", measured, "bare index_select loop")
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
