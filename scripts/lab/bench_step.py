"""The cost of a training step: ours with everything on, a plain PyTorch loop, and Lightning as documented.

All have the same network, optimizer (fused AdamW), batch and data. Ours logs loss and accuracy to a CSV file, draws a
progress bar, keeps checkpoints, checks for finite numbers and prints a line per epoch. Lightning logs, draws and saves
by its own means. The plain loop gathers its batches from tensors in memory and does nothing else: it is the lower
limit. Then the same with ten times the batch, in 8 micro-batches. Time is that of the thread.

    python scripts/lab/bench_step.py
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bench
import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchwise.batching.loader import MicroBatch
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.epoch_line import EpochLine
from batchwise.callbacks.progress import ProgressBar
from batchwise.data.module import DataModule
from batchwise.models import place
from batchwise.models.convnet import ConvNet
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

Made = Callable[[], nn.Module]
EXAMPLES = 60_000
"""As many as MNIST has, whose images the network is for; an epoch of them ends within the timed steps."""


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Return the optimizer of all alternatives."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def warm_up(steps: int) -> int:
    """Return the number of steps that are not timed."""
    return min(20, max(1, steps // 4))


def plain(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int, parts: int = 1) -> float:
    """Return microseconds per step of a careful user's loop."""
    network, not_timed = make(), warm_up(steps)
    optimizer = adamw(network.parameters())
    order = torch.randperm(len(inputs)).repeat(1 + (steps + not_timed) * batch_size // len(inputs)).split(batch_size)
    for step, index in enumerate(order[: steps + not_timed]):
        if step == not_timed:
            start = time.thread_time()
        optimizer.zero_grad()
        for part in index.chunk(parts):
            batch = inputs.index_select(0, part).float().mul_(1 / 255)
            (F.cross_entropy(network(batch), targets.index_select(0, part)) / parts).backward()
        optimizer.step()
    return (time.thread_time() - start) / steps * 1e6


def plain_epoch(network: nn.Module, inputs: Tensor, targets: Tensor, batch_size: int) -> float:
    """Return the seconds of one epoch of that loop."""
    optimizer = adamw(network.parameters())
    start = time.perf_counter()
    for index in torch.randperm(len(inputs)).split(batch_size):
        batch = inputs.index_select(0, index).float().mul_(1 / 255)
        loss = F.cross_entropy(network(batch), targets.index_select(0, index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


class Clock:
    """Times the steps after the warm-up, and everything between them, by the time of the thread.

    It is called where a step gets its batch. It is no callback, because a callback that listens to steps slows them.
    """

    seconds = 0.0

    def __init__(self, not_timed: int) -> None:
        self.not_timed, self.step, self.start = not_timed, -1, 0.0

    def begin(self) -> None:
        """Note that a step begins."""
        self.step += 1
        now = time.thread_time()
        if self.step == self.not_timed:
            self.start = now
        self.seconds = now - self.start


class Memory(DataModule):
    """The tensors of the benchmark."""

    def __init__(self, inputs: Tensor, targets: Tensor, clock: Clock | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tensors, self.clock = (inputs, targets), clock

    def load(self, split: str) -> Any:
        """Return the training split alone."""
        return self.tensors if split == "train" else None

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Convert bytes to floats from 0 to 1, and tell the clock."""
        trains = place.current is not None and place.current.counts  # and does not try the losses before
        if self.clock and batch.position == 0 and trains:
            self.clock.begin()
        return replace(batch, inputs=batch.inputs.float().mul_(1 / 255))


def ours(
    make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int, parts: int = 1, callbacks: Any = ()
) -> float:
    """Return microseconds per step of ours."""
    clock = Clock(warm_up(steps))
    data = Memory(inputs, targets, clock, batch_size=batch_size, micro_batch_size=-(-batch_size // parts))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            max_steps=steps + clock.not_timed + 1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[*callbacks, Last(), EpochLine(), ProgressBar()],
            log_every_n_steps=50,
            default_root_dir=folder,
        )
        trainer.fit(Classification(make(), optimizer=adamw), datamodule=data)
    return clock.seconds / steps * 1e6


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send all output to nowhere, but let progress bars draw as on a terminal."""
    os.environ["FORCE_COLOR"] = "1"
    with open(os.devnull, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
    del os.environ["FORCE_COLOR"]


class Listener(pl.Callback):
    """Listens to the end of each step, so that Lightning's own loop runs."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Do nothing."""


class Documented(pl.LightningModule):
    """A module as in Lightning's documentation."""

    def __init__(self, network: nn.Module, clock: Clock | None = None) -> None:
        super().__init__()
        self.network, self.clock = network, clock

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the mean loss and log it."""
        if self.clock:
            self.clock.begin()
        logits = self.network(batch[0].float().mul_(1 / 255))
        loss = F.cross_entropy(logits, batch[1])
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", (logits.argmax(1) == batch[1]).float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return adamw(self.parameters())


def documented(make: Made, inputs: Tensor, targets: Tensor, batch_size: int, steps: int) -> float:
    """Return microseconds per step of Lightning with a DataLoader and `self.log`."""
    clock = Clock(warm_up(steps))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = pl.Trainer(
            max_steps=steps + clock.not_timed + 1,
            accelerator="cpu",
            logger=CSVLogger(folder),
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Documented(make(), clock), DataLoader(TensorDataset(inputs, targets), batch_size, shuffle=True))
    return clock.seconds / steps * 1e6


def mlp() -> nn.Module:
    """Return the small network, whose step takes a millisecond."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def main() -> None:
    """Measure and report."""
    given = bench.arguments(__doc__)
    # Moments of units that are dead for a thousand steps are denormal numbers, which slow a CPU down several times.
    torch.set_flush_denormal(True)
    pixels = torch.randint(0, 256, (EXAMPLES, 784), dtype=torch.uint8)
    targets = torch.randint(0, 10, (EXAMPLES,))
    work = {
        "MLP 784-256-10, batch 1": (mlp, pixels, targets, 1, 600),
        "MLP 784-256-10, batch 64": (mlp, pixels, targets, 64, 1_000),
        "ConvNet 28 x 28, batch 128": (ConvNet, pixels.view(-1, 1, 28, 28), targets, 128, 12),
    }
    figures = {}
    for title, (make, inputs, labels, batch_size, steps) in work.items():
        batch_size = max(min(16, batch_size), int(batch_size * min(1.0, 10 * given.scale)))
        settings = (make, inputs, labels, batch_size, max(3, int(steps * given.scale)))
        alternatives = {"plain PyTorch loop": plain, "ours": ours, "Lightning as documented": documented}
        alternatives["ours, with a callback that listens"] = partial(ours, callbacks=[Listener()])
        in_parts = {"plain PyTorch loop": plain, "ours": ours}
        measured = bench.interleave({name: partial(run, *settings) for name, run in alternatives.items()}, given.pairs)
        figures[title] = bench.report(title, "microseconds per step", measured, "plain PyTorch loop")
        if batch_size == 1:
            continue
        title = f"{title}0 in 8 micro-batches"
        settings = (*settings[:3], 10 * batch_size, max(2, settings[4] // 10), 8)
        measured = bench.interleave({name: partial(run, *settings) for name, run in in_parts.items()}, given.pairs)
        figures[title] = bench.report(title, "microseconds per step", measured, "plain PyTorch loop")
    bench.save(given.json and Path(given.json), figures)


if __name__ == "__main__":
    main()
