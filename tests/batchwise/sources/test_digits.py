# pyright: reportOptionalSubscript=false, reportGeneralTypeIssues=false
from copy import copy

import pytest
import torch
from sklearn.datasets import load_digits

from batchwise.batching.loader import make_batch
from batchwise.batching.order import Repeated, Sequential, Shuffled
from batchwise.batching.sampling import Balanced, Stratified, Weighted
from batchwise.sources.digits import Digits, read_digits

SPLITS = ("train", "val", "test")
FRACTIONS = [(0.15, 0.15), (0.1, 0.3), (0.01, 0.5), (0.333, 0.6)]


@pytest.fixture(scope="module")
def source() -> tuple[torch.Tensor, torch.Tensor]:
    bunch = load_digits()
    return torch.from_numpy(bunch.images).to(torch.uint8)[:, None], torch.from_numpy(bunch.target)


def index_of(data: Digits, split: str) -> torch.Tensor:
    """Which of the 1,797 images are in a split. (No two of them are equal, which is asserted.)"""
    images = read_digits()[0].flatten(1).tolist()
    where = {tuple(image): number for number, image in enumerate(images)}
    assert len(where) == 1797
    return torch.tensor([where[tuple(image)] for image in data.load(split)[0].flatten(1).tolist()])


def test_every_image_is_that_of_scikit_learn(source):
    data = Digits()
    images, digits = source
    for split in SPLITS:
        index = index_of(data, split)
        x, y = data.load(split)
        assert torch.equal(x, images[index])
        assert torch.equal(y, digits[index])
        assert (x.dtype, y.dtype, tuple(x.shape[1:])) == (torch.uint8, torch.int64, (1, 8, 8))
        assert x.max() == 16


@pytest.mark.parametrize("fractions", FRACTIONS)
def test_the_splits_are_the_whole_and_do_not_overlap(fractions):
    index = [index_of(Digits(val_fraction=fractions[0], test_fraction=fractions[1]), split) for split in SPLITS]
    assert sum(map(len, index)) == 1797
    assert torch.equal(torch.cat(index).sort().values, torch.arange(1797))


def test_sizes_by_default():
    assert [len(Digits().load(split)[1]) for split in SPLITS] == [1259, 269, 269]


@pytest.mark.parametrize("fractions", FRACTIONS)
def test_each_split_has_each_digit_in_its_proportion(fractions, source):
    data, classes = Digits(val_fraction=fractions[0], test_fraction=fractions[1]), source[1].bincount()
    assert classes.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    for split, fraction in zip(SPLITS, (1 - sum(fractions), *fractions), strict=True):
        off = data.load(split)[1].bincount(minlength=10) - fraction * classes
        assert off.abs().max() <= (1 if split == "train" else 0.5)


def test_the_training_split_is_normalised():
    data = Digits(split_seed=3)
    images, digits = data.load("train")
    raw = images.clone()
    batch = data.transform(make_batch((images, digits), torch.arange(len(digits))), training=True)
    assert batch.inputs.dtype == torch.float32
    assert batch.inputs.double().mean().item() == pytest.approx(0, abs=1e-6)
    assert batch.inputs.double().std().item() == pytest.approx(1, abs=1e-6)
    assert batch.targets is digits
    assert torch.equal(images, raw)  # what was given is left as it was


def test_other_splits_use_the_figures_of_the_training_split():
    data = Digits()
    train, (test, digits) = data.load("train")[0].double(), data.load("test")
    found = data.transform(make_batch((test, digits), torch.arange(len(digits))), training=False).inputs
    assert torch.allclose(found.double(), (test.double() - train.mean()) / train.std(), atol=1e-6)
    assert abs(found.mean().item()) > 1e-4


def test_the_split_seed_decides_and_nothing_else(source):
    first = {split: index_of(Digits(), split).tolist() for split in SPLITS}
    torch.manual_seed(8)
    before = torch.get_rng_state()
    assert {split: index_of(Digits(seed=9, batch_size=7), split).tolist() for split in SPLITS} == first
    assert torch.equal(torch.get_rng_state(), before)
    other = set(index_of(Digits(split_seed=1), "test").tolist())
    common = len(other & set(first["test"]))
    assert common < 70  # by chance: 270 * 0.15 = 40


def test_the_first_examples_are_not_one_class():
    assert len(Digits().load("train")[1][:50].unique()) == 10


def test_predict_is_the_test_split():
    data = Digits()
    assert torch.equal(data.split("predict").fields[1], data.load("test")[1])
    assert data.split("train") is data.split("train")
    assert [name for name, _ in data.loaded()] == ["predict", "train"]


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.2, -0.1), (0.5, 0.5), (0.9, 0.2), (1, 0.1), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_are_refused(fractions):
    message = f"val_fraction {fractions[0]} and data.test_fraction {fractions[1]} leave no training examples: write two"
    with pytest.raises(ValueError, match=message):
        Digits(val_fraction=fractions[0], test_fraction=fractions[1])


def test_a_fraction_of_zero_makes_no_split():
    data = Digits(val_fraction=0, test_fraction=0)
    assert (data.load("val"), data.load("test")) == (None, None)
    assert len(data.load("train")[1]) == 1797


def test_a_share_too_small_for_each_class_is_drawn_from_all():
    data = Digits(val_fraction=0.002, batch_size=8)
    data.setup("fit")
    val = data.split("val")
    assert val is not None
    assert len(val) == round(0.002 * 1797)


def test_a_plan_for_the_training_split():
    data = Digits(batch_size=64, seed=0)
    data.setup("fit")
    assert (data.plan.examples, data.plan.steps_per_epoch, data.plan.last_batch) == (1259, 20, 43)
    counted = torch.cat([b.index for share in data.train_dataloader() for b in share.micro_batches])
    assert torch.equal(counted.sort().values, torch.arange(1259))


@pytest.mark.parametrize(
    "order", [Sequential(), Shuffled(), Stratified(), Balanced(), Weighted([1.0] * 10), Repeated(4)]
)
def test_the_order_is_the_one_asked_for(order):
    data = Digits(batch_size=64, seed=5, order=order)
    assert data.order is order
    data.setup("fit")
    expected = copy(order).prepare(1259, 64, 5, data.load("train")[1])
    share = next(iter(data.train_dataloader()))
    assert share.micro_batches[0].index.tolist() == expected.indices(0, 0, 64).tolist()
    assert data.plan.examples == len(expected) == (4 * 1259 if isinstance(order, Repeated) else 1259)


def test_a_limit_of_an_earlier_run_is_not_taken_for_one_of_this_run():
    data = Digits(batch_size=64)
    assert not data.ran_out_of_memory()
    data.limit_file.write_text("25")
    assert data.ran_out_of_memory()
    resumed = Digits(batch_size=64)
    resumed.setup("fit")
    assert resumed.plan.largest_micro_batch <= 25
    assert not resumed.ran_out_of_memory()
    resumed.limit_file.write_text("12")
    assert resumed.ran_out_of_memory()


def test_some_classes_and_few_examples_of_each() -> None:
    everything, some = Digits(batch_size=1), Digits(batch_size=1, classes=[7, 3], examples_per_class=10)
    images, targets = some.load("train")
    assert torch.bincount(targets).tolist() == [10, 10]
    all_images, digits = everything.load("train")
    for target, digit in enumerate([7, 3]):
        theirs = {image.numpy().tobytes() for image in all_images[digits == digit]}
        assert {image.numpy().tobytes() for image in images[targets == target]} < theirs
    for split in ("val", "test"):  # whole, whatever is trained on
        images, targets = some.load(split)
        all_images, digits = everything.load(split)
        assert torch.equal(images, all_images[(digits == 7) | (digits == 3)])
        assert torch.bincount(targets).tolist() == [int((digits == digit).sum()) for digit in (7, 3)]
    other = Digits(batch_size=1, classes=[7, 3], examples_per_class=10, split_seed=1)
    assert not torch.equal(other.load("train")[0], some.load("train")[0])


@pytest.mark.parametrize("wrong", [{"classes": []}, {"classes": [1, 1]}, {"classes": [10]}])
def test_wrong_classes(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"data.{next(iter(wrong))} is "):
        Digits(batch_size=1, **wrong)


def test_a_test_scales_by_the_images_of_training_and_knows_its_digits():
    data = Digits(classes=[3, 1], batch_size=4)
    data.setup("test")
    few = Digits(classes=[3, 1], examples_per_class=2, batch_size=4)
    few.recall(data.state_dict())
    few.setup("test")
    assert few.learnt == data.learnt != Digits(classes=[3, 1], examples_per_class=2).learnt
    other = Digits(classes=[1, 3], batch_size=4)
    other.recall(data.state_dict())
    with pytest.raises(ValueError, match="trained with the classes 3, 1, and Digits now has 1, 3: use the same"):
        other.setup("test")
