"""What a layer may know of the micro-batch that runs: for layers whose work depends on the whole batch."""

from typing import NamedTuple


class Place(NamedTuple):
    """Where a micro-batch stands.

    Args:
        key: a number for (seed, optimizer step).
        first: position of its first example in the global batch.
        counts: False where the examples only stand in for a device that has nothing to do.
    """

    key: int
    first: int
    counts: bool = True


current: Place | None = None
"""Set for each micro-batch in training; None outside it."""
