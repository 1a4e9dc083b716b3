"""`inspect`: whole batches as the network will see them, without training, and what is wrong with them, a line each."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table

from batchwise.batching.loader import MicroBatch, TrainLoader
from batchwise.choosing.look import Look, Values, classes, hashes, is_table, tensors
from batchwise.choosing.sequences import Sequences, texts
from batchwise.choosing.sheet import draw
from batchwise.data.module import DataModule
from batchwise.tasks.task import Task

BATCHES = 32  # most batches that are looked at
SAMPLE = 4096  # most rows of a table that its histograms are of; of images, one micro-batch is enough
COLUMNS = 16  # most columns of a table that are listed


class Batches:
    """What was seen of the first batches of the training, over all devices.

    Args:
        trainer: says on which device and in which precision the network will see them.
        data: transforms them.
        loader: yields whole batches.
        seconds: no further batch is read after so many.
    """

    def __init__(self, trainer: pl.Trainer, data: DataModule, loader: TrainLoader, seconds: float) -> None:
        self.text = hasattr(data, "decode")
        self.values = Values(self.text)  # after `transform`
        self.sequences = Sequences()
        self.classes: list[list[int]] = []  # of each batch
        self.repeats: list[int] = []  # of each batch: examples whose inputs came before in it
        self.not_finite: list[int] = []
        self.sample: list[MicroBatch] = []
        end = perf_counter() + seconds
        for share in islice(loader, BATCHES):
            keys, numbers = [], []
            for part in share.micro_batches:
                keys += hashes(part.inputs)
                numbers += classes(part.targets)
                if self.text:
                    self.sequences.add(tensors(part.inputs)[0])
                with trainer.precision_plugin.forward_context():
                    batch = data.to_device(part, trainer.strategy.root_device, training=True)
                self.not_finite += part.index[self.values.add(batch.inputs)[0]].tolist()
                if not self.sample or (
                    is_table(batch.inputs) and not self.text and sum(map(len, self.sample)) < SAMPLE
                ):
                    self.sample.append(batch.to(torch.device("cpu")))
            self.repeats.append(len(keys) - len(set(keys)))
            self.classes.append(numbers)
            if perf_counter() > end:
                break

    def problems(self, train: Look) -> Iterator[str]:
        """Say what is wrong with the batches, beyond what is wrong with the training examples themselves."""
        repeated = [number for number, count in enumerate(self.repeats) if count]
        if repeated and len(set(train.hashes)) > 1:
            some = f"such as batch {repeated[0]}, in {self.repeats[repeated[0]]} examples"
            yield f"{len(repeated)} of {len(self.repeats)} batches repeat inputs within the batch, {some}"
        if self.not_finite and not train.not_finite:
            yield f"transform makes values that are not finite, such as of train example {min(self.not_finite)}"


class Classes:
    """The classes of batches against those of the data set.

    Their distance is the total variation: half the sum of the absolute differences of the shares, from 0 to 1.

    Args:
        data: the class of each example.
        batches: those of the examples of each batch.
    """

    def __init__(self, data: list[int], batches: list[list[int]]) -> None:
        self.names, codes = np.unique(np.concatenate([data, *batches]), return_inverse=True)
        whole, *parts = np.split(codes, np.cumsum([len(data), *map(len, batches)])[:-1])
        self.data = self._shares(whole)
        """The share of each class, [classes]; and below, in each batch, [batches, classes]."""
        self.batches = np.stack([self._shares(part) for part in parts])
        self.distances = self._distances(self.batches)
        draw = np.random.default_rng(0)
        drawn = [draw.choice(whole, min(len(part), len(whole)), replace=False) for part in parts]
        self.by_chance = self._distances(np.stack([self._shares(part) for part in drawn])).mean()

    def _shares(self, codes: np.ndarray) -> np.ndarray:
        return np.bincount(codes, minlength=len(self.names)) / len(codes)

    def _distances(self, shares: np.ndarray) -> np.ndarray:
        return np.abs(shares - self.data).sum(1) / 2

    def __str__(self) -> str:
        return (
            f"{len(self.names)}; total variation from data set to batch {self.distances.mean():.3f} (at most "
            f"{self.distances.max():.3f}), to a random batch {self.by_chance:.3f}"
        )

    def problems(self, order: str) -> Iterator[str]:
        """Say where batches are less like the data set than random ones, which some orders intend."""
        if (distance := self.distances.mean()) > 2 * self.by_chance:
            yield (
                f"the classes of a batch are {distance:.2f} from those of the data set (total variation), those of a "
                f"random batch {self.by_chance:.2f}: data.order is {order}"
            )


def loader_speed(loader: TrainLoader, examples: int, seconds: float) -> str:
    """Return how fast batches come, against copies of as many bytes out of memory as large as the data."""
    batches = iter(loader)
    share = next(batches)  # which may start processes
    leaves = [leaf for batch in share.micro_batches for leaf in tensors(_fields(batch))]
    nbytes, size, device = sum(leaf.nbytes for leaf in leaves), share.size, leaves[0].device
    source = torch.ones(min(max(examples * nbytes // size, nbytes), 2**26), dtype=torch.uint8, device=device)
    del share, leaves  # so that the loader may use their memory again, as in training

    def copies() -> Iterator[int]:
        while True:
            yield from (part.clone().nbytes for part in source.split(nbytes))

    def reads() -> Iterator[int]:
        yield from (share.size for share in batches)
        while True:
            yield from (share.size for share in loader)

    rate, copied = (_per_second(items, seconds) for items in (reads(), copies()))
    return (
        f"{rate:,.0f} examples/s, {rate * nbytes / size / 1e6:,.0f} MB/s; memory copies as many bytes at "
        f"{copied / 1e6:,.0f} MB/s ({rate * nbytes / size / copied:.1%})"
    )


def _per_second(items: Iterator[int], seconds: float) -> float:
    total, start = 0, perf_counter()
    for item in items:
        total += item
        if perf_counter() > start + seconds:
            break
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return total / (perf_counter() - start)


def _fields(batch: MicroBatch) -> tuple:
    return (batch.inputs,) if batch.targets is None else (batch.inputs, batch.targets)


def _kind(inputs: Any) -> str:
    return ", ".join(f"{str(leaf.dtype)[6:]} {list(leaf.shape[1:])}" for leaf in tensors(inputs))


def inspect(trainer: pl.Trainer, model: Task, data: DataModule, seconds: float) -> None:
    """Print what is seen, and what is wrong; draw `inspect.png` into the run's folder; log both to W&B.

    Args:
        trainer: has the run's folder and the loggers.
        model: tried on the data.
        data: has its plan.
        seconds: most time for reading each split.

    Raises:
        ValueError: the data cannot be looked at.
    """
    if seconds <= 0:
        raise ValueError(f"seconds is {seconds}: write a number above 0")
    plan = data.plan
    assert plan is not None
    problems: list[str] = []
    loader = data.train_dataloader()
    # The batches of all devices, cut into micro-batches that are no larger than theirs.
    loader.plan = replace(plan, devices=1, micro_batch_size=plan.largest_micro_batch)
    console = Console()
    with console.status("looking at the data"):
        looks = [seen for split in ("train", "val", "test") if (seen := _look(data, split, seconds, problems))]
        batches = Batches(trainer, data, loader, seconds)
        speed = loader_speed(loader, looks[0].total, seconds / 20)
    train, sample, stored = looks[0], batches.sample, data.examples("train", 1)
    labels = data.labels()
    numbers = train.classes if labels is None else labels.tolist()
    mix = Classes(numbers, batches.classes) if numbers else None

    for seen in looks:
        problems += seen.problems()
    problems += [line for one, other in combinations(looks, 2) for line in other.leaks(one)]
    problems += batches.problems(train)
    problems += mix.problems(type(data.order).__name__) if mix else ()
    try:
        model.prepare(data, "train")
    except ValueError as error:
        problems.append(str(error))

    sizes = [sum(leaf.nbytes for leaf in tensors(_fields(batch))) / len(batch) for batch in (stored, sample[0])]
    counts = ", ".join(f"{seen.split} {len(seen.examples):,}" for seen in looks)
    figures = {
        "examples": ", ".join(f"{seen.split} {seen.total:,}" for seen in looks),
        "looked at": "all" if all(seen.total == len(seen.examples) for seen in looks) else counts,
        "batch": f"{plan.batch_size}; devices {plan.devices}, micro_batch_size {plan.largest_micro_batch}, "
        f"steps_per_epoch {plan.steps_per_epoch}",
        "inputs": f"{_kind(stored.inputs)}: {train.values}",
        "to the network": f"{_kind(sample[0].inputs)}: {batches.values}",
        **(batches.sequences.figures() if batches.text else {}),
        "bytes per example": f"{sizes[0]:,.0f} as read, {sizes[1]:,.0f} as the network takes it",
        "classes": str(mix or "targets are not classes"),
        "loader": speed,
    }
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        table.add_row(name, value)
    console.print(table)
    if train.table:
        console.print(_columns(train.values))
    if batches.text:
        console.print(texts(data, sample[0]))
    for line in problems or ["nothing wrong"]:
        print(f"found: {line}")

    path = Path(trainer.default_root_dir) / "inspect.png"
    inputs = [tensors(batch.inputs)[0] for batch in sample]
    draw(path, torch.cat(inputs), sample[0].targets, mix, batches.sequences.lengths)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("inspect/batch", [str(path)])
            logger.log_table("inspect/figures", ["figure", "value"], [list(row) for row in figures.items()])
            logger.log_table("inspect/found", ["found"], [[line] for line in problems])
            logger.finalize("success")


def _look(data: DataModule, split: str, seconds: float, problems: list[str]) -> Look | None:
    try:
        fetch = data.split(split)
    except Exception as error:  # the test split need not be there before training
        problems.append(f"the {split} split cannot be loaded ({type(error).__name__}: {error})")
        return None
    return Look(split, len(fetch), hasattr(data, "decode")).read(fetch, seconds) if fetch else None


def _columns(values: Values) -> Table:
    table = Table("column", "lowest", "mean", "highest", title="columns of the training inputs", box=None)
    means = values.sum / values.count
    rows = zip(values.low.tolist(), means.tolist(), values.high.tolist(), strict=True)
    for number, row in enumerate(islice(rows, COLUMNS)):
        table.add_row(str(number), *(f"{value:.4g}" for value in row))
    if len(means) > COLUMNS:
        table.caption = f"and {len(means) - COLUMNS} more"
    return table
