"""Whether a long training stays as it began: memory, and the time of each step, over 100,000 steps.

A small network, so that what is around it weighs most; loss logged, checkpoints kept. Steps in which a checkpoint is
written are left out of the slowest.

    python scripts/bench_long.py
"""

import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench
import lightning.pytorch as pl
import torch
from bench_step import Memory, adamw, quiet
from lightning.pytorch.loggers import CSVLogger

from project.callbacks.checkpoint import Last
from project.callbacks.progress import ProgressBar
from project.models.mlp import MLP
from project.tasks.classification import Classification
from project.trainer import Trainer

MARKS = 10


class Watch(pl.Callback):
    """Keeps the time of each step, and the memory at ten places."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.times: list[float] = []
        self.memory: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Look."""
        self.times.append(time.perf_counter())
        if trainer.global_step % (self.steps // MARKS) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            self.memory.append(resident / 2**20)


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__, pairs=1)
    steps = int(100_000 * given.scale)
    inputs, targets = torch.randint(0, 256, (16_000, 64), dtype=torch.uint8), torch.randint(0, 10, (16_000,))
    watch = Watch(steps)
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
    took = [(b - a) * 1e6 for a, b in zip(watch.times, watch.times[1:], strict=False)]
    between = [each for step, each in enumerate(took, 1) if step % 1000]  # a checkpoint is written before step 1000 k
    figures = {}
    memory = {f"after {number * 10}% of {steps:,} steps": [each] for number, each in enumerate(watch.memory) if number}
    title = f"resident memory (peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f})"
    figures["memory"] = bench.report(title, "MiB", memory, next(iter(memory)))
    ordered = sorted(between)
    times = {
        "median": [statistics.median(between)],
        "slowest of 1,000": [ordered[-max(1, len(ordered) // 1000)]],
        "slowest": [ordered[-1]],
    }
    figures["steps"] = bench.report("steps", "microseconds", times, "median")
    limit = 5 * statistics.median(between)
    slow = [step for step, each in enumerate(took, 1) if step % 1000 and each > limit]
    print(f"  more than five times the median: {len(slow)} of {len(between):,} steps, such as {slow[:10]}")
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
