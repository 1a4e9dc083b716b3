"""Regression: squared error; MSE, MAE and R2 in the units of the targets."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from batchwise.batching.device import widest
from batchwise.batching.loader import MicroBatch
from batchwise.data.module import DataModule
from batchwise.tasks.losses import described
from batchwise.tasks.task import Task

COARSE = 0.01
"""A warning tells of targets that are rounded by more than this share of their std."""


class Regression(Task):
    """Predict one or several numbers per example. Targets are [N] or [N, K]; the network gives [N, 1] or [N, K].

    The network learns standardised targets: their mean over the training split is 0, and their std is 1. So a network
    that always predicts the mean has a loss of 1. Metrics and predictions are in the units of the targets. The
    checkpoint has mean and std. If targets are neither in memory nor in memory maps, they are not standardised.
    """

    target_mean: Tensor
    target_std: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("target_mean", torch.zeros(1))
        self.register_buffer("target_std", torch.ones(1))

    def losses(self, batch: MicroBatch) -> Tensor:
        """One squared error per target [N, K], of standardised targets."""
        outputs = self(batch.inputs)
        targets = (batch.targets.reshape(outputs.shape) - self.target_mean) / self.target_std
        if self._measures.are_due(self.training):
            wide = widest(outputs.device)
            # Without the mean, for the precision of R2: it subtracts two sums of squares.
            without = batch.targets.reshape(outputs.shape).to(wide) - self.target_mean.to(wide)
            self.measure(outputs.to(wide) * self.target_std.to(wide), without)
        return F.mse_loss(outputs, targets, reduction="none")

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The numbers [N] or [N, K], in the units of the targets."""
        predicted = self(batch.inputs) * self.target_std + self.target_mean
        return {"predicted": predicted.squeeze(1) if predicted.shape[1] == 1 else predicted}

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """Mean squared error; mean absolute error; R2, the explained share of the variance (the mean over K)."""
        return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score()})

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that there is an output for each target and that targets are finite. Set their mean and std."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(f"model.network gives {described(outputs)}: numbers [N, K] are needed")
        count = outputs.shape[1]
        if len(self.target_mean) != count:
            self.target_mean = self.target_mean.new_zeros(count)
            self.target_std = self.target_std.new_ones(count)
        for name, targets in targets_of(data):
            if targets[0].numel() != count:
                raise ValueError(
                    f"model.network has {count} outputs, but the {name} split has {targets[0].numel()} targets per "
                    f"example: write as many outputs (num_classes {targets[0].numel()})"
                )
            if name == "train":
                rows = targets.reshape(len(targets), -1).double()
                std = rows.std(0, correction=0)
                self.target_mean.copy_(rows.mean(0))
                self.target_std.copy_(torch.where(std > 0, std, 1.0))
                error = (rows.to(outputs.dtype) - rows).square().mean(0).sqrt()
                if (coarse := error > COARSE * std).any():
                    which = int(coarse.nonzero()[0])
                    warnings.warn(
                        f"targets of up to {rows[:, which].abs().max():.6g} with std {std[which]:.2g} are rounded by "
                        f"{error[which]:.2g} in {outputs.dtype}: subtract their mean in load, or write a finer "
                        "trainer.precision, such as bf16-mixed",
                        stacklevel=2,
                    )


def targets_of(data: DataModule) -> list[tuple[str, Tensor]]:
    """Return the targets of each loaded split that consists of tensors, with the name of the split.

    Raises:
        ValueError: a target is not finite, or they are not in one tensor of real numbers.
    """
    found = []
    for name, fetch in data.loaded():
        fields = getattr(fetch, "fields", ())
        if len(fields) < 2:
            continue
        if not isinstance(fields[-1], Tensor) or fields[-1].is_complex():
            kind = "complex" if isinstance(fields[-1], Tensor) else f"a {type(fields[-1]).__name__}"
            raise ValueError(
                f"the targets of the {name} split are {kind}: write one tensor of real numbers [N, ...], or a task of "
                "your own"
            )
        wrong = ~fields[-1].reshape(len(fields[-1]), -1).isfinite().all(1)
        if wrong.any():
            raise ValueError(
                f"{int(wrong.sum()):,} targets of the {name} split are not finite, such as that of example "
                f"{int(wrong.nonzero()[0])}: correct them, or leave these examples out"
            )
        found.append((name, fields[-1]))
    return found
