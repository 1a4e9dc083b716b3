"""The transformer: padding, documents in one block, order of time."""

import pytest
import torch

from batchwise.models import place
from batchwise.models.transformer import Transformer, rotary, rotate

SMALL = {"vocab_size": 11, "width": 16, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def _float64(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(place, "current", None)


def network(**arguments) -> Transformer:
    made = Transformer(**SMALL | arguments).double()
    for parameter in made.parameters():  # as large as after training, so that a leak would be seen
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(11, shape, dtype=torch.int32)


def padded(rows: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([rows, rows.new_full((len(rows), length - rows.shape[1]), -1)], 1)


@pytest.mark.parametrize("classes", [None, 3])
def test_padding_changes_neither_outputs_nor_gradients(classes: int | None) -> None:
    net, short, long = network(num_classes=classes, dropout=0.3), tokens(1, 5), tokens(1, 40)

    def run(batch: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        place.current = place.Place(key=1, first=0)  # dropout is that of the example, in training too
        outputs = net(batch)[:1] if classes else net(batch)[:1, :5]
        return outputs, list(torch.autograd.grad(outputs.square().sum(), list(net.parameters())))

    alone, beside = run(short), run(torch.cat([padded(short, 40), long]))
    assert (alone[0] - beside[0]).abs().max() < 1e-12
    assert alone[0].std() > 0.1
    for one, other in zip(alone[1], beside[1], strict=True):
        assert (one - other).abs().max() <= 1e-12 * max(1, one.abs().max())


def test_a_place_sees_what_is_before_it_and_a_classifier_all() -> None:
    first = tokens(1, 12)
    second = first.clone()
    second[0, 7] = (second[0, 7] + 1) % 11
    net = network().eval()
    changed = (net(first) - net(second)).abs().amax((0, 2)) > 1e-12
    assert changed.tolist() == [False] * 7 + [True] * 5
    mean = network(num_classes=2, depth=1).eval()
    assert (mean(first) - mean(second)).abs().max() > 1e-3
    assert (mean(first) - mean(first.flip(1))).abs().max() > 1e-3  # the order of tokens matters


def test_documents_in_one_block_are_as_each_alone() -> None:
    net, parts = network().eval(), [tokens(1, 4), tokens(1, 9), tokens(1, 6)]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([4, 9, 6]))[None]
    together = net(torch.cat(parts, 1), documents)
    assert (together - torch.cat([net(part) for part in parts], 1)).abs().max() < 1e-12
    assert (together - net(torch.cat(parts, 1))).abs().max() > 1e-3


def test_rotary_products_depend_on_the_distance() -> None:
    query, key = torch.randn(2, 1, 8, dtype=torch.float64).expand(2, 20, 8)
    rotation = rotary(20, 8, query)
    products = rotate(query, *rotation) @ rotate(key, *rotation).T
    for distance in range(-19, 20):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-12
    assert products.diagonal(1)[0] != pytest.approx(products.diagonal(-1)[0])


def test_parameters() -> None:
    net = Transformer(vocab_size=257, width=96, depth=3, heads=4)
    block = 4 * 96**2 + 3 * 256 * 96 + 2 * 96
    assert sum(parameter.numel() for parameter in net.parameters()) == 257 * 96 + 3 * block + 96
    logits = net(torch.randint(257, (2, 30)))
    assert logits.shape == (2, 30, 257)
    assert logits.std() < 0.5  # nearly uniform at first


def test_a_width_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="width is 100 for 8 heads: write 96 or 112"):
        Transformer(width=100, heads=8)
