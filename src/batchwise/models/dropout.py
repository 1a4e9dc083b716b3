"""Dropout that does not depend on how the batch is executed."""

from typing import Any

import torch
from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.batching.random import mix
from batchwise.models import place


class Dropout(nn.Module):
    """Zeroes each value with probability `p` and scales the rest by 1 / (1 - p), as `torch.nn.Dropout` does.

    The mask of an example is a function of (seed, step, position of the example in the global batch, layer). So it is
    the same on any device, in any micro-batch and after any resume. Outside a `Task`, it is ordinary dropout. Use one
    instance per place in the network, because an instance gives an example the same mask each time.

    Args:
        p: probability that a value is zeroed.
    """

    @typed
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout is {p}: write a probability from 0 to below 1")
        self.p = p
        self.number = 0  # of the layer; the task sets it

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, ...] to [N, ...]."""
        return self._drop(inputs, inputs.detach())

    def _drop(self, inputs: Tensor, like: Tensor) -> Tensor:
        """Drop all values of the inputs [N, ...] that belong to one of `like`, which has the first dimensions."""
        if not self.training or self.p == 0:
            return inputs
        kept = (_opaque_mask if torch.compiler.is_compiling() else mask)(like, self.p, self.number)
        kept = kept.view(*kept.shape, *[1] * (inputs.ndim - kept.ndim))
        # The factor is no part of the mask, where half precision would round it: 1 / 0.98 to 1.0234.
        return inputs * kept * (1 / (1 - self.p))

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"


class ChannelDropout(Dropout):
    """Zeroes whole channels of [N, C, ...], as `torch.nn.Dropout2d` does; otherwise it is `Dropout`."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [N, C, ...] to [N, C, ...]."""
        return self._drop(inputs, inputs.new_empty(inputs.shape[:2]))


EXACT: dict[type, type[Dropout]] = {nn.Dropout: Dropout} | dict.fromkeys(
    (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ChannelDropout
)
"""The layers of PyTorch, and those that stand in for them."""


def number_layers(module: nn.Module) -> None:
    """Give each exact dropout layer a number, so that no two draw the same mask."""
    for number, layer in enumerate(layer for layer in module.modules() if isinstance(layer, Dropout)):
        layer.number = number


def convert_dropout(network: nn.Module) -> int:
    """Replace PyTorch's dropout layers in a network by exact ones; return their number."""
    found: list[tuple[nn.Module, str, Any]] = [
        (parent, name, layer)
        for parent in network.modules()
        for name, layer in parent._modules.items()  # also a layer that has two names, which `named_children` tells once
        if type(layer) in EXACT
    ]
    for parent, name, layer in found:
        setattr(parent, name, EXACT[type(layer)](layer.p).train(layer.training))
    return len(found)


def mask(inputs: Tensor, p: float, number: int) -> Tensor:
    """Return 1 for each of the inputs [N, ...] that layer `number` keeps, and 0 for the others, in their type."""
    found = place.numbers(len(inputs), inputs.device)
    if found is None:
        return torch.empty_like(inputs).bernoulli_(1 - p)
    key, where = found
    examples = mix(mix(key, number), where)
    values = torch.arange(inputs[0].numel(), device=inputs.device)
    # The keys of the examples are good hashes, so one round of multiply and shift per value is enough.
    bits = examples[:, None] ^ (values * 0x1E3779B97F4A7C15)
    bits.bitwise_xor_(bits >> 32).mul_(0x3F58476D1CE4E5B9)
    keep = bits.bitwise_right_shift_(40).bitwise_and_(0xFFFFFF) >= int(p * 2**24)
    return keep.view(inputs.shape).to(inputs.dtype)


# A compiler must not look into it, because the place changes at each step.
_opaque_mask = torch.library.custom_op("batchwise::dropout_mask", mask, mutates_args=())
_opaque_mask.register_fake(
    lambda inputs, p, number: torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
)
