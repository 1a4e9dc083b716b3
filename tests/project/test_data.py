"""The data: three splits without a common example, as the network takes them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchwise.sources.digits import read_digits
from project.data import Digits

SPLITS = ("train", "val", "test")
FIT = ("fit", "--config", "configs/digits.yaml", "--trainer.max_epochs", 1)


def test_each_image_is_in_one_split() -> None:
    data = Digits()
    images = torch.cat([data.load(split)[0] for split in SPLITS])
    every, _ = read_digits()
    assert len(images) == len(every) == 1797
    assert images.flatten(1).unique(dim=0).equal(every.flatten(1).unique(dim=0))


def test_splits_have_their_share_of_each_digit() -> None:
    data = Digits(val_fraction=0.2, test_fraction=0.1)
    counts = {split: data.load(split)[1].bincount() for split in SPLITS}
    for split, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        assert (counts[split] / sum(counts.values()) - share).abs().max() < 0.01


def test_images_and_targets() -> None:
    images, digits = Digits().load("train")
    assert images.shape == (len(digits), 1, 8, 8)
    assert images.dtype == torch.uint8
    assert digits.unique().tolist() == list(range(10))


def test_the_network_gets_numbers_around_zero() -> None:
    data = Digits(batch_size=64)
    data.setup("fit")
    inputs = data.to_device(data.examples("train", 2000), torch.device("cpu"), training=True).inputs
    assert inputs.dtype == torch.float32
    assert abs(inputs.mean().item()) < 0.01
    assert abs(inputs.std().item() - 1) < 0.01


@pytest.mark.parametrize("fraction", ["1", "15", "-0.1", ".nan"])
def test_a_fraction_out_of_range_is_one_line(fraction: str, run: Callable[..., Any]) -> None:
    result = run(*FIT, "--data.val_fraction", fraction)
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if not line.startswith(("note:", "warning:"))]
    assert line.startswith(
        f"error: data.val_fraction {float(fraction.strip('.'))} and data.test_fraction 0.15 leave no "
    )
    assert line.endswith("write two fractions from 0 that add up to less than 1")


def test_fractions_of_zero_make_no_split(run: Callable[..., Any]) -> None:
    data = Digits(val_fraction=0, test_fraction=0)
    assert (data.load("val"), data.load("test")) == (None, None)
    result = run(*FIT, "--data.val_fraction", 0)
    assert result.code == 0, result.err
