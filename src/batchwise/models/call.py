"""The call of a network with inputs of any structure."""

from typing import Any

import torch
from torch import Tensor, nn

from batchwise.batching.structure import on_tensors


def call(network: nn.Module, inputs: Any, channels_last: bool = False) -> Any:
    """Apply a network to inputs: a tuple is passed as several arguments, a dict as keyword arguments.

    Of an object with `logits`, such as the outputs of Hugging Face's models, the logits are returned.

    Args:
        network: takes the inputs.
        inputs: tensors [N, ...] in dicts, tuples and lists.
        channels_last: lay out images [N, C, H, W] with the channels last.
    """
    if channels_last:
        inputs = on_tensors(inputs, _channels_last)
    if isinstance(inputs, Tensor):
        outputs = network(inputs)
    elif isinstance(inputs, dict):
        outputs = network(**inputs)
    else:
        outputs = network(*inputs) if isinstance(inputs, tuple) else network(inputs)
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)


def lay_out(network: nn.Module, channels_last: bool) -> None:
    """Set the memory format of a network's convolutions. This changes only the speed."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs
