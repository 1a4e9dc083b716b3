"""What `losses` of a task may return."""

from typing import Any

from torch import Tensor

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
        ValueError: it is not one loss per target.
    """
    losses, weights = given if isinstance(given, tuple) else (given, None)
    if not isinstance(losses, Tensor) or losses.ndim == 0 or losses.shape[0] != examples:
        what = described(losses if isinstance(losses, Tensor) else given)
        raise ValueError(
            f"{name} gave {what} for {examples} examples: return one loss per target (reduction='none'), with the "
            "examples in the first dimension"
        )
    return losses, weights


def described(value: Any) -> str:
    """Return the shape of a tensor in words, or the type of something else."""
    return f"the shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
