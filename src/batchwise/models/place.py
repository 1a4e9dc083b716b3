"""The place of the running micro-batch in the global batch, for layers that must know it."""

from typing import NamedTuple


class Place(NamedTuple):
    """The place of a micro-batch.

    Args:
        key: a number made from (seed, optimizer step).
        first: position of its first example in the global batch.
        counts: False if the examples only stand in, on a device without examples of its own.
        size: number of its examples.
    """

    key: int
    first: int
    counts: bool = True
    size: int = 0


current: Place | None = None
"""Set for each micro-batch in training; None outside it."""
