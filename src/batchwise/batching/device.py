"""Tensors and numbers on the device that trains."""

from typing import Any

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Return whether a device has float64. Apple's `mps` has not."""
    return device.type != "mps"


def widest(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device: float64, or else float32."""
    return torch.float64 if has_float64(device) else torch.float32


def exact(device: torch.device) -> torch.device:
    """Return the device that draws random numbers for a device: itself, or the host where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, and of a type. The host does not wait until a GPU has it."""
    return tensor.to(device, dtype, non_blocking=device.type in GO_ON)


GO_ON = ("cuda",)
"""The devices that take a tensor while the host goes on, and may free it."""


def number_on(device: torch.device, number: Any) -> Tensor:
    """Return a number, or several, in the widest floats of a device. A Python number is filled in there, not copied."""
    if isinstance(number, int | float):
        return torch.full((), number, dtype=widest(device), device=device)
    return send(torch.as_tensor(number), device, widest(device))
