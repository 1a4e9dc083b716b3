import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchwise.models import place
from batchwise.models.convnet import ConvNet, make_norm2d
from batchwise.models.mlp import MLP, make_norm
from batchwise.models.norm import convert_batchnorm
from batchwise.models.resnet import ResNet

MLP_NORMS, CONV_NORMS = ["none", "layer", "batch"], ["none", "batch", "group", "instance"]
NETWORKS = [(MLP, norm) for norm in MLP_NORMS] + [(ConvNet, norm) for norm in CONV_NORMS]
NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.InstanceNorm2d)


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(place, "current", None)


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, NORMS)]


def parameters_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("network", "norm"), NETWORKS)
def test_images_in_logits_out(network, norm, training):
    logits = network(num_classes=7, norm=norm, dropout=0.2).train(training)(torch.randn(5, 1, 8, 8))
    assert logits.shape == (5, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("norm", CONV_NORMS)
def test_convnet_takes_images_of_any_size_and_width(norm):
    network = ConvNet(in_channels=3, num_classes=4, channels=(6, 12, 5), norm=norm)
    assert network(torch.randn(2, 3, 17, 30)).shape == (2, 4)
    assert network.features(torch.randn(2, 3, 17, 30)).shape == (2, 5, 5, 8)  # halved twice, rounded up


def test_numbers_of_parameters():
    assert parameters_of(MLP()) == 64 * 128 + 128 + 128 * 10 + 10
    assert parameters_of(MLP(norm="layer")) == 64 * 128 + 2 * 128 + 128 * 10 + 10
    assert parameters_of(MLP(hidden_features=())) == 64 * 10 + 10
    assert parameters_of(MLP(6, 2, (5, 3))) == 6 * 5 + 5 + 5 * 3 + 3 + 3 * 2 + 2
    kernels = 9 * (1 * 32 + 32 * 32 + 32 * 64 + 64 * 64)
    assert parameters_of(ConvNet()) == kernels + 2 * (32 + 32 + 64 + 64) + 64 * 10 + 10
    assert parameters_of(ConvNet(norm="none")) == kernels + (32 + 32 + 64 + 64) + 64 * 10 + 10


def test_no_hidden_layer_is_a_linear_model():
    network, x = MLP(6, 2, ()), torch.randn(3, 2, 3)
    assert torch.allclose(network(x), x.flatten(1) @ network.layers[-1].weight.T + network.layers[-1].bias)


@pytest.mark.parametrize(("network", "norm"), NETWORKS)
def test_no_bias_before_a_norm(network, norm):
    layers = [m for m in network(norm=norm).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    *inner, last = layers
    assert len(inner) == (1 if network is MLP else 4)
    assert [layer.bias is not None for layer in inner] == [norm == "none"] * len(inner)
    assert last.bias is not None


def test_the_norm_that_was_asked_for():
    assert [type(m) for m in norms_of(MLP(hidden_features=(8, 8), norm="layer"))] == [nn.LayerNorm] * 2
    assert [type(m) for m in norms_of(MLP(norm="batch"))] == [nn.BatchNorm1d]
    assert norms_of(MLP()) == norms_of(ConvNet(norm="none")) == []
    assert [type(m) for m in norms_of(ConvNet(norm="batch"))] == [nn.BatchNorm2d] * 4
    assert [type(m) for m in norms_of(ConvNet(norm="instance"))] == [nn.InstanceNorm2d] * 4
    assert [m.num_groups for m in norms_of(ConvNet(channels=(16, 12, 5)))] == [8, 8, 4, 4, 1, 1]


@pytest.mark.parametrize("norm", ["layer", "group", "instance"])
def test_these_norms_see_one_example_at_a_time(norm):
    network = MLP(norm=norm) if norm == "layer" else ConvNet(norm=norm)
    x = torch.randn(4, 1, 8, 8)
    together = network(x)
    assert torch.allclose(together, torch.cat([network(example[None]) for example in x]), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: MLP(norm="group"), "'group': write one of none, layer, batch"),
        (lambda: ConvNet(norm="layer"), "'layer': write one of none, batch, group, instance"),
        (lambda: make_norm("", 3), "'': write one of none, layer, batch"),
        (lambda: make_norm2d("Batch", 3), "'Batch': write one of none, batch, group, instance"),
    ],
)
def test_a_wrong_norm_names_the_right_ones(make, names):
    with pytest.raises(ValueError, match=f"^norm is {names}$"):
        make()


@pytest.mark.parametrize("network", [MLP, ConvNet])
def test_dropout_is_for_training_only(network):
    x = torch.randn(4, 1, 8, 8)
    dropped, plain = network(dropout=0.5), network()
    assert not torch.equal(dropped(x), dropped(x))
    assert torch.equal(plain(x), plain(x))
    dropped.eval()
    assert torch.equal(dropped(x), dropped(x))
    plain.load_state_dict(dict(zip(plain.state_dict(), dropped.state_dict().values(), strict=True)))
    assert torch.equal(dropped(x), plain(x))


@pytest.mark.parametrize("network", [MLP, ConvNet])
def test_dropout_zeroes_that_share_before_the_last_layer(network):
    network = network(dropout=0.3, **({"hidden_features": (4000,)} if network is MLP else {"channels": (64,)}))
    seen = []
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(64, 1, 8, 8)
    network(x), network.eval()(x)
    dropped, kept = seen
    alive = kept != 0
    assert (dropped == 0)[alive].float().mean().item() == pytest.approx(0.3, abs=0.03)
    left = alive & (dropped != 0)
    assert torch.allclose(dropped[left], kept[left] / 0.7)


@pytest.mark.parametrize(("network", "norm"), NETWORKS)
def test_a_few_steps_reduce_the_loss(network, norm):
    small = {"hidden_features": (32,)} if network is MLP else {"channels": (8, 16)}
    network = network(num_classes=4, norm=norm, **small)
    y = torch.arange(64) % 4
    x = 0.5 * torch.randn(64, 1, 8, 8) + torch.randn(4, 1, 8, 8)[y]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = cross_entropy(network(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1.4, abs=0.6)  # ln 4, more or less
    assert losses[-1] < 0.6 * losses[0]


def test_resnet() -> None:
    network = ResNet()
    assert (
        parameters_of(network)
        == 9 * (3 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 2 * 256 * 256 + 3 * 256 * 256)
        + 2 * (64 + 3 * 128 + 6 * 256)
        + 10 * 256
    )
    images, targets = torch.randn(6, 3, 32, 32), torch.arange(6)
    assert abs(cross_entropy(network(images), targets).item() - 2.303) < 0.2
    network = ResNet(4, 7, channels=(4, 6, 8))
    assert network.eval()(torch.randn(5, 4, 9, 6)).shape == (5, 7)
    assert convert_batchnorm(network, 4) == 7
    for norm in CONV_NORMS:
        network = ResNet(channels=(4, 6, 8, 8), norm=norm).double().eval()
        plain = network(images.double())
        last = network.to(memory_format=torch.channels_last)(images.double().to(memory_format=torch.channels_last))
        assert torch.allclose(plain, last)
