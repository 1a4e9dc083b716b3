"""What `losses` and `predictions` of a task may return."""

from typing import Any

from torch import Tensor

from batchwise.batching.structure import leaves
from batchwise.errors import Mistake

Term = Tensor | tuple[Tensor, Tensor]
"""One loss per target, or the losses and their weights."""
Losses = Term | dict[str, Term]
"""One term, or several by name."""


def checked(given: Any, examples: int, name: str) -> tuple[Tensor, Tensor | None]:
    """Return losses and weights (None: all one).

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
    return losses, weights


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
