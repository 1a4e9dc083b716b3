"""Augmentation of whole micro-batches, on the device. The random numbers depend on seed, epoch and example alone.

So an example is augmented in the same way on any device, in any micro-batch and after any resume. The augmentations are
listed in the configuration, under `data.augment`. In training they are applied in this order:

1. those that take images as they are stored, mostly bytes, because that is cheapest;
2. the data module's `transform`, which normalises;
3. those with `after_transform`, because they need normalised values: zero is the mean, and images can be mixed.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import pi
from typing import ClassVar

import torch
from torch import Tensor, nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.order import Order
from batchwise.batching.random import mix, uniform
from batchwise.data import pixels

_STREAM = int.from_bytes(b"augment", "big")  # separates these random numbers from others with the same seed


@dataclass(frozen=True)
class Draws:
    """The random numbers of one augmentation for the examples of a micro-batch. There is no generator and no state.

    Args:
        key: made from the seed and the place of the augmentation in the list.
        epoch: from 0.
        index: numbers of the examples, int64 [N], on the host.
        places: positions of the examples in the global batch, if the order may repeat an example in an epoch, because
            copies must differ. Otherwise 0, so that the batch size does not matter.
        copies: number of neighbouring positions that hold the same example.
    """

    key: int
    epoch: int
    index: Tensor
    places: Tensor | int = 0
    copies: int = 1

    def uniform(self, count: int) -> Tensor:
        """Return numbers in [0, 1), float64 [count, N], on the host."""
        return uniform(mix(self.key, self.epoch, self.index, self.places), torch.arange(count)[:, None])

    def partners(self) -> Tensor:
        """Return the place of each example's partner in the micro-batch, int64 [N]: see `mixing.Mixing`."""
        own = torch.arange(len(self.index))
        partner = (own // self.copies ^ 1) * self.copies + own % self.copies
        return torch.where(partner < len(own), partner, own)


class Augmentation(ABC):
    """Changes each example of a micro-batch, by random numbers that belong to the example."""

    after_transform: ClassVar[bool] = False
    for_images: ClassVar[bool] = True
    """The inputs must be [N, C, H, W]."""
    in_pairs: ClassVar[bool] = False
    """It needs `Draws.partners`."""

    @abstractmethod
    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Return the batch, augmented, on the same device."""


class Flip(Augmentation):
    """Mirror left and right.

    Args:
        p: probability.
        alternate: instead, flip a random half of the examples in the first epoch, the other half in the next, and so
            on. In any two epochs the network sees each example both ways (Jordan 2024, arXiv 2404.00498).
    """

    def __init__(self, p: float = 0.5, alternate: bool = False) -> None:
        self.p, self.alternate = share(p, "Flip.p"), alternate

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Flip."""
        alternating = (mix(draws.key, draws.index) + draws.epoch) % 2 == 1
        which = alternating if self.alternate else draws.uniform(1)[0] < self.p
        return replace(batch, inputs=pixels.flip(batch.inputs, which.to(batch.inputs.device)))


class ShiftCrop(Augmentation):
    """Shift by a few pixels in each direction, and fill in by reflection. It is known as padding and a random crop.

    Args:
        pixels: the largest shift. All shifts from -pixels to pixels are equally likely.
    """

    def __init__(self, pixels: int = 4) -> None:
        if pixels < 1:
            raise ValueError(f"ShiftCrop.pixels is {pixels}: write at least 1")
        self.pixels = pixels

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Shift."""
        if self.pixels >= (side := min(batch.inputs.shape[2:])):
            raise ValueError(f"ShiftCrop.pixels is {self.pixels}, but the images have {side}: write at most {side - 1}")
        shifts = (draws.uniform(2) * (2 * self.pixels + 1)).long() - self.pixels
        return replace(batch, inputs=pixels.shift(batch.inputs, *shifts.to(batch.inputs.device)))


class CutOut(Augmentation):
    """Set a square to zero, which after normalisation is the mean (DeVries and Taylor 2017, arXiv 1708.04552).

    Its centre is anywhere in the image, so part of the square may be outside.

    Args:
        size: side of the square, in pixels.
    """

    after_transform = True

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

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0) -> None:
        names = ("brightness", "contrast", "saturation")
        given = zip(names, (brightness, contrast, saturation), strict=True)
        self.most = torch.tensor([share(x, f"ColourJitter.{name}") for name, x in given], dtype=torch.float64)

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Change the colours."""
        factors = 1 + (2 * draws.uniform(3) - 1) * self.most[:, None]
        return replace(batch, inputs=pixels.jitter(batch.inputs, *on(batch.inputs, factors)))


class Affine(Augmentation):
    """Rotate, shear, scale and shift, each by a uniform random number.

    Args:
        degrees: largest rotation, in both directions.
        shear: largest shear along the rows, in degrees, in both directions.
        scale: smallest and largest size of the content, as a factor.
        translate: largest shift in each direction, as a share of the image's side.
    """

    def __init__(
        self, degrees: float = 0.0, shear: float = 0.0, scale: tuple[float, float] = (1.0, 1.0), translate: float = 0.0
    ) -> None:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"Affine.scale is {list(scale)}: write least and most, above 0")
        self.degrees, self.shear, self.scale, self.translate = degrees, shear, scale, translate

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Move the pixels."""
        matrices = self.matrices(draws, *batch.inputs.shape[2:])
        return replace(batch, inputs=pixels.affine(batch.inputs, on(batch.inputs, matrices)))

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
        key = mix(seed, _STREAM, number)
        if isinstance(step, Augmentation):
            shape = list(batch.inputs.shape) if isinstance(batch.inputs, Tensor) else type(batch.inputs).__name__
            if not isinstance(batch.inputs, Tensor) or (step.for_images and batch.inputs.ndim != 4):
                raise ValueError(f"{type(step).__name__} takes images [N, C, H, W], but the inputs are {shape}")
            places = 0 if order.once else batch.position + torch.arange(len(batch))
            batch = step(batch, Draws(key, batch.epoch, batch.index, places, order.copies))
        else:
            # Some modules draw on the host even for a GPU. The task has seeded the GPU's generator.
            torch.default_generator.manual_seed(mix(key, batch.epoch, int(batch.index[0]), batch.position))
            batch = replace(batch, inputs=step(batch.inputs))
    return batch


def unit_of(steps: Sequence[Augmentation | nn.Module], order: Order) -> int:
    """Return the number of examples that the augmentations need in one micro-batch."""
    return 2 * order.copies if any(isinstance(step, Augmentation) and step.in_pairs for step in steps) else 1


def on(inputs: Tensor, numbers: Tensor) -> Tensor:
    """Return float64 numbers on the device of the inputs, in the widest type that the device has."""
    return numbers.to(inputs.device, pixels.widest(inputs))


def share(value: float, name: str) -> float:
    """Return the value, or raise ValueError if it is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: write a number from 0 to 1")
    return value
