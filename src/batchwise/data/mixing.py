"""Mix-up and cut-mix: each example and its target are mixed with those of a neighbour in the global batch."""

from abc import abstractmethod
from dataclasses import replace
from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.device import send, widest
from batchwise.batching.loader import MicroBatch
from batchwise.data import pixels
from batchwise.data.augmentation import Augmentation, Draws, on, share
from batchwise.ranges import PositiveInt


class Mixing(Augmentation):
    """Mix each example with a partner, and its target with the partner's.

    The partner is the neighbour in the global batch: positions 0 and 1 are partners, 2 and 3, and so on. It is random,
    because the order is. With the order `Repeated`, whole groups of copies are partners. The last of an odd number is
    not mixed. Partners are in the same micro-batch, because the plan keeps them together as one `unit`. So mixing is
    exact on any devices with any accumulation, and nothing is read or sent twice.

    An example has at least half of its mixture. If its share is less, one minus the share is used. Over both partners
    this changes nothing. The larger part decides the class that metrics see.

    Args:
        num_classes: number of classes, if targets are class numbers; they become probabilities [N, num_classes]. null:
            targets are floats, which are mixed as they are.
        alpha: the share of the example is drawn from Beta(alpha, alpha).
        p: probability that an example is mixed at all.
    """

    after_transform = True
    in_pairs = True

    @typed
    def __init__(self, num_classes: PositiveInt | None = None, alpha: float = 1.0, p: float = 1.0) -> None:
        if not alpha > 0:
            raise ValueError(f"{type(self).__name__}.alpha is {alpha}: write a number above 0")
        self.num_classes, self.alpha, self.p = num_classes, alpha, share(p, f"{type(self).__name__}.p")

    def __call__(self, batch: MicroBatch, draws: Draws) -> MicroBatch:
        """Mix inputs and targets."""
        if not isinstance(batch.targets, Tensor):
            found = "none" if batch.targets is None else f"a {type(batch.targets).__name__}"
            raise ValueError(
                f"{type(self).__name__} mixes targets in one tensor, but the data has {found}: leave it out"
            )
        if self.for_images and batch.targets.ndim > 2:
            raise ValueError(
                f"{type(self).__name__} mixes class numbers [N] or probabilities [N, C] by the share of the pixels, "
                f"but the targets are {list(batch.targets.shape)}: leave it out, or take MixUp"
            )
        number, angle, often, *place = draws.uniform(5)
        shares = beta(self.alpha, number, angle)
        shares = torch.where(often < self.p, torch.maximum(shares, 1 - shares), 1.0)
        partners = send(draws.partners(), batch.inputs.device)
        inputs, shares = self.mix(batch.inputs, partners, shares, torch.stack(place))
        targets = self._as_numbers(batch.targets, pixels.float_type(inputs))
        return replace(batch, inputs=inputs, targets=_mixed(targets, partners, shares))

    @abstractmethod
    def mix(self, inputs: Tensor, partners: Tensor, shares: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed inputs, and the share of each example in its mixture, [N].

        Args:
            inputs: [N, ...].
            partners: places of the partners in the micro-batch, int64 [N].
            shares: the shares that are wanted, float64 [N], on the host.
            place: two more uniform numbers, float64 [2, N], on the host.
        """

    def _as_numbers(self, targets: Tensor, dtype: torch.dtype) -> Tensor:
        if targets.is_floating_point():
            return targets
        if self.num_classes is None or targets.ndim != 1:
            raise ValueError(
                f"{type(self).__name__}.num_classes is {self.num_classes}, but the targets are {targets.dtype} "
                f"{list(targets.shape)}: class numbers [N] need it, other targets must be floats"
            )
        return F.one_hot(targets.long(), self.num_classes).to(dtype)


class MixUp(Mixing):
    """Average an example and its partner (Zhang et al. 2018, arXiv 1710.09412). For inputs of any shape."""

    for_images = False

    def mix(self, inputs: Tensor, partners: Tensor, shares: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Average."""
        if not inputs.is_floating_point():
            raise ValueError(f"MixUp averages floats, but the inputs are {inputs.dtype}: make floats in transform")
        return _mixed(inputs, partners, shares), shares


class CutMix(Mixing):
    """Copy a box of the partner into an example, at the same place (Yun et al. 2019, arXiv 1905.04899).

    The target is mixed by the share of the pixels.
    """

    def mix(self, inputs: Tensor, partners: Tensor, shares: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Put in the box."""
        sides = torch.tensor(inputs.shape[2:])[:, None]
        lengths = ((1 - shares).sqrt() * sides).floor()
        corners = (place * sides).floor() - (lengths / 2).floor()
        box = pixels.boxes(inputs, *on(inputs, torch.cat([corners, lengths])))
        return torch.where(box, inputs[partners], inputs), 1 - box.to(widest(inputs.device)).mean((1, 2, 3))


def beta(alpha: float, first: Tensor, second: Tensor) -> Tensor:
    """Turn two uniform numbers into one from Beta(alpha, alpha).

    They give Student's t with 2 alpha degrees of freedom (Bailey 1994, "Polar generation of random variates with the
    t-distribution"). Then 1/2 + t / (2 sqrt(2 alpha + t**2)) has the distribution (Devroye 1996, "Random variate
    generation in one line of code").
    """
    tangent = (first ** (-1 / alpha) - 1).sqrt() * (2 * pi * second).cos()  # t / sqrt(2 alpha); it may be infinite
    return 0.5 + 0.5 * tangent.atan().sin()


def _mixed(values: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    shares = send(shares, values.device, values.dtype).view(-1, *[1] * (values.ndim - 1))
    return torch.lerp(values[partners], values, shares)
