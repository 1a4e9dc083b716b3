"""What patterns freeze."""

import re

import pytest
import torch
from torch import nn

from batchwise.models.convnet import ConvNet
from batchwise.models.frozen import Frozen, matches
from batchwise.tasks.classification import Classification


@pytest.mark.parametrize(
    ("name", "pattern", "found"),
    [
        ("features.1.weight", "features", True),
        ("features.1.weight", "features.1", True),
        ("features.10.weight", "features.1", False),
        ("features.1.weight", "*.weight", True),
        ("features.1.weight", "features.[0-3]", True),
        ("features.1.weight", "weight", False),
        ("head.1.bias", "HEAD", False),
    ],
)
def test_patterns(name: str, pattern: str, found: bool) -> None:
    assert matches(name, pattern) is found


def test_norms_are_frozen_where_all_that_they_learn_is() -> None:
    network = ConvNet(channels=[2, 3], norm="batch")
    norms = [name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert norms == ["features.1", "features.4", "features.7", "features.10"]
    for patterns, expected in (
        ([], []),
        (["features.1"], ["features.1"]),
        (["features.4.*"], ["features.4"]),
        (["*.weight"], []),
        (["features"], norms),
    ):
        assert Frozen(network, patterns).norms == expected


def test_mistakes_name_what_is_near() -> None:
    network = ConvNet(channels=[2, 3], norm="batch")
    for arguments, words in (
        ({"freeze": ["feature"]}, "model.freeze feature matches no parameter of the network: write such as features."),
        ({"freeze": ["head.*", "stem"]}, "model.freeze stem matches no parameter"),
        ({"freeze": ["*"]}, "model.freeze * matches all parameters: leave some to train"),
        (
            {"lr_factors": {"haed.1": 0.1}},
            "model.lr_factors haed.1 matches no parameter of the network: write such as head.1",
        ),
        ({"lr_factors": {"head": 0}}, "write finite factors above 0"),
        ({"lr_factors": {"head": float("inf")}}, "write finite factors above 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Classification(network, **arguments)
    with pytest.raises(ValueError, match="matches no parameter of the network: leave it out, because there are none"):
        Classification(torch.nn.Flatten(), freeze=["a"])
    with pytest.raises(ValueError, match=r"model\.optimizer has nothing to train: write a network that has parameters"):
        Classification(torch.nn.Flatten()).configure_optimizers()


def test_training_mode_leaves_frozen_norms_in_evaluation_mode() -> None:
    network = ConvNet(channels=[2, 3], norm="batch")
    task = Classification(network, freeze=["features.1", "head"])
    assert not network.features[1].training
    task.eval()
    task.train()
    assert not network.features[1].training
    assert network.features[4].training
    assert network.head.training
    assert not any(parameter.requires_grad for parameter in network.head.parameters())
    before = {name: value.clone() for name, value in network.features[1].state_dict().items()}
    task(torch.randn(4, 1, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in network.features[1].state_dict().items())
