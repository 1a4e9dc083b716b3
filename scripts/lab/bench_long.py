"""Memory and the time of each step over 100,000 steps: does a long training stay as it began?

The network is small, so that the cost around it weighs most. Loss is logged and checkpoints are kept. "Slowest" leaves
out the steps that write a checkpoint. Time is also taken on the thread's own clock, which stops while another process
has the core.

    python scripts/lab/bench_long.py
"""

import gc
import os
import resource
import statistics
import tempfile
import time
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench
import lightning.pytorch as pl
import torch
from bench_step import Memory, adamw, quiet
from lightning.pytorch.loggers import CSVLogger

from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.progress import ProgressBar
from batchwise.models.mlp import MLP
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

MARKS = 10


class Watch(pl.Callback):
    """Keeps the time of each step, and the memory at ten steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        # Both have their full size from the start, so that they do not add to the growth that is measured.
        self.wall, self.own = array("d", bytes(8 * steps)), array("d", bytes(8 * steps))
        self.memory: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Take the time, and at ten steps the memory."""
        self.wall[trainer.global_step] = time.perf_counter()
        self.own[trainer.global_step] = time.thread_time()
        if trainer.global_step % (self.steps // MARKS) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.memory.append(resident / 2**20)


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__, pairs=1)
    steps = int(100_000 * given.scale)
    inputs, targets = torch.randint(0, 256, (16_000, 64), dtype=torch.uint8), torch.randint(0, 10, (16_000,))
    watch = Watch(steps)
    gc.freeze()  # as `python -m batchwise` does
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=CSVLogger(folder, flush_logs_every_n_steps=1000),
            callbacks=[watch, Last(), ProgressBar()],
            log_every_n_steps=50,
            default_root_dir=folder,
        )
        trainer.fit(
            Classification(MLP(64, 10, [32]), optimizer=adamw), datamodule=Memory(inputs, targets, batch_size=16)
        )
    figures = {}
    memory = {f"after {number * 10}% of {steps:,} steps": [each] for number, each in enumerate(watch.memory) if number}
    title = f"resident memory (peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f})"
    figures["memory"] = bench.report(title, "MiB", memory, next(iter(memory)))
    for clock, times in (("wall clock", watch.wall), ("thread's clock", watch.own)):
        took = [(b - a) * 1e6 for a, b in pairwise(times)]
        between = sorted(each for step, each in enumerate(took, 1) if step % 1000)  # a checkpoint before step 1000 k
        middle = statistics.median(between)
        rows = {"median": [middle], "slowest of 1,000": [between[-max(1, steps // 1000)]], "slowest": [between[-1]]}
        figures[clock] = bench.report(f"steps, {clock}", "microseconds", rows, "median")
        slow = [step for step, each in enumerate(took, 1) if step % 1000 and each > 5 * middle]
        print(f"  more than five times the median: {len(slow)} of {len(between):,} steps, such as {slow[:8]}")
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
