"""Several networks that are trained against one another, each with an optimizer of its own, such as a GAN."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from batchwise.batching.loader import MicroBatch
from batchwise.tasks.making import finish
from batchwise.tasks.players import Players
from batchwise.tasks.task import Losses, Task


class Adversarial(Task):
    """Players take turns on each global batch; each step has the exact gradient of its player's own loss.

    A player is a part of the network, by the name of the attribute: `network.generator`, `network.discriminator`. On
    each batch the players step one after the other, in the order of `optimizer`. So one batch is one step for
    schedules, checkpoints and the log; the losses that are logged are those of the first player. (Goodfellow et al.
    2014, "Generative adversarial nets", arXiv 1406.2661, algorithm 1.)

    Args:
        network: has each player as an attribute.
        optimizer: that of each player, by its name; a mapping from names to classes as under `Task`.
        steps: steps of a player per batch, where they are not one.
        **kwargs: those of `Task`.

    Raises:
        ValueError: a player is no part of the network, or has no step; two players share a parameter.
    """

    players: ClassVar[tuple[str, ...]] = ()
    """What a subclass may fix: the names of its players."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: dict[str, Callable[[Iterable], Optimizer]],
        steps: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        self._make_optimizers, self._steps = optimizer, dict.fromkeys(optimizer, 1) | (steps or {})
        parts = [name for name, _ in network.named_children()]
        for name in (*self._steps, *self.players):
            if name not in parts or name not in optimizer:
                raise ValueError(
                    f"model.optimizer has {', '.join(optimizer)}, and the network {', '.join(parts)}: {name} must be "
                    "in both"
                )
        owners: dict[nn.Parameter, str] = {}
        for name in optimizer:
            for parameter in network.get_submodule(name).parameters():
                if (other := owners.setdefault(parameter, name)) != name:
                    raise ValueError(f"the players {other} and {name} share a parameter: make it part of one of them")
        if min(self._steps.values(), default=1) < 1:
            raise ValueError(f"model.steps is {steps}: write whole numbers of at least 1")

    @abstractmethod
    def losses(self, batch: MicroBatch, player: str = "") -> Losses:  # type: ignore[override]
        """Return one loss per target of a player; in evaluation, where `player` is "", of what is to be measured."""

    def _new_optimizer(self) -> Optimizer:
        made = {}
        for name, make in self._make_optimizers.items():
            parameters = self.network.get_submodule(name).named_parameters(prefix=f"network.{name}")
            made[name] = finish(make(self._tuning.groups(parameters, self._decay_matrices_only)))
        return Players(made)

    def _turns(self) -> list[tuple[str | None, Optimizer]]:
        players: Any = self.trainer.optimizers[0]
        return [(name, each) for name, each in players.players.items() for _ in range(self._steps[name])]
