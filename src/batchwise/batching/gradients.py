"""The exact gradient of a batch: sum the losses of its micro-batches, sum their weights, divide once.

For targets i with losses l_i and weights w_i, over all micro-batches and devices, the optimizer gets

    grad( sum_i w_i l_i / sum_i w_i )

This is what one device gets from the whole batch at once. A mean per micro-batch would give a target a weight that
depends on how many other targets are in its micro-batch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Number = float | Tensor
"""A number on the host, or one that is still on the device."""


def weighted_sum(losses: Tensor, weights: Tensor | None, target_weights: Tensor | None = None) -> tuple[Tensor, Number]:
    """Return the sum of weighted losses (with its graph) and the sum of weights.

    Args:
        losses: one per target, [N] or [N, T].
        weights: one per example [N], or None for ones.
        target_weights: one per target, shaped like `losses`, or None for ones. A loss of weight zero may be infinite
            or NaN; its gradient may not.

    Raises:
        ValueError: the target weights do not have the shape of the losses.
    """
    if losses.dtype.itemsize < 4:  # half precision cannot count to 3,000
        losses = losses.float()
    if target_weights is not None and target_weights.shape != losses.shape:
        raise ValueError(
            f"the weights have the shape {list(target_weights.shape)}, the losses {list(losses.shape)}: "
            "write one weight per loss"
        )
    if weights is not None:
        weights = weights.to(losses).reshape(-1, *[1] * (losses.ndim - 1)).expand_as(losses)
        target_weights = weights if target_weights is None else weights * target_weights
    if target_weights is None:
        return losses.sum(), losses.numel()
    # Not only a product, because 0 * inf is nan.
    counted = torch.where(target_weights == 0, losses.new_zeros(()), losses * target_weights)
    return counted.sum(), target_weights.sum(dtype=losses.dtype)


def parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters of an optimizer (to collect them from the network takes 50 times as long)."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Any) -> list[Tensor]:
    """Return the gradients of an optimizer's parameters, where they have one."""
    groups = optimizer.param_groups
    return [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]


def drop_gradients(optimizer: Any) -> None:
    """Set all gradients to None, as `Optimizer.zero_grad` does, but without its profiler record."""
    for parameter in parameters(optimizer):
        parameter.grad = None


def full(tensor: Tensor) -> Tensor:
    """Return the full tensor where it is cut over devices. This communicates, so all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Number) -> None:
    """Multiply all gradients by `factor` in one fused call, or do nothing if the host knows that it is one."""
    if isinstance(factor, float) and factor == 1.0:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    dtype = gradients[0].dtype
    if dtype.itemsize < 4:  # PyTorch would round the factor to half precision
        for gradient in gradients:
            gradient.copy_(gradient.float() * factor)
        return
    if isinstance(factor, Tensor):
        factor = factor.to(dtype.to_real())  # else there is no fused kernel
    torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
