"""Which examples a network runs on. Layers that draw random numbers draw them by example."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from batchwise.batching.device import send


class Place(NamedTuple):
    """The place of a micro-batch.

    Args:
        key: a number made from (seed, optimizer step). In a step that is recorded, it is on the device.
        first: position of its first example in the global batch; likewise.
        counts: False if the examples only stand in, on a device without examples of its own.
        size: number of its examples.
    """

    key: int | Tensor
    first: int | Tensor
    counts: bool = True
    size: int = 0


current: Place | None = None
"""Set for each micro-batch in training; None outside it."""

_evaluated: Tensor | None = None


@contextmanager
def evaluating(index: Tensor) -> Iterator[None]:
    """Let layers draw for the examples of an evaluation by their numbers within the split, int64 [N]."""
    global _evaluated
    _evaluated = index
    try:
        yield
    finally:
        _evaluated = None


def numbers(count: int, device: torch.device) -> tuple[int | Tensor, Tensor] | None:
    """Return what random numbers are functions of: a key, and a number for each example. None: there is neither.

    Args:
        count: number of the examples.
        device: gets their numbers.
    """
    if current is not None:
        return current.key, current.first + torch.arange(count, device=device)
    if _evaluated is not None and len(_evaluated) == count:
        return 0, send(_evaluated, device)
    return None
