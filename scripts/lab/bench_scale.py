"""How cost grows: with the number of examples, with the batch, with the number of processes.

Examples: what the training loader feeds per second, and when the first batch is there. Batch: examples trained per
second, against a plain PyTorch loop that runs each batch whole; ours in micro-batches of at most 64. Processes: a whole
`fit` on the digits, from its own log.

    python scripts/lab/bench_scale.py
"""

import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bench
import torch
from bench_feed import timed
from bench_step import Made, mlp, ours, plain

from batchwise.batching.fetch import make_fetch
from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Shuffled
from batchwise.batching.plan import BatchPlan
from batchwise.models.convnet import ConvNet


def loader(examples: int) -> TrainLoader:
    """Return a training loader over rows of 16 bytes, in batches of 256."""
    fetch = make_fetch((torch.zeros(examples, 16, dtype=torch.uint8), torch.zeros(examples, dtype=torch.long)))
    return TrainLoader(
        BatchPlan(examples, 256, limit=1000), Shuffled().prepare(examples, 256, seed=0), fetch, 0, lambda: 0
    )


def first_batch(examples: int) -> Callable[[], float]:
    """Return a run that gives the milliseconds to the first batch of an epoch that was not asked for before."""
    whole = loader(examples)
    epochs = iter(range(1, 10**6))

    def run() -> float:
        whole.position = lambda: next(epochs) * whole.plan.steps_per_epoch
        start = time.perf_counter()
        next(iter(whole))
        return (time.perf_counter() - start) * 1000

    return run


def rate(
    run: Callable[..., float], make: Made, shape: tuple[int, ...], batch_size: int, work: float, parts: int = 1
) -> float:
    """Return examples per second of a training loop that runs each batch in so many parts."""
    inputs = torch.randint(0, 256, (max(20_000, batch_size), *shape), dtype=torch.uint8)
    targets = torch.randint(0, 10, (len(inputs),))
    steps = max(2, int(work / batch_size))
    return batch_size / run(make, inputs, targets, batch_size, steps, parts) * 1e6


def fit(*arguments: str, epochs: int) -> Callable[[], float]:
    """Return a run of `fit` on the digits that gives the median of the examples per second in its log."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, *bench.FIT, *bench.CSV, "--trainer.max_epochs", str(epochs), *arguments]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            (path,) = Path(folder).glob("runs/digits/*/log/version_0/metrics.csv")
            with path.open() as file:
                rows = [float(row["examples_per_second"]) for row in csv.DictReader(file) if row["examples_per_second"]]
            return statistics.median(rows)

    return run


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    figures = {}
    sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= max(10**5, 10**7 * given.scale)]

    def measure(title: str, unit: str, alternatives: dict[str, Callable[[], float]]) -> None:
        measured = bench.interleave(alternatives, given.pairs)
        figures[title] = bench.report(title, unit, measured, next(iter(alternatives)))

    measure("first batch of an epoch", "milliseconds", {f"{size:,} examples": first_batch(size) for size in sizes})
    measure(
        "feeding 16-byte rows in batches of 256",
        "examples/s",
        {f"{size:,} examples": timed(loader(size), min(size, 256_000)) for size in sizes},
    )
    for name, make, shape, work, batches, most in (
        ("MLP 784-256-10", mlp, (784,), 40_000, (1, 8, 64, 512, 8192), 8192),
        ("ConvNet 28 x 28", ConvNet, (1, 28, 28), 1_500, (64, 256, 4096), 64),
    ):
        alternatives: dict[str, Callable[[], float]] = {}
        for batch_size in sorted(batches, key=lambda size: size != 64):
            if batch_size <= max(64, 8192 * given.scale):
                work_here = work * given.scale * (batch_size / 64 if batch_size < 64 else 1)
                settings = (make, shape, batch_size, work_here)
                alternatives[f"plain loop, batch {batch_size}"] = lambda a=settings: rate(plain, *a)
                parts = -(-batch_size // most)
                alternatives[f"ours, batch {batch_size}"] = lambda a=settings, b=parts: rate(ours, *a, b)
        measure(f"batch: {name}", "examples/s", alternatives)
    epochs = max(1, int(10 * given.scale))
    networks = {"ConvNet": ("--model.network", "batchwise.models.convnet.ConvNet"), "MLP": ()}
    for name, network in list(networks.items())[: 1 if given.scale < 0.1 else 2]:
        network = (*network, "--data.batch_size", "256", "--trainer.log_every_n_steps", "5")
        two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
        alternatives = {
            "1 process, 1 thread": fit(*network, "--trainer.threads", "1", epochs=epochs),
            "1 process, 2 threads": fit(*network, "--trainer.threads", "2", epochs=epochs),
            "2 processes, 1 thread each": fit(*network, *two, "--trainer.threads", "1", epochs=epochs),
        }
        measure(f"processes: {name}, batch 256", "examples/s", alternatives)
    bench.save(given.json, figures)


if __name__ == "__main__":
    main()
