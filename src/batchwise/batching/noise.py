"""The gradient noise scale: the batch size at which noise and signal of the gradient are equal.

McCandlish et al. 2018 (arXiv 1812.06162): B_simple = S / |G|^2, where G is the mean of the gradients of single examples
and S the trace of their covariance. A much smaller batch wastes steps, a much larger one wastes examples.

Both follow from the parts (micro-batches, devices) of one ordinary batch. Part i has b_i examples and the mean gradient
g_i; the b_i may differ. The batch has m parts, B = sum b_i examples and the mean gradient g = sum b_i g_i / B. A mean
over b independent examples has E|g_b|^2 = |G|^2 + S / b, so

    E sum_i b_i |g_i|^2 = B |G|^2 + m S    and    E B |g|^2 = B |G|^2 + S,

The difference is (m - 1) S. So S = (sum_i b_i |g_i|^2 - B |g|^2) / (m - 1) and |G|^2 = |g|^2 - S / B are without bias.
For equal parts these are the paper's formulas. S is the mean square between groups of an analysis of variance.

One batch says little, and its |G|^2 is often negative. So divide sums over many batches, and do not average quotients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

FEWEST = 40
"""Fewest batches for which a figure should be given."""


class Sample(NamedTuple):
    """The unbiased estimates of one batch. The unit of the gradient cancels in the noise scale."""

    examples: int
    noise: float
    """The estimate of S, the trace of the covariance of single examples' gradients."""
    signal: float
    """The estimate of |G|^2; it may be negative."""


class Estimate(NamedTuple):
    """A gradient noise scale, in examples, with its 95% confidence interval."""

    scale: float
    low: float
    high: float
    """Infinite where the signal is lost."""
    lost: bool
    """True if the pooled |G|^2 is not significantly positive. Then only the lower bound `low` is known."""

    def __str__(self) -> str:
        """Return the estimate in words."""
        if self.lost:
            return f"more than {self.low:,.3g} examples"
        return f"{self.scale:,.3g} examples (95%: {self.low:,.3g} to {self.high:,.3g})"


def sample(small: float, whole: float, parts: int, examples: int) -> Sample:
    """Return the unbiased estimates from one batch.

    Args:
        small: the sum over the parts of b_i |g_i|^2.
        whole: |g|^2 of the mean gradient over the whole batch.
        parts: number of parts, at least 2.
        examples: number of examples in the whole batch.
    """
    noise = (small - examples * whole) / (parts - 1)
    return Sample(examples, noise, whole - noise / examples)


def noise_scale(samples: Iterable[Sample], confidence: float = 0.95) -> Estimate:
    """Return the noise scale of several batches together, each weighted by its examples.

    The interval is that of the inverse, |G|^2 / S, by the delta method. The denominator S is known well, even if the
    signal is lost in the noise. If the interval reaches zero, the noise scale has no upper bound.

    Raises:
        ValueError: there are fewer than two samples.
    """
    samples = list(samples)
    count = len(samples)
    if count < 2:
        raise ValueError(f"the noise scale of {count} batch(es) has no interval: give at least {FEWEST}")
    noise = math.fsum(s.examples * s.noise for s in samples)
    signal = math.fsum(s.examples * s.signal for s in samples)
    if noise <= 0:  # all examples have the same gradient
        return Estimate(0.0, 0.0, 0.0, False) if signal > 0 else Estimate(math.inf, 0.0, math.inf, True)
    inverse = signal / noise
    squares = math.fsum((s.examples * (s.signal - inverse * s.noise)) ** 2 for s in samples)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    quantile = z + (z**3 + z) / (4 * (count - 1))  # of Student's t (Cornish-Fisher)
    margin = quantile * math.sqrt(squares * count / (count - 1)) / noise
    lost = inverse <= margin
    # |G|^2 is not negative, so neither is the best guess of it.
    low = 1 / (max(inverse, 0.0) + margin) if inverse + margin > 0 else math.inf
    return Estimate(1 / inverse if inverse > 0 else math.inf, low, math.inf if lost else 1 / (inverse - margin), lost)


class NoiseMeter(ABC):
    """Base class of what measures the gradient noise scale during training."""

    @abstractmethod
    def estimate(self) -> Estimate | None:
        """Return the noise scale of the newest samples, or None while there are too few."""
