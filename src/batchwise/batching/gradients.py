"""The exact gradient of a global batch: micro-batches in, one sum, one count, one division.

For targets i with losses l_i and weights w_i, over all micro-batches and devices, the optimizer gets

    grad( sum_i w_i l_i / sum_i w_i )

which is what one device gets from the whole batch at once. A mean per micro-batch would weigh a target by the company
it happens to have.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Number = float | Tensor
"""A number that the host knows, or one that is still on the device."""


def weighted_sum(losses: Tensor, weights: Tensor | None, target_weights: Tensor | None = None) -> tuple[Tensor, Number]:
    """Return the sum of weighted losses (with its graph) and the sum of weights.

    Args:
        losses: one per target, [N] or [N, T].
        weights: one per example [N], or None for ones.
        target_weights: one per target, shaped like `losses`, or None for ones. A target of weight zero counts for
            nothing even if its loss is not finite; its gradient must be.
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
    # A target that does not count must not count even if its loss is not finite: 0 * inf is nan.
    counted = torch.where(target_weights == 0, losses.new_zeros(()), losses * target_weights)
    return counted.sum(), target_weights.sum(dtype=losses.dtype)


def gradients_of(optimizer: Any) -> list[Tensor]:
    """Return the gradients of the parameters that an optimizer moves, where they have one."""
    groups = optimizer.param_groups
    return [parameter.grad for group in groups for parameter in group["params"] if parameter.grad is not None]


def full(tensor: Tensor) -> Tensor:
    """Return a tensor that may be cut over devices in one piece; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Number) -> None:
    """Multiply all gradients by `factor` in one fused call; none at all where the host knows that it is one."""
    if isinstance(factor, float) and factor == 1.0:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
