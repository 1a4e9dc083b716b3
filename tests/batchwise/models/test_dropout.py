import pytest
import torch
from torch import nn

from batchwise.models import place
from batchwise.models.dropout import ChannelDropout, Dropout, number_layers


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    place.current = None


def masks(layer, inputs, key, sizes):
    """Run the examples in micro-batches of the given sizes."""
    outputs, first = [], 0
    for part in inputs.split(sizes):
        place.current = place.Place(key, first)
        outputs.append(layer(part))
        first += len(part)
    return torch.cat(outputs)


def test_the_mask_does_not_depend_on_the_split():
    layer, inputs = Dropout(0.3), torch.ones(24, 3, 5, 5)
    whole = masks(layer, inputs, 7, [24])
    for sizes in ([12, 12], [1] * 24, [5, 7, 11, 1]):
        assert torch.equal(masks(layer, inputs, 7, sizes), whole)


def test_it_is_dropout():
    layer, inputs = Dropout(0.3), torch.ones(2000, 300, dtype=torch.float64)
    outputs = masks(layer, inputs, 7, [2000])
    assert set(outputs.unique().tolist()) == {0.0, 1 / 0.7}
    kept = outputs > 0
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / kept.numel()) ** 0.5
    # As spread out as independent draws: over the examples for each value, and over the values for each example.
    assert kept.double().mean(0).std().item() == pytest.approx((0.21 / 2000) ** 0.5, rel=0.15)
    assert kept.double().mean(1).std().item() == pytest.approx((0.21 / 300) ** 0.5, rel=0.15)


@pytest.mark.parametrize("layer", [Dropout(0.02), ChannelDropout(0.02)], ids=["values", "channels"])
@pytest.mark.parametrize("key", [None, 7], ids=["alone", "in a task"])
def test_half_precision_does_not_round_the_factor(layer, key):
    """1 / 0.98 is 1.0234 in bfloat16, so that values would grow by 0.3%."""
    inputs = (torch.rand(40, 50, 4) + 0.5).bfloat16().requires_grad_()
    place.current = None if key is None else place.Place(key, 0)
    outputs = layer(inputs)
    outputs.sum().backward()
    kept = outputs > 0
    assert torch.equal(outputs[kept], (inputs.double() / 0.98).bfloat16()[kept])
    assert inputs.grad.unique().tolist() == [0, torch.tensor(1 / 0.98).bfloat16().item()]


def test_steps_layers_and_neighbours_are_uncorrelated():
    layer, other, inputs = Dropout(0.5), Dropout(0.5), torch.ones(1000, 200)
    other.number = 1
    first = masks(layer, inputs, 1, [1000]) - 1
    limit = 4 / first.numel() ** 0.5
    for second in (masks(layer, inputs, 2, [1000]) - 1, masks(other, inputs, 1, [1000]) - 1):
        assert abs((first * second).mean()) < limit
    assert abs((first[1:] * first[:-1]).mean()) < limit
    assert abs((first[:, 1:] * first[:, :-1]).mean()) < limit


def test_gradients_pass_where_values_pass():
    layer, inputs = Dropout(0.4), torch.ones(8, 10, requires_grad=True)
    outputs = masks(layer, inputs, 3, [8])
    outputs.sum().backward()
    assert torch.equal(inputs.grad, outputs.detach())


def test_outside_training_and_outside_a_task():
    layer, inputs = Dropout(0.5), torch.ones(100, 100)
    assert torch.equal(layer.eval()(inputs), inputs)
    layer.train()
    torch.manual_seed(0)
    outputs = layer(inputs)
    torch.manual_seed(0)
    assert torch.equal(outputs, nn.Dropout(0.5)(inputs))


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_wrong_probability(p):
    with pytest.raises(ValueError, match=r"dropout is .*from 0 to below 1"):
        Dropout(p)


def test_layers_get_numbers():
    network = nn.Sequential(Dropout(0.5), nn.Sequential(Dropout(0.5)), nn.Flatten())
    number_layers(network)
    assert [layer.number for layer in (network[0], network[1][0])] == [0, 1]
