"""Your task: the loss, the metrics, and what `predict` writes. Its arguments are the keys under `model`."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from batchwise import DataModule, MicroBatch, Task
from batchwise.tasks.classification import check_labels


class DigitTask(Task):
    """Say which digit an image shows.

    Args:
        label_smoothing: share of the target that is spread over all digits, so that the model is less sure of itself.
        **kwargs: those of `Task`, such as `network`, `optimizer` and `schedule`. Pass them on.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")  # best.ckpt is where this was highest

    def __init__(self, label_smoothing: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.label_smoothing = label_smoothing

    def losses(self, batch: MicroBatch) -> Tensor:
        """Return one loss per example [N], and not their mean: the engine takes the mean once, over the whole batch."""
        logits = self(batch.inputs)
        self.measure(logits, batch.targets)  # for the metrics below
        return F.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing)

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """Return the metrics, given the outputs for a few examples. The log has val/accuracy, test/f1 and so on."""
        classes = outputs.shape[1]
        accuracy = MulticlassAccuracy(classes, average="micro")
        return MetricCollection({"accuracy": accuracy, "f1": MulticlassF1Score(classes, average="macro")})

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the columns of predictions.csv, one row per example."""
        probability = self(batch.inputs).softmax(dim=1)
        return {"predicted": probability.argmax(dim=1), "probability": probability}

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Raise ValueError, before training, where the data does not fit the network. You may leave this out."""
        check_labels(data, classes=outputs.shape[1])
