"""The losses of a few examples are computed whole, in parts and twice, before anything is trained."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from batchwise.batching.loader import MicroBatch
from batchwise.data.augmentation import Augmentation
from batchwise.data.module import DataModule
from batchwise.errors import Mistake
from batchwise.models import place
from batchwise.models.compiled import parts_watched
from batchwise.models.dropout import EXACT
from batchwise.models.kept import dtype_of, home_of, kept_buffers, kept_modes
from batchwise.models.norm import batchnorms
from batchwise.tasks.exchange import parts_of
from batchwise.tasks.gradient_trial import check_gradients
from batchwise.tasks.losses import about_kinds, about_labels, about_pairs
from batchwise.tasks.measures import MetricError
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.passes import seed_generator
from batchwise.tasks.terms import Parts

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

EXAMPLES, MOST = 6, 16
KEY = 1
"""Stands for (seed, step) in the numbers that keyed layers draw."""


class Tried(NamedTuple):
    """What a few examples gave."""

    losses: dict[str, Tensor]
    """The sum of weighted losses of each example [N], by term."""
    moved: dict[str, Tensor]
    """How far the buffers have moved, by which a spectral norm is seen that hardly moves."""
    pairs: set[str]
    """The terms with losses [N, N] in micro-batches of N examples."""


def rehearse(task: "Task", data: DataModule) -> None:
    """Compute the losses of a few training examples in training mode; change nothing.

    It waits for another call if a hook that has not run yet must come first. If memory is short, it finds nothing:
    training can handle that.

    Raises:
        ValueError: `losses` fails, or gives something else than one loss per target; or an example's loss depends on
            the others in its micro-batch, and the plan cuts the batch; or a parameter has no gradient, which processes
            that train together would wait for.
    """
    try:
        name, compiles = f"{type(task).__name__}.losses", getattr(data.trainer, "compile", False)
        with as_it_was(task, data), parts_watched(task.network, name) if compiles else nullcontext():
            _rehearse(task, data)
    except (AttributeError, TypeError, KeyError):
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    task._measures.rehearsed = True


def _rehearse(task: "Task", data: DataModule) -> None:
    plan = data.plan
    assert plan is not None
    # From both ends, because examples may be sorted by length.
    train = data.split("train")
    assert train is not None
    count = min(max(EXAMPLES, 2 * plan.unit), len(train))
    half = min(max(1, count // 2 // plan.unit) * plan.unit, count)
    front, back = torch.arange(half), torch.arange(len(train) - count + half, len(train))
    one, another = _of_each_class(data, MOST - count if plan.unit == 1 else 0)
    index, half = torch.cat([front, one, another, back]), half + len(one)
    batch, is_cut = data.examples("train", index), plan.accumulation * plan.devices > 1
    for player in task._players():
        whole = _try(task, data, [batch], player, 0)
        again = _try(task, data, [batch], player, 1)
        if not _all_close(whole, again):
            seeded = _try(task, data, [batch], player, 0)
            (_warn_of_randomness if _all_close(whole, seeded) else _warn_of_state)(task)
        elif not task._couples and (is_cut or whole.pairs) and half < len(index):
            # In small parts, because of two large ones each may well have its share of what a loss picks from the
            # batch, such as the hardest half of it.
            parts = _try(task, data, _halves(data, batch, index, half), player, 0, max(2, plan.unit))
            if pairs := whole.pairs & parts.pairs:
                line = about_pairs(f"{type(task).__name__}.{_name(pairs.pop())}")
                if is_cut:
                    raise ValueError(line)
                warnings.warn(line, stacklevel=2)
            elif is_cut:
                _compare(task, whole, parts)
        ends = _on_device(task, data, data.examples("train", torch.cat([front, back])))
        check_gradients(task, data.trainer, _call(task, ends, player), player)


def _compare(task: "Task", whole: Tried, parts: Tried) -> None:
    """Raise ValueError if losses, or warn if buffers, depend on how the examples were cut."""
    apart = [term for term, losses in whole.losses.items() if not _close(losses, parts.losses[term])]
    others = [name for name, move in whole.moved.items() if not _close(move, parts.moved[name])]
    if others:
        line = (
            f"the buffer {others[0]} is updated in each forward pass, so it depends on how the batch is executed "
            "(micro-batches, devices): update it in a hook such as on_train_batch_end, or run each batch whole on one "
            "device (data.micro_batch_size null)"
        )
        if apart:
            raise ValueError(line.replace("so it depends", "so it, and with it the losses, depends"))
        warnings.warn(line, stacklevel=2)
    elif apart:
        raise ValueError(
            f"{type(task).__name__}.{_name(apart[0])} gives an example another loss when other examples are in its "
            "micro-batch, so the result depends on how the batch is executed: mask the padding, return weights in "
            "place of dividing by their sum, write a task of batchwise.tasks.contrastive, or run each batch whole on "
            "one device (data.micro_batch_size null)"
        )


def _name(term: str) -> str:
    return f"losses['{term}']" if term else "losses"


def _of_each_class(data: DataModule, most: int) -> tuple[Tensor, Tensor]:
    """Return an example of each of the rarest classes, and another one of each, int64 [n] each, at most so many in all.

    A loss that is divided by the number of some class, such as the positives, shows it where both halves have some.
    """
    labels = data.labels()
    if labels is None:
        return torch.arange(0), torch.arange(0)
    classes, counts = labels.unique(return_counts=True)
    rarest = classes[counts.argsort(stable=True)[: max(0, most // 2)]]
    places = [(labels == one).nonzero().squeeze(1)[[0, -1]] for one in rarest]
    first, second = torch.stack(places, 1) if places else torch.zeros(2, 0, dtype=torch.int64)
    return first, second


def _halves(data: DataModule, batch: MicroBatch, index: Tensor, half: int) -> list[MicroBatch]:
    """Return what is cut: each half, read by itself, because padding depends on what is read together.

    A module that augments may draw for all examples together. Then it is the whole, which is augmented and then cut.
    """
    if not all(isinstance(step, Augmentation) for step in data.augment):
        return [batch]
    halves = [data.examples("train", part, at) for part, at in ((index[:half], 0), (index[half:], half))]
    return [part for part in halves if len(part)]


@contextmanager
def as_it_was(task: "Task", data: DataModule) -> Iterator[None]:
    """Restore modes, buffers, metrics and the generator afterwards. Batch norm looks at no other example."""
    trainer, task._trainer, task._own_data = task._trainer, data.trainer, data
    # It is to be seen whether `losses` feeds metrics, but none are fed.
    task._measures.row_is_due, metrics = True, task._measures.step_metrics
    task._measures.step_metrics = None
    devices = [home_of(task)] if home_of(task).type == "cuda" else []
    try:
        with kept_modes(task), kept_buffers(task), torch.random.fork_rng(devices=devices):
            for _, norm in batchnorms(task):
                norm.eval()
            yield
    finally:
        task._trainer, task._own_data, place.current = trainer, None, None
        task._measures.row_is_due, task._measures.step_metrics = False, metrics
        for metric in parts_of(task):
            metric.reset()


def _try(
    task: "Task", data: DataModule, batches: list[MicroBatch], player: tuple[str, ...], seed: int, most: int = 2**31
) -> Tried:
    """Compute the losses over micro-batches of `most` examples, or one more. Buffers are then as before."""
    found: dict[str, list[Tensor]] = {}
    squares: list[set[str]] = []
    with kept_buffers(task) as before:
        for part in (
            part for batch in batches for part in _on_device(task, data, batch, seed).split(most, max(3, most))
        ):
            seed_generator(home_of(task), seed + part.position)
            # As in training, where a loss may take a gradient of its own. Embeddings have none in their first pass.
            with torch.set_grad_enabled(not task._couples):
                parts = _call(task, part, player)
            task._measures.terms.check(task, part, parts)
            squares.append({term for term, (losses, _) in parts.items() if losses.shape[:2] == (len(part), len(part))})
            for term, (losses, weights) in parts.items():
                weighted = losses if weights is None else torch.where(weights == 0, 0.0, losses * weights)
                found.setdefault(term, []).append(weighted.detach().cpu().double().reshape(len(part), -1).sum(1))
        moved = {
            name: buffer.cpu().double().nan_to_num() - before[name].cpu().double().nan_to_num()
            for name, buffer in task.named_buffers()
            if not buffer.is_complex() and name in before and buffer.shape == before[name].shape
        }
    return Tried({term: torch.cat(losses) for term, losses in found.items()}, moved, set.intersection(*squares))


def _on_device(task: "Task", data: DataModule, batch: MicroBatch, seed: int = 0) -> MicroBatch:
    copy = replace(batch._map(torch.clone), key=KEY)  # because a transform may work in place
    seed_generator(home_of(task), seed + batch.position)  # as in training, from which a transform may draw
    place.current = place.Place(KEY, batch.position, False, len(batch))
    return on_device(task, data, copy, training=True)


def on_device(task: "Task", data: DataModule, batch: MicroBatch, training: bool) -> MicroBatch:
    """Return a micro-batch on the device of a task. Without a trainer, its floats are of the type of the network's."""
    moved = data.to_device(batch, home_of(task), training)
    return moved.cast(dtype_of(task.network)) if data.trainer is None else moved


def _call(task: "Task", part: MicroBatch, player: tuple[str, ...]) -> Parts:
    place.current = place.Place(KEY, part.position, False, len(part))
    try:
        given = task.losses(part, *player)
    except (MetricError, Mistake):
        raise
    except (RuntimeError, IndexError, ValueError, TypeError, AttributeError) as error:
        kinds = about_kinds(lambda other: task.losses(other, *player), error, part)
        tuple_meant = "MicroBatch' object is not subscriptable" in str(error) or "iterable MicroBatch" in str(error)
        if is_out_of_memory(error) or (isinstance(error, TypeError | AttributeError) and not (tuple_meant or kinds)):
            raise
        remedy = ": write batch.inputs and batch.targets" * tuple_meant
        frames = [one for one in traceback.extract_tb(error.__traceback__) if "site-packages" not in one.filename]
        raise ValueError(
            f"{type(task).__name__}.losses fails on a few examples: {kinds}"
            f"{about_labels(error, part) or (str(error) or type(error).__name__).splitlines()[0]}{remedy} "
            f"({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
        ) from error
    return task._measures.terms.parts(task, part, given)


def _close(one: Tensor, other: Tensor, same: bool = False) -> bool:
    """Return whether losses are equal but for rounding.

    Args:
        one: losses [N].
        other: losses of the same examples.
        same: they are from the same micro-batch, so that they are rounded alike. Attention dropout in a new transformer
            moves a loss by 1e-4.
    """
    if one.shape != other.shape:
        return False
    half = any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps")))
    rounding = (1e-3 if same else 0.05) if half or torch.get_default_dtype().itemsize < 4 else 1e-6 if same else 1e-4
    usual = float(one.abs().nan_to_num().mean())
    return torch.allclose(one, other, rtol=rounding, atol=rounding * usual + 1e-12, equal_nan=True)


def _all_close(one: Tried, other: Tried) -> bool:
    return all(_close(losses, other.losses[term], same=True) for term, losses in one.losses.items())


def _warn_of_state(task: "Task") -> None:
    warnings.warn(
        f"{type(task).__name__}.losses, or the network, keeps something between micro-batches, such as the state of a "
        "recurrent network or a generator of its own, so the result depends on how the batch is executed "
        "(micro-batches, devices): keep nothing, and draw by batch.rand, also in transform",
        stacklevel=2,
    )


def _warn_of_randomness(task: "Task") -> None:
    layers = [name for name, module in task.named_modules() if type(module) in EXACT]
    source = f"layers such as {', '.join(layers[:3])} draw" if layers else "losses, or the network, draws"
    ours = "batch.randn, also in transform; in the network batchwise.models.noise or batchwise.models.dropout.Dropout"
    remedy = "model.exact_dropout true" if layers else ours
    warnings.warn(
        f"{source} random numbers that depend on how the batch is executed (micro-batches, devices): write {remedy}",
        stacklevel=2,
    )
