"""The task: one loss per example, it learns, and the way a batch is executed does not change what is learnt."""

import pytest
import torch

from batchwise import Trainer
from project.data import Digits
from project.model import Network
from project.task import DigitTask


def train(epochs: int, precision: str = "32-true", **sizes: int) -> tuple[DigitTask, dict[str, float]]:
    """Train without the command line; return the task and what was measured."""
    torch.manual_seed(0)
    task = DigitTask(network=Network())
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(task, Digits(**sizes))
    return task, {name: value.item() for name, value in trainer.callback_metrics.items()}


def test_one_loss_per_example() -> None:
    data, task = Digits(batch_size=64), DigitTask(network=Network(dropout=0.0))
    batch = data.to_device(data.examples("train", 7), torch.device("cpu"), training=True)
    losses = task.losses(batch)
    assert losses.shape == (7,)
    one = task.losses(batch.take(torch.tensor([3])))
    assert one.item() == pytest.approx(losses[3].item(), rel=1e-5)


def test_it_learns() -> None:
    _, measured = train(epochs=2, batch_size=32)
    assert measured["val/accuracy"] > 0.9
    assert measured["val/f1"] > 0.9


def test_micro_batches_do_not_change_the_result() -> None:
    """1,259 images in batches of 100: the last one has 59, and micro-batches of 15 fit into neither."""
    whole, measured = train(epochs=2, precision="64-true", batch_size=100)
    parts, again = train(epochs=2, precision="64-true", batch_size=100, micro_batch_size=15)
    assert (whole.data.plan.accumulation, parts.data.plan.accumulation) == (1, 7)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parts.get_parameter(name), parameter, rtol=0, atol=1e-12)
    for name in ("train/loss_epoch", "val/loss", "val/accuracy"):
        assert again[name] == pytest.approx(measured[name], abs=1e-7), name  # float32 keeps so much
