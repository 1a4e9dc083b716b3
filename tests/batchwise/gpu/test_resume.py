"""A training that moves between a CPU and a GPU is the training on one of them."""

from pathlib import Path
from typing import Any

import parts
import pytest
import small
import torch
from torch import nn

from batchwise.models.dropout import Dropout
from batchwise.optim.schedule import Schedule

pytestmark = pytest.mark.gpu


def task(optimizer: Any) -> small.Task:
    net = parts.mlp(nn.BatchNorm1d(8).double(), Dropout(0.2))  # no bias before the norm: it would be rounding alone
    return small.Classify(
        net, optimizer=optimizer, schedule=Schedule("cosine", warmup_examples=100), ghost_batch_size=5
    )


@pytest.mark.parametrize("optimizer", [small.adamw, parts.sgd, torch.optim.NAdam])
@pytest.mark.parametrize("first_on_cpu", [True, False])
def test_moving_to_another_device(first_on_cpu: bool, optimizer: Any, on: dict[str, Any], tmp_path: Path) -> None:
    settings = {"max_epochs": 3, "gradient_clip_val": 1.0}
    whole, _ = small.fit(task(optimizer), **settings)
    first, second = ({}, on) if first_on_cpu else (on, {})
    begun, trainer = small.fit(task(optimizer), **settings, **first, limit_train_batches=1.0, callbacks=[StopAfter(1)])
    assert trainer.global_step == 7
    path = str(tmp_path / "begun.ckpt")
    trainer.save_checkpoint(path)
    assert small.furthest(begun, whole) > 1e-3
    ended, trainer = small.fit(task(optimizer), ckpt_path=path, **settings, **second)
    assert trainer.global_step == 21
    assert small.furthest(ended, whole) < 1e-10


class StopAfter(small.pl.Callback):
    """Stops training after some epochs, of the three that the schedule knows."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs
