"""The making of a batch plan: from configured sizes, the limits of a trainer, and the examples."""

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from batchwise.batching.loader import TrainLoader
from batchwise.batching.noise import NoiseMeter
from batchwise.batching.order import Order
from batchwise.batching.plan import BatchPlan
from batchwise.batching.schedule import Adaptive, BatchSizes
from batchwise.batching.tokens import SequencePlan


@dataclass(frozen=True)
class Limits:
    """How long a trainer trains at most. None: there is no such limit.

    Args:
        epochs: the most epochs.
        steps: the most optimizer steps.
        batches: the most batches of an epoch; a float is a share of them.
    """

    epochs: int | None = None
    steps: int | None = None
    batches: int | float | None = None

    @classmethod
    def of(cls, trainer: pl.Trainer | None) -> "Limits":
        """Return the limits of a trainer; without a trainer there are none."""
        if trainer is None:
            return cls()
        epochs, steps = (None if most == -1 else most for most in (trainer.max_epochs, trainer.max_steps))
        return cls(epochs, steps, trainer.limit_train_batches)

    def total_steps(self, plan: BatchPlan) -> float:
        """Return the most optimizer steps of a training (inf: no limit)."""
        by_epochs = math.inf if self.epochs is None else plan.first_step(self.epochs)
        return min(by_epochs, math.inf if self.steps is None else self.steps)


def make_plan(
    order: Order,
    schedule: BatchSizes,
    limits: Limits,
    *,
    seed: int,
    examples: int,
    labels: Tensor | None,
    lengths: Tensor | None,
    batch_tokens: int | None,
    micro_batch_tokens: int | None,
    drop_last: bool,
    **sizes: Any,
) -> BatchPlan:
    """Prepare the order, and return the plan of the epochs that it makes.

    Args:
        order: is prepared in place.
        schedule: decides how the batch size changes.
        limits: of the trainer.
        seed: of the order.
        examples: how many there are.
        labels: class of each, integers [examples]; None: not known.
        lengths: tokens of each, int64 [examples]; None: they are not sequences.
        batch_tokens: as in `DataModule`; and so the next two.
        micro_batch_tokens: most tokens on one device at once.
        drop_last: leave out the short batch.
        **sizes: those of `BatchPlan.derive`.

    Raises:
        ValueError: the sizes contradict one another, or do not suit the examples.
    """
    if batch_tokens or micro_batch_tokens:
        if lengths is None:
            raise ValueError(
                "data.batch_tokens and data.micro_batch_tokens are of sequences, but the training split has no "
                "lengths: write data.batch_size and data.micro_batch_size"
            )
        if batch_tokens and sizes["accumulate_grad_batches"] is not None:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {sizes['accumulate_grad_batches']}, but data.batch_tokens is cut "
                "by tokens: write data.micro_batch_tokens"
            )
        if batch_tokens:  # the number of examples that they are on average
            sizes["batch_size"] = max(1, round(batch_tokens * len(lengths) / max(1, int(lengths.sum()))))
    batch_size = BatchPlan.derive(examples=examples, **sizes).batch_size
    # An order may deal classes into batches. It deals parts that batches of all sizes are whole numbers of.
    order.prepare(examples, math.gcd(batch_size, *schedule.sizes), seed, labels, lengths)
    plan = BatchPlan.derive(examples=len(order), drop_last=drop_last, **sizes)
    if lengths is not None:
        plan = SequencePlan.of(plan, lengths, order, batch_tokens=batch_tokens, micro_batch_tokens=micro_batch_tokens)
    most = limits.batches
    most = max(1, int(plan.steps_per_epoch * most)) if isinstance(most, float) else most
    plan = replace(plan, limit=most)
    total = math.inf if limits.epochs is None else limits.epochs * plan.examples_per_epoch
    return replace(plan, changes=schedule.changes(total))


def noise_meter(trainer: pl.Trainer | None) -> NoiseMeter | None:
    """Return the callback that measures the gradient noise scale, if there is one."""
    callbacks = trainer.callbacks if trainer else []  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, NoiseMeter)), None)


def adapted(plan: BatchPlan, schedule: Adaptive, step: int, trainer: pl.Trainer | None) -> BatchPlan:
    """Return a plan with the batch size of the epoch that begins with a step. It is decided once for each epoch."""
    noise, seen = noise_meter(trainer), plan.examples_at(step)
    estimate = noise.estimate() if noise else None
    if estimate is None or not plan.begins_epoch(step) or (plan.changes and plan.changes[-1][0] == seen):
        return plan
    measured = estimate.low if estimate.lost else estimate.scale
    size = schedule.next(plan.size_at(step), plan.batch_size, min(schedule.most, plan.positions), measured)
    size = trainer.strategy.broadcast(size) if trainer else size  # so that no rounding parts the devices
    return plan if size == plan.size_at(step) else replace(plan, changes=(*plan.changes, (seen, size)))


class LimitedLoader(TrainLoader):
    """A loader whose length becomes that of the epoch when Lightning takes its share, `limit_train_batches`, of it."""

    share: int | float | None = None

    def __len__(self) -> int:
        steps, share = super().__len__(), self.share
        if not isinstance(share, float) or not 0 < share < 1:
            return steps
        return next(length for length in count(int(steps / share)) if int(length * share) >= steps)
