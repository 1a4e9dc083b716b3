"""Losses and metrics of a training, summed over all micro-batches and devices."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from itertools import groupby
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from batchwise.batching.device import widest
from batchwise.models import place
from batchwise.tasks.exchange import lists_of, lists_whole, parts_of
from batchwise.tasks.hooks import row_is_due
from batchwise.tasks.losses import described
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.sums import Sums, reduce_sums
from batchwise.tasks.terms import Terms

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

MOST_HELD = 2**20
"""Number of values that may wait for a row in the log."""


class MetricError(ValueError):
    """`self.measure` gave the metrics something that they cannot take."""


class Measures:
    """The sums and metrics of a task. It is an object of its own, so that no hook of a user's subclass can break it.

    Args:
        terms: those of the loss.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.window, self.epoch, self.evaluation = Sums(), Sums(), Sums()
        """Sums since the last row in the log; since the epoch began; of the running evaluation."""
        self.epoch_loss = float("nan")
        """Mean loss of the last epoch that has ended."""
        self.metrics: MetricCollection | None = None
        self.step_metrics: MetricCollection | None = None
        """The same metrics, over one training batch."""
        self.found: list[str] | None = None
        """Names of the single numbers that the metrics gave before training; None: they were not seen."""
        self._mean: str | None = None
        """The name of a metric that is a mean."""
        self._held: list[tuple[Tensor, ...]] = []
        """Values of its micro-batches, which the metrics get together: an update takes as long as a small network."""
        self.tables: dict[str, Tensor] = {}
        """Metrics of the last evaluation that are not a single number, such as `val/confusion`."""
        self.shown: dict[str, float] = {}
        """Values for the progress bar."""
        self.flops_per_example: float | None = None
        """FLOPs of the forward pass; None: not known."""
        self.tried: Any = False
        """The plan of the training for which the task was tried; True: tried for an evaluation; False: not tried."""
        self.logged: set[str] = set()
        """Names that `losses` logs, as far as they are known before training."""
        self.rehearsed = False
        """Whether the losses of some examples were computed before training."""
        self.fed: set[bool] = set()
        """Whether `losses` was seen to feed the metrics in training (True) and in evaluation (False)."""
        self.row_is_due = False
        """Whether a row in the log is due after this step."""

    def make(self, make: Callable[[], MetricCollection | None], device: torch.device) -> None:
        """Make the metrics, with sums in double precision."""
        self._held.clear()  # of a step that broke off
        with _DtypeContextManager(widest(device)):
            metrics = make()
        if metrics is None:
            return
        if isinstance(metrics, Metric | dict | list | tuple):
            metrics = MetricCollection(metrics)  # type: ignore[arg-type]
        if not isinstance(metrics, MetricCollection):
            raise ValueError(f"make_metrics gave a {type(metrics).__name__}: return torchmetrics.MetricCollection")
        self.terms.refuse_names({str(name) for name in metrics})
        if metrics._enable_compute_groups is True:
            # torchmetrics would join metrics whose states are equal after the first update, perhaps by chance.
            metrics = MetricCollection(dict(metrics.items()), compute_groups=False)  # type: ignore[arg-type]
        self.metrics, self.found = metrics, None
        self._mean = next((str(name) for name, one in metrics.items() if isinstance(one, MeanMetric)), None)
        feeds = True in self.fed or not self.rehearsed
        try:
            single = {name: deepcopy(metric) for name, metric in metrics.items() if feeds and not is_table(metric)}  # type: ignore[misc]
        except (TypeError, RuntimeError) as error:
            said = f"a metric of make_metrics cannot be copied for training ({str(error).splitlines()[0]})"
            raise ValueError(f"{said}: let it hold only what copy.deepcopy takes") from None
        self.step_metrics = MetricCollection(single, compute_groups=False) if single else None  # type: ignore[arg-type]
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Move the metrics. A metric that is moved takes values of PyTorch's default type from then on."""
        with _DtypeContextManager(widest(device)):
            for metrics in (self.metrics, self.step_metrics):
                if metrics is not None:
                    metrics.to(device)

    def names(self) -> list[str]:
        """Return the names of the terms, and of the metrics that are single numbers."""
        made = [name for name, metric in (self.metrics or {}).items() if not is_table(metric)]  # type: ignore[union-attr]
        return [*(self.terms.names or []), *(made if self.found is None else self.found)]

    # Training

    def start_training(self) -> None:
        """Forget the sums of an earlier training."""
        self.window, self.epoch = Sums(), Sums()
        self.terms.start_training()

    def start_step(self, task: "Task", step: int) -> None:
        """Measure this step if a row in the log is due after it."""
        self.row_is_due = row_is_due(task.trainer, step + 1)

    def forget_step(self) -> None:
        """Forget the metrics and terms of the step, because its micro-batches are run again."""
        self.terms.running = None
        self._held.clear()
        if self.row_is_due and self.step_metrics is not None:
            self.step_metrics.reset()

    def add(self, sums: Sums) -> None:
        """Add the sums of a step that was made."""
        self.window = self.window.plus(sums.loss, sums.count)
        self.epoch = self.epoch.plus(sums.loss, sums.count)

    def update(self, training: bool, values: tuple[Tensor, ...]) -> None:
        """Update the metrics of the running evaluation, or in training those of the step if a row is due."""
        self.fed.add(training)
        metrics = self._due(training)
        if metrics is None or (values and all(isinstance(one, Tensor) and one.shape[:1] == (0,) for one in values)):
            return
        if place.current is not None and not place.current.counts:
            return stand_in(metrics, values)
        size = place.current.size if training and place.current is not None else 0
        by_example = size and all(isinstance(value, Tensor) and value.shape[:1] == (size,) for value in values)
        if by_example and (len(self._held) + 1) * sum(value.numel() for value in values) <= MOST_HELD:
            self._held.append(tuple(value.detach() for value in values))
            return
        self._update_step()
        self._update(metrics, values)

    def _update_step(self) -> None:
        """Give the values that are held to the metrics of the step."""
        for _, group in groupby(self._held, lambda held: [(value.dtype, value.shape[1:]) for value in held]):
            self._update(self.step_metrics, tuple(torch.cat(parts) for parts in zip(*group, strict=True)))
        self._held.clear()

    def _update(self, metrics: Any, values: tuple[Tensor, ...]) -> None:
        if self._mean and len(values) == 1 and isinstance(values[0], Tensor) and values[0].ndim == 0:
            raise MetricError(
                f"self.measure gives one number, and the metric '{self._mean}' would count each micro-batch alike: "
                "give one value per example [N]"
            )
        # Sums are in double precision, so that they do not depend on the micro-batches.
        given = [value.to(widest(value.device)) if _is_narrow(value) else value for value in values]
        try:
            metrics.update(*given)
        except (ValueError, RuntimeError, TypeError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(described(value) for value in values)
            raise MetricError(
                f"the metrics of make_metrics cannot take what self.measure gives ({shapes}): "
                f"{(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error

    def _due(self, training: bool) -> MetricCollection | None:
        return self.metrics if not training else self.step_metrics if self.row_is_due else None

    def are_due(self, training: bool) -> bool:
        """Return whether `update` needs values."""
        self.fed.add(training)
        return self._due(training) is not None

    def row(self, examples: int) -> dict[str, float]:
        """Return the mean loss since the last row and the metrics of the last batch. Begin a new row.

        Args:
            examples: of the last batch.
        """
        values = self.terms.row() if self.terms.names else {"train/loss": self.window.mean()}
        self.window = Sums()
        if self.step_metrics is not None:
            self._update_step()
            found = computed(self.step_metrics, examples).items()
            values |= {f"train/{name}": value.item() for name, value in found if value.numel() == 1}
            self.step_metrics.reset()
        return values

    def end_epoch(self) -> dict[str, float]:
        """Return the exact means of the epoch, by their names in the log, and begin another."""
        if not self.epoch.count and not self.terms.names:
            warnings.warn("no target of this epoch had a weight above 0: there was nothing to learn", stacklevel=2)
        means = self.terms.end_epoch() if self.terms.names else {"train/loss": self.epoch.mean()}
        self.epoch = Sums()
        self.epoch_loss = means["train/loss"]
        return {f"{name}_epoch": mean for name, mean in means.items()}

    # Evaluation

    def start_evaluation(self, task: "Task") -> None:
        """Begin an evaluation."""
        self.evaluation, self.terms.running = Sums(), None
        task._step.finite.start_evaluation()
        if self.metrics is not None:
            self.metrics.reset()  # before they are moved: a list of texts cannot be
        self.to(task.device)

    def end_evaluation(self, task: "Task", stage: str) -> dict[str, Tensor]:
        """Return the mean loss and the metrics over all devices, by their names in the log."""
        task._conclude_evaluation()
        if self.terms.names:
            means = self.terms.end_evaluation(task, stage)
        else:
            means = {f"{stage}/loss": reduce_sums(task, self.evaluation).mean()}
        task._step.finite.end_evaluation(task, stage, means[f"{stage}/loss"])
        values = {name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()}
        if self.metrics is not None and (split := task.data.split(stage)) is not None:
            with suppress(*() if False in self.fed else (ValueError,)):  # fed by nobody, which was warned of
                values |= {f"{stage}/{name}": value for name, value in computed(self.metrics, len(split)).items()}
        self.tables = {name: value for name, value in values.items() if value.numel() != 1}
        return {name: value for name, value in values.items() if value.numel() == 1}

    def state(self, ends_row: bool, ends_epoch: bool) -> dict[str, Any]:
        """Return the sums for a checkpoint, so that mean losses are exact after a resume.

        A row, or an epoch, that the newest step ends is left out: a callback may save before it is written.
        """
        window, epoch = Sums() if ends_row else self.window, Sums() if ends_epoch else self.epoch
        sums = {"epoch": [float(value) for value in epoch], "window": [float(value) for value in window]}
        return sums | ({"terms": self.terms.state(ends_row, ends_epoch)} if self.terms.names else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the sums from a checkpoint."""
        self.epoch, self.window = Sums(*state["epoch"]), Sums(*state["window"])
        if "terms" in state:
            self.terms.restore(state["terms"])


def computed(metrics: MetricCollection, examples: int) -> dict[str, Tensor]:
    """Return the values over all devices. A metric that needs two examples, such as R2, is left out where there is one.

    All devices must call it.
    """
    with lists_whole(metrics):
        values: dict[str, Any] = metrics.compute() if examples > 1 else {}
        if examples < 2:
            for name, metric in metrics.items():
                with suppress(ValueError):
                    values[name] = metric.compute()  # type: ignore[operator]
    return numbers(values)


def numbers(values: dict[str, Any]) -> dict[str, Tensor]:
    """Return the values that are tensors or numbers, as tensors. A curve is several of them."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in values.items()
        if isinstance(value, Tensor | Real)
    }


def stand_in(metrics: MetricCollection, values: tuple[Tensor, ...]) -> None:
    """Give states of the right shapes, which hold nothing, to metrics of a device that has no example of the batch.

    Devices exchange states, whose shapes some metrics know only after an update.
    """
    for metric in metrics.values(copy_state=False):
        if metric.update_called:  # type: ignore[union-attr]
            continue
        metric.update(*values)  # type: ignore[operator]
        for part in parts_of(metric):
            for name, state in part.metric_state.items():
                if isinstance(state, list):
                    pieces = [] if name in lists_of(part) else [torch.atleast_1d(one)[:0] for one in state]
                    setattr(part, name, pieces)
                else:
                    default: Any = part._defaults[name]
                    setattr(part, name, default.to(state).expand_as(state).clone())


def _is_narrow(value: Tensor) -> bool:
    """Return whether each example has a few numbers. An image, or logits of a vocabulary, would take long."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0 and value.shape[1:].numel() <= 64


def is_table(metric: Metric) -> bool:
    """Return whether a metric is a confusion matrix, and not a single number."""
    return type(metric).__name__.endswith("ConfusionMatrix")
