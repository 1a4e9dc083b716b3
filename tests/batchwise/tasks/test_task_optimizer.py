"""The optimizer that a task makes."""

from typing import Any

import pytest
import torch
from small import fit, network
from torch import nn

from batchwise.errors import Mistake
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


@pytest.mark.parametrize("kind", ["instance", "dict"])
def test_an_optimizer_that_is_made_already_is_one_line(kind: str) -> None:
    net = network()
    wrong: Any = torch.optim.AdamW(net.parameters()) if kind == "instance" else {"class_path": "torch.optim.AdamW"}
    task = Classification(net, optimizer=wrong)
    with pytest.raises(Mistake, match=r"^model.optimizer is a (AdamW|dict): write a class or function, such as"):
        fit(task)


@pytest.mark.parametrize("schedule", ["cosine", {"shape": "cosine"}])
def test_a_schedule_is_made_before(schedule: Any) -> None:
    with pytest.raises(TypeError, match=r"^schedule is .*cosine.*: write a batchwise\.Schedule, such as"):
        Classification(network(), schedule=schedule)
