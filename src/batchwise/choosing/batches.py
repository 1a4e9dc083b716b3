"""`inspect`: look at the data and at whole batches as the network will see them, and print a line for each fault."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor

from batchwise.batching.loader import MicroBatch, TrainLoader
from batchwise.batching.structure import tensors
from batchwise.choosing.classes import Classes
from batchwise.choosing.look import Look, Values, classes_of, fields, hashes, main_field
from batchwise.choosing.sequences import Decodes, Sequences, are_tokens, are_unequal, texts
from batchwise.choosing.sheet import draw
from batchwise.data.module import DataModule
from batchwise.tasks.task import Task

BATCHES = 32  # most batches that are looked at
SAMPLE = 4096  # most rows of a table in its histograms; of images, one micro-batch is enough


class Batches:
    """The first batches of the training, over all devices.

    Args:
        trainer: has the device and the precision in which the network will see them.
        data: transforms them.
        loader: yields whole batches.
        seconds: after so many, no further batch is read.
    """

    def __init__(self, trainer: pl.Trainer, data: DataModule, loader: TrainLoader, seconds: float) -> None:
        self.text = are_tokens(data)
        self.values = Values(are_unequal(data))  # after `transform`
        self.sequences = Sequences()
        self.classes: list[list[int]] = []  # of each batch
        self.repeats: list[int] = []  # of each batch: examples with the inputs of an earlier one in it
        self.not_finite: list[int] = []
        self.sample: list[MicroBatch] = []
        end = perf_counter() + seconds
        for batch in islice(loader, BATCHES):
            keys, numbers = [], []
            for stored in batch.micro_batches:
                keys += hashes(stored.inputs)
                numbers += classes_of(stored.targets)
                if self.text:
                    self.sequences.add(main_field(stored.inputs))
                with trainer.precision_plugin.forward_context():
                    seen = data.to_device(stored, trainer.strategy.root_device, training=True)
                self.not_finite += stored.index[self.values.add(seen.inputs)[0]].tolist()
                if not self.sample or (self.values.table and sum(map(len, self.sample)) < SAMPLE):
                    self.sample.append(seen.to(torch.device("cpu")))
            self.repeats.append(len(keys) - len(set(keys)))
            self.classes.append(numbers)
            if perf_counter() > end:
                break

    def problems(self, train: Look) -> Iterator[str]:
        """Yield the faults of the batches that are no faults of the training examples."""
        repeated = [number for number, count in enumerate(self.repeats) if count]
        if repeated and len(set(train.hashes)) > 1:
            some = f"such as batch {repeated[0]}, in {self.repeats[repeated[0]]} examples"
            yield f"{len(repeated)} of {len(self.repeats)} batches repeat inputs within the batch, {some}"
        if self.not_finite and not train.not_finite:
            yield f"transform makes values that are not finite, such as of train example {min(self.not_finite)}"


def inspect(trainer: pl.Trainer, model: Task, data: DataModule, seconds: float) -> None:
    """Print figures and faults of the data. Draw `inspect.png` into the run's folder, and log it to W&B.

    Args:
        trainer: has the run's folder and the loggers.
        model: tried on the data.
        data: has its plan.
        seconds: most time for reading each split.

    Raises:
        ValueError: the data cannot be looked at.
    """
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
    train, sample, labels = looks[0], batches.sample, data.labels()
    numbers = train.classes if labels is None else labels.tolist()
    classes = Classes(numbers, batches.classes) if numbers else None

    for seen in looks:
        problems += seen.problems()
    problems += [line for one, other in combinations(looks, 2) for line in other.leaks(one)]
    problems += batches.problems(train)
    problems += classes.problems(type(data.order).__name__) if classes else ()
    try:
        model.prepare(data, "train")
    except ValueError as error:
        problems.append(str(error))

    counts = ", ".join(f"{seen.split} {len(seen.examples):,}" for seen in looks)
    figures = {
        "examples": ", ".join(f"{seen.split} {seen.total:,}" for seen in looks),
        "looked at": "all" if all(seen.total == len(seen.examples) for seen in looks) else counts,
        "batch": f"{plan.batch_size}; devices {plan.devices}, micro_batch_size {plan.largest_micro_batch}, "
        f"steps_per_epoch {plan.steps_per_epoch}",
        "inputs": f"{_kind(data.examples('train', 1).inputs)}: {train.values}",
        "to the network": f"{_kind(sample[0].inputs)}: {batches.values}",
        **(batches.sequences.figures() if batches.text else {}),
        "classes": str(classes or "targets are not classes"),
    }
    table = Table(box=None, show_header=False)
    for name, value in figures.items():
        table.add_row(name, value)
    console.print(table)
    if isinstance(data, Decodes):
        console.print(texts(data, sample[0]))
    for line in problems or ["nothing wrong"]:
        print(f"found: {line}")

    path = Path(trainer.default_root_dir) / "inspect.png"
    targets = sample[0].targets
    draw(path, _drawn(sample), targets if isinstance(targets, Tensor) else None, classes, batches.sequences.lengths)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image("inspect/batch", [str(path)])
            logger.finalize("success")


def _drawn(sample: list[MicroBatch]) -> Tensor:
    """Return what the picture shows: the images, the columns, or else all values of the inputs."""
    found = [main_field(batch.inputs) for batch in sample]
    whole = [field for field in found if isinstance(field, Tensor)]
    if whole:
        return torch.cat(whole)
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors(found)])


def _kind(inputs: object) -> str:
    return ", ".join(map(_said, fields(inputs)))


def _said(field: Tensor | list) -> str:
    if isinstance(field, Tensor):
        return f"{str(field.dtype)[6:]} {list(field.shape[1:])}"
    first = next(tensors(field), None)
    return f"a list, such as {'text' if first is None else f'{str(first.dtype)[6:]} {list(first.shape)}'}"


def _look(data: DataModule, split: str, seconds: float, problems: list[str]) -> Look | None:
    try:
        fetch = data.split(split)
    except Exception as error:  # the test split need not be there before training
        problems.append(f"the {split} split cannot be loaded ({type(error).__name__}: {error})")
        return None
    return Look(split, len(fetch), are_unequal(data)).read(fetch, seconds) if fetch else None
