"""The data: three splits without a common example, as the network takes them."""

import torch

from batchwise.sources.digits import read_digits
from project.data import Digits

SPLITS = ("train", "val", "test")


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
