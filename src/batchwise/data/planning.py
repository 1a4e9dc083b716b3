"""Batch plans, from configured sizes, the limits of a trainer, and the examples."""

import math
from dataclasses import replace
from itertools import count
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import EvalLoader, TrainLoader
from batchwise.batching.noise import NoiseMeter
from batchwise.batching.order import Order, Sources
from batchwise.batching.plan import BatchPlan
from batchwise.batching.schedule import Adaptive, BatchSizes
from batchwise.batching.tokens import SequencePlan


def check_trainer(trainer: Any) -> None:
    """Refuse a trainer that takes no batches, or cuts layers.

    Raises:
        TypeError: it is Lightning's own, whose loops measure nothing of a task, and whose modules know no `Batch`.
        ValueError: its strategy cuts layers.
    """
    if trainer is not None and not hasattr(trainer, "accumulation"):
        raise TypeError(
            "a DataModule feeds a Task, and a Task trains with batchwise.Trainer, not with "
            f"{type(trainer).__module__}.Trainer"
        )
    layers = getattr(getattr(trainer, "strategy", None), "_tensor_parallel_size", 1)
    if layers != 1:
        raise ValueError(f"trainer.strategy.tensor_parallel_size is {layers}: write 1, because layers are not cut")


def make_plan(
    order: Order,
    schedule: BatchSizes,
    trainer: pl.Trainer | None,
    *,
    seed: int,
    examples: int,
    labels: Tensor | None,
    lengths: Tensor | None,
    sources: Sources | None,
    shards: Tensor | None,
    batch_tokens: int | None,
    micro_batch_tokens: int | None,
    drop_last: bool,
    **sizes: Any,
) -> BatchPlan:
    """Prepare the order, and return the plan of the epochs that it makes.

    Args:
        order: is prepared in place.
        schedule: decides how the batch size changes.
        trainer: has the limits; None: there are none.
        seed: of the order.
        examples: how many there are.
        labels: class of each, integers [examples]; None: not known.
        lengths: tokens of each, int64 [examples]; None: they are not sequences.
        sources: examples of each source; None: there is one.
        shards: examples of each file, int64 [shards]; None: they are not in shards.
        batch_tokens: as in `DataModule`.
        micro_batch_tokens: most tokens on one device at once.
        drop_last: leave out the short batch.
        **sizes: those of `BatchPlan.derive`.

    Raises:
        ValueError: the sizes contradict one another, or do not suit the examples; or the schedule follows what nobody
            measures.
    """
    if isinstance(schedule, Adaptive) and noise_meter(trainer) is None:
        raise ValueError(
            "data.batch_size_schedule Adaptive follows the gradient noise scale, but nobody measures it: write "
            "batchwise.callbacks.noise_scale.NoiseScale under trainer.callbacks"
        )
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
        if batch_tokens and order.copies > 1:
            raise ValueError(
                f"data.order keeps {order.copies} copies of an example in one batch, but data.batch_tokens is cut by "
                "tokens: write data.batch_size"
            )
        if batch_tokens:  # the number of examples that they are on average
            sizes["batch_size"] = max(1, round(batch_tokens * len(lengths) / max(1, int(lengths.sum()))))
    batch_size = BatchPlan.derive(examples=examples, **sizes).batch_size
    # An order may deal classes into batches. It deals them into parts, and each batch is a whole number of parts.
    order.prepare(examples, math.gcd(batch_size, *schedule.sizes), seed, labels, lengths, sources, shards)
    plan = BatchPlan.derive(examples=len(order), drop_last=drop_last, **sizes)
    if lengths is not None:
        plan = SequencePlan.of(plan, lengths, order, batch_tokens=batch_tokens, micro_batch_tokens=micro_batch_tokens)
    limit, max_epochs = (trainer.limit_train_batches, trainer.max_epochs) if trainer else (None, None)
    if limit == 0:
        raise ValueError("trainer.limit_train_batches is 0: write at least 1, or a share above 0")
    if isinstance(limit, float):  # 1.0 is Lightning's default, and no limit: later batches may be of another size
        steps = plan.steps_per_epoch
        limit = None if limit == 1 else _share(steps, limit, "trainer.limit_train_batches", "step of an epoch")
    plan = replace(plan, limit=limit)
    total = math.inf if max_epochs in (None, -1) else max_epochs * plan.examples_per_epoch
    return replace(plan, changes=schedule.changes(total))


def _share(whole: int, share: float, key: str, what: str) -> int:
    """Return a share of a whole number, and at least 1."""
    if share and int(whole * share) == 0:
        rank_zero_warn(
            f"{key} is {share:g}, which is less than one {what} of {whole:,}: it is taken as 1", stacklevel=2
        )
    return max(1, int(whole * share))


def noise_meter(trainer: pl.Trainer | None) -> NoiseMeter | None:
    """Return the callback that measures the gradient noise scale, if there is one."""
    callbacks = trainer.callbacks if trainer else []  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, NoiseMeter)), None)


def adapted(plan: BatchPlan, schedule: Adaptive, step: int, trainer: pl.Trainer | None) -> BatchPlan:
    """Return a plan with the batch size of the epoch that begins with a step. It is chosen once for each epoch."""
    noise, seen = noise_meter(trainer), plan.examples_at(step)
    estimate = noise.estimate() if noise else None
    if estimate is None or not plan.begins_epoch(step) or (plan.changes and plan.changes[-1][0] == seen):
        return plan
    measured = estimate.low if estimate.lost else estimate.scale
    size = schedule.next(plan.size_at(step), plan.batch_size, min(schedule.most, plan.positions), measured)
    size = trainer.strategy.broadcast(size) if trainer else size  # so that no rounding parts the devices
    return plan if size == plan.size_at(step) else replace(plan, changes=(*plan.changes, (seen, size)))


EVAL_BATCH = 256
"""Examples of a batch of an evaluation, where nothing else is said."""


class Limited:
    """A loader for a limit that is a share, which Lightning multiplies by the length of the loader.

    The length is chosen so that the product is the number of items that the loader has.
    """

    limit: int | float | None = None

    def __len__(self) -> int:
        items, share = super().__len__(), self.limit  # type: ignore[misc]
        if not isinstance(share, float) or not 0 < share < 1:
            return items
        return next(length for length in count(int(items / share)) if int(length * share) >= items)


class LimitedLoader(Limited, TrainLoader):
    """The loader of training."""


class LimitedEvalLoader(Limited, EvalLoader):
    """The loader of an evaluation."""


def eval_loader(
    name: str, fetch: Fetch, most: int, batch_size: int | None, replicas: tuple[int, int], limit: int | float | None
) -> EvalLoader:
    """Return the loader of this device's share of an evaluation.

    Args:
        name: of the split.
        fetch: its examples.
        most: examples on one device at once.
        batch_size: the same where the user has set it. Else a batch of `limit` is one of `EVAL_BATCH`, because which
            examples are evaluated must not depend on devices and micro-batches. If tokens are limited, `most` may be
            smaller. Then it is the batch, because Lightning takes no more items than `limit`.
        replicas: number of devices, and of this one.
        limit: the trainer's limit: so many batches, or a share of the split; None: all.
    """
    examples, (devices, rank) = len(fetch), replicas
    if isinstance(limit, float):
        examples = _share(examples, limit, f"trainer.limit_{name}_batches", "example")
    elif limit:
        examples = min(examples, limit * (batch_size or min(most, EVAL_BATCH)))
    loader = LimitedEvalLoader(fetch, most, rank, devices, examples)
    loader.limit = limit
    return loader
