"""What an augmentation is: random numbers that belong to the examples, and a change of a micro-batch by them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from batchwise.batching.device import send, widest
from batchwise.batching.loader import MicroBatch
from batchwise.batching.random import mix, uniform
from batchwise.data import places


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


_HERE = object()


class Geometric(Augmentation):
    """Moves the pixels of the images, and with them the masks and boxes in inputs and targets: see `places.Places`."""

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Move."""
        image = places.image_of(batch.inputs)
        assert image is not None
        size = (image.shape[2], image.shape[3])
        numbers = self.numbers(draws, *size)
        numbers = on(image, numbers) if numbers.is_floating_point() else send(numbers, image.device)
        boxes = partial(self.boxes, size=size)
        along = places.Places(type(self).__name__, size, numbers, self.masks, boxes)
        inputs = places.put(batch.inputs, image, _HERE)
        inputs = places.put(along(inputs, "inputs"), _HERE, self.images(image, numbers))  # others may be masks
        return replace(batch, inputs=inputs, targets=along(batch.targets, "targets"))

    @abstractmethod
    def numbers(self, draws: Draws, height: int, width: int) -> Tensor:
        """Return what is done to each image, [N, ...]."""

    @abstractmethod
    def images(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Move the pixels of images [N, C, H, W]."""

    def masks(self, masks: Tensor, numbers: Tensor) -> Tensor:
        """Move masks [N, C, H, W]; whole numbers stay whole numbers."""
        return self.images(masks, numbers)

    @abstractmethod
    def boxes(self, boxes: Tensor, numbers: Tensor, size: tuple[int, int]) -> Tensor:
        """Move boxes [N, K, 4] in images of a height and a width."""


def on(inputs: Tensor, numbers: Tensor) -> Tensor:
    """Return float64 numbers on the device of the inputs, in the widest type that the device has."""
    return send(numbers, inputs.device, widest(inputs.device))


def share(value: float, name: str) -> float:
    """Return the value, or raise ValueError if it is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: write a number from 0 to 1")
    return value
