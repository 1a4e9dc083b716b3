"""Muon for hidden weight matrices and AdamW for all else, from parameters as a task gives them."""

from collections.abc import Iterable
from typing import Any

import pytorch_optimizer
from torch import Tensor


class Muon(pytorch_optimizer.Muon):
    """Muon (Jordan et al. 2024), which has to be told which parameters are matrices of hidden layers.

    Those are all with two or more dimensions, but for the first and the last ones: the embedding, where there is one,
    and the output layer.

    Args:
        params: parameters, or groups of them, in the order of the network.
        lr: of the matrices.
        adamw_lr: of the rest.
        weight_decay: of matrices, under both; a group's own goes before.
        first: matrices at the beginning that are embeddings.
        last: matrices at the end that are output layers.
        **kwargs: those of `pytorch_optimizer.Muon`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        adamw_lr: float = 0.003,
        weight_decay: float = 0.0,
        first: int = 0,
        last: int = 1,
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
