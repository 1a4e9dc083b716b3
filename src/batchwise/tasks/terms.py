"""Losses of several terms, each divided by its own count over the global batch.

For terms t with coefficients c_t, and targets i with losses l_ti and weights w_ti, over all micro-batches and devices,
the loss of a batch is

    sum_t c_t (sum_i w_ti l_ti / sum_i w_ti)

The backward pass of the first micro-batch needs the counts of the whole batch. They are there if the batch is one
micro-batch on one device, and if all terms have one loss per example, without weights. Otherwise the task gives them in
`counts`, or all micro-batches go forward once more.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from batchwise.batching.device import number_on, widest
from batchwise.batching.gradients import Number, weighted_sum
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.models import place
from batchwise.models.kept import kept_buffers, kept_metrics
from batchwise.tasks.losses import checked
from batchwise.tasks.passes import begin
from batchwise.tasks.sums import reduce

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

Parts = dict[str, tuple[Tensor, Tensor | None]]
"""Losses and weights (None: all one) by term. A loss that is one tensor has the name ""."""
TAKEN = ("loss", "loss_epoch")
"""Names of the weighted sum in the log."""


class Terms:
    """The terms of a task's loss: their names, their counts in the running batch, and their sums for the log.

    Sums are tensors [2, T] on the device: of losses and of weights, for each term.

    Args:
        coefficients: by term; 1 for the others.
        has_counts: whether the task writes `counts`.

    Raises:
        ValueError: a coefficient is not finite.
    """

    def __init__(self, coefficients: dict[str, float], has_counts: bool) -> None:
        for name, value in coefficients.items():
            if not math.isfinite(value):
                raise ValueError(f"model.coefficients.{name} is {value}: write a finite number")
        self._coefficients, self._has_counts = coefficients, has_counts
        self.names: list[str] | None = None
        """None: not known yet. Empty: the loss is one tensor."""
        self.counts: Tensor | None = None
        """Counts [T] of the running batch; None: those of the micro-batch, which is all of it."""
        self._size = 0
        self._kept: Tensor | None = None
        self._one_each = True
        """Whether all terms have had one loss per example, without weights."""
        self._relies_on_it = False
        """Whether the counts of the running batch follow from that."""
        self.running: Tensor | None = None
        """Sums of the running step on this device, or of the running evaluation."""
        self.window: Tensor | None = None
        """Sums since the last row in the log, over all devices."""
        self.epoch: Tensor | None = None
        """Sums since the epoch began, over all devices."""

    def refuse_names(self, metrics: set[str]) -> None:
        """Raise ValueError if one of the names of metrics, or of what they give, is that of a loss."""
        if "loss" in metrics:
            raise ValueError("make_metrics has a metric 'loss', which is the name of the mean loss: rename it")
        if both := metrics & set(self.names or ()):
            raise ValueError(f"{both.pop()} is the name of a term of the loss and of a metric: rename one of them")

    # What `losses` gives

    def parts(self, task: "Task", batch: MicroBatch, given: Any) -> Parts:
        """Return losses and weights by term.

        Raises:
            ValueError: a term has not one loss per target, or the names are not those of before.
        """
        name, count = f"{type(task).__name__}.losses", len(batch)
        names = list(given) if isinstance(given, dict) else []
        if self.names is None or set(names) != set(self.names):
            self._learn(task, name, names, isinstance(given, dict))
        if not names:
            return {"": checked(given, count, name)}
        parts = {term: checked(given[term], count, f"{name}['{term}']") for term in self.names or ()}
        bare = all(weights is None and losses.ndim == 1 for losses, weights in parts.values())
        bare &= batch.weights is None or not batch.counts
        if self._relies_on_it and _in_step(task) and not bare:
            raise ValueError(f"{name} has weights, or several targets per example, only in some batches: write counts")
        self._one_each &= bare or not task.training
        return parts

    def _learn(self, task: "Task", name: str, names: list[str], is_dict: bool) -> None:
        if self.names is not None:
            raise ValueError(
                f"{name} gives {_shown(names)} now, and gave {_shown(self.names)} before: return the same terms each "
                "time, with weights of zero where a term has no target"
            )
        if is_dict and (not names or any(not isinstance(one, str) or one in ("", *TAKEN) for one in names)):
            raise ValueError(
                f"{name} gives a dict of {names}: its keys are the names of the terms, and {TAKEN[0]} is their sum"
            )
        if both := [one for one in names if f"{one}_epoch" in names]:
            raise ValueError(
                f"{name} gives {_shown(names)}: rename {both[0]}_epoch, which is the mean of {both[0]} over an epoch"
            )
        if names and (task._couples or task._players() != [()]):
            which = "that couples the examples" if task._couples else "of several optimizers"
            raise ValueError(f"{name} gives {_shown(names)}, but the loss {which} is one tensor: add the terms up")
        if unknown := [one for one in self._coefficients if one not in names]:
            raise ValueError(
                f"model.coefficients has {unknown[0]}, but {name} gives {_shown(names)}: write these, or none"
            )
        self.names = names

    def summed(self, task: "Task", batch: MicroBatch, given: Any) -> tuple[Tensor, Number]:
        """Return the loss sum and the count of a micro-batch on the device, and add its sums to the running ones.

        In training, the loss over the global batch is the sum of these losses over the sum of these counts.
        """
        pairs = [weighted_sum(losses, batch.weights, each) for losses, each in self.parts(task, batch, given).values()]
        kind = widest(pairs[0][0].device)
        losses = torch.stack([loss.to(kind) for loss, _ in pairs])
        counts = torch.stack([n.to(kind) if isinstance(n, Tensor) else losses.new_full((), n) for _, n in pairs])
        counts = counts.detach()  # as they are where they come from another pass
        sums = torch.stack([losses.detach(), counts])
        self.running = sums if self.running is None else self.running + sums
        size = len(batch)
        if self.counts is not None and _in_step(task):
            counts, size = self.counts, self._size
        factors = self._factors(losses) * size / (counts + (counts == 0))
        return (losses * factors).sum(), len(batch) * batch.counts

    def _factors(self, like: Tensor) -> Tensor:
        """Return the coefficients [T] on the device. They are kept, because a copy to the device takes time."""
        if self._kept is None or self._kept.device != like.device:
            self._kept = like.new_tensor([self._coefficients.get(name, 1.0) for name in self.names or ()])
        return self._kept

    # The counts of a batch

    def look_ahead(self, task: "Task", batch: Batch, key: int) -> None:
        """Find the counts of a batch, before its first backward pass. All devices come here."""
        self.counts, self._relies_on_it, self._size = None, False, batch.size
        several = task.trainer.world_size > 1
        if not several and len(batch.micro_batches) == 1:
            return
        found = self._own_counts(task, batch, key)
        if self.names:
            self.counts = reduce(task, found) if several else found

    def _own_counts(self, task: "Task", batch: Batch, key: int) -> Tensor:
        """Return the counts [T] of this device's share."""
        parts = batch.micro_batches
        real = [part for part in parts if part.counts]
        if self.names and not self._has_counts and self._one_each and all(part.weights is None for part in real):
            self._relies_on_it = True
            count = sum(map(len, real))
            return torch.full((len(self.names),), count, dtype=widest(task.device), device=task.device)
        context: Any = task.trainer.precision_plugin.train_step_context  # type: ignore[attr-defined]
        with kept_buffers(task), kept_metrics(task):
            total = torch.zeros(0)
            for part in parts:
                begin(task, part, key)
                assert place.current is not None
                place.current = place.current._replace(counts=False)  # nothing is measured or logged
                copy = task.data.to_device(part._map(torch.clone), task.device, training=True)
                if self.names and self._has_counts:
                    own = self.given_counts(task, copy)
                else:
                    with context():
                        found = self.parts(task, copy, task.losses(copy))
                    if not self.names:
                        break
                    own = _counts(copy, found)
                    del found  # and its graph, which a loss may need for a gradient of its own
                total = own if part is parts[0] else total + own
        return total

    def given_counts(self, task: "Task", batch: MicroBatch) -> Tensor:
        """Return the counts [T] of a micro-batch on the device, by the task's `counts`.

        Raises:
            ValueError: it does not give each term, or not one number per example.
        """
        given, name = task.counts(batch), f"{type(task).__name__}.counts"
        if not isinstance(given, dict) or set(given) != set(self.names or ()):
            what = _shown(list(given)) if isinstance(given, dict) else f"a {type(given).__name__}"
            raise ValueError(f"{name} gives {what}, but losses gives {_shown(self.names or [])}")
        device, found = batch.weights.device if batch.weights is not None else task.device, []
        for term in self.names or ():
            each = number_on(device, given[term])
            each = each.expand(len(batch)) if each.ndim == 0 else each.flatten(1).sum(1) if each.ndim > 1 else each
            if len(each) != len(batch):
                raise ValueError(
                    f"{name}['{term}'] has the shape {list(each.shape)} for {len(batch)} examples: give the weights of "
                    "its losses, or the number of targets of each example, [N], or one number for all"
                )
            found.append((each if batch.weights is None else each * batch.weights.to(each)).sum())
        return torch.stack(found)

    def check(self, task: "Task", batch: MicroBatch, parts: Parts) -> None:
        """Raise ValueError if `counts` and `losses` do not agree on a few examples."""
        if not self.names or not self._has_counts:
            return
        for name, given, right in zip(
            self.names, self.given_counts(task, batch).tolist(), _counts(batch, parts).tolist(), strict=True
        ):
            if not math.isclose(given, right, rel_tol=1e-3, abs_tol=1e-6):
                raise ValueError(
                    f"{type(task).__name__}.counts gives {given:g} for the term {name} in a few examples, but the "
                    f"weights in losses sum to {right:g}"
                )

    # The log

    def start_training(self) -> None:
        """Forget the sums of an earlier training."""
        self.window = self.epoch = None

    def add(self, task: "Task", made: Tensor | bool) -> None:
        """Add the sums of the running step, if it is made. All devices come here."""
        sums = self.running
        assert sums is not None
        if task.trainer.world_size > 1:
            sums = reduce(task, sums)
        if isinstance(made, Tensor):
            sums = torch.where(made, sums, 0.0)
        self.window = sums if self.window is None else self.window.to(sums) + sums
        self.epoch = sums if self.epoch is None else self.epoch.to(sums) + sums

    def row(self) -> dict[str, float]:
        """Return the means since the last row, by their names in the log. Begin a new row."""
        sums, self.window = self.window, None
        return self._means("train", self._by_name(sums))

    def end_epoch(self) -> dict[str, float]:
        """Return the means of the epoch, by their names in a row. Begin another epoch."""
        sums, self.epoch = self.epoch, None
        return self._means("train", self._by_name(sums))

    def end_evaluation(self, task: "Task", stage: str) -> dict[str, float]:
        """Return the means of an evaluation over all devices, by their names. All devices come here."""
        sums = self.running
        if sums is not None and task.trainer.world_size > 1:
            sums = reduce(task, sums)
        return self._means(stage, self._by_name(sums))

    def _by_name(self, sums: Tensor | None) -> dict[str, list[float]]:
        """Return sum and count of each term. This waits for the device."""
        names = self.names or []
        values = [[0.0] * len(names)] * 2 if sums is None else sums.tolist()
        return {name: [loss, count] for name, loss, count in zip(names, *values, strict=True)}

    def _means(self, stage: str, sums: dict[str, list[float]]) -> dict[str, float]:
        """Return the weighted sum of the means, and each mean; nan where there is no target."""
        means = {name: loss / count for name, (loss, count) in sums.items() if count}
        total = sum(self._coefficients.get(name, 1.0) * mean for name, mean in means.items()) if means else math.nan
        return {f"{stage}/loss": total} | {f"{stage}/{name}": means.get(name, math.nan) for name in sums}

    def state(self, ends_row: bool, ends_epoch: bool) -> dict[str, Any]:
        """Return the sums for a checkpoint, with those of a new row or epoch if one ends."""
        epoch, window = None if ends_epoch else self.epoch, None if ends_row else self.window
        return {"epoch": self._by_name(epoch), "window": self._by_name(window)}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the sums from a checkpoint. A term that it does not have begins with zero."""
        if self.names is None:
            self.names = list(state["epoch"])
        names = self.names

        def restored(sums: dict[str, list[float]]) -> Tensor | None:
            found = [sums.get(name, [0.0, 0.0]) for name in names]
            return torch.tensor(found, dtype=torch.float64).T if names else None

        self.epoch, self.window = restored(state["epoch"]), restored(state["window"])


def _in_step(task: "Task") -> bool:
    return task.training and place.current is not None


@torch.no_grad()
def _counts(batch: MicroBatch, parts: Parts) -> Tensor:
    """Return the counts [T] of a micro-batch."""
    device = next(iter(parts.values()))[0].device
    found = [weighted_sum(losses, batch.weights, weights)[1] for losses, weights in parts.values()]
    return torch.stack([number_on(device, count) for count in found])


def _shown(names: list[str]) -> str:
    return f"the terms {', '.join(names)}" if names else "one tensor"
