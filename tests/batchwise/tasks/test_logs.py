"""`self.log`: against means computed by hand, in any micro-batches, in each logger."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from batchwise import MicroBatch
from tests.batchwise.small import Classify, Points, adamw, fit, network

STEPS, PER_EPOCH, EVERY = 14, 7, 2
FLAGS = {
    "step": {"on_step": True, "on_epoch": False},
    "epoch": {"on_step": False, "on_epoch": True},
    "both": {"on_step": True, "on_epoch": True},
    "bar": {"prog_bar": True},
}


class Memory(Logger):
    """Keeps the rows that a logger gets."""

    name, version = "memory", 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def found(self, name: str) -> dict[int | None, float]:
        return {step: row[name] for step, row in self.rows if name in row}


def values(inputs: Tensor) -> Tensor:
    return inputs.sum(1)


class Logging(Classify):
    """Logs the sum of each example's inputs, from one place, in one way."""

    def __init__(self, place: str, flags: dict[str, Any], scalar: bool = True) -> None:
        super().__init__(network(), optimizer=adamw)
        self.place, self.flags, self.scalar = place, flags, scalar

    def say(self, module: Any, inputs: Tensor) -> None:
        each = values(inputs)
        module.log("sum", each.mean() if self.scalar else each, **self.flags)

    def losses(self, batch: MicroBatch) -> Tensor:
        if self.place == "losses":
            self.say(self, batch.inputs)
        return super().losses(batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.place == "task":
            self.say(self, torch.cat([one.inputs for one in batch.micro_batches]))


class Callback(pl.Callback):
    def __init__(self, task: Logging) -> None:
        self.task = task

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.task.place == "callback":
            self.task.say(self, torch.cat([one.inputs for one in batch.micro_batches]))


def expected(data: Points) -> tuple[dict[int, float], dict[int, float]]:
    """By hand: the mean of each batch by the number of steps done, and that of each epoch."""
    assert data.plan is not None
    each = values(data.x)
    steps = {
        step + 1: each[data.order.indices(step // PER_EPOCH, *data.plan.bounds(step))].mean().item()
        for step in range(STEPS)
    }
    return steps, {PER_EPOCH: each.mean().item(), STEPS: each.mean().item()}


def check(found: Any, task: Logging, data: Points, flags: str) -> None:
    """Compare what a logger has with what was computed by hand."""
    steps, epochs = expected(data)
    rows = {step: mean for step, mean in steps.items() if step % EVERY == 0}
    if flags != "epoch":
        assert found("sum_step" if flags == "both" else "sum") == pytest.approx(rows, abs=1e-12)
    if flags in ("epoch", "both"):
        validated = {**epochs} if task.place == "losses" else epochs
        assert found("sum_epoch" if flags == "both" else "sum") == pytest.approx(validated, abs=1e-12)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("place", ["losses", "task", "callback"])
def test_values_in_the_log(place: str, flags: str, micro_batch_size: int | None) -> None:
    task, data, memory = Logging(place, FLAGS[flags]), Points(micro_batch_size=micro_batch_size), Memory()
    settings = {"logger": memory, "log_every_n_steps": EVERY, "limit_val_batches": 0, "max_epochs": 2}
    _, trainer = fit(task, data, callbacks=[Callback(task)], **settings)
    check(memory.found, task, data, flags)
    name = "sum_epoch" if flags == "both" else "sum"
    steps, epochs = expected(data)
    assert trainer.callback_metrics[name].item() == pytest.approx((epochs if flags != "step" and flags != "bar" else steps)[14])
    if flags == "bar":
        assert trainer.progress_bar_metrics["sum"] == pytest.approx(steps[14])
