import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchwise.batching.plan import BatchPlan
from batchwise.models import place
from batchwise.models.convnet import ConvNet
from batchwise.models.norm import GhostBatchNorm, convert_batchnorm, has_batchnorm

SHAPES = {"vectors": (5,), "images": (5, 3, 2)}


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    yield
    place.current = None


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def ghost_norm(size, channels=5, momentum=0.1):
    layer = GhostBatchNorm(channels, size, momentum=momentum).double()
    layer.zero_sums()  # in the dtype of the layer
    with torch.no_grad():
        layer.weight.copy_(random(channels, seed=1))
        layer.bias.copy_(random(channels, seed=2))
    return layer


def plain_norm(layer, dims, momentum=0.1):
    """The batch norm of torch with the same weights."""
    plain = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(len(layer.weight), momentum=momentum).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    return plain


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    ("size", "ghosts"),
    [
        pytest.param(4, [4, 4, 4], id="a multiple"),
        pytest.param(4, [4, 4, 2], id="a remainder of half"),
        pytest.param(4, [4, 3], id="a remainder of more than half"),
        pytest.param(4, [4, 4, 5], id="a remainder of less than half"),
        pytest.param(4, [5], id="less than half beside one"),
        pytest.param(4, [3], id="fewer than one"),
        pytest.param(8, [2], id="fewer than half of one"),
    ],
)
def test_each_ghost_batch_is_normalised_by_itself(shape, size, ghosts):
    layer = ghost_norm(size)
    plain = plain_norm(layer, 1 + len(shape))
    inputs = random(sum(ghosts), *shape).requires_grad_()
    expected = inputs.detach().clone().requires_grad_()
    upstream = random(*inputs.shape, seed=3)
    outputs = layer(inputs)
    outputs.backward(upstream)
    reference = torch.cat([plain(part) for part in expected.split(ghosts)])
    reference.backward(upstream)
    torch.testing.assert_close(outputs, reference, rtol=0, atol=1e-12)
    torch.testing.assert_close(inputs.grad, expected.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=0, atol=1e-12)
    assert layer.sums[2].tolist() == [len(ghosts)] * 5
    # It matters: as one batch the result is another.
    assert len(ghosts) == 1 or (plain(inputs.detach()) - outputs).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("cuts", [[16], [4, 4, 4, 4], [8, 8], [4, 12]])
def test_running_statistics_move_once_per_step_by_the_mean_over_ghost_batches(shape, cuts):
    layer = ghost_norm(4, momentum=0.3)
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for step in range(3):
        inputs = random(16, *shape, seed=step)
        layer.zero_sums()
        for part in inputs.split(cuts):
            layer(part)
        assert torch.equal(layer.running_mean, mean), "the forward pass moves nothing"
        layer.move_running(layer.sums)
        over = [0, *range(2, inputs.ndim)]
        ghosts = inputs.split(4)
        mean = 0.7 * mean + 0.3 * torch.stack([ghost.mean(over) for ghost in ghosts]).mean(0)
        var = 0.7 * var + 0.3 * torch.stack([ghost.var(over, correction=1) for ghost in ghosts]).mean(0)
        torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_var, var, rtol=0, atol=1e-12)
        mean, var = layer.running_mean.clone(), layer.running_var.clone()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_one_ghost_batch_per_step_is_the_batch_norm_of_torch(shape):
    layer = ghost_norm(16)
    plain = plain_norm(layer, 1 + len(shape))
    for step in range(5):
        inputs = random(16, *shape, seed=step)
        layer.zero_sums()
        torch.testing.assert_close(layer(inputs), plain(inputs), rtol=0, atol=1e-12)
        layer.move_running(layer.sums)
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=0, atol=1e-12)
    other = random(7, *shape, seed=9)
    torch.testing.assert_close(layer.eval()(other), plain.eval()(other), rtol=0, atol=1e-12)
    assert (layer.train()(other) - plain(other)).abs().max() > 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["mixed", "true"])
@pytest.mark.parametrize("cuts", [4 * 257, 4])
def test_statistics_of_half_precision_are_as_precise_as_those_of_torch(kind, cuts):
    """bfloat16 has numbers of eight bits: of ghost batches it counts 256."""
    inputs = random(4 * 257, 5).add(10).bfloat16()
    layer, plain = GhostBatchNorm(5, 4, momentum=1.0).to(kind), GhostBatchNorm(5, 4, momentum=1.0)
    layer.zero_sums()
    outputs = torch.cat([layer(part) for part in inputs.split(cuts)])
    assert outputs.dtype == kind
    precision = 2**-8 if kind == torch.bfloat16 else 1e-5
    torch.testing.assert_close(outputs.float(), plain(inputs.float()), rtol=precision, atol=1e-4)
    for norm in (layer, plain):
        norm.move_running(norm.sums)
    torch.testing.assert_close(layer.running_mean.float(), plain.running_mean, rtol=precision, atol=0)
    torch.testing.assert_close(layer.running_var.float(), plain.running_var, rtol=precision, atol=0)


def test_evaluation_touches_nothing():
    layer = ghost_norm(4).eval()
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    layer(random(12, 5))
    layer.move_running(layer.sums)
    assert torch.equal(layer.sums, torch.zeros(3, 5))
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])


def test_a_stand_in_is_normalised_but_does_not_count():
    layer = ghost_norm(4)
    layer(random(8, 5))
    sums = layer.sums.clone()
    place.current = place.Place(0, 0, False)
    assert layer(random(1, 5, seed=5)).isfinite().all()
    layer(random(8, 5, seed=6))
    assert torch.equal(layer.sums, sums)
    place.current = place.Place(0, 0, True)
    layer(random(8, 5, seed=6))
    assert layer.sums[2].tolist() == [4] * 5


def test_sums_are_no_state_and_carry_no_graph():
    layer = ghost_norm(4)
    layer(random(8, 5).requires_grad_())
    assert not layer.sums.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_one_value_per_channel_does_not_divide_by_zero():
    layer = ghost_norm(4)
    torch.testing.assert_close(layer(random(1, 5)), layer.bias[None])
    layer.move_running(layer.sums)
    torch.testing.assert_close(layer.running_var, torch.full((5,), 0.9, dtype=torch.float64))


@given(examples=st.integers(1, 300), unit=st.integers(2, 40))
@settings(deadline=None, max_examples=300)
@pytest.mark.weekly
def test_the_layer_and_the_plan_cut_a_batch_alike(examples, unit):
    parts = BatchPlan(examples, examples, micro_batch_size=unit, unit=unit).parts(0, 0)
    layer = GhostBatchNorm(1, unit, eps=1e-12).double()
    layer.zero_sums()
    inputs = random(examples, 1)
    outputs = layer(inputs).detach()
    assert layer.sums[2, 0] == len(parts)
    for part in parts:
        ghost = inputs[part.start : part.stop]
        expected = (ghost - ghost.mean()) * torch.rsqrt(ghost.var(correction=0) + 1e-12)
        torch.testing.assert_close(outputs[part.start : part.stop], expected, rtol=0, atol=1e-9)


@given(
    examples=st.integers(1, 300),
    unit=st.integers(2, 20),
    devices=st.integers(1, 5),
    units=st.integers(1, 4),
    batch_size=st.integers(1, 200),
)
@settings(deadline=None, max_examples=300)
@pytest.mark.slow
def test_any_execution_of_a_plan_normalises_alike(examples, unit, devices, units, batch_size):
    plan = BatchPlan(examples, batch_size, devices, unit * units, unit=unit)
    for step in {0, plan.steps_per_epoch - 1}:
        start, stop = plan.bounds(step)
        inputs = random(examples, 2)
        whole, parts = GhostBatchNorm(2, unit).double(), GhostBatchNorm(2, unit).double()
        whole.zero_sums()
        parts.zero_sums()
        expected = whole(inputs[start:stop])
        outputs = torch.full_like(inputs, torch.nan)
        for rank in range(devices):
            for part in plan.parts(step, rank):
                place.current = place.Place(0, part.start - start, part.counts)
                values = parts(inputs[part.start : part.stop])
                if part.counts:
                    outputs[part.start : part.stop] = values.detach()
        place.current = None
        torch.testing.assert_close(outputs[start:stop], expected.detach(), rtol=0, atol=1e-9)
        torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-12, atol=1e-9)


def test_converting_keeps_weights_statistics_and_settings():
    inner = nn.Sequential(nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5, eps=1e-3, momentum=0.2))
    network = nn.Sequential(inner, nn.ReLU(), nn.ModuleDict({"deep": nn.Sequential(nn.BatchNorm1d(5))})["deep"])
    for number, layer in enumerate(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d)):
        for tensor, seed in ((layer.weight, 1), (layer.bias, 2), (layer.running_mean, 3)):
            tensor.data.copy_(random(5, seed=seed + 10 * number))
        layer.running_var.copy_(random(5, seed=4 + 10 * number).abs())
    before = {name: value.clone() for name, value in network.state_dict().items() if "num_batches" not in name}
    inputs = torch.randn(6, 5)
    expected = network.eval()(inputs)
    assert has_batchnorm(network.train())
    assert convert_batchnorm(network, 4) == 2
    assert not has_batchnorm(network)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(network.eval()(inputs), expected)
    ghosts = [layer for layer in network.modules() if isinstance(layer, GhostBatchNorm)]
    assert [(ghost.ghost_batch_size, ghost.eps, ghost.momentum) for ghost in ghosts] == [(4, 1e-3, 0.2), (4, 1e-5, 0.1)]
    assert convert_batchnorm(network, 4) == 0


def test_converting_the_convnet():
    network = ConvNet(norm="batch", channels=(4, 6, 8))
    assert convert_batchnorm(network, 16) == 6
    assert convert_batchnorm(ConvNet(norm="group"), 16) == 0
    images = torch.randn(32, 1, 8, 8)
    network(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_converting_a_batch_norm_in_double_precision():
    network = nn.Sequential(nn.BatchNorm1d(5).double())
    network[0].running_mean.copy_(random(5))
    expected = network[0].running_mean.clone()
    convert_batchnorm(network, 4)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float64}
    torch.testing.assert_close(network[0].running_mean, expected, rtol=0, atol=0)
    network(random(8, 5))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(5, affine=False),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.BatchNorm1d(5, momentum=None),
    ],
    ids=["no weights", "no statistics", "no momentum"],
)
def test_batch_norms_that_cannot_be_converted(layer):
    with pytest.raises(ValueError, match="ghost_batch_size: the batch norm 1 has no weights or running statistics"):
        convert_batchnorm(nn.Sequential(nn.Linear(5, 5), layer), 4)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_ghost_batch_has_at_least_two_examples(size):
    with pytest.raises(ValueError, match=rf"ghost_batch_size is {size}: write at least 2"):
        GhostBatchNorm(5, size)
    with pytest.raises(ValueError, match=rf"ghost_batch_size is {size}: write at least 2"):
        convert_batchnorm(nn.Sequential(nn.BatchNorm1d(5)), size)


def test_a_batch_norm_in_evaluation_mode_stays_in_it():
    """Whoever freezes a pretrained batch norm with `.eval()` keeps it frozen."""
    network = nn.Sequential(nn.BatchNorm1d(5).eval())
    convert_batchnorm(network, 4)
    inputs = torch.randn(8, 5) + 3
    torch.testing.assert_close(network[0](inputs), F.batch_norm(inputs, torch.zeros(5), torch.ones(5)))


def test_a_frozen_batch_norm_stays_frozen():
    network = nn.Sequential(nn.BatchNorm1d(5).requires_grad_(False))
    convert_batchnorm(network, 4)
    assert not any(parameter.requires_grad for parameter in network.parameters())
