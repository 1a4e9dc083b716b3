"""What `losses` and `predictions` of a task may return."""

from collections.abc import Callable
from dataclasses import replace
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from torch import Tensor

from batchwise.batching.collate import numbers
from batchwise.batching.device import send
from batchwise.batching.fetch import DataError
from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import leaves
from batchwise.errors import Mistake

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

Term = Tensor | tuple[Tensor, Tensor]
"""One loss per target, or the losses and their weights."""
Losses = Term | dict[str, Term]
"""One term, or several by name."""


def checked(given: Any, examples: int, name: str) -> tuple[Tensor, Tensor | None]:
    """Return losses and weights (None: all one), on the device of the losses.

    Args:
        given: what `losses` has returned.
        examples: of the micro-batch.
        name: of what has returned it.

    Raises:
        ValueError: it is not one loss per target, with one weight for each or none.
    """
    if isinstance(given, tuple) and len(given) != 2:
        raise Mistake(f"{name} gave {len(given)} values: return the losses, or the losses and their weights")
    losses, weights = given if isinstance(given, tuple) else (given, None)
    if not isinstance(losses, Tensor) or losses.ndim == 0 or losses.shape[0] != examples:
        what = described(losses if isinstance(losses, Tensor) else given)
        raise ValueError(
            f"{name} gave {what} for {examples} examples: return one loss per target (reduction='none'), with the "
            "examples in the first dimension"
        )
    if not isinstance(weights, Tensor | None):
        raise Mistake(f"{name} gave {described(weights)} as weights: return a tensor with one weight per loss, or None")
    return losses, None if weights is None else send(weights, losses.device)


def losses_of(task: "Task", batch: MicroBatch, player: tuple[str, ...]) -> Losses:
    """Return what `losses` of a task gives for a micro-batch.

    Raises:
        DataError: a label is no whole number, and the losses need classes.
    """
    try:
        given = task.losses(batch, *player)
    except RuntimeError as error:
        if wrong := about_labels(error, batch):
            raise wrong from error
        raise
    if not task.training:
        task._step.finite.look(batch, given)
    return given


def about_labels(error: Exception, batch: MicroBatch) -> DataError | None:
    """Return what an error in `losses` is about, if labels are floats, such as one of 1.5 among whole numbers."""
    labels = batch.targets
    if "Long" not in str(error) or not isinstance(labels, Tensor) or labels.ndim != 1 or not labels.is_floating_point():
        return None
    wrong = (labels % 1 != 0).nonzero()
    if not len(wrong):
        return DataError(f"a label of {numbers(batch.index.tolist())} is a float: write whole numbers")
    example = int(batch.index[wrong[0]])
    return DataError(f"label {float(labels[wrong[0]]):g} at example {example} is no class: write whole numbers")


class Stranger:
    """Stands in for a part of a batch, to see whether an error is about that, or about another thing of its type."""


def about_kinds(call: Callable[[MicroBatch], Any], error: Exception, batch: MicroBatch) -> str:
    """Return which part of a batch is no tensor, if a call of the user's code complains of that; otherwise nothing.

    Args:
        call: has raised the error. It is called again, without that part.
        error: of a wrong type, or another one.
        batch: what it was called with.
    """
    for name, value in (("targets", batch.targets), ("inputs", batch.inputs)):
        kind = type(value).__name__
        if not isinstance(error, TypeError | AttributeError) or isinstance(value, Tensor) or kind not in str(error):
            continue
        try:
            call(replace(batch, **{name: Stranger()}))
        except Exception as other:
            places = [extract_tb(one.__traceback__)[-1] for one in (error, other)]
            if places[0] == places[1] and Stranger.__name__ in str(other):
                return f"batch.{name} is {'None, since load gave none' if value is None else f'a {kind}'}: "
    return ""


def about_pairs(name: str) -> str:
    """Return what is to be said where `name` gives a loss for each pair of examples."""
    return (
        f"{name} gives losses [N, N] for N examples, one for each pair: where outputs [N] meet targets [N, 1], write "
        "squeeze(1) of the latter; if you mean pairs, write a task of batchwise.tasks.contrastive"
    )


def checked_columns(given: Any, examples: int, name: str) -> dict[str, Any]:
    """Return the columns of predictions.

    Args:
        given: what `predictions` has returned.
        examples: of the micro-batch.
        name: of what has returned it.

    Raises:
        Mistake: a column has no value for each example.
    """
    if not isinstance(given, dict):
        raise Mistake(
            f"{name} gave {described(given)}: return a dict of tensors [N, ...] by the names of their columns"
        )
    for place, leaf in leaves(given, name):
        has_rows = isinstance(leaf, list) or (isinstance(leaf, Tensor) and leaf.ndim > 0)
        if not has_rows or len(leaf) != examples:
            raise Mistake(
                f"{place} gave {described(leaf)} for {examples} examples: return a tensor with one row for each"
            )
    return given


def described(value: Any) -> str:
    """Return the shape of a tensor in words, or the type of something else."""
    return f"the shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
