"""The findings of `tune`, and the batch size that follows from them."""

import math
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

from batchwise.batching.noise import Estimate
from batchwise.choosing import fits
from batchwise.choosing.fits import Size
from batchwise.choosing.range_test import RangeTest

NEAR = 1.05
"""A predicted time counts as good as the least if it is at most so many times as long."""


class Choice(NamedTuple):
    """A batch size and its costs to reach a target, relative to the least of each."""

    batch_size: int
    steps: float
    examples: float
    seconds: float


@dataclass
class Findings:
    """The facts about a task on a machine that are known so far."""

    batch_size: int
    """The configured batch size."""
    largest: int
    """The largest batch size to look at."""
    devices: int = 1
    unit: int = 1
    """Examples that must stay together."""
    sizes: list[Size] = field(default_factory=list)
    noise: list[tuple[int, Estimate]] = field(default_factory=list)
    """Examples seen, and the noise scale of the batches before."""
    all_fit: bool = False
    overhead: float = 0.0
    """Seconds of an optimizer step without forward and backward passes."""
    rates: RangeTest | None = None

    def knee(self) -> Size:
        """Return the smallest micro-batch whose speed is within 5% of the best."""
        return fits.knee(self.sizes)

    def share(self, batch_size: int) -> int:
        """Return the examples of a batch that one device has."""
        return -(-batch_size // self.devices)

    def seconds(self, batch_size: int) -> float:
        """Return the seconds of forward and backward passes of a batch, in micro-batches up to the knee."""
        share = self.share(batch_size)
        most = min(share, self.knee().examples)
        return share / max((size.speed for size in self.sizes if size.examples <= most), default=self.sizes[0].speed)

    def noise_scale(self) -> float | None:
        """Return the noise scale of the whole run. A lost signal counts with its lower bound.

        A step at batch size B gets 1 / (1 + noise / B) as far as a step without noise (McCandlish et al. 2018, section
        2.2). The mean is weighted by this. So the noisy end of a training, in which little happens, does not decide.
        """
        values = [each.low if each.lost else each.scale for _, each in self.noise]
        values = [value for value in values if 0 < value < math.inf]
        weights = [1 / (1 + value / self.batch_size) for value in values]
        return sum(map(mul, values, weights)) / sum(weights) if values else None

    def choices(self) -> list[Choice]:
        """Return the costs of each batch size: steps ~ 1 + noise / B (McCandlish et al. 2018, equation 2.11)."""
        noise = self.noise_scale()
        if noise is None:
            return []
        found = []
        for batch_size in (2**power for power in range(2, self.largest.bit_length())):
            steps = 1 + noise / batch_size
            seconds = steps * (self.overhead + self.seconds(batch_size))
            found.append(Choice(batch_size, steps, steps * batch_size / noise, seconds))
        fastest = min((choice.seconds for choice in found), default=1.0)
        return [choice._replace(seconds=choice.seconds / fastest) for choice in found]

    def best(self) -> Choice | None:
        """Return the batch size of the least predicted time; of those within 5%, that of the fewest examples."""
        near = [choice for choice in self.choices() if choice.seconds <= NEAR]
        return min(near, key=lambda choice: choice.examples) if near else None
