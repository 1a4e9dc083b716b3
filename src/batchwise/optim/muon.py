"""Muon for the weight matrices of hidden layers, and AdamW for all other parameters."""

from collections.abc import Iterable
from typing import Any

import pytorch_optimizer
from torch import Tensor

from batchwise.arguments import typed
from batchwise.ranges import NonNegativeInt


class Muon(pytorch_optimizer.Muon):
    """Muon (Jordan et al. 2024), which finds the matrices of hidden layers by itself.

    These are all parameters with two or more dimensions, except those of the embedding, which come first, and of the
    output layer, which come last.

    Args:
        params: parameters, or groups of parameters, in the order of the network.
        lr: learning rate of Muon.
        adamw_lr: learning rate of AdamW.
        weight_decay: weight decay of all matrices, also of those under AdamW. A group's own value takes precedence.
        first: number of matrices at the beginning that are embeddings.
        last: number of matrices at the end that are output layers.
        **kwargs: arguments of `pytorch_optimizer.Muon`.
    """

    @typed
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        adamw_lr: float = 0.003,
        weight_decay: float = 0.0,
        first: NonNegativeInt = 0,
        last: NonNegativeInt = 1,
        **kwargs: Any,
    ) -> None:
        given: list[dict[str, Any]] = [each if isinstance(each, dict) else {"params": [each]} for each in params]
        matrices = [weight for group in given for weight in group["params"] if weight.ndim >= 2]
        hidden = {id(weight) for weight in matrices[first : len(matrices) - last]}
        parts: dict[tuple[bool, float], list[Tensor]] = {}
        for group in given:
            for weight in group["params"]:
                decay = group.get("weight_decay", weight_decay if weight.ndim >= 2 else 0.0)
                parts.setdefault((id(weight) in hidden, decay), []).append(weight)
        groups = [{"params": part, "use_muon": use, "weight_decay": decay} for (use, decay), part in parts.items()]
        super().__init__(groups, lr=lr, adamw_lr=adamw_lr, **kwargs)
