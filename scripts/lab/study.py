"""What the studies of docs/batching.md share: many small trainings on the digits, in one process, over several seeds.

Each is an ordinary training by this project's Trainer, task and data module, without log and checkpoints. A seed also
draws its own split into training, validation and test, so that the deviation over the seeds is not that of one lucky
split. What is chosen (a learning rate) is chosen by validation; what is reported as accuracy is of the test split.
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
from functools import partial
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
    """The digits made harder: half of them for training, and some of the training labels wrong.

    Args:
        wrong: share of the training images whose label is another digit, drawn once per split.
        choose: which training images there are, and how they are stored: given their labels, their numbers.
        **kwargs: those of `Digits`.
    """

    def __init__(self, wrong: float = 0.0, choose: Callable[[Tensor], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(val_fraction=0.2, test_fraction=0.3, **kwargs)
        self.wrong, self.choose = wrong, choose

    @property
    def statistics(self) -> tuple[float, float]:
        """Mean and deviation of the training images."""
        return self._statistics

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return images and digits."""
        images, digits = super().load(split)
        if split != "train":
            return images, digits
        generator = torch.Generator().manual_seed(self.split_seed)
        other = (digits + torch.randint(1, 10, digits.shape, generator=generator)) % 10
        digits = torch.where(torch.rand(digits.shape, generator=generator) < self.wrong, other, digits)
        chosen = torch.arange(len(digits)) if self.choose is None else self.choose(digits)
        return images[chosen], digits[chosen]


@dataclass(frozen=True)
class Setting:
    """One way to train: the batch, and what follows it."""

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
    """Epochs between two looks at the validation split."""
    target: float = math.inf
    """Training ends when the accuracy on the validation split has reached this, in per cent, and `least` epochs."""
    least: int = 0


@dataclass
class Run:
    """What came out, with accuracies in per cent."""

    test: float = math.nan
    epochs: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    """On the validation split."""
    loss: list[float] = field(default_factory=list)
    """On the training split, the mean over the epoch."""
    seconds: list[float] = field(default_factory=list)
    """Of training alone, so far."""
    steps: list[int] = field(default_factory=list)

    @property
    def val(self) -> float:
        """The accuracy on the validation split at the end."""
        return self.accuracy[-1]

    def reached(self, target: float) -> int | None:
        """Return the place in the lists at which the validation accuracy first is at least `target`."""
        return next((place for place, value in enumerate(self.accuracy) if value >= target), None)


class Speed(Callback):
    """Notes the seconds of training alone, after each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note it."""
        (record,) = (callback for callback in trainer.callbacks if isinstance(callback, Record))
        self.seconds.append(record.totals(pl_module).seconds)


def trainer(folder: str, setting: Setting, scale: float, callbacks: Sequence[Callback], **kwargs: Any) -> Trainer:
    """Return a Trainer without log and checkpoints; in a tiny form, for a few steps per epoch."""
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
        setting: how.
        seed: of the split, the first weights, the order and dropout.
        scale: share of the epochs.
        callbacks: which see what is to be seen.
        **kwargs: more arguments for the Trainer.
    """
    torch.manual_seed(seed)
    task = Classification(setting.network(), partial(setting.optimizer, lr=setting.lr), setting.schedule)
    data = setting.data(batch_size=setting.batch_size, order=setting.order(), seed=seed, split_seed=seed)
    with tempfile.TemporaryDirectory() as folder, silence():
        trainer(folder, setting, scale, callbacks, limit_val_batches=0, **kwargs).fit(task, datamodule=data)


@contextlib.contextmanager
def silence() -> Any:
    """Let nothing be printed: what a study has to say comes at its end."""
    with open(os.devnull, "w") as file, contextlib.redirect_stdout(file):
        yield


def arguments(description: str | None, seeds: int = 5) -> argparse.Namespace:
    """Return the command line that all studies take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help="trainings of each setting")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the epochs; the tests take little")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--png", type=Path, help="also draw this picture")
    given = bench.prepare(parser)
    if given.scale < 0.1:
        given.seeds = min(given.seeds, 2)
    return given


def few(given: argparse.Namespace, values: Iterable[Key]) -> list[Key]:
    """Return the values; in a tiny form, the first and the last alone."""
    values = list(values)
    return values if given.scale >= 0.1 else [values[0], values[-1]]


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Return mean and deviation over the seeds."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    return statistics.mean(values)


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> dict[str, dict[str, str]]:
    """Print a table as Markdown; return it: by the first column, then by the others."""
    rows = [[str(value) for value in row] for row in rows]
    print(f"\n{title}\n")
    for line in ([*head], ["---", *["--:"] * (len(head) - 1)], *rows):
        print(f"| {' | '.join(line)} |".replace("|  |", "| |"))
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def panels(number: int) -> tuple[Figure, list[Any]]:
    """Return a picture with so many panels in a row."""
    figure = Figure(figsize=(4.6 * number, 3.7), dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def finish(given: argparse.Namespace, figure: Figure | None, **tables: dict[str, dict[str, str]]) -> None:
    """Leave the picture and the tables where they were asked for."""
    if given.png is not None and figure is not None:
        figure.savefig(given.png)
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": bench.machine(), "seeds": given.seeds, **tables}, indent=2) + "\n")
