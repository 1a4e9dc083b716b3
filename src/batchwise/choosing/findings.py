"""The findings of `tune`, and the batch size and rate that follow from them."""

import math
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

import numpy as np

from batchwise.batching.noise import Estimate
from batchwise.choosing import fits
from batchwise.choosing.branches import Rates
from batchwise.choosing.fits import Size
from batchwise.choosing.trials import least_squares

NEAR = 1.05
"""A predicted time counts as good as the least if it is at most so many times as long."""
FAR = 4.0
"""The noise scale and the branches disagree if one is more than so many times the other."""


class Choice(NamedTuple):
    """A batch size and its costs to a target: steps, examples and seconds, relative to the least of each."""

    batch_size: int
    steps: float
    examples: float
    seconds: float


class Advice(NamedTuple):
    """What `tune` recommends."""

    batch_size: int
    low: int
    """The smallest and the largest batch size that are as good, within 5% of the time."""
    high: int
    factor: float
    """On the configured rate."""
    gain: float
    """The time that the configuration takes, relative to this; infinite if it never got as far."""


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
    rates: dict[int, Rates] = field(default_factory=dict)
    """The branches of each batch size that was tried."""

    # What fits and what is fast

    def knee(self) -> Size:
        """Return the smallest micro-batch whose speed is within 5% of the best."""
        return fits.knee(self.sizes)

    def share(self, batch_size: int) -> int:
        """Return the examples of a batch that one device has."""
        return -(-batch_size // self.devices)

    def passes(self, batch_size: int) -> float:
        """Return the seconds of forward and backward passes of a batch, in micro-batches up to the knee."""
        share = self.share(batch_size)
        most = min(share, self.knee().examples)
        return share / max((size.speed for size in self.sizes if size.examples <= most), default=self.sizes[0].speed)

    def seconds(self, batch_size: int) -> float:
        """Return the seconds of a step: as measured in the branches, or beyond them by the passes."""
        if not self.rates:
            return self.passes(batch_size) + self.overhead
        sizes = sorted(self.rates)
        within = min(max(batch_size, sizes[0]), sizes[-1])
        times = np.log([self.rates[size].seconds() for size in sizes])
        measured = math.exp(np.interp(math.log(within), np.log(sizes), times))
        return measured * self.passes(batch_size) / self.passes(within)

    # What the gradient says

    def noise_scale(self) -> float | None:
        """Return the noise scale of the whole run. A lost signal counts with its lower bound.

        A step at batch size B gets 1 / (1 + noise / B) as far as a step without noise (McCandlish et al. 2018, section
        2.2). The mean is weighted by this. So the noisy end of a training, in which little happens, does not decide.
        """
        values = [each.low if each.lost else each.scale for _, each in self.noise]
        values = [value for value in values if 0 < value < math.inf]
        weights = [1 / (1 + value / self.batch_size) for value in values]
        return sum(map(mul, values, weights)) / sum(weights) if values else None

    def by_noise(self) -> list[Choice]:
        """Return the costs of each batch size by the noise scale alone (McCandlish et al. 2018, equation 2.11)."""
        noise = self.noise_scale()
        sizes = [2**power for power in range(2, self.largest.bit_length())]
        return [] if noise is None else self._choices(sizes, 1.0, noise)

    def first_guess(self) -> int:
        """Return the batch size of the least time by the noise scale; without one, the configured batch size."""
        best = min(self.by_noise(), key=lambda choice: choice.seconds, default=None)
        return self.batch_size if best is None else best.batch_size

    # What the branches say

    def level(self) -> float:
        """Return the lowest loss that each batch size has reached at its best rate, with each seed."""
        return max(branch.final() for each in self.rates.values() for branch in each.best())

    def fitted(self) -> tuple[float, float] | None:
        """Return (S, E) of steps = S + E / B to the level, from at least three batch sizes."""
        level = self.level() if self.rates else math.inf
        found = {size: each.steps_to(level) for size, each in self.rates.items()}
        return least_squares({size: steps for size, steps in found.items() if math.isfinite(steps)})

    def choices(self) -> list[Choice]:
        """Return the costs of the powers of two from the smallest batch size that was tried to the largest."""
        fitted = self.fitted()
        if fitted is None:
            return []
        low, high = min(self.rates), max(self.rates)
        sizes = {2**power for power in range(2, high.bit_length()) if low <= 2**power <= high}
        return self._choices(sorted({*sizes, *self.rates}), *fitted)

    def _choices(self, sizes: list[int], least: float, examples: float) -> list[Choice]:
        found = []
        for size in sizes:
            steps = least + examples / size
            relative = steps / least if least else steps
            found.append(Choice(size, relative, steps * size / (examples or 1), steps * self.seconds(size)))
        fastest = min((choice.seconds for choice in found), default=1.0)
        return [choice._replace(seconds=choice.seconds / fastest) for choice in found]

    def factor(self, batch_size: int) -> float:
        """Return the best factor on the rate, between the batch sizes that were tried by their logarithms."""
        below = max((size for size in self.rates if size <= batch_size), default=min(self.rates))
        above = min((size for size in self.rates if size >= batch_size), default=max(self.rates))
        share = 0.0 if below == above else math.log(batch_size / below) / math.log(above / below)
        return self.rates[below].between() ** (1 - share) * self.rates[above].between() ** share

    def disagree(self) -> bool:
        """Return whether the noise scale of the gradient and that of the branches are far apart."""
        noise, fitted = self.noise_scale(), self.fitted()
        if noise is None or fitted is None:
            return False
        ratio = fitted[1] / fitted[0] / noise if fitted[0] else math.inf
        return not 1 / FAR <= ratio <= FAR

    def best(self) -> Advice | None:
        """Return the batch size of the least predicted time; of those within 5%, that of the fewest examples.

        Where noise scale and branches disagree, it follows the branches, and the range has what either finds as good.
        """
        near = [choice for choice in self.choices() if choice.seconds <= NEAR]
        if not near:
            return None
        best = min(near, key=lambda choice: choice.examples)
        also = self.by_noise() if self.disagree() else []
        as_good = [choice.batch_size for choice in (*near, *also) if choice.seconds <= NEAR]
        level, own = self.level(), self.rates.get(self.batch_size)
        ours = (self.fitted() or (0.0, 0.0))[0] + (self.fitted() or (0.0, 0.0))[1] / best.batch_size
        theirs = own.steps_to(level, 1.0) * own.seconds() if own else math.inf
        gain = theirs / (ours * self.seconds(best.batch_size))
        return Advice(best.batch_size, min(as_good), max(as_good), self.factor(best.batch_size), gain)
