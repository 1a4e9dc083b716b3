"""Several networks that train against each other, such as a GAN. Each has its own optimizer."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.errors import Mistake
from batchwise.tasks.making import made
from batchwise.tasks.players import Players
from batchwise.tasks.task import Losses, Task


class Adversarial(Task):
    """Players take turns on each global batch. Each step has the exact gradient of its player's own loss.

    A player is an attribute of the network, such as `network.generator` and `network.discriminator`. On each batch the
    players step one after the other, in the order of `optimizer`. One batch is one step for schedules, checkpoints and
    the log. The logged training loss is that of the first player. (Goodfellow et al. 2014, "Generative adversarial
    nets", arXiv 1406.2661, algorithm 1.)

    Args:
        network: has each player as an attribute.
        optimizer: the optimizer of each player, by the player's name.
        steps: steps per batch, by the player's name; one by default.
        **kwargs: arguments of `Task`.

    Raises:
        ValueError: a player is no part of the network, or has no step; two players share a parameter.
    """

    players: ClassVar[tuple[str, ...]] = ()
    """Names of the players, which a subclass may fix."""

    @typed
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
        """Return one loss per target of a player. In evaluation `player` is "": return the loss to measure."""

    def _new_optimizer(self) -> Optimizer:
        players = {}
        for name, make in self._make_optimizers.items():
            parameters = self.network.get_submodule(name).named_parameters(prefix=f"network.{name}")
            players[name] = made(
                make, self._tuning.groups(parameters, self._decay_matrices_only), f"model.optimizer.{name}"
            )
        return Players(players)

    def _players(self) -> list[tuple[str, ...]]:
        return [(name,) for name in self._steps]

    def _turns(self) -> list[tuple[str | None, Optimizer]]:
        players = self.trainer.optimizers[0]
        if not isinstance(players, Players):
            raise Mistake(
                f"configure_optimizers of {type(self).__name__} gives {type(players).__name__}, which no player steps: "
                "write model.optimizer, and change at most what super().configure_optimizers() gives"
            )
        return [(name, each) for name, each in players.players.items() for _ in range(self._steps[name])]
