"""Trainings that take a tenth of a second: a few points in float64, in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from batchwise import DataModule, MicroBatch, Task
from batchwise.models.dropout import Dropout
from batchwise.trainer import Trainer

EXAMPLES = 64


class Points(DataModule):
    """64 points of 5 numbers in 3 classes; batches of 10, so that the last one of an epoch has 4."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 10, "seed": 3} | kwargs)
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(EXAMPLES, 5, dtype=torch.float64, generator=generator)
        self.y = (self.x @ torch.randn(5, 3, dtype=torch.float64, generator=generator)).argmax(1)

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        return self.x, self.y


class Classify(Task):
    def losses(self, batch: MicroBatch) -> Tensor:
        logits = self(batch.inputs)
        self.measure(logits, batch.targets)
        return F.cross_entropy(logits, batch.targets, reduction="none")

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        return MetricCollection({"accuracy": MulticlassAccuracy(3, average="micro")})


def network() -> nn.Sequential:
    """The same weights each time."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), Dropout(0.2), nn.Linear(8, 3)).double()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def trainer(**settings: Any) -> Trainer:
    usual: dict[str, Any] = {
        "accelerator": "cpu",
        "precision": "64-true",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": Path.cwd(),
        "max_epochs": 3,
    }
    return Trainer(**usual | settings)


def fit(
    task: Task | None = None, data: DataModule | None = None, ckpt_path: str | None = None, **settings: Any
) -> tuple[Task, Trainer]:
    """Train a task, by default `Classify` on `Points` for 3 epochs of 7 steps; return both."""
    pl.seed_everything(0, verbose=False)
    task = task or Classify(network(), optimizer=adamw)
    made = trainer(**settings)
    made.fit(task, datamodule=data or Points(), ckpt_path=ckpt_path, weights_only=True)
    return task, made


def furthest(first: nn.Module, second: nn.Module) -> float:
    """The largest difference between the weights of two modules."""
    theirs = second.state_dict()
    return max((value - theirs[name]).abs().max().item() for name, value in first.state_dict().items())


def plain_loop(
    module: nn.Module, data: Points, optimizer: torch.optim.Optimizer, steps: int, after_step: Callable[[int], None]
) -> None:
    """Train a module without dropout in plain PyTorch, on the batches of a data module that has trained already."""
    assert data.plan is not None
    for step in range(steps):
        index = data.order.indices(step // 7, *data.plan.bounds(step))
        optimizer.zero_grad()
        F.cross_entropy(module(data.x[index]), data.y[index]).backward()
        optimizer.step()
        after_step(step)


class Fragile(torch.autograd.Function):
    """Runs out of memory where there are too many examples."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, most: int, where: str) -> Tensor:
        context.most, context.where = most, where
        if where == "forward" and len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inputs.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        if context.where == "backward" and len(gradients[0]) > context.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return gradients[0], None, None


class Memory(Logger):
    """Keeps the rows that a logger gets."""

    name, version = "memory", 0  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def found(self, name: str) -> dict[int | None, float]:
        return {step: row[name] for step, row in self.rows if name in row}
