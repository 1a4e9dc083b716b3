"""The part of a network that does not learn. Patterns name it."""

import difflib
from collections.abc import Iterable

from torch import nn

from batchwise.models.norm import batchnorms
from batchwise.optim.groups import matches


def check_patterns(key: str, patterns: Iterable[str], network: nn.Module) -> None:
    """Raise ValueError if a pattern matches no parameter of the network, and name similar parameters."""
    parameters = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in parameters):
            known = [*dict.fromkeys(name.rpartition(".")[0] for name in parameters if "." in name), *parameters]
            near = difflib.get_close_matches(pattern, known, cutoff=0.5) or known[:3]
            raise ValueError(f"{key} {pattern} matches no parameter of the network: write such as {', '.join(near)}")


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
