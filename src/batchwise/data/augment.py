"""Augmentation of whole micro-batches, on the device. The random numbers depend on seed, epoch and example.

Where an order may have an example twice, they also depend on its position in the batch.

So an example is augmented in the same way on any device, in any micro-batch and after any resume. The augmentations are
listed in the configuration, under `data.augment`. In training they are applied in this order:

1. those that take images as they are stored, mostly bytes, because that is cheapest;
2. the data module's `transform`, which normalises;
3. those with `after_transform`, because they need normalised values: zero is the mean, and images can be mixed.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import pi

import torch
from torch import Tensor, nn

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.batching.order import Order
from batchwise.batching.random import mix
from batchwise.batching.structure import shape
from batchwise.data import pixels, places
from batchwise.data.augmentation import Augmentation, Draws, Geometric, on, share

_STREAM = int.from_bytes(b"augment", "big")  # separates these random numbers from others with the same seed


class Flip(Geometric):
    """Mirror left and right.

    Args:
        p: probability.
        alternate: instead, flip a random half of the examples in the first epoch, the other half in the next, and so
            on. In any two epochs the network sees each example both ways (Jordan 2024, arXiv 2404.00498).
    """

    @typed
    def __init__(self, p: float = 0.5, alternate: bool = False) -> None:
        self.p, self.alternate = share(p, "Flip.p"), alternate

    def numbers(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return which images are mirrored, bool [N]."""
        alternating = (mix(draws.key, draws.index) + draws.epoch) % 2 == 1
        return alternating if self.alternate else draws.uniform(1)[0] < self.p

    def images(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Flip."""
        return pixels.flip(images, numbers)

    def boxes(self, boxes: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Flip."""
        return places.flipped(boxes, numbers, size[1])


class ShiftCrop(Geometric):
    """Shift by a few pixels in each direction, and fill in by reflection. It is known as padding and a random crop.

    Args:
        pixels: the largest shift. All shifts from -pixels to pixels are equally likely.
    """

    @typed
    def __init__(self, pixels: int = 4) -> None:
        if pixels < 1:
            raise ValueError(f"ShiftCrop.pixels is {pixels}: write at least 1")
        self.pixels = pixels

    def numbers(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return the shifts downwards and to the right, int64 [N, 2]."""
        if self.pixels >= (side := min(height, width)):
            raise ValueError(f"ShiftCrop.pixels is {self.pixels}, but the images have {side}: write at most {side - 1}")
        return (draws.uniform(2) * (2 * self.pixels + 1)).long().T - self.pixels

    def images(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Shift."""
        return pixels.shift(images, *numbers.T)

    def boxes(self, boxes: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Shift."""
        down, right = numbers.T
        return places.shifted(boxes, down, right, size)


class CutOut(Augmentation):
    """Set a square to zero, which after normalisation is the mean (DeVries and Taylor 2017, arXiv 1708.04552).

    Its centre is anywhere in the image, so part of the square may be outside.

    Args:
        size: side of the square, in pixels.
    """

    after_transform = True

    @typed
    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"CutOut.size is {size}: write at least 1")
        self.size = size

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Cut out."""
        sides = torch.tensor(batch.inputs.shape[2:])
        corner = (draws.uniform(2) * sides[:, None]).floor() - self.size // 2
        sizes = torch.full_like(corner, self.size)
        box = pixels.boxes(batch.inputs, *on(batch.inputs, torch.cat([corner, sizes])))
        return replace(batch, inputs=batch.inputs.masked_fill(box, 0))


class ColourJitter(Augmentation):
    """Multiply brightness, contrast and saturation by factors from 1 - x to 1 + x.

    Args:
        brightness: x of the brightness.
        contrast: x of the contrast.
        saturation: x of the saturation.
    """

    @typed
    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        names = ("brightness", "contrast", "saturation")
        given = zip(names, (brightness, contrast, saturation), strict=True)
        self.most = torch.tensor([share(x, f"ColourJitter.{name}") for name, x in given], dtype=torch.float64)

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Change the colours."""
        factors = 1 + (2 * draws.uniform(3) - 1) * self.most[:, None]
        return replace(batch, inputs=pixels.jitter(batch.inputs, *on(batch.inputs, factors)))


class Affine(Geometric):
    """Rotate, shear, scale and shift, each by a uniform random number.

    Args:
        degrees: largest rotation, in both directions.
        shear: largest shear along the rows, in degrees, in both directions.
        scale: smallest and largest size of the content, as a factor.
        translate: largest shift in each direction, as a share of the image's side.
    """

    @typed
    def __init__(
        self, degrees: float = 0.0, shear: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), translate: float = 0.0
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Affine.scale is {list(scale)}: write least and most, above 0")
        self.degrees, self.shear, self.scale, self.translate = degrees, shear, scale, translate

    def numbers(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return the matrices for `pixels.affine`, [N, 2, 3]."""
        return self.matrices(draws, height, width)

    def images(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Move the pixels."""
        return pixels.affine(images, numbers)

    def masks(self, masks: Tensor, numbers: Tensor) -> Tensor:
        """Move the pixels of masks; of whole numbers, the nearest counts."""
        return pixels.affine(masks, numbers, nearest=not masks.is_floating_point())

    def boxes(self, boxes: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the upright boxes around the moved ones."""
        return places.transformed(boxes, numbers, size)

    def matrices(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return the matrices for `pixels.affine`, float64 [N, 2, 3]."""
        rotation, shear, scale, *shifts = draws.uniform(5)
        angle, shear = ((2 * u - 1) * most * pi / 180 for u, most in ((rotation, self.degrees), (shear, self.shear)))
        scale = 1 / (self.scale[0] + scale * (self.scale[1] - self.scale[0]))
        cos, sin, slope, aspect = angle.cos(), angle.sin(), shear.tan(), height / width
        linear = torch.stack([cos, (cos * slope - sin) * aspect, sin / aspect, sin * slope + cos]) * scale
        right, down = (2 * (2 * u - 1) * self.translate for u in shifts)
        matrix = torch.stack([linear[0], linear[1], -right, linear[2], linear[3], -down])
        return matrix.T.reshape(-1, 2, 3)


def augment(
    batch: MicroBatch, steps: Sequence[Augmentation | nn.Module], after_transform: bool, seed: int, order: Order
) -> MicroBatch:
    """Apply the augmentations that belong before `transform`, or those that belong after it.

    A module (of torchvision's v2, kornia, or one's own) is applied to the inputs after `transform`. It draws from the
    generator of its device, which is seeded for each micro-batch. So it is exact as long as the borders of the
    micro-batches stay. The module decides whether it draws for each example or once for all of them.

    Raises:
        ValueError: an augmentation does not suit the data.
    """
    for number, step in enumerate(steps):
        if getattr(step, "after_transform", True) != after_transform:
            continue
        key, image = mix(seed, _STREAM, number), places.image_of(batch.inputs)
        if isinstance(step, Augmentation):
            alone = not step.for_images or step.in_pairs  # it takes all of the inputs
            whole = batch.inputs if isinstance(batch.inputs, Tensor) else None
            if (image is None and step.for_images) or (whole is None and alone):
                what = "images [N, C, H, W]" if step.for_images else "one tensor"
                raise ValueError(f"{type(step).__name__} takes {what}, but the inputs are {_said(batch)}")
            nth = 0 if order.once else batch.position + torch.arange(len(batch))
            draws = Draws(key, batch.epoch, batch.index, nth, order.copies)
            if whole is not None or isinstance(step, Geometric):
                batch = step(batch, draws)
            else:
                made = step(replace(batch, inputs=image), draws)
                batch = replace(made, inputs=places.put(batch.inputs, image, made.inputs))
        else:
            _refuse_places(step, batch, image)
            # Some modules draw on the host even for a GPU. The task has seeded the GPU's generator.
            torch.default_generator.manual_seed(mix(key, batch.epoch, int(batch.index[0]), batch.position))
            inputs = batch.inputs if image is None else image
            batch = replace(batch, inputs=places.put(batch.inputs, inputs, step(inputs)))
    return batch


def _said(batch: MicroBatch) -> str:
    return str(list(batch.inputs.shape)) if isinstance(batch.inputs, Tensor) else shape(batch.inputs)


def _refuse_places(step: nn.Module, batch: MicroBatch, image: Tensor | None) -> None:
    if image is None:
        return
    size = (image.shape[2], image.shape[3])
    others = places.put(batch.inputs, image, None)
    found = [*places.with_places(others, "inputs", size), *places.with_places(batch.targets, "targets", size)]
    if found:
        raise ValueError(
            f"{type(step).__name__} changes the images alone, but {found[0]} has places in them: take Flip, ShiftCrop "
            f"or Affine of batchwise.data.augment, which move both; if it moves nothing, apply it in transform"
        )


def unit_of(steps: Sequence[Augmentation | nn.Module], order: Order) -> int:
    """Return the number of examples that the augmentations need in one micro-batch."""
    return 2 * order.copies if any(isinstance(step, Augmentation) and step.in_pairs for step in steps) else 1
