"""Masks and boxes move with their image."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchwise import DataModule
from batchwise.batching.loader import MicroBatch
from batchwise.batching.order import Shuffled
from batchwise.data.augment import Affine, ColourJitter, CutOut, Flip, ShiftCrop, augment
from batchwise.data.augmentation import Geometric
from batchwise.data.mixing import CutMix, MixUp

COUNT, HEIGHT, WIDTH = 40, 12, 16
MOVES: dict[str, Geometric] = {
    "flip": Flip(),
    "alternate": Flip(alternate=True),
    "shift": ShiftCrop(2),
    "affine": Affine(degrees=15, shear=5, scale=(0.8, 1.2), translate=0.1),
}


def rectangles() -> tuple[Tensor, Tensor]:
    """Masks [N, H, W] of one rectangle each, and its box [N, 4], which is some pixels from the edge."""
    generator = torch.Generator().manual_seed(0)
    top = torch.randint(3, 5, (COUNT,), generator=generator)
    left = torch.randint(3, 7, (COUNT,), generator=generator)
    bottom, right = top + 2 + torch.arange(COUNT) % 3, left + 2 + torch.arange(COUNT) % 4
    rows, columns = torch.arange(HEIGHT)[None, :, None], torch.arange(WIDTH)[None, None]
    inside = (rows >= top[:, None, None]) & (rows < bottom[:, None, None])
    inside = inside & (columns >= left[:, None, None]) & (columns < right[:, None, None])
    return inside, torch.stack([left, top, right, bottom], 1)


def images() -> Tensor:
    return torch.rand(COUNT, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def augmented(step: Any, inputs: Any, targets: Any, epoch: int = 1) -> MicroBatch:
    batch = MicroBatch(inputs, targets, torch.arange(COUNT), epoch=epoch)
    return augment(augment(batch, [step], False, 3, Shuffled()), [step], True, 3, Shuffled())


@pytest.mark.parametrize("name", ["flip", "alternate", "shift"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.float32])
def test_a_mask_moves_with_its_image_to_the_pixel(name, dtype):
    mask, _ = rectangles()
    mask = mask.to(dtype)
    made = augmented(MOVES[name], torch.cat([images(), mask[:, None].double()], 1), mask)
    assert torch.equal(made.targets.double(), made.inputs[:, 3])
    assert made.targets.dtype == dtype
    assert not torch.equal(made.targets, mask)


def test_a_mask_of_whole_numbers_takes_the_nearest_pixel_and_one_of_floats_is_an_image():
    labels = 7 + 60_000 * rectangles()[0].int()
    soft = images()[:, 0]
    made = augmented(MOVES["affine"], torch.stack([soft, labels.double()], 1), {"labels": labels, "soft": soft})
    assert torch.equal(made.targets["soft"], made.inputs[:, 0])
    assert set(made.targets["labels"].unique().tolist()) == {7, 60_007}
    bilinear = made.inputs[:, 1]
    certain = ((bilinear - 7) / 60_000 - 0.5).abs() > 0.49  # all four neighbours are the same there
    assert certain.double().mean() > 0.5
    assert torch.equal(made.targets["labels"][certain] > 7, bilinear[certain] > 30_000)
    assert (made.targets["labels"] != labels).any()


def bounds(mask: Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("name", ["flip", "shift"])
def test_a_box_stays_around_its_mask(name, dtype):
    mask, box = rectangles()
    made = augmented(MOVES[name], images(), {"mask": mask, "boxes": box.to(dtype)})
    assert made.targets["boxes"].dtype == dtype
    assert made.targets["boxes"].tolist() == [bounds(each) for each in made.targets["mask"]]


def test_a_box_is_cut_at_the_edge():
    box = torch.tensor([[0, 0, 2, 2]]).repeat(COUNT, 1)
    moved = augmented(ShiftCrop(3), images(), {"boxes": box}).targets["boxes"]
    assert (int(moved.min()), int(moved.max())) == (0, 5)
    assert [0, 0, 0, 0] in moved.tolist()  # it has left the image, and keeps its place in the list


def test_a_transformed_box_is_the_smallest_around_the_rectangle():
    mask, box = rectangles()
    upright = Affine(scale=(0.8, 1.2), translate=0.1)
    for step, most in ((upright, 1.0), (Affine(degrees=15, shear=5), 2.5)):
        made = augmented(step, images(), {"mask": mask, "boxes": box.double()})
        found = torch.tensor([bounds(each) for each in made.targets["mask"]])
        outside = (made.targets["boxes"] - found) * torch.tensor([-1, -1, 1, 1])
        assert outside.min() > -0.51  # the centre of the outermost pixel is inside
        assert outside.max() < most
        assert (made.targets["boxes"] != box).any(1).all()
    whole = augmented(MOVES["affine"], images(), {"boxes": box}).targets["boxes"]
    exact = augmented(MOVES["affine"], images(), {"boxes": box.double()}).targets["boxes"]
    assert torch.equal(whole, exact.round().long())


def listed(dictionaries: bool) -> tuple[Any, Any]:
    """A variable number of boxes and masks of each image, and the same as a tensor of two."""
    mask, box = rectangles()
    counts = [i % 3 for i in range(COUNT)]
    items = {
        "boxes": [box[i].expand(count, 4) for i, count in enumerate(counts)],
        "masks": [mask[i].expand(count, HEIGHT, WIDTH) for i, count in enumerate(counts)],
        "labels": [torch.arange(count) for count in counts],
    }
    several = {"boxes": box[:, None].expand(COUNT, 2, 4), "masks": mask[:, None].expand(COUNT, 2, HEIGHT, WIDTH)}
    return [
        dict(zip(items, each, strict=True)) for each in zip(*items.values(), strict=True)
    ] if dictionaries else items, several


@pytest.mark.parametrize("dictionaries", [True, False])
@pytest.mark.parametrize("name", MOVES)
def test_lists_of_one_value_per_example_move_too(name, dictionaries):
    lists, tensors = listed(dictionaries)
    made = augmented(MOVES[name], images(), (lists, tensors)).targets
    for example in range(COUNT):
        for key in ("boxes", "masks"):
            own = made[0][example][key] if dictionaries else made[0][key][example]
            assert len(own) == example % 3
            assert torch.equal(own, made[1][key][example][:1].expand_as(own))
        labels = made[0][example]["labels"] if dictionaries else made[0]["labels"][example]
        assert labels.tolist() == list(range(example % 3))


def test_padding_among_boxes_stays():
    padded = torch.cat([rectangles()[1][:, None], torch.full((COUNT, 1, 4), -1)], 1)
    for step in MOVES.values():
        moved = augmented(step, images(), {"boxes": padded}).targets["boxes"]
        assert (moved[:, 1] == -1).all()
        assert (moved[:, 0] != padded[:, 0]).any()


@pytest.mark.parametrize("name", MOVES)
def test_nested_inputs_have_one_image_and_masks_move_with_it(name):
    mask, _ = rectangles()
    image = (255 * images()).byte()
    inputs = {"pixels": image, "valid": mask, "age": torch.arange(COUNT), "file": ["x"] * COUNT}
    made, alone = augmented(MOVES[name], inputs, mask), augmented(MOVES[name], image, mask)
    assert torch.equal(made.inputs["pixels"], alone.inputs)
    assert torch.equal(made.inputs["valid"], alone.targets)
    assert torch.equal(made.targets, alone.targets)
    assert made.inputs["age"].tolist() == list(range(COUNT))
    assert made.inputs["file"] == ["x"] * COUNT


@pytest.mark.parametrize("step", [ColourJitter(0.4), CutOut(3), nn.Dropout(0.5)])
def test_what_moves_nothing_changes_the_image_among_the_inputs(step):
    inputs = {"pixels": images(), "age": torch.arange(COUNT)}
    made = augmented(step, inputs, torch.arange(COUNT))
    assert torch.equal(made.inputs["pixels"], augmented(step, images(), torch.arange(COUNT)).inputs)
    assert (made.inputs["pixels"] != images()).any()
    assert made.inputs["age"].tolist() == list(range(COUNT))


def test_what_has_no_places_stays():
    targets = {"class": torch.arange(COUNT), "probability": torch.rand(COUNT, 4), "none": None}
    for step in MOVES.values():
        made = augmented(step, images(), targets).targets
        assert all(made[key] is targets[key] for key in targets)
    assert augmented(Flip(), images(), None).targets is None


@pytest.mark.parametrize(
    ("step", "targets", "line"),
    [
        (Flip(), torch.zeros(COUNT, 6, 8), r"^Flip moves the images, but targets \[40, 6, 8\] is no mask of 12 x 16"),
        (Flip(), {"points": torch.zeros(COUNT, 5, 2)}, r"but targets\['points'\] \[40, 5, 2\] .* leave Flip out"),
        (Flip(), [torch.zeros(3, 5)] * COUNT, r"but targets \[1, 3, 5\] is no mask"),
        (Flip(), [[torch.zeros(3, 2)] * 2] * COUNT, r"but targets, a list is no mask"),
        (nn.Dropout(), torch.zeros(COUNT, HEIGHT, WIDTH), r"^Dropout changes the im.*, but targets \[40, 12, 16\]"),
        (nn.Dropout(), [{"boxes": torch.zeros(3, 4)}] * COUNT, r"^Dropout changes the im.*, but targets\['boxes'\]"),
        (CutMix(3), torch.zeros(COUNT, HEIGHT, WIDTH), r"^CutMix mixes class .* the targets are \[40, 12, 16\]"),
        (MixUp(3), {"class": torch.zeros(COUNT)}, r"^MixUp mixes targets in one tensor, but the data has a dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused_in_a_line(step, targets, line):
    with pytest.raises(ValueError, match=line) as error:
        augmented(step, images(), targets)
    assert "\n" not in str(error.value)


def test_two_images_are_refused():
    with pytest.raises(
        ValueError, match=r"^Flip takes images \[N, C, H, W\], but the inputs are \{'a': \[3, 12, 16\], 'b'"
    ):
        augmented(Flip(), {"a": images(), "b": images()}, None)


class Segments(DataModule):
    def load(self, split: str) -> Any:
        mask, box = rectangles()
        return {"pixels": mask[:, None].byte()}, {"mask": mask.long(), "boxes": [each[None] for each in box]}

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        return replace(batch, inputs={"pixels": batch.inputs["pixels"].float()})


@pytest.mark.parametrize("make", [lambda: Flip(), lambda: ShiftCrop(2)])
def test_whole_batches_in_any_micro_batches(make: Callable[[], Geometric]):
    def seen(size: int) -> dict[int, Tensor]:
        data = Segments(batch_size=20, micro_batch_size=size, seed=1, augment=[make()])
        data.setup("fit")
        found = {}
        for item in data.train_dataloader():
            for part in item.micro_batches:
                batch = data.to_device(part, torch.device("cpu"), training=True)
                assert torch.equal(batch.inputs["pixels"][:, 0], batch.targets["mask"].float())
                found |= dict(zip(part.index.tolist(), batch.targets["boxes"], strict=True))
                for mask, box in zip(batch.targets["mask"], batch.targets["boxes"], strict=True):
                    assert box.tolist() == [bounds(mask)]
        return found

    whole, parts = seen(20), seen(3)
    assert len(whole) == COUNT
    assert all(torch.equal(whole[example], parts[example]) for example in whole)
