"""Classify each example: cross-entropy, accuracy, macro F1."""

import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from project.batching.loader import Batch
from project.callbacks.pictures import Pictures
from project.data.module import DataModule
from project.tasks.task import Task


class Classification(Task):
    """Classify each example. Targets are class numbers [N]; the network gives logits [N, C].

    Args:
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        **kwargs: those of `Task`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")

    def __init__(self, *args: Any, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing is {label_smoothing}: write a share from 0 to below 1")
        self.label_smoothing = label_smoothing
        self.confusion: MulticlassConfusionMatrix | None = None

    def losses(self, batch: Batch) -> Tensor:
        """One cross-entropy per example [N], in nats. Never averaged here: the base class divides once."""
        logits = self(batch.inputs)
        self.measure(logits, batch.targets)
        return F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing)

    def measure(self, *values: Tensor) -> None:
        """Also count, in evaluation, which class is taken for which."""
        super().measure(*values)
        if self.confusion is not None and not self.training:
            self.confusion.update(*values)

    def on_validation_epoch_start(self) -> None:
        """Also forget the counts."""
        super().on_validation_epoch_start()
        if self.confusion is not None:
            self.confusion.reset()

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        """The most probable class [N], and the probability of each class [N, C]."""
        probability = self(batch.inputs).float().softmax(dim=1)
        return {"predicted": probability.argmax(dim=1), "probability": probability}

    def configure_callbacks(self) -> list[Callback]:
        """Also log pictures: of a few predictions, and of what is taken for what."""
        return [*super().configure_callbacks(), Pictures()]

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """Top-1 accuracy over all examples, and the mean over classes of their F1."""
        classes = outputs.shape[1]
        self.confusion = MulticlassConfusionMatrix(classes, validate_args=False)
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
                "f1": MulticlassF1Score(classes, average="macro", validate_args=False),
            }
        )

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that the network has an output for each class and that targets are class numbers."""
        if outputs.ndim != 2:
            raise ValueError(f"model.network gives the shape {list(outputs.shape)}: logits [N, classes] are needed")
        for name, fetch in data.loaded():
            targets = getattr(fetch, "fields", (None,))[-1]
            if targets is None or len(fetch.fields) < 2:  # type: ignore[attr-defined]
                continue
            if targets.ndim != 1 or targets.is_floating_point():
                raise ValueError(
                    f"the targets of the {name} split are {targets.dtype} of shape {list(targets.shape)}: "
                    "write one whole number per example"
                )
            wrong = ((targets < 0) | (targets >= outputs.shape[1])).nonzero()
            if len(wrong):
                example = int(wrong[0])
                raise ValueError(
                    f"label {int(targets[example])} at example {example} of the {name} split, but model.network has "
                    f"{outputs.shape[1]} outputs: write num_classes {int(targets.max()) + 1}, or correct the label"
                )
            if name == "train" and len(torch.unique(targets)) == 1:
                warnings.warn(f"all {len(targets)} training examples have the label {int(targets[0])}", stacklevel=2)
