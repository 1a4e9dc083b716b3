"""What a training step costs: ours with everything on, a plain PyTorch loop, and Lightning as its documentation has it.

The same network, optimizer (fused AdamW), batch and data; ours with exact loss logged to a CSV file, checkpoints, the
check for finite numbers, and a line per epoch. The plain loop gathers its batches from tensors in memory and does
nothing else: it is the limit.

    python scripts/bench_step.py
"""

import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from project.batching.loader import Batch
from project.callbacks.checkpoint import Last
from project.callbacks.epoch_line import EpochLine
from project.data.module import DataModule
from project.models.convnet import ConvNet
from project.tasks.classification import Classification
from project.trainer import Trainer

Made = Callable[[], nn.Module]
WARM_UP = 20  # steps that are not timed


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of all alternatives."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def plain(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of the loop that a careful user writes."""
    network = make()
    optimizer = adamw(network.parameters())
    order = torch.randperm(len(inputs)).repeat(1 + (steps + WARM_UP) * batch_size // len(inputs)).split(batch_size)
    for step, index in enumerate(order[: steps + WARM_UP]):
        if step == WARM_UP:
            start = time.perf_counter()
        batch = inputs.index_select(0, index).float().mul_(1 / 255)
        loss = F.cross_entropy(network(batch), targets.index_select(0, index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps * 1e6


class Clock(pl.Callback):
    """Times the steps after the warm-up, with all that happens between them."""

    seconds = 0.0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Start and stop."""
        if trainer.global_step == WARM_UP:
            self.start = time.perf_counter()
        self.seconds = time.perf_counter() - getattr(self, "start", 0)


class Memory(DataModule):
    """The tensors of the benchmark."""

    def __init__(self, inputs: Tensor, targets: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tensors = inputs, targets

    def load(self, split: str) -> Any:
        """Return the training split alone."""
        return self.tensors if split == "train" else None

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Make floats of bytes."""
        return replace(batch, inputs=batch.inputs.float().mul_(1 / 255))


def ours(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of this project."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        trainer = Trainer(
            max_steps=steps + WARM_UP + 1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[clock, Last(), EpochLine()],
            enable_progress_bar=False,
            log_every_n_steps=50,
            default_root_dir=folder,
        )
        trainer.fit(Classification(make(), optimizer=adamw), datamodule=Memory(inputs, targets, batch_size=batch_size))
    return clock.seconds / steps * 1e6


class Documented(pl.LightningModule):
    """A module as Lightning's documentation writes it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the mean loss and log it."""
        loss = F.cross_entropy(self.network(batch[0].float().mul_(1 / 255)), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return adamw(self.parameters())


def documented(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of Lightning with a DataLoader and `self.log`."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        trainer = pl.Trainer(
            max_steps=steps + WARM_UP + 1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[clock],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Documented(make()), DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True))
    return clock.seconds / steps * 1e6


def mlp() -> nn.Module:
    """Return the small network, whose step takes a millisecond."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pixels = torch.randint(0, 256, (10_000, 784), dtype=torch.uint8)
    targets = torch.randint(0, 10, (10_000,))
    work = {
        "MLP 784-256-10, batch 64": (mlp, pixels, targets, 64, 600),
        "ConvNet 28 x 28, batch 128": (ConvNet, pixels.view(-1, 1, 28, 28), targets, 128, 12),
    }
    figures = {}
    for title, (make, inputs, labels, batch_size, steps) in work.items():
        steps = max(3, int(steps * given.scale))
        alternatives = {"plain PyTorch loop": plain, "ours": ours, "Lightning as documented": documented}
        measured = bench.interleave(
            {
                name: lambda run=run: run(make, inputs, labels, batch_size, steps)  # noqa: B023 (called at once)
                for name, run in alternatives.items()
            },
            given.pairs,
        )
        figures[title] = bench.report(title, "microseconds per step", measured, "plain PyTorch loop")
    bench.save(given.json and Path(given.json), figures)


if __name__ == "__main__":
    main()
