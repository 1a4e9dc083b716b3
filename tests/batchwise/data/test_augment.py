"""Augmentations: each example has its own random numbers, rightly distributed, wherever and with whom it is run."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import CSV, DIGITS, run_here
from scipy import stats
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch, TrainLoader
from batchwise.batching.order import Order, Repeated, Shuffled
from batchwise.batching.sampling import Balanced
from batchwise.data import pixels
from batchwise.data.augment import Affine, Augmentation, ColourJitter, CutOut, Draws, Flip, ShiftCrop, augment
from batchwise.data.mixing import CutMix, MixUp, beta
from batchwise.data.module import DataModule
from batchwise.sources.digits import Digits

ALL: dict[str, Augmentation] = {
    "flip": Flip(),
    "alternating flip": Flip(alternate=True),
    "shift-crop": ShiftCrop(2),
    "cut-out": CutOut(3),
    "colour jitter": ColourJitter(0.4, 0.4, 0.4),
    "affine": Affine(degrees=20, shear=10, scale=(0.8, 1.2), translate=0.1),
    "mix-up": MixUp(10, p=0.8),
    "cut-mix": CutMix(10, p=0.8),
}


class Colours(DataModule):
    """301 images of 3 x 9 x 7 bytes."""

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(256, (301, 3, 9, 7), generator=generator).byte(), torch.arange(301) % 10

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        return replace(batch, inputs=batch.inputs.to(torch.get_default_dtype()).sub_(128).div_(64))


def seen(data: DataModule, devices: int = 1) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
    """Inputs and targets that the network sees in an epoch, by step, position and example."""
    data.setup("fit")
    assert data.plan is not None
    found = {}
    for rank in range(devices):
        plan = replace(data.plan, devices=devices)
        for share in TrainLoader(plan, data.order, data.feed("train"), rank, lambda: 0):
            for part in share.micro_batches:
                batch = data.to_device(part, torch.device("cpu"), training=True)
                assert len(batch.inputs) == len(batch.targets) == len(part)
                for place, example in enumerate(part.index.tolist()):
                    if part.counts:
                        key = share.step, part.position + place, example
                        assert key not in found
                        found[key] = batch.inputs[place], batch.targets[place]
    return found


def same(one: dict, other: dict) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))


def draws_of(count: int, epoch: int = 0) -> Draws:
    return Draws(7, epoch, torch.arange(count))


def of(inputs: Tensor) -> MicroBatch:
    return MicroBatch(inputs, torch.arange(len(inputs)) % 10, torch.arange(len(inputs)))


@pytest.mark.parametrize("name", ALL)
def test_an_example_is_the_same_wherever_it_is_run(name: str) -> None:
    """Batches of 60 and a last one of 1; images compared to the bit."""

    def data(**settings) -> Colours:
        return Colours(batch_size=60, seed=3, augment=[ALL[name]], **settings)

    whole = seen(data())
    assert len(whole) == 301
    for settings, devices in (({"micro_batch_size": 20}, 1), ({}, 2), ({"micro_batch_size": 8}, 3)):
        assert same(whole, seen(data(**settings), devices)), settings
    assert not same(whole, seen(Colours(batch_size=60, seed=3)))
    # Another epoch, another seed: another draw. (An order of its own would have other keys.)
    draws = Draws(7, 0, torch.arange(301))
    batch = data().transform(of(data().load("train")[0]), True) if ALL[name].after_transform else of(data().load("")[0])
    first = ALL[name](batch, draws).inputs
    assert torch.equal(first, ALL[name](batch, draws).inputs)
    assert not torch.equal(first, ALL[name](batch, replace(draws, epoch=1)).inputs)
    assert not torch.equal(first, ALL[name](batch, replace(draws, key=8)).inputs)


def test_out_of_memory_keeps_pairs_together() -> None:
    """What a step that ran out of memory does: it cuts its share in whole units."""
    data = Colours(batch_size=61, seed=3, augment=[MixUp(10)])
    whole = seen(data)
    assert data.plan is not None
    assert data.plan.unit == 2
    cut = {}
    for share in TrainLoader(data.plan, data.order, data.feed("train"), 0, lambda: 0):
        share.cut(8, data.plan.unit)
        for part in share.micro_batches:
            batch = data.to_device(part, torch.device("cpu"), training=True)
            for place, example in enumerate(part.index.tolist()):
                cut[share.step, part.position + place, example] = batch.inputs[place], batch.targets[place]
    assert same(whole, cut)


def test_the_batch_size_changes_nothing_but_partners() -> None:
    runs = [seen(Colours(batch_size=size, augment=[ShiftCrop(2)])) for size in (10, 60)]
    small, large = ({example: image for (_, _, example), (image, _) in run.items()} for run in runs)
    assert all(torch.equal(small[example], large[example]) for example in range(301))


@pytest.mark.parametrize("order", [Repeated(3), Balanced()])
def test_an_example_that_comes_again_comes_out_different(order: Order) -> None:
    data = Colours(batch_size=12, seed=0, order=order, augment=[Affine(degrees=30)])
    by_example: dict[int, list[Tensor]] = {}
    for (_, _, example), (image, _) in seen(data).items():
        by_example.setdefault(example, []).append(image)
    again = [copies for copies in by_example.values() if len(copies) > 1]
    assert again or isinstance(order, Balanced)
    assert all(not torch.equal(copies[0], copies[1]) for copies in again)


def test_with_repeated_examples_partners_are_other_examples() -> None:
    data = Colours(batch_size=12, seed=0, order=Repeated(2), augment=[MixUp(10)], micro_batch_size=4)
    found = seen(data)
    assert data.plan is not None
    assert data.plan.unit == 4
    examples = {(step, position): example for step, position, example in found}
    for (step, position, example), (_, target) in found.items():
        partner = examples.get((step, (position // 2 ^ 1) * 2 + position % 2), example)
        assert partner != example or (step, position // 2) == (50, 0)  # 602 positions: the last batch is of two
        assert set(target.nonzero().flatten().tolist()) == {example % 10, partner % 10}


def test_mixing_and_ghost_batches_together() -> None:
    data = Colours(batch_size=60, augment=[MixUp(10)])
    assert [data.unit_for(unit) for unit in (1, 2, 5, 8)] == [2, 2, 10, 8]


def test_evaluation_is_not_augmented() -> None:
    plain, ours = (Colours(batch_size=60, augment=steps) for steps in (None, list(ALL.values())))
    batches = [data.to_device(data.examples("val", 20), torch.device("cpu"), training=False) for data in (plain, ours)]
    assert torch.equal(batches[0].inputs, batches[1].inputs)


# What is drawn


def test_flip_rate() -> None:
    marked = torch.zeros(4000, 1, 1, 2)
    marked[..., 0] = 1
    for p in (0.5, 0.1):
        flipped = Flip(p)(of(marked), draws_of(4000)).inputs[:, 0, 0, 1]
        assert abs(flipped.mean().item() - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    assert torch.equal(pixels.flip(marked[:2], torch.tensor([True, False]))[:, 0, 0], torch.tensor([[0.0, 1], [1, 0]]))


def test_alternating_flip_shows_each_side_once_in_two_epochs() -> None:
    marked = torch.zeros(4000, 1, 1, 2)
    marked[..., 0] = 1
    epochs = [Flip(alternate=True)(of(marked), draws_of(4000, epoch)).inputs[:, 0, 0, 1] for epoch in range(4)]
    assert torch.equal(epochs[0] + epochs[1], torch.ones(4000))
    assert torch.equal(epochs[0], epochs[2])
    assert torch.equal(epochs[1], epochs[3])
    assert abs(epochs[0].mean().item() - 0.5) < 0.032  # four standard deviations


def test_shifts_are_uniform_and_reflect() -> None:
    places = torch.arange(9 * 7).view(1, 1, 9, 7).expand(5000, 1, 9, 7)
    shifted = ShiftCrop(2)(of(places), draws_of(5000)).inputs
    padded = F.pad(places[:1].double(), (2, 2, 2, 2), mode="reflect")[0, 0].long()
    crops = torch.stack([padded[y : y + 9, x : x + 7] for y in range(5) for x in range(5)])
    which = (shifted[:, 0, None] == crops).all((2, 3))  # [N, 25]
    assert torch.equal(which.sum(1), torch.ones(5000, dtype=torch.int64))
    assert stats.chisquare(which.sum(0).numpy()).pvalue > 0.001
    moved = pixels.shift(places[:1], torch.tensor([1]), torch.tensor([2]))
    assert moved[0, 0, 1, 2] == 0  # the corner goes down and right


def test_cut_out_is_a_square_anywhere() -> None:
    cut = CutOut(3)(of(torch.ones(4000, 2, 9, 7)), draws_of(4000)).inputs == 0
    assert torch.equal(cut[:, 0], cut[:, 1])
    rows, columns = cut[:, 0].any(2), cut[:, 0].any(1)
    assert torch.equal(cut[:, 0], rows[:, :, None] & columns[:, None, :])
    assert set(rows.sum(1).tolist()) == set(columns.sum(1).tolist()) == {2, 3}
    middles = cut[:, 0, 4].any(1).double().mean().item()  # a row is hit by three of nine centres
    assert abs(middles - 3 / 9) < 0.03


def test_colour_jitter() -> None:
    colours = torch.tensor([[40.0, 80], [120, 160]]).expand(2, 3, 2, 2) * torch.tensor([1.0, 1, 0.5]).view(3, 1, 1)
    one = torch.ones(2)
    assert torch.equal(pixels.jitter(colours, one, one, one), colours)
    assert torch.allclose(pixels.jitter(colours, 1.5 * one, one, one), 1.5 * colours)
    grey = 0.299 * colours[:, 0] + 0.587 * colours[:, 1] + 0.114 * colours[:, 2]
    assert torch.allclose(pixels.jitter(colours, one, one, 0 * one), grey[:, None].expand_as(colours))
    flat = pixels.jitter(colours, one, 0 * one, one)
    assert torch.allclose(flat, grey.mean((1, 2)).view(2, 1, 1, 1).expand_as(colours))
    assert pixels.jitter(colours.byte(), 9 * one, one, one).max() == 255
    brightness = ColourJitter(brightness=0.4)(of(torch.ones(4000, 3, 1, 1)), draws_of(4000)).inputs[:, 0, 0, 0]
    assert stats.kstest(brightness.numpy(), "uniform", args=(0.6, 0.8)).pvalue > 0.001


def test_affine() -> None:
    picture = torch.randn(1, 2, 8, 8, dtype=torch.float64)

    def moved(**settings) -> Tensor:
        affine = Affine(**settings)
        affine.matrices = lambda draws, *sides: Affine.matrices(affine, One(), *sides)
        return affine(of(picture), draws_of(1)).inputs

    class One:
        """The largest of all numbers, as good as 1."""

        def uniform(self, count: int) -> Tensor:
            return torch.ones(count, 1, dtype=torch.float64)

    assert torch.allclose(moved(), picture)
    assert torch.allclose(moved(degrees=90), picture.rot90(1, (2, 3)), atol=1e-12)
    assert torch.allclose(moved(translate=0.25)[..., 2:, 2:], picture[..., :-2, :-2])
    smaller = moved(scale=(0.5, 0.5))
    assert torch.allclose(smaller[..., 2:6, 2:6], F.avg_pool2d(picture, 2))
    assert torch.allclose(smaller[..., 1, :], smaller[..., 2, :])  # reflected, the edge too
    tall = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 4)
    matrix = Affine(degrees=90).matrices(One(), 8, 4)
    across = pixels.affine(tall, matrix)[0, 0]
    assert torch.allclose(across[:, 1] - across[:, 0], torch.ones(8))  # pixels stay square
    angles = Affine(degrees=30).matrices(draws_of(4000), 8, 8)
    degrees = torch.rad2deg(torch.atan2(angles[:, 1, 0], angles[:, 0, 0]))
    assert stats.kstest(degrees.numpy(), "uniform", args=(-30, 60)).pvalue > 0.001


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mix_up_shares(alpha: float) -> None:
    numbers = draws_of(20000).uniform(2)
    assert stats.kstest(beta(alpha, *numbers).numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.001
    inputs = torch.arange(4000.0, dtype=torch.float64)[:, None] % 2  # 0 and 1 are partners
    mixed = MixUp(10, alpha)(of(inputs), draws_of(4000))
    shares = (mixed.inputs[:, 0] - (1 - inputs[:, 0])).abs()
    assert shares.min() >= 0.5
    folded = stats.kstest(shares.numpy(), lambda x: 2 * stats.beta(alpha, alpha).cdf(x) - 1)
    assert folded.pvalue > 0.001
    own = mixed.targets.gather(1, of(inputs).targets[:, None])[:, 0]
    assert torch.equal(own, shares)
    assert torch.equal(mixed.targets.argmax(1), of(inputs).targets)
    half = MixUp(10, alpha, p=0.5)(of(inputs), draws_of(4000))
    assert abs((half.inputs == inputs).double().mean().item() - 0.5) < 0.032


def test_cut_mix_shares_are_those_of_the_pixels() -> None:
    inputs = (torch.arange(4000.0, dtype=torch.float64) % 2).view(-1, 1, 1, 1).expand(4000, 1, 16, 16)
    mixed = CutMix(10)(of(inputs), draws_of(4000))
    others = mixed.inputs[:, 0] != inputs[:, 0]
    shares = 1 - others.double().mean((1, 2))
    assert torch.allclose(mixed.targets.gather(1, of(inputs).targets[:, None])[:, 0], shares)
    assert torch.equal(others, others.any(2)[:, :, None] & others.any(1)[:, None, :])  # boxes
    inner = others[:, 0].any(1) | others[:, -1].any(1) | others[:, :, 0].any(1) | others[:, :, -1].any(1)
    assert shares.min() >= 0.5
    assert 0.2 < inner.double().mean() < 0.9  # some are cut by the border
    assert shares.mean() > 0.75  # so that they are larger than those wanted, which are 3/4 in the mean


def test_cut_mix_takes_bytes() -> None:
    inputs = torch.randint(256, (400, 1, 16, 16)).byte()
    mixed, right = (CutMix(10)(of(images), draws_of(400)) for images in (inputs, inputs.float()))
    assert torch.equal(mixed.inputs, right.inputs.byte())
    torch.testing.assert_close(mixed.targets, right.targets, check_dtype=False)


def test_soft_targets_have_the_cross_entropy_of_the_pair() -> None:
    logits = torch.randn(4, 10, dtype=torch.float64)
    batch = MixUp(10)(of(torch.randn(4, 1, 2, 2, dtype=torch.float64)), draws_of(4))
    labels = torch.arange(4)
    share = batch.targets.gather(1, labels[:, None])[:, 0]
    for smoothing in (0.0, 0.1):
        ours, own, others = (
            F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
            for targets in (batch.targets, labels, labels ^ 1)
        )
        assert torch.allclose(ours, share * own + (1 - share) * others, rtol=1e-12)


def test_numbers_are_mixed_themselves() -> None:
    batch = replace(of(torch.randn(3, 5)), targets=torch.tensor([1.0, 3.0, 7.0]))
    mixed = MixUp()(batch, draws_of(3))
    assert ((mixed.targets[:2] >= 1) & (mixed.targets[:2] <= 3)).all()
    assert mixed.targets[2] == 7  # at an odd end one is left alone
    assert torch.equal(mixed.inputs[2], batch.inputs[2])


# A module of one's own, of torchvision or of kornia


class Noise(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + torch.rand_like(inputs)


def test_any_module_is_exact_for_the_same_micro_batches() -> None:
    data = Colours(batch_size=60, seed=3, micro_batch_size=20, augment=[Flip(), Noise()])
    first = seen(data)
    torch.rand(5)  # whatever else was drawn
    assert same(first, seen(data))
    assert same(first, seen(data, 3))  # on three devices the borders are the same, and in the last batch of 1 too
    assert not same(first, seen(Colours(batch_size=60, seed=3, micro_batch_size=10, augment=data.augment)))


# Mistakes


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: ShiftCrop(0), "ShiftCrop.pixels is 0: write at least 1"),
        (lambda: CutOut(0), "CutOut.size is 0: write at least 1"),
        (lambda: Flip(2), "Flip.p is 2: write a number from 0 to 1"),
        (lambda: Affine(scale=(2, 1)), "Affine.scale is [2, 1]: write least and most, above 0"),
        (lambda: CutMix(10, alpha=0), "CutMix.alpha is 0: write a number above 0"),
        (
            lambda: MixUp()(of(torch.ones(4, 2)), draws_of(4)),
            "MixUp.num_classes is None, but the targets are torch.int64",
        ),
        (
            lambda: MixUp(10)(of(torch.ones(4, 1, 2, 2).byte()), draws_of(4)),
            "MixUp averages floats, but the inputs are torch.uint8: make floats in transform",
        ),
    ],
)
def test_wrong_settings(wrong: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        wrong()


AUGMENT = "[{class_path: batchwise.data.%s, init_args: {%s}}]"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("augment.ShiftCrop", "pixels: 8", "ShiftCrop.pixels is 8, but the images have 8: write at most 7"),
        ("augment.Flip", "p: 2", "Flip.p is 2.0: write a number from 0 to 1"),
        ("mixing.MixUp", "num_classes: 7", "MixUp.num_classes is 7, but model.network has 10 outputs"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_one_line_before_training(name: str, settings: str, words: str) -> None:
    result = run_here("fit", *DIGITS, *CSV, "--data.augment", AUGMENT % (name, settings))
    assert result.code == 2
    assert words in result.err
    assert len(result.err.splitlines()) == 1


def test_tables_are_no_images() -> None:
    batch = of(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"Flip takes images \[N, C, H, W\], but the inputs are \[4, 5\]"):
        augment(batch, [Flip()], False, 0, Shuffled())


def test_pairs_need_micro_batches_of_two() -> None:
    settings = ("--data.augment", AUGMENT % ("mixing.MixUp", "num_classes: 10"), "--data.micro_batch_size", 1)
    result = run_here("fit", *DIGITS, *CSV, *settings)
    assert result.code == 2
    assert "micro_batch_size is 1, but 2 examples must stay together: write at least 2" in result.err
    assert Digits(batch_size=3).unit_for(1) == 1
