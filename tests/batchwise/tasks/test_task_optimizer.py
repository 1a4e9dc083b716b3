"""The optimizer that a task makes."""

import pytest
import torch
from torch import nn

from batchwise.tasks.classification import Classification


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_optimizers_are_fused(optimizer) -> None:
    network = nn.Linear(3, 2)
    made = Classification(network, optimizer=lambda groups: optimizer(groups, lr=0.1))._new_optimizer()
    assert [group["fused"] for group in made.param_groups] == [True]
    twin = nn.Linear(3, 2)
    twin.load_state_dict(network.state_dict())
    plain = optimizer(twin.parameters(), lr=0.1, fused=False, foreach=False)
    for step in range(3):
        for parameters in (network.parameters(), twin.parameters()):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        made.step()
        plain.step()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("key", ["fused", "foreach"])
def test_what_was_asked_for_stays(key: str) -> None:
    task = Classification(
        nn.Linear(3, 2), optimizer=lambda groups: torch.optim.SGD(groups, 0.1, **{key: key != "fused"})
    )
    assert not task._new_optimizer().param_groups[0]["fused"]


def test_optimizers_that_know_no_fused_kernel_are_left_alone() -> None:
    task = Classification(nn.Linear(3, 2), optimizer=torch.optim.RMSprop)
    assert "fused" not in task._new_optimizer().param_groups[0]
