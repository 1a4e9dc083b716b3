"""Classify each example: cross-entropy, accuracy, macro F1."""

import math
import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from batchwise.arguments import typed
from batchwise.batching.device import send
from batchwise.batching.loader import MicroBatch
from batchwise.data.mixing import Mixing
from batchwise.data.module import DataModule
from batchwise.ranges import ClosedUnitInterval
from batchwise.tasks.losses import described
from batchwise.tasks.task import Losses, Task


class Classification(Task):
    """Classify each example. Targets are class numbers [N]; the network gives logits [N, C].

    Args:
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016, section 7).
        class_weights: weight of each class in the loss, in training and evaluation. The loss is the weighted mean over
            the global batch. balanced: training examples / (classes * training examples of the class), so that all
            classes count alike (as in scikit-learn).
        **kwargs: arguments of `Task`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/accuracy", "max")

    weights: Tensor | None
    """Weight of each class, [C]; None: all are one."""

    @typed
    def __init__(
        self,
        *args: Any,
        label_smoothing: ClosedUnitInterval = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        if isinstance(class_weights, list) and not (
            any(class_weights) and all(0 <= weight < math.inf for weight in class_weights)
        ):
            raise ValueError(
                f"model.class_weights is {class_weights}: write a number of at least 0 for each class, finite and not "
                "all of them 0"
            )
        self.class_weights = class_weights
        # Balanced weights go into the checkpoint, because an evaluation may not have the training examples.
        self.register_buffer("weights", None, persistent=class_weights == "balanced")

    def losses(self, batch: MicroBatch) -> Losses:
        """One cross-entropy per example [N], in nats. Never averaged here: the base class divides once."""
        logits, targets = self(batch.inputs), batch.targets
        if not targets.is_floating_point():
            targets = targets.long()  # PyTorch takes no other whole numbers, and bytes for a mask of the weights
        losses = self._cross_entropy(logits, targets)
        if self._measures.are_due(self.training):  # after the losses, whose error names a label that is no class
            self.measure(_probability(logits), targets.argmax(1) if targets.ndim == 2 else targets)
        return losses

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Losses:
        mixed = targets.ndim == 2  # probabilities [N, C], of augmentations that mix examples
        weights, by_class = None, self.weights
        if by_class is not None and mixed:
            # Each class in a mixture has its own weight. So the divisor is the sum of these weights.
            shares = targets * by_class
            weights = shares.sum(1)
            targets = shares / weights.clamp_min(torch.finfo(weights.dtype).tiny)[:, None]
        elif by_class is not None:
            weights = by_class[targets]
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        return losses if weights is None else (losses, weights)

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The most probable class [N], and the probability of each class [N, C]."""
        probability = _probability(self(batch.inputs))
        return {"predicted": probability.argmax(dim=1), "probability": probability}

    def make_metrics(self, outputs: Tensor) -> MetricCollection:
        """Top-1 accuracy over all examples, the mean F1 over the classes, and the confusion matrix."""
        classes = outputs.shape[1]
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro", validate_args=False),
                "f1": MulticlassF1Score(classes, average="macro", validate_args=False),
                "confusion": MulticlassConfusionMatrix(classes, validate_args=False),
            }
        )

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Check that the network has an output for each class and that targets are class numbers."""
        if not isinstance(outputs, Tensor) or outputs.ndim != 2:
            raise ValueError(f"model.network gives {described(outputs)}: logits [N, classes] are needed")
        for step in data.augment:
            if isinstance(step, Mixing) and step.num_classes != outputs.shape[1]:
                raise ValueError(
                    f"{type(step).__name__}.num_classes is {step.num_classes}, but model.network has "
                    f"{outputs.shape[1]} outputs: write num_classes {outputs.shape[1]}"
                )
        check_labels(data, outputs.shape[1])
        names = data.class_names
        if names is not None and len(names) < outputs.shape[1]:
            warnings.warn(
                f"model.network has {outputs.shape[1]} outputs for {len(names)} classes: write num_classes "
                f"{len(names)}, unless more are to come",
                stacklevel=2,
            )
        if self.class_weights is not None:
            self._weigh(data, outputs)

    def _weigh(self, data: DataModule, outputs: Tensor) -> None:
        """Set the weights of the classes. In an evaluation, balanced weights come from the checkpoint later."""
        weights, classes = self.class_weights, outputs.shape[1]
        if weights == "balanced":
            labels = data.labels() if data.plan is not None else torch.arange(classes)
            if labels is None:
                raise ValueError("model.class_weights is balanced, but the labels are not in memory: write the weights")
            counts = torch.bincount(labels.long(), minlength=classes).clamp(min=1)
            weights = len(labels) / (classes * counts.double())
        elif weights is not None and len(weights) != classes:
            raise ValueError(f"model.class_weights has {len(weights)} numbers: write {classes}, one for each class")
        # In mixed precision, outputs are of half precision, but losses are not.
        kind = torch.promote_types(outputs.dtype, torch.float32)
        self.weights = send(torch.as_tensor(weights, dtype=torch.float64), outputs.device, kind)


def _probability(logits: Tensor) -> Tensor:
    """Return the probability of each class [N, C]. torchmetrics takes logits for it if all happen to be in [0, 1]."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)


def check_labels(data: DataModule, classes: int) -> None:
    """Check that the targets in memory are class numbers below `classes`. Warn of classes that training does not have.

    Raises:
        ValueError: a target is not a class number.
    """
    found: dict[str, Tensor] = {}
    for name, fetch in data.loaded():
        fields = getattr(fetch, "fields", ())
        targets = fields[-1] if len(fields) > 1 else data.labels() if name == "train" and not fields else None
        if targets is None:
            continue
        if not isinstance(targets, Tensor):
            raise ValueError(
                f"the targets of the {name} split are a {type(targets).__name__}: write one tensor of whole numbers, "
                "or a task of your own"
            )
        if targets.ndim != 1 or targets.is_floating_point() or targets.is_complex():
            raise ValueError(
                f"the targets of the {name} split are {targets.dtype} of shape {list(targets.shape)}: "
                "write one whole number per example"
            )
        targets = targets.long()  # PyTorch does not compare uint16
        wrong = ((targets < 0) | (targets >= classes)).nonzero()
        if len(wrong):
            example = int(wrong[0])
            raise ValueError(
                f"label {int(targets[example])} at example {example} of the {name} split, but model.network has "
                f"{classes} outputs: write num_classes {int(targets.max()) + 1}, or correct the label"
            )
        found[name] = torch.unique(targets)
        if len(found[name]) == 1 < len(targets):
            which = "training" if name == "train" else name
            warnings.warn(f"all {len(targets)} {which} examples have the label {int(targets[0])}", stacklevel=2)
    for name, labels in found.items():
        unknown = [int(label) for label in labels if label not in found.get("train", labels)]
        if unknown:
            words = ", ".join(data.class_names[label] if data.class_names else str(label) for label in unknown[:10])
            warnings.warn(f"labels of the {name} split that no training example has: {words}", stacklevel=2)
