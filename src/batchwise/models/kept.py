"""Where a module is, and passes through it that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric


def home_of(module: nn.Module) -> torch.device:
    """Return the device on which a module is. Lightning's `device` is the one to which it will move."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(0)).device


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the type of a module's floats."""
    types = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
    return next(types, torch.get_default_dtype())


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Restore the mode of each part afterwards: some parts may be in evaluation mode on purpose."""
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restore the values of all buffers afterwards, such as running statistics. Yield copies of them, by name."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in before and buffer.shape == before[name].shape:
                    buffer.copy_(before[name])


@contextmanager
def kept_metrics(module: nn.Module) -> Iterator[None]:
    """Restore what the metrics of a module have seen afterwards."""
    metrics = [one for one in module.modules() if isinstance(one, Metric)]
    before = [
        ({name: _copied(value) for name, value in one.metric_state.items()}, one._update_count) for one in metrics
    ]
    try:
        yield
    finally:
        for metric, (state, count) in zip(metrics, before, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else list(value)
