"""Multi-label classification: binary cross-entropy, F1, accuracy."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MultilabelAccuracy, MultilabelF1Score

from batchwise.batching.loader import MicroBatch
from batchwise.data.module import DataModule
from batchwise.tasks.regression import targets_of
from batchwise.tasks.task import Task


class MultiLabel(Task):
    """Decide for each of C labels whether it applies. Targets are 0 or 1 [N, C]; the network gives logits [N, C]."""

    monitor = ("val/f1", "max")

    def losses(self, batch: MicroBatch) -> Tensor:
        """One binary cross-entropy per example and label [N, C], in nats."""
        logits = self(batch.inputs)
        if self._measures.are_due(self.training):
            self.measure(_probability(logits), batch.targets.long())
        return F.binary_cross_entropy_with_logits(logits, batch.targets.to(logits.dtype), reduction="none")

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The probability of each label [N, C], and the decision [N, C]: 1 for a probability above one half."""
        probability = _probability(self(batch.inputs))
        return {"predicted": (probability > 0.5).long(), "probability": probability}

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """F1 and accuracy of the decisions, as means over the labels."""
        count = outputs.shape[1]
        return MetricCollection(
            {
                "f1": MultilabelF1Score(count, average="macro", validate_args=False),
                "accuracy": MultilabelAccuracy(count, average="macro", validate_args=False),
            }
        )

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that the network has an output for each label and that targets are 0 and 1."""
        for name, targets in targets_of(data):
            if targets[:1].shape != outputs[:1].shape:
                raise ValueError(
                    f"the targets of the {name} split are {list(targets.shape)}, but model.network gives "
                    f"{list(outputs.shape)}: write one 0 or 1 per label, and as many outputs as labels"
                )
            wrong = ((targets != 0) & (targets != 1)).any(1).nonzero()
            if len(wrong):
                raise ValueError(
                    f"example {int(wrong[0])} of the {name} split has the targets {targets[int(wrong[0])].tolist()}: "
                    "write 0 or 1 for each label"
                )


def _probability(logits: Tensor) -> Tensor:
    """Return the probability of each label [N, C]. torchmetrics takes logits for it if all happen to be in [0, 1]."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
