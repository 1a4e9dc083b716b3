"""Several optimizers that look like one to Lightning, checkpoints and schedules."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from batchwise.arguments import typed
from batchwise.errors import TrainingStopped

MISSING = (
    "a parameter that had a gradient has none any more, and the processes wait for it: write trainer.strategy "
    "ddp_find_unused_parameters_true"
)


class Players(Optimizer):
    """Optimizers of different parameters. Each steps by itself.

    To Lightning they are one optimizer, with the groups and the states of all. So one batch is one step for schedules
    and checkpoints, and a checkpoint looks like that of any other training.

    Args:
        players: the optimizers by name. No parameter may be in two of them.
    """

    @typed
    def __init__(self, players: dict[str, Optimizer]) -> None:
        groups = [group for optimizer in players.values() for group in optimizer.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.players = players
        self._share(groups)

    def _share(self, groups: list[dict[str, Any]]) -> None:
        """Let all players use these groups and one common state."""
        self.param_groups = groups
        each = iter(groups)
        for optimizer in self.players.values():
            optimizer.param_groups = [next(each) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the groups and the states of all."""
        super().load_state_dict(state_dict)
        self._share(self.param_groups)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Refuse: each player steps by itself.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"step one of the players: {', '.join(self.players)}")


def add_gradients(parameters: Iterable[nn.Parameter], add: Callable[[Tensor], Tensor]) -> None:
    """Replace each gradient by its sum over all devices. A parameter without a gradient on any device keeps none.

    Args:
        parameters: the same parameters on all devices.
        add: returns the sum of a tensor over all devices.
    """
    every = list(parameters)
    if not every:
        return
    has = torch.tensor([float(parameter.grad is not None) for parameter in every], device=every[0].device)
    used = [parameter for parameter, count in zip(every, add(has).tolist(), strict=True) if count]
    for kind in {parameter.dtype for parameter in used}:
        own = [parameter for parameter in used if parameter.dtype == kind]
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in own])
        for parameter, gradient in zip(own, add(flat).split([p.numel() for p in own]), strict=True):
            parameter.grad = gradient.view_as(parameter)


def refuse_missing(model: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Raise TrainingStopped if DDP waits for a gradient that has not come: those beside it are not added up either.

    DDP itself says so at the next step, after this one has been made with what each device has.

    Args:
        model: as DDP has wrapped it.
        parameters: those that it waits for.
    """
    waits = not getattr(model, "find_unused_parameters", True) and not model.static_graph
    if waits and any(parameter.grad is None for parameter in parameters):
        raise TrainingStopped(MISSING, everywhere=True)
