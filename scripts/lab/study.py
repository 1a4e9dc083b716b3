"""Shared by the studies of docs/batching.md: many small trainings on the digits, in one process, over several seeds.

Each is an ordinary training by the engine's Trainer, task and data module, without log and checkpoints. Each seed also
draws its own split into training, validation and test, so that the spread over the seeds includes that of the split.
Choices (of a learning rate) are made by validation accuracy. Reported accuracies are those of the test split.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import bench
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD

from batchwise.batching.order import Order, Shuffled
from batchwise.callbacks.record import Record
from batchwise.models.mlp import MLP
from batchwise.optim.schedule import Schedule
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

Key = TypeVar("Key", bound=Hashable)
EXAMPLES = 899
"""Training images in each split of `FewDigits`."""


class FewDigits(Digits):
    """The digits made harder: only half of them for training, and some of the training labels wrong.

    Args:
        wrong: share of the training images with a wrong label, drawn once per split.
        choose: maps the training labels to the indices of the training images to use, in their stored order.
        **kwargs: those of `Digits`.
    """

    def __init__(self, wrong: float = 0.0, choose: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(val_fraction=0.2, test_fraction=0.3, **kwargs)
        self.wrong, self.choose = wrong, choose

    @cached_property
    def statistics(self) -> tuple[float, float]:
        """Mean and std of the training images, chosen or not."""
        images = super().load("train")[0].double()  # type: ignore[index]
        return images.mean().item(), images.std().item()

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images and digits."""
        images, digits = super().load(split)  # type: ignore[misc]
        if split != "train":
            return images, digits
        generator = torch.Generator().manual_seed(self.split_seed)
        other = (digits + torch.randint(1, 10, digits.shape, generator=generator)) % 10
        digits = torch.where(torch.rand(digits.shape, generator=generator) < self.wrong, other, digits)
        chosen = torch.arange(len(digits)) if self.choose is None else self.choose(digits)
        return images[chosen], digits[chosen]


@dataclass(frozen=True)
class Setting:
    """One way to train."""

    batch_size: int = 32
    lr: float = 0.1
    epochs: float = 20
    optimizer: Callable[..., torch.optim.Optimizer] = SGD
    schedule: Schedule = Schedule()  # noqa: RUF009 (frozen)
    reference_batch_size: int | None = None
    network: Callable[[], nn.Module] = MLP
    order: Callable[[], Order] = Shuffled
    data: Callable[..., FewDigits] = FewDigits
    every: int = 1
    """Epochs between two validations."""
    target: float = math.inf
    """Validation accuracy in percent at which training ends, but not before `least` epochs."""
    least: int = 0


@dataclass
class Run:
    """The results of a training. Accuracies are in percent."""

    test: float = math.nan
    epochs: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    """On the validation split."""
    loss: list[float] = field(default_factory=list)
    """Mean training loss since the last validation."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of training so far, without validation."""
    steps: list[int] = field(default_factory=list)

    @property
    def val(self) -> float:
        """The last validation accuracy."""
        return self.accuracy[-1]

    def reached(self, target: float) -> int | None:
        """Return the index at which the validation accuracy is first at least `target`, or None."""
        return next((place for place, value in enumerate(self.accuracy) if value >= target), None)


class Speed(Callback):
    """Keeps the seconds of training, without validation, after each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the seconds."""
        (record,) = (callback for callback in trainer.callbacks if isinstance(callback, Record))
        self.seconds.append(record.totals(pl_module).seconds)


def trainer(folder: str, setting: Setting, scale: float, callbacks: Sequence[Callback], **kwargs: Any) -> Trainer:
    """Return a Trainer without log and checkpoints. In the tiny form (a small `scale`) an epoch has a few steps."""
    epochs = max(1, round(setting.epochs * scale))
    settings: dict[str, Any] = {"max_epochs": epochs, "check_val_every_n_epoch": min(setting.every, epochs)}
    few_steps: dict[str, Any] = {"limit_train_batches": 4} if scale < 0.1 else {}
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=10**9,
        callbacks=list(callbacks),
        default_root_dir=folder,
        **settings | few_steps | kwargs,
    )


def train(setting: Setting, seed: int, scale: float = 1.0, callbacks: Sequence[Callback] = (), **kwargs: Any) -> None:
    """Train one network.

    Args:
        setting: the way to train.
        seed: seed of the split, the initial weights, the order and dropout.
        scale: share of the epochs.
        callbacks: observers of the training.
        **kwargs: more arguments for the Trainer.
    """
    torch.manual_seed(seed)
    task = Classification(setting.network(), partial(setting.optimizer, lr=setting.lr), setting.schedule)
    data = setting.data(batch_size=setting.batch_size, order=setting.order(), seed=seed, split_seed=seed)
    with tempfile.TemporaryDirectory() as folder, silence():
        trainer(folder, setting, scale, callbacks, limit_val_batches=0, **kwargs).fit(task, datamodule=data)


@contextlib.contextmanager
def silence() -> Any:
    """Print nothing meanwhile: a study prints its tables at the end."""
    with open(os.devnull, "w") as file, contextlib.redirect_stdout(file):
        yield


def arguments(description: str | None, seeds: int = 5) -> argparse.Namespace:
    """Return the command line that all studies take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each setting")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the epochs; tests take a small one")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads")
    parser.add_argument("--json", type=Path, help="file for the tables")
    parser.add_argument("--png", type=Path, help="file for the picture")
    given = bench.prepare(parser)
    if given.scale < 0.1:
        given.seeds = min(given.seeds, 2)
    return given


def few(given: argparse.Namespace, values: Iterable[Key]) -> list[Key]:
    """Return the values; in the tiny form only the first and the last."""
    values = list(values)
    return values if given.scale >= 0.1 else [values[0], values[-1]]


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return mean ± std over the seeds."""
    values = list(values)
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    return statistics.mean(values)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, dict[str, str]]:
    """Print a table as Markdown; return it as {first column: {head: cell}}."""
    rows = [[str(value) for value in row] for row in rows]
    print(f"\n{title}\n")
    for line in ([*head], ["---", *["--:"] * (len(head) - 1)], *rows):
        print(f"| {' | '.join(line)} |".replace("|  |", "| |"))
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def panels(number: int) -> tuple[Figure, list[Any]]:
    """Return a figure with `number` panels in a row."""
    figure = Figure(figsize=(4.6 * number, 3.7), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def finish(given: argparse.Namespace, figure: Figure | None, **tables: dict[str, dict[str, str]]) -> None:
    """Write the picture and the tables to the files that were asked for."""
    if given.png is not None and figure is not None:
        figure.savefig(given.png)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": bench.machine(), "seeds": given.seeds, **tables}, indent=2) + "\n")
