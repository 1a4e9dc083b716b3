"""Rates by pattern."""

import pytest
import torch
from torch import nn

from batchwise.errors import Mistake
from batchwise.models.mlp import MLP
from batchwise.optim.groups import parameter_groups
from batchwise.optim.muon import Muon
from batchwise.tasks.classification import Classification


def test_groups_by_factor_and_decay() -> None:
    network = MLP(4, 3, [5, 6])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    network.layers[1].bias.requires_grad_(False)
    groups = parameter_groups(network.named_parameters(), {"layers.1": 0.1, "layers.[15]": 0.5}, True)
    found = [
        (group["lr_factor"], group.get("weight_decay"), [names[id(p)] for p in group["params"]]) for group in groups
    ]
    assert found == [
        (1.0, None, ["layers.9.weight"]),
        (1.0, 0.0, ["layers.9.bias"]),
        (0.5, None, ["layers.5.weight"]),
        (0.5, 0.0, ["layers.5.bias"]),
        (0.1, None, ["layers.1.weight"]),
    ]


@pytest.mark.parametrize("decay_matrices_only", [False, True])
def test_the_factor_is_on_the_step(decay_matrices_only: bool) -> None:
    """SGD moves each parameter by rate times factor times gradient."""
    task = Classification(
        MLP(4, 3, [5]),
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.5),
        lr_factors={"layers.1": 0.125},
        decay_matrices_only=decay_matrices_only,
    )
    optimizer = task._new_optimizer()
    assert all("lr_factor" not in group for group in optimizer.param_groups)
    before = {name: parameter.detach().clone() for name, parameter in task.network.named_parameters()}
    for parameter in task.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in task.network.named_parameters():
        torch.testing.assert_close(
            before[name] - parameter, torch.full_like(parameter, 0.0625 if "layers.1" in name else 0.5)
        )


def test_factors_that_an_optimizer_would_lose_are_refused() -> None:
    """Muon makes groups of its own, and finds the first and the last layer by their order."""
    line = "^model.lr_factors do nothing with Muon, which groups parameters by itself: leave them out$"
    for factors in ({"layers.1": 0.1}, {"layers": 0.1}):
        with pytest.raises(Mistake, match=line):
            Classification(MLP(4, 3, [5]), optimizer=Muon, lr_factors=factors)._new_optimizer()
    Classification(MLP(4, 3, [5]), optimizer=Muon, lr_factors={"layers": 1.0})._new_optimizer()


def test_without_factors_the_groups_are_as_ever() -> None:
    task = Classification(nn.Linear(3, 2))
    assert [len(group["params"]) for group in task._new_optimizer().param_groups] == [2]
