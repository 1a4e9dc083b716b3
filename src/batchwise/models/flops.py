"""Floating-point operations of a network's forward pass."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def count_flops(forward: Callable[[], T]) -> tuple[T, int | None]:
    """Return the result of `forward`, and the operations of its matrix products, convolutions and attention.

    PyTorch counts them. What it does not know (LSTM on a CPU, a kernel of one's own) adds nothing, so the number is a
    lower bound. It is None where nothing was counted, or where the network cannot run under PyTorch's counter.
    """
    counter = FlopCounterMode(display=False)
    try:
        # PyTorch does not count attention that it fuses, as it does on a CPU, and whole layers where no gradient is
        # wanted. A compiled network that the counter has seen would never be compiled again.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad(), torch.compiler.set_stance("force_eager"), counter:
            return forward(), counter.get_total_flops() or None
    except Exception:  # of the counter, or of the network, which then raises it again
        return forward(), None
