"""Networks that are trained side by side are equal to those trained alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from side_by_side import Networks

from batchwise.models.mlp import MLP


@pytest.mark.weekly
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_each_network_is_trained_as_if_alone(norm: str) -> None:
    torch.manual_seed(0)
    alone = [MLP(6, 3, [5, 4], norm=norm) for _ in range(3)]
    together = Networks([copy.deepcopy(network) for network in alone])
    inputs, targets = torch.randn(3, 8, 6), torch.randint(0, 3, (3, 8))
    pairs = [(network.parameters(), 0.1 * (1 + number)) for number, network in enumerate(alone)]
    optimizers = [torch.optim.SGD(parameters, rate) for parameters, rate in pairs]
    for _ in range(3):
        for number, network in enumerate(alone):
            optimizers[number].zero_grad()
            F.cross_entropy(network(inputs[number]), targets[number]).backward()
            optimizers[number].step()
    rates = torch.tensor([rate for _, rate in pairs])
    for _ in range(3):
        together.zero_grad()
        F.cross_entropy(together(inputs).flatten(0, 1), targets.flatten(), reduction="none").view(3, 8).mean(
            1
        ).sum().backward()
        with torch.no_grad():
            for parameter in together.parameters():
                if parameter.grad is not None:
                    shape = (3, *[1] * (parameter.ndim - 1)) if parameter.ndim > 1 else (3, -1)
                    gradient = parameter.grad if parameter.ndim > 1 else parameter.grad.view(3, -1)
                    step = gradient * (rates.view(shape) if parameter.ndim > 1 else rates[:, None])
                    parameter -= step.view_as(parameter)
    for training in (True, False):
        together.train(training)
        ours = together(inputs)
        for number, network in enumerate(alone):
            torch.testing.assert_close(ours[number], network.train(training)(inputs[number]), rtol=1e-5, atol=1e-6)
