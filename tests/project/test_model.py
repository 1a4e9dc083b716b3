"""The network: its shapes, and that no example changes what another gets."""

import torch

from project.model import Network


def test_shapes() -> None:
    network = Network(in_features=64, hidden_features=32, num_classes=10)
    assert network(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 64 * 32 + 2 * 32 + (32 + 1) * 10


def test_examples_do_not_influence_one_another() -> None:
    """Else the result would depend on which examples run together: so does batch norm."""
    network = Network().double().eval()
    images = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(network(images), alone, rtol=0, atol=1e-12)
