"""Does accumulation equal the large batch? Ours and Lightning's, each against the batch in one piece.

In float64, with plain SGD and batches of 96 out of 899 images, so that the last batch has 35. First the gradients of
one epoch are compared, with a learning rate of zero, so that all are taken at the same weights. Then the weights after
three epochs of training. "Lightning" is its Trainer with `accumulate_grad_batches`, a mean loss and a DataLoader, over
the same images in the same order.

    python scripts/lab/study_accumulation.py
"""

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import study
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from study import FewDigits
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from batchwise.batching.gradients import gradients_of
from batchwise.batching.loader import MicroBatch
from batchwise.batching.order import Shuffled
from batchwise.data.module import DataModule
from batchwise.models.mlp import MLP
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

BATCH, RATE = 96, 0.1
PLAIN, DROPOUT, NORM = MLP, partial(MLP, dropout=0.3), partial(MLP, norm="batch")


class Gradients(Callback):
    """Keeps the gradient of each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Keep this one."""
        self.seen.append(torch.cat([gradient.flatten() for gradient in gradients_of(optimizer)]).clone())


class SameOrder:
    """A sampler that gives the images of each epoch in the order of our loader."""

    def __init__(self, examples: int, seed: int) -> None:
        self.order, self.epoch = Shuffled().prepare(examples, BATCH, seed), 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(self.order.indices(self.epoch - 1, 0, len(self)).tolist())


class Documented(pl.LightningModule):
    """A module as in Lightning's documentation."""

    def __init__(self, network: nn.Module, rate: float, data: DataModule) -> None:
        super().__init__()
        self.network, self.rate, self.data = network, rate, data

    def training_step(self, batch: Any, _: int) -> Tensor:
        """Return the mean loss."""
        images, digits = batch
        inputs = self.data.transform(MicroBatch(images, digits, torch.arange(len(digits))), training=True).inputs
        return F.cross_entropy(self.network(inputs), digits)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return SGD(self.parameters(), lr=self.rate)


def fit(how: str, micro_batch: int, make: Any, ghost: int | None, rate: float, epochs: int, seed: int) -> list[Tensor]:
    """Return the gradient of each step, and after them the weights."""
    torch.manual_seed(seed)
    network, seen = make(), Gradients()
    settings: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "max_epochs": epochs, "precision": "64-true", "callbacks": [seen], "limit_val_batches": 0,
        "num_sanity_val_steps": 0, "enable_model_summary": False,
    }  # fmt: skip
    data = FewDigits(batch_size=BATCH, micro_batch_size=micro_batch, seed=seed, split_seed=seed)
    if how == "ours":
        task = Classification(network, partial(SGD, lr=rate), ghost_batch_size=ghost)
        Trainer(**settings).fit(task, datamodule=data)
    else:
        images, digits = data.load("train")
        loader = DataLoader(TensorDataset(images, digits), micro_batch, sampler=SameOrder(len(digits), seed))
        trainer = pl.Trainer(accumulate_grad_batches=BATCH // micro_batch, **settings)
        trainer.fit(Documented(network, rate, data), loader)
    return [*seen.seen, torch.cat([p.detach().flatten() for p in network.parameters()])]


def row(given: argparse.Namespace, name: str, how: str, micro_batch: int, make: Any, ghost: int | None) -> list[str]:
    """Return the largest errors of gradients and weights against the batch in one piece, over all seeds."""
    full = last = weights = 0.0
    for seed in range(given.seeds):
        once, parts = (fit("ours", BATCH, make, ghost, 0.0, 1, seed), fit(how, micro_batch, make, ghost, 0.0, 1, seed))
        errors = [((a - b).norm() / a.norm()).item() for a, b in zip(once[:-1], parts[:-1], strict=True)]
        full, last = max(full, *errors[:-1]), max(last, errors[-1])
        epochs = 3 if given.scale >= 0.1 else 1
        ways = (("ours", BATCH), (how, micro_batch))
        one, other = (fit(kind, size, make, ghost, RATE, epochs, seed)[-1] for kind, size in ways)
        weights = max(weights, (one - other).abs().max().item())
    return [f"{name}, micro-batches of {micro_batch}", f"{full:.1g}", f"{last:.1g}", f"{weights:.1g}"]


def main() -> None:
    """Train and print."""
    given = study.arguments(__doc__)
    alternatives = [
        ("ours", "ours", 48, PLAIN, None),
        ("ours", "ours", 24, PLAIN, None),
        ("ours", "ours", 7, PLAIN, None),
        ("ours", "ours", 1, PLAIN, None),
        ("ours, dropout", "ours", 24, DROPOUT, None),
        ("ours, batch norm", "ours", 24, NORM, None),
        ("ours, ghost batch norm over 12", "ours", 24, NORM, 12),
        ("Lightning", "Lightning", 96, PLAIN, None),
        ("Lightning", "Lightning", 24, PLAIN, None),
        ("Lightning", "Lightning", 8, PLAIN, None),
        ("Lightning", "Lightning", 1, PLAIN, None),
    ]
    with study.silence():
        rows = [row(given, *each) for each in study.few(given, alternatives)]
    head = ["", "gradient, full batches", "gradient, last batch", "weights after 3 epochs"]
    title = "Relative error of the gradient, and largest difference of a weight, against the batch in one piece"
    figures = study.table(title, head, rows)
    study.finish(given, None, accumulation=figures)


if __name__ == "__main__":
    main()
