"""Noise inside a network that does not depend on how the batch is executed."""

from collections.abc import Callable

import torch
from torch import Tensor

from batchwise.batching.device import exact, send
from batchwise.batching.random import keyed
from batchwise.models import place


def rand_like(values: Tensor, name: str) -> Tensor:
    """Return uniform numbers in [0, 1), shaped like `values`, [N, ...], with one row per example.

    In training, the numbers of an example are a function of (seed, step, position of the example in the global batch,
    `name`), and in evaluation of the example and `name`, as those of `MicroBatch.rand`. So they are the same on any
    device, in any micro-batch and after any resume. Outside a `Task` they are those of `torch.rand_like`.

    Args:
        values: floats with the examples of the micro-batch in the first dimension. Type and device are taken from it.
        name: what the numbers are for. Two places in the network need two names, or they draw the same numbers.
    """
    return (_noise if torch.compiler.is_compiling() else _numbers)(values.detach(), name, False)


def randn_like(values: Tensor, name: str) -> Tensor:
    """Return numbers of the standard normal distribution, drawn as those of `rand_like`."""
    return (_noise if torch.compiler.is_compiling() else _numbers)(values.detach(), name, True)


def _numbers(values: Tensor, name: str, normal: bool) -> Tensor:
    found = place.numbers(len(values), exact(values.device))
    if found is None:
        return torch.randn_like(values) if normal else torch.rand_like(values)
    key, where = found
    return send(keyed(key, name, where, values.shape[1:], normal, values.dtype), values.device)


# A compiler must not look into it, because the place changes at each step.
_noise: Callable[[Tensor, str, bool], Tensor] = torch.library.custom_op("batchwise::noise", _numbers, mutates_args=())
_noise.register_fake(lambda values, name, normal: torch.empty_like(values))  # type: ignore[attr-defined]
