"""The tasks of the study of `tune`: data, network, targets, and an optimizer with a plain first guess of its rate."""

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import make_classification, make_friedman1
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.data.module import DataModule
from batchwise.models.convnet import ConvNet
from batchwise.models.mlp import MLP
from batchwise.models.transformer import Transformer
from batchwise.optim.muon import Muon
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.tasks.language import Language
from batchwise.tasks.regression import Regression
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer

TEXT = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
"""Python's own documentation, 700 thousand characters."""


def ready(data: DataModule, folder: Path | str, epochs: int | None = None) -> Trainer:
    """Return a trainer on the CPU that logs nothing, with its data set up."""
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=epochs, default_root_dir=folder, enable_progress_bar=False
    )
    data.trainer = trainer
    data.setup("fit")
    return trainer


class Rows(DataModule):
    """Rows of a table in memory, standardised: the first four fifths for training, the others for validation."""

    table: Callable[[], tuple[Any, Any]]

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return rows [N, columns] and targets [N]."""
        rows, targets = (torch.as_tensor(each) for each in self.table())
        border = len(rows) * 4 // 5
        first = rows[:border]
        part = slice(border) if split == "train" else slice(border, None)
        return ((rows[part] - first.mean(0)) / first.std(0)).float(), targets[part]


class Clusters(Rows):
    """Eight classes of two clusters each in twelve of thirty columns, one label in 20 wrong (scikit-learn makes it)."""

    def table(self) -> tuple[Any, Any]:
        """Return 6,000 rows and their classes."""
        made: Any = make_classification(6000, 30, n_informative=12, n_classes=8, n_clusters_per_class=2, flip_y=0.05,
                                   class_sep=2.0, random_state=0)  # fmt: skip
        return made


class Friedman(Rows):
    """Friedman's first function of ten numbers, with noise (scikit-learn makes it): 5,000 rows."""

    def table(self) -> tuple[Any, Any]:
        """Return the rows and the numbers, single precision."""
        rows, numbers = make_friedman1(5000, noise=1.0, random_state=0)
        return rows, numbers.astype("float32")


class Characters(DataModule):
    """Predict the next character of Python's own documentation from the eight before it.

    Inputs are character codes uint8 [N, 8] from 0 to 127, which become one-hot vectors. Targets are codes [N].
    """

    each = 16
    """Positions from one training example to the next."""

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return positions of the first nine tenths of the text ("train"), or every 16th position of the last tenth."""
        windows = torch.tensor(list(TEXT)).unfold(0, 9, 1)
        border = len(windows[::16]) * 9 // 10 * 16
        part = windows[: border : self.each] if split == "train" else windows[border::16]
        return part[:, :8].byte().contiguous(), part[:, 8].long()

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Convert codes to one-hot vectors [N, 1024]."""
        return replace(batch, inputs=nn.functional.one_hot(batch.inputs.long(), 128).flatten(1).float())


class EveryCharacter(Characters):
    """The same, with every position for training."""

    each = 1


class Blocks(DataModule):
    """Blocks of 32 characters of Python's own documentation: inputs [N, 32], and the same one place further."""

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return the blocks of the first nine tenths of the text ("train"), or 200 blocks of the last tenth."""
        blocks = torch.tensor(list(TEXT)).unfold(0, 33, 32)
        border = len(blocks) * 9 // 10
        part = blocks[:border] if split == "train" else blocks[border::10][:200]
        return part[:, :32].contiguous(), part[:, 1:].contiguous()


@dataclass(frozen=True)
class Problem:
    """A task, how long it is to be trained, and two values to reach."""

    data: type[DataModule]
    task: Callable[..., Task]
    network: Callable[[], nn.Module]
    metric: str
    targets: tuple[float, float]
    """The easier one first. Accuracies rise, losses fall."""
    epochs: int
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    budget: float = 0.25
    """That of `tune`."""
    hopeless: float = 4
    """A training ends after so many times the seconds of the fastest one."""

    def make(self, optimizer: str, seed: int) -> Task:
        """Return a new task."""
        torch.manual_seed(seed)
        return self.task(self.network(), optimizer=OPTIMIZERS[optimizer], decay_matrices_only=True)

    def reached(self, value: float, target: float) -> bool:
        """Return whether a value of the metric reaches a target."""
        return value >= target if "accuracy" in self.metric else value <= target


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.05),
    "SGD": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "Muon": partial(Muon, lr=0.02, adamw_lr=1e-3),
}
"""What one writes without having tried anything: the library's rate, or the usual one. It is for batches of 64."""
SOFT = partial(Language, sample_length=0)
PROBLEMS = {
    "digits": Problem(
        Digits, Classification, partial(MLP, 64, 10, [512], norm="layer", dropout=0.2), "val/accuracy", (0.94, 0.97), 20
    ),
    "characters": Problem(Characters, Classification, partial(MLP, 1024, 128, [128]), "val/accuracy", (0.35, 0.42), 8),
    "clusters": Problem(Clusters, Classification, partial(MLP, 30, 8, [128], dropout=0.1), "val/loss", (0.75, 0.6), 20),
    "digits, convolutions": Problem(
        Digits, Classification, partial(ConvNet, channels=(8, 16)), "val/accuracy", (0.85, 0.94), 20
    ),
    "friedman": Problem(Friedman, Regression, partial(MLP, 10, 1, [64, 64]), "val/loss", (0.15, 0.08), 20),
    "transformer": Problem(
        Blocks, SOFT, partial(Transformer, 128, 32, 2, 2), "val/loss", (2.6, 2.3), 2, (8, 16, 32, 64, 128, 256)
    ),
}  # fmt: skip
USUAL = tuple(PROBLEMS)
"""Those whose training takes seconds."""
PROBLEMS["every character"] = replace(
    PROBLEMS["characters"],
    data=EveryCharacter, metric="val/loss", targets=(1.47, 1.42), epochs=60, sizes=(256,), budget=0.01,
    hopeless=1.5,
)  # fmt: skip
DEVELOPED_ON = ("digits", "characters", "clusters")
"""The tasks on which the method was made. The others were set before, and looked at after."""
