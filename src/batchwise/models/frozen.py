"""The part of a network that does not learn. Patterns name it."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchwise.models.norm import batchnorms
from batchwise.optim.groups import matches

CHECKSUM = "_frozen"
"""The name under which a checkpoint without frozen parameters has their checksum."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 2**20


def check_patterns(key: str, patterns: Iterable[str], network: nn.Module) -> None:
    """Raise ValueError if a pattern matches no parameter of the network, and name similar parameters."""
    parameters = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in parameters):
            known = [*dict.fromkeys(name.rpartition(".")[0] for name in parameters if "." in name), *parameters]
            near = difflib.get_close_matches(pattern, known, cutoff=0.5) or known[:3]
            remedy = f"write such as {', '.join(near)}" if near else "leave it out, because there are none"
            raise ValueError(f"{key} {pattern} matches no parameter of the network: {remedy}")


class Frozen:
    """The frozen parameters, and the frozen batch norms, which use and keep their running statistics.

    Args:
        network: has them.
        patterns: patterns of the names of modules and parameters.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left to train.
    """

    def __init__(self, network: nn.Module, patterns: Iterable[str]) -> None:
        check_patterns("model.freeze", patterns, network)

        def named(name: str) -> bool:
            return any(matches(name, pattern) for pattern in patterns)

        self.parameters = [parameter for name, parameter in network.named_parameters() if named(name)]
        if self.parameters and len(self.parameters) == len(list(network.parameters())):
            raise ValueError(f"model.freeze {', '.join(patterns)} matches all parameters: leave some to train")
        frozen = {id(parameter) for parameter in self.parameters}
        self.norms: list[str] = []
        """Names of the batch norms. The modules themselves may be replaced, by synchronised ones."""
        for name, layer in batchnorms(network):
            own = [id(parameter) for parameter in layer.parameters()]
            if named(name) or (own and frozen.issuperset(own)):
                self.norms.append(name)


# Checkpoints without frozen parameters


def not_learning(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that do not learn, in the order of their names. Tied ones have several."""
    named = sorted(module.named_parameters(remove_duplicate=False))
    return {name: one for name, one in named if not one.requires_grad}


def leave_out(frozen: dict[str, nn.Parameter], state: dict[str, Any]) -> None:
    """Take parameters out of a state dict that has them, and put their checksum in."""
    state[CHECKSUM] = checksum(frozen.values())
    for name in frozen:
        del state[name]


def fill_in(module: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
    """Put the parameters that were left out of a state dict back, as the module has them.

    Raises:
        ValueError: they are not those with which it was saved.
    """
    saved = state.pop(prefix + CHECKSUM, None)
    if saved is None:
        return
    parameters = {prefix + name: one for name, one in module.named_parameters(remove_duplicate=False)}
    missing = {name: one for name, one in parameters.items() if name not in state}
    own = checksum(missing[name] for name in sorted(missing))
    if own[0] != saved[0]:
        raise ValueError(
            f"the checkpoint leaves out {int(saved[0]):,} values that did not learn, and of this network "
            f"{int(own[0]):,} are missing in it: make the same network"
        )
    if own[1] == saved[1] and own[2] != saved[2]:  # in another precision they cannot be compared
        raise ValueError(
            "the checkpoint leaves out the parameters that did not learn, and those of this network are others: make "
            "it from the same weights (model.init_from)"
        )
    state.update(missing)


def checksum(parameters: Iterable[Tensor]) -> Tensor:
    """Return the number of values, their bytes, and a weighted sum of their bits, int64 [3], on the host.

    Bits count as whole numbers, which do not round, so that the sum is the same on any device. Each is multiplied by an
    odd number of its own, so that the order of the values counts.
    """
    count, size, total = 0, 0, torch.zeros((), dtype=torch.int64)
    for parameter in parameters:
        bits = parameter.detach().flatten().view(_BITS[parameter.element_size()])
        size += bits.nbytes
        own = torch.zeros_like(total, device=bits.device)
        for piece in bits.split(_PIECE):  # the products take 8 bytes each
            own += (piece * torch.arange(2 * count + 1, 2 * (count + len(piece)) + 1, 2, device=bits.device)).sum()
            count += len(piece)
        total = total + own.cpu()
    return torch.stack([torch.tensor(count), torch.tensor(size), total])
