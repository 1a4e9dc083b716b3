"""Fine-tuning: the initial weights, the frozen parameters, and learning rates for parts of the network."""

from collections.abc import Iterable
from math import inf
from os.path import expanduser
from typing import Any

import torch
from torch import Tensor, nn

from batchwise.errors import TrainingStopped
from batchwise.models.frozen import CHECKSUM, Frozen, check_patterns, checksum, leave_out, not_learning
from batchwise.models.weights import take_weights
from batchwise.optim.groups import parameter_groups


class FineTuning:
    """How a task uses weights that are already trained.

    Args:
        network: gets `requires_grad = False` on its frozen parameters.
        init_from: file of initial weights, which are used if name and shape fit: see `take_weights`.
        freeze: patterns of frozen modules or parameters: see `Frozen`.
        lr_factors: factors on the learning rate, by pattern. If several patterns match, the first counts.
        save_frozen: whether checkpoints hold frozen parameters.

    Raises:
        ValueError: a pattern matches nothing, or a factor is not above 0.
    """

    def __init__(
        self,
        network: nn.Module,
        init_from: str | None,
        freeze: list[str],
        lr_factors: dict[str, float],
        save_frozen: bool,
    ) -> None:
        check_patterns("model.lr_factors", lr_factors, network)
        if not all(0 < factor < inf for factor in lr_factors.values()):
            raise ValueError(
                f"model.lr_factors is {lr_factors}: write finite factors above 0 (model.freeze keeps weights)"
            )
        self.init_from = init_from and expanduser(init_from)
        """None once the weights are loaded, and if they come from a checkpoint."""
        self.lr_factors, self.save_frozen = lr_factors, save_frozen
        self._moved: set[str] = set()
        """Names of parameters that have learnt, or were loaded. They are saved, also if they are frozen later."""
        self._left_out: tuple[list[str], Tensor] | None = None
        self.frozen = Frozen(network, freeze)
        for parameter in self.frozen.parameters:
            parameter.requires_grad_(False)

    def take(self, network: nn.Module) -> str | None:
        """Load the initial weights, only once. Return a line that reports it."""
        path, self.init_from = self.init_from, None
        return None if path is None else take_weights(network, path)

    def watch(self, task: nn.Module) -> None:
        """Note what checkpoints leave out, at the beginning of a training."""
        if not self.save_frozen:
            frozen = self._never_moved(task)
            self._left_out = list(frozen), checksum(frozen.values())

    def loaded(self, state: Iterable[str]) -> None:
        """Note which parameters come from a checkpoint. A new network has others, so they must be saved again."""
        self._moved.update(state)

    def _never_moved(self, task: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters that do not learn, and have not."""
        frozen = not_learning(task)
        self._moved.update(name for name, _ in task.named_parameters(remove_duplicate=False) if name not in frozen)
        return {name: parameter for name, parameter in frozen.items() if name not in self._moved}

    def thin(self, task: nn.Module, state: dict[str, Any]) -> None:
        """Take what has never learnt out of the weights of a checkpoint, if it is left out.

        Raises:
            TrainingStopped: it has changed all the same, as an averaged teacher does, so it would be lost.
        """
        if self.save_frozen:
            return
        frozen = {name: parameter for name, parameter in self._never_moved(task).items() if name in state}
        names = list(frozen)
        leave_out(frozen, state)
        if self._left_out and self._left_out[0] == names and not torch.equal(self._left_out[1], state[CHECKSUM]):
            raise TrainingStopped(
                "model.save_frozen is false, but parameters that do not learn have changed, and would be lost: leave "
                "it out, or make them buffers",
                everywhere=True,
            )
        self._left_out = names, state[CHECKSUM]

    def hold_norms(self, network: nn.Module) -> None:
        """Keep frozen batch norms in evaluation mode, so that they use their statistics and do not change them."""
        for name in self.frozen.norms:
            network.get_submodule(name).eval()

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]], matrices_only: bool) -> list[dict[str, Any]]:
        """Return the groups of parameters for an optimizer.

        Args:
            parameters: with their names within the task. Patterns match names within its network.
            matrices_only: no weight decay for parameters with fewer than two dimensions.
        """
        named = [(name.removeprefix("network."), parameter) for name, parameter in parameters]
        return parameter_groups(named, self.lr_factors, matrices_only)
