"""The findings of `tune`, and the batch size and rate that follow from them."""

import math
from dataclasses import dataclass, field
from operator import mul
from typing import NamedTuple

import numpy as np

from batchwise.batching.noise import Estimate
from batchwise.choosing import fits
from batchwise.choosing.branches import CONSTANT, Branches, Course, levels, steps_to
from batchwise.choosing.fits import Size
from batchwise.choosing.trials import Fit, least_squares
from batchwise.optim.schedule import Schedule

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
    """The smallest and the largest batch size that are as good."""
    high: int
    factor: float
    """On the configured rate."""
    course: Course
    """How rate and batch size change."""
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
    copies: int = 1
    """What divides each batch size: how often an example is in its batch."""
    sizes: list[Size] = field(default_factory=list)
    noise: list[tuple[int, Estimate]] = field(default_factory=list)
    """Examples seen, and the noise scale of the batches before."""
    no_larger: str = "interrupted"
    """Why no larger micro-batch was run."""
    schedule: Schedule = field(default_factory=Schedule)
    """The configured schedule of the rate."""
    rates: dict[int, Branches] = field(default_factory=dict)
    """The branches of each batch size that was tried."""
    configured: Branches | None = None
    """A branch with the configured batch size, rate and schedule."""
    shapes: list[Branches] = field(default_factory=list)
    """The branches whose rate falls, those in which it falls last first."""
    later: list[Branches] = field(default_factory=list)
    """Longer branches of the best shape: one in which the batch stays, and one in which it doubles."""

    def sets_rates(self) -> bool:
        """Return whether rates were tried; they were not if `configure_optimizers` of the task sets them."""
        return any(branch.rate is not None for each in self.rates.values() for branch in each.branches.values())

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
            return self.passes(batch_size)
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
        return [] if noise is None else self._choices(sizes, Fit(1.0, noise))

    def first_guess(self) -> int:
        """Return the batch size of the least time by the noise scale; without one, the configured batch size."""
        best = min(self.by_noise(), key=lambda choice: choice.seconds, default=None)
        return self.batch_size if best is None else best.batch_size

    # What the branches say

    def steps(self, batch_size: int) -> float:
        """Return the steps of a batch size to losses that all have reached, their geometric mean."""
        return steps_to(self._levels(), self.rates[batch_size].curve())

    def _levels(self) -> list[float]:
        return levels([each.curve() for each in self.rates.values()])

    def fitted(self) -> Fit | None:
        """Return the fit to the steps to the levels, from at least three batch sizes."""
        return least_squares({size: self.steps(size) for size in self.rates})

    def choices(self) -> list[Choice]:
        """Return the costs of the powers of two from the smallest batch size that was tried to the largest."""
        fitted = self.fitted()
        if fitted is None:
            return []
        low, high = min(self.rates), max(self.rates)
        sizes = {
            2**power for power in range(2, high.bit_length()) if low <= 2**power <= high and 2**power % self.copies == 0
        }
        return self._choices(sorted({*sizes, *self.rates}), fitted)

    def _choices(self, sizes: list[int], fitted: Fit) -> list[Choice]:
        found = []
        for size in sizes:
            steps = fitted.steps(size)
            costs = (steps / (fitted.least or 1), steps * size / (fitted.examples or 1), steps * self.seconds(size))
            found.append(Choice(size, *costs))
        fastest = min((choice.seconds for choice in found), default=1.0)
        return [choice._replace(seconds=choice.seconds / fastest) for choice in found]

    def factor(self, batch_size: int) -> float:
        """Return the best factor on the rate: a power of the batch size, fitted to the factors that were found."""
        sizes = sorted(self.rates)
        found = np.log([self.rates[size].between() for size in sizes])
        line = np.polyfit(np.log(sizes), found, min(1, len(sizes) - 1))
        return math.exp(np.polyval(line, math.log(batch_size)))

    def disagree(self) -> bool:
        """Return whether the noise scale of the gradient and that of the branches are far apart."""
        noise, fitted = self.noise_scale(), self.fitted()
        if noise is None or fitted is None:
            return False
        return not 1 / FAR <= fitted.noise_scale / noise <= FAR

    def hindered(self) -> float:
        """Return the seconds that threads waited for a core while steps were timed, as a share of that time."""
        return float(np.median([branch.hindered for each in self.rates.values() for branch in each.timed] or [0.0]))

    def unsure(self) -> float:
        """Return how far a time may be off, as a share.

        That is half the distance of the quartiles of its measurements, and the waits for a core. If other programs are
        always there, measurements agree, but large batches, which use several cores, are slowed more than small ones.
        """
        times = [[branch.seconds for branch in each.timed] for each in self.rates.values() if each.timed]
        quartiles = [np.quantile(each, (0.25, 0.5, 0.75)) for each in times]
        spread = max((float((high - low) / middle / 2) for low, middle, high in quartiles), default=0.0)
        return spread + self.hindered()

    def best(self) -> Advice | None:
        """Return the batch size of the least predicted time, and those whose time is as good.

        That is within 5% of it, and more where other work on the machine makes the seconds of a step unsure. Where
        noise scale and branches disagree, it follows the branches, and the range has what either finds as good. If too
        few batch sizes were tried, it is the configured one, and only the rate is advised.
        """
        choices, fitted, own = self.choices(), self.fitted(), self.rates.get(self.batch_size)
        if not choices and own is None:
            return None
        size = min(choices, key=lambda choice: choice.seconds).batch_size if choices else self.batch_size
        also, near = self.by_noise() if self.disagree() else [], NEAR + self.unsure()
        as_good = [choice.batch_size for choice in (*choices, *also) if choice.seconds <= near] or [size]
        shape, factor, course = self.shape(), self.factor(size), CONSTANT
        if shape is not None:
            factor = shape.factor
            course = (self.later[1] if self.pays_to_double() else shape).course
        theirs = math.inf
        if self.configured is not None:
            theirs = steps_to(self._levels(), self.configured.curve()) * self.seconds(self.batch_size)
        steps = fitted.steps(size) if fitted else self.steps(size)
        gain = theirs / (steps * self.shortened() * self.seconds(size))
        return Advice(size, min(as_good), max(as_good), factor, course, gain)

    # The course of the training

    def shape(self) -> Branches | None:
        """Return the branches of the shape of the rate with the fewest steps; None: none was tried.

        If the best one saves less than 5% of the steps, it is the one whose rate falls last.
        """
        known = self._known_shapes()
        if not known:
            return None
        best = min(known, key=self._steps_of)
        return best if self._steps_of(best) * NEAR < 1 else known[0]

    def _known_shapes(self) -> list[Branches]:
        return [each for each in self.shapes if math.isfinite(each.loss(each.factor))]

    def _steps_of(self, shape: Branches) -> float:
        """Return the steps of a shape, as a share of those of the rate that falls last.

        Only these two are compared, at late losses, which a third one may not have reached.
        """
        curves = [self._known_shapes()[0].curve(), shape.curve()]
        last, own = (steps_to(levels(curves), curve) for curve in curves)
        return own / last

    def shortened(self) -> float:
        """Return the steps of the best shape of the rate, as a share of those of a rate that falls last."""
        shape = self.shape()
        return 1.0 if shape is None else self._steps_of(shape)

    def doubled(self) -> float | None:
        """Return the time to late losses if the batch doubles, as a share of that if it stays; None: not known."""
        if not self.later or any(math.isinf(each.loss(each.factor)) for each in self.later):
            return None
        stays, doubles = self.later
        size, examples = stays.batch_size, doubles.course.doubles
        assert examples is not None
        curves = [stays.curve(), doubles.curve(self.seconds(2 * size) / self.seconds(size))]
        late = levels(curves, float(np.interp(math.log(examples / size), *curves[0])))
        one, other = (steps_to(late, curve) for curve in curves)
        return other / one if math.isfinite(one) else None

    def pays_to_double(self) -> bool:
        """Return whether doubling the batch later saves 5% of the time."""
        ratio = self.doubled()
        return ratio is not None and ratio * NEAR < 1
