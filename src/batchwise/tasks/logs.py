"""What is logged by `self.log`: exact over all micro-batches and devices, as of the number of optimizer steps done."""

from typing import Any

import torch
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _METRICS, _Metadata, _ResultCollection
from torch import Tensor
from torchmetrics import Metric

from batchwise.batching.device import widest
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.models import place
from batchwise.tasks.exchange import gather_objects
from batchwise.tasks.hooks import before_step, row_is_due, values_are_due

Amount = list[Any]
"""A sum and its weight, or an extreme and 1: numbers, or tensors that are still on the device."""


class Entry:
    """What was logged under one name, in one hook.

    Args:
        meta: the arguments of `self.log`.
        local: each device keeps its own value.
    """

    def __init__(self, meta: _Metadata, local: bool = False) -> None:
        self.meta, self.local = meta, local
        self.metric: Metric | None = None
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.step: Amount | None = None
        """Of the running optimizer step, on this device."""
        self.epoch: Amount | None = None
        """Of the steps of the epoch before it, or of an evaluation."""
        self.reduced: dict[bool, Amount | None] = {}
        """Over all devices, as of when they were last added up: of the step (True) and of the epoch (False)."""
        if self.metric is not None:
            self.metric.reset()
            self.metric = None

    def arguments(self) -> list[Any]:
        """Return the arguments of `self.log`, of plain types."""
        meta = self.meta
        return [meta.fx, meta.name, meta.prog_bar, meta.logger, meta.on_step, meta.on_epoch, meta.reduce_fx.__name__]

    def combine(self, one: Amount | None, other: Amount | None) -> Amount | None:
        """Return what two amounts are together."""
        if one is None or other is None:
            return other if one is None else one
        if self.meta.is_mean_reduction or self.meta.is_sum_reduction:
            return [one[0] + other[0], one[1] + other[1]]
        return [(max if self.meta.is_max_reduction else min)(one[0], other[0]), 1.0]

    def amount(self, on_step: bool) -> Amount | None:
        """Return what this device has of the step, or of the epoch so far."""
        return self.step if on_step else self.combine(self.epoch, self.step)

    def is_sum(self) -> bool:
        """Return whether values of other devices can be added."""
        return not self.local and self.metric is None

    def sums(self) -> dict[bool, Amount | None]:
        """Return the amounts of the step (True) and of the epoch (False), as numbers."""
        amounts = {True: self.amount(True), False: self.amount(False) if self.meta.on_epoch else None}
        return {key: None if one is None else [float(value) for value in one] for key, one in amounts.items()}

    def value(self, on_step: bool, alone: bool) -> Tensor | None:
        """Return the value of the step or of the epoch, over all devices; None: there is none."""
        if self.metric is not None:
            return None if on_step else self.metric.compute()
        amount = self.amount(on_step) if alone or self.local else self.reduced.get(on_step)
        if amount is None or not amount[1]:
            return None
        total = amount[0] if isinstance(amount[0], Tensor) else torch.tensor(amount[0], dtype=torch.float64)
        return total / amount[1] if self.meta.is_mean_reduction else total


class Results(_ResultCollection):
    """Lightning's collection of what is logged in a loop, with exact values.

    A mean is over examples: the mean of a micro-batch counts as often as it has examples, and so does that of a
    device. What a device logs of examples that only keep it in step does not count. In a step that is run again, or
    skipped, only the pass that is used counts.
    """

    def __init__(self, trainer: Any, training: bool) -> None:
        super().__init__(training)
        self._trainer, self.examples = trainer, 0  # that this device has evaluated

    def log(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        fx: str,
        name: str,
        value: Tensor | Metric,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool = False,
        on_epoch: bool = True,
        reduce_fx: Any = "mean",
        batch_size: int | None = None,
        rank_zero_only: bool = False,
        **_: Any,
    ) -> None:
        """Add a value to those of its name. The arguments are those of `LightningModule.log`."""
        # An evaluation has no steps, so there the value is always that of the whole.
        on_step, on_epoch = on_step and (self.training or on_epoch), on_epoch or not self.training
        meta = _Metadata(fx, name, prog_bar, logger, on_step, on_epoch, reduce_fx)
        entry = self._entry(meta, rank_zero_only)
        if (entry.meta, entry.local) != (meta, rank_zero_only):
            raise ValueError(f"self.log('{name}', ...) is called twice in {fx}, with different arguments")
        if isinstance(value, Metric):
            if self.training and on_step:
                raise ValueError(
                    f"self.log('{name}', ...) is given a metric object, whose value in a step would be that of the "
                    "last micro-batch: write on_step=False, on_epoch=True, or log numbers"
                )
            in_training = self._trainer.fit_loop.epoch_loop._results
            if not self.training and any(other.metric is value for other in in_training.values()):
                raise ValueError(
                    f"self.log('{name}', ...) is given the same metric object in training and in an "
                    "evaluation, which would mix them: make one for each"
                )
            entry.metric = value
            return
        weight = self._weight(batch_size)
        if weight:
            value = value.detach().to(widest(value.device))
            entry.step = entry.combine(entry.step, [value * weight if meta.is_mean_reduction else value, weight])

    def _weight(self, batch_size: int | None) -> float:
        """Return the number of examples that a value is of: of the micro-batch or batch, or of the evaluation."""
        if place.current is not None:
            return place.current.counts * (place.current.size if batch_size is None else batch_size)
        if batch_size is not None:
            return batch_size
        if isinstance(self.batch, Batch):
            return sum(len(one) for one in self.batch.micro_batches if one.counts)
        return len(self.batch) if isinstance(self.batch, MicroBatch) else self.examples or 1

    # Steps

    def start_step(self) -> None:
        """Count the values of the step before to the epoch."""
        for entry in self.values():
            if entry.step is not None:
                entry.epoch, entry.step = entry.amount(False) if entry.meta.on_epoch else None, None
                entry.reduced.pop(True, None)

    def mark(self) -> dict[str, Amount | None]:
        """Return what the step has so far, for `rewind`."""
        return {key: entry.step for key, entry in self.items()}

    def rewind(self, mark: dict[str, Amount | None]) -> None:
        """Forget what the step has logged since `mark`: it is run again, or skipped."""
        for key, entry in self.items():
            entry.step = mark.get(key)

    def has_news(self) -> bool:
        """Return whether something was logged in this step, on this device."""
        return any(entry.step is not None for entry in self.values())

    # Devices

    def add_up(self) -> None:
        """Add up the values over all devices; all of them must call it."""
        if self._trainer.world_size == 1:
            return
        mine = [(entry.arguments(), entry.sums()) for entry in self.values() if entry.is_sum()]
        for entry in self.values():
            entry.reduced = {}
        for arguments, sums in (sent for device in gather_objects(mine) for sent in device):
            entry = self._entry(_Metadata(*arguments))
            for on_step, amount in sums.items():
                entry.reduced[on_step] = entry.combine(entry.reduced.get(on_step), amount)

    def _entry(self, meta: _Metadata, local: bool = False) -> Entry:
        key = f"{meta.fx}.{meta.name}"
        if key not in self:
            self[key] = Entry(meta, local)
        return self[key]

    def metrics(self, on_step: bool) -> _METRICS:
        """Return the values for callbacks, loggers and the progress bar, by their names there."""
        metrics = _METRICS(callback={}, log={}, pbar={})
        for entry in self.values():
            meta = entry.meta
            wanted = meta.on_step and self.training if on_step else meta.on_epoch
            value = entry.value(on_step, self._trainer.world_size == 1) if wanted else None
            if value is None:
                continue
            named = meta.forked_name(on_step)
            metrics["callback"] |= {meta.name: value, named: value}
            if meta.logger:
                metrics["log"][named] = value
            if meta.prog_bar:
                metrics["pbar"][named] = value.item()
        return metrics

    # What Lightning calls, and checkpoints

    def reset(self, metrics: bool | None = None, fx: str | None = None) -> None:
        """Forget all values, where Lightning asks for all; in the middle of an epoch it need not ask."""
        if metrics is None and fx is None:
            self.examples = 0
            for entry in self.values():
                entry.reset()

    def to(self, *args: Any, **kwargs: Any) -> "Results":
        """Leave the values where they are."""
        return self

    def state(self, together: bool) -> list[list[Any]]:
        """Return the sums of the running epoch over all devices, for a checkpoint.

        Args:
            together: all devices are here; else there are only the values of this one.
        """
        if together:
            self.add_up()
        found = []
        for entry in self.values():
            if entry.is_sum() and entry.meta.on_epoch:
                sums = entry.reduced if together and self._trainer.world_size > 1 else entry.sums()
                found.append([*entry.arguments(), sums.get(False)])
        return found

    def restore(self, state: list[list[Any]], first: bool) -> None:
        """Go on with the sums of a checkpoint in the first process; the others only learn what is logged.

        All devices must know it, because a loop in which somebody logs makes other calls.
        """
        for *arguments, epoch in state:
            self._entry(_Metadata(*arguments)).epoch = epoch if first else None


def as_lightning_takes_it(value: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of Lightning's `log`, which takes scalars, and would round numbers to float32."""
    if isinstance(value, Tensor) and value.dim():  # also of one example, or of none, where some are picked
        reduce, values = arguments.get("reduce_fx", "mean"), value.detach().to(widest(value.device))
        if not value.numel():
            return {"batch_size": 0} | arguments | {"value": values.sum()}
        reduced = (getattr(torch, reduce) if isinstance(reduce, str) else reduce)(values)
        return {"batch_size": value.numel()} | arguments | {"value": reduced}
    if isinstance(value, int | float):
        value = torch.tensor(float(value), dtype=torch.float64)
    return arguments | {"value": value}


class Connector(_LoggerConnector):
    """Lightning's way from what is logged to loggers and callbacks, at the number of optimizer steps done."""

    @property
    def should_update_logs(self) -> bool:
        """Whether a row is due after the step that has just been made."""
        trainer = self.trainer
        return row_is_due(trainer, trainer.global_step) or trainer.should_stop

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row; its step is the number of optimizer steps done, and not one less."""
        super().log_metrics(metrics, step if step is not None or "step" in metrics else self.trainer.global_step)

    def on_batch_start(self, batch: Any, dataloader_idx: int | None = None) -> None:
        """Begin a step."""
        if isinstance(results := self.trainer._results, Results):
            results.start_step()
            results.examples += len(batch) if isinstance(batch, MicroBatch) else 0
        super().on_batch_start(batch, dataloader_idx)
        if isinstance(batch, Batch):  # of training
            for hook in before_step(self.trainer):
                hook(self.trainer, self.trainer.lightning_module, batch)

    def on_batch_end(self) -> None:
        """Add up the values of the devices, where somebody may read them."""
        trainer: Any = self.trainer
        task = trainer.lightning_module
        if (
            isinstance(results := trainer._results, Results)
            and results.training
            and values_are_due(trainer, trainer.global_step)
            and task._step.is_heard  # else the step has added them up
        ):
            results.add_up()
        super().on_batch_end()

    def on_epoch_end(self) -> None:
        """Add up the values of the devices."""
        if isinstance(results := self.trainer._results, Results):
            results.add_up()
        super().on_epoch_end()
