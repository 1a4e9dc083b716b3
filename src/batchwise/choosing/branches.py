"""Short trainings of one task from the same weights, at several rates and batch sizes, and how far each gets."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from time import perf_counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from batchwise.batching.loader import Batch
from batchwise.batching.schedule import Milestones
from batchwise.choosing import short
from batchwise.choosing.speed import quickest
from batchwise.data.module import DataModule
from batchwise.host import core_waits
from batchwise.tasks.task import Task

SHARE = 0.15
"""The growth of the number of steps from one point of a curve to the next."""
AHEAD = ((0.5, 0.75), (0.25, 0.5))
"""After so much of its steps, a branch must have got so much as far as its rival, or it ends."""
PROGRESS = (0.9, 0.95, 0.98)
"""Branches are compared where they have got so far, from the first loss to the lowest that all have reached."""
WIDEST = 7
"""The most rates that are added beyond the first three, each by a factor of two."""


class Course(NamedTuple):
    """How the rate and the batch size change in the course of a training, after so many examples; None: they do not."""

    falls: int | None = None
    """The rate falls with the square root of the examples, see `Schedule`."""
    doubles: int | None = None
    """The batch is twice as large, and the rate follows."""

    def set(self, task: Task, data: DataModule, batch_size: int) -> None:
        """Give it to a task and its data, without another warm-up than that in examples."""
        shape = "constant" if self.falls is None else "inverse_sqrt"
        rates = task._rates
        rates.schedule = replace(rates.schedule, shape=shape, hold_examples=self.falls, warmup=0.0, floor=0.0)
        if self.doubles is not None:
            data.batch_size_schedule = Milestones([2 * batch_size], examples=[self.doubles])

    def count(self, steps: float, batch_size: int, twice: float) -> float:
        """Return a number of steps in which each one with twice the batch counts as so many."""
        border = math.inf if self.doubles is None else self.doubles / batch_size
        return min(steps, border) + max(0.0, steps - border) * twice


CONSTANT = Course()


class Branch(Callback):
    """A short training, and its curve: the validation loss after some steps, or without validation that of training.

    Args:
        batch_size: examples per step.
        factor: on the rates that the rule gives.
        seed: of the order of the examples.
        steps: optimizer steps.
        rival: a branch of the same batch size; once it is far ahead, this one ends.
        validates: whether there is a validation split.
        course: how rate and batch size change.
    """

    def __init__(
        self,
        batch_size: int,
        factor: float,
        seed: int,
        steps: int,
        rival: "Branch | None" = None,
        validates: bool = False,
        course: Course = CONSTANT,
    ) -> None:
        self.batch_size, self.factor, self.seed, self.steps = batch_size, factor, seed, steps
        self.rival, self.validates, self.course = rival, validates, course
        self.points: list[tuple[int, float]] = []
        self.rate: float | None = None
        """The rate of the first group, at this batch size; None: the task's own `configure_optimizers` sets it."""
        self.diverged = False
        self.seconds = math.inf
        """The seconds of a step, and of the wait for its batch, on the slowest device."""
        self.hindered = 0.0
        """The seconds that threads have waited for a core, as a share of those of the branch."""
        self._times: list[float] = []
        self._waits: list[float] = []
        self._start = 0.0, 0.0
        self._losses: list[float] = []
        self._next, self._lap = 1, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Task, batch: Batch, batch_idx: int) -> None:
        """Set the rate, before the first step."""
        if batch.step == 0:
            self.rate = pl_module._rates.times(self.factor)
            self._start = perf_counter(), core_waits()
        now = perf_counter()
        if batch_idx:  # not the start of an epoch
            self._waits.append(now - self._lap)
        self._lap = now

    def on_train_batch_end(self, trainer: Any, pl_module: Task, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Take the time and the loss, and validate if it is due."""
        self._losses.append(pl_module._step.sums.mean())  # waits for the device
        now, step = perf_counter(), trainer.global_step
        self._times.append(now - self._lap)
        self._lap = now
        due = step >= min(self._next, self.steps)
        if due:
            self._next = max(step + 1, math.ceil(step * (1 + SHARE)))
        trainer.val_check_batch = 1 if due and self.validates else short.NEVER
        if due and not self.validates:
            self._note(trainer, statistics.mean(self._losses))
        if due:
            self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Add a point to the curve."""
        self._note(trainer, float(trainer.callback_metrics["val/loss"]))
        self._lap = perf_counter()

    def _note(self, trainer: pl.Trainer, loss: float) -> None:
        step = trainer.global_step
        self.points.append((step, loss))
        if self.rival is not None and len(self.rival.points) > 1:
            losses, own = self.rival.until(step), self.until(step)[-1]
            fallen = losses[0] - losses[-1]
            for share, least in AHEAD:
                if step >= share * self.steps:
                    trainer.should_stop = bool(losses[0] - own < least * fallen)
                    break

    def agree(self, largest: Callable[[float], float]) -> None:
        """End the branch, and let all devices take the times of the slowest.

        Of the waits for batches the mean counts, because a loader has several ready at once, and then none.
        """
        quick = quickest(self._times[1:] or self._times or [0.0])
        self.seconds = largest(quick + float(np.mean(self._waits or [0.0])))
        since, waited = self._start
        waited = max(0.0, core_waits() - waited)  # those of threads that have ended are not known
        self.hindered = largest(waited / max(1e-9, perf_counter() - since))

    def until(self, step: int) -> np.ndarray:
        """Return the smoothed losses up to a step: without later ones, branches share the noise of their batches."""
        return smoothed(tuple(point for point in self.points if point[0] <= step))[1]

    def final(self) -> float:
        """Return the loss at the end. That of a branch that ended early is as far from its rival's as it was then."""
        if self.diverged or not self.points or not math.isfinite(self.points[-1][1]):
            return math.inf
        last = self.points[-1][0]
        own = float(self.until(last)[-1])
        if last >= self.steps or self.rival is None:
            return own
        return self.rival.final() + max(0.0, own - float(self.rival.until(last)[-1]))


Curve = tuple[np.ndarray, np.ndarray]
"""Logarithms of steps, and losses."""


@cache  # each curve is asked for many times
def smoothed(points: tuple[tuple[float, float], ...]) -> Curve:
    """Return logarithms of steps, rising, and the losses that are nearest to those of the points and never rise.

    (Isotonic regression. So a loss that goes up and down counts with its mean.)
    """
    from sklearn.isotonic import isotonic_regression

    if not points:  # it diverged, or was never begun
        return np.zeros(1), np.full(1, math.inf)
    steps, losses = (np.array(each, float) for each in zip(*sorted(points), strict=True))
    return np.log(steps), isotonic_regression(np.where(np.isfinite(losses), losses, 1e30), increasing=False)


Train = Callable[[Branch], None]


class Branches:
    """The branches of one batch size.

    Args:
        batch_size: examples per step.
        steps: optimizer steps of a branch.
        train: trains a branch.
        validates: whether there is a validation split.
        course: how rate and batch size change.
    """

    def __init__(self, batch_size: int, steps: int, train: Train, validates: bool, course: Course = CONSTANT) -> None:
        self.batch_size, self.steps, self.course = batch_size, steps, course
        self._train, self._validates = train, validates
        self.branches: dict[tuple[float, int], Branch] = {}
        self.timed: list[Branch] = []
        """Branches of a few steps, which were timed in turn with those of other batch sizes."""

    def run(self, factor: float, seed: int) -> None:
        """Train a branch, unless that has been done."""
        if (factor, seed) not in self.branches:
            others = [branch for (_, other), branch in self.branches.items() if other == seed]
            whole = [branch for branch in others if branch.points and branch.points[-1][0] >= self.steps]
            rival = min(whole, key=Branch.final, default=None)
            branch = Branch(self.batch_size, factor, seed, self.steps, rival, self._validates, self.course)
            self._train(branch)
            self.branches[factor, seed] = branch

    def loss(self, factor: float) -> float:
        """Return the mean of the last losses over the seeds."""
        return statistics.mean(branch.final() for (other, _), branch in self.branches.items() if other == factor)

    def search(self, middle: float) -> None:
        """Try a rate, half of it and twice of it, and go on by factors of two while the best one is at an end.

        The best and those beside it are tried once more, with another order of the examples.
        """
        for factor in (middle, middle * 2, middle / 2):
            self.run(factor, 0)
            if self.branches[factor, 0].rate is None:
                return
        for _ in range(WIDEST):
            factors, best = self.factors, self.factor
            if factors[0] < best < factors[-1]:
                break
            self.run(best / 2 if best == factors[0] else best * 2, 0)
        for _ in range(2):  # the second seed may move the best rate by one
            best = self.factor
            for factor in (best, best / 2, best * 2):
                self.run(factor, 0)
                self.run(factor, 1)

    @property
    def factors(self) -> list[float]:
        """The factors that were tried, in rising order."""
        return sorted({factor for factor, _ in self.branches})

    @property
    def factor(self) -> float:
        """The factor with the least loss at the end; of equals, the lowest."""
        return min(self.factors, key=self.loss)

    def is_found(self) -> bool:
        """Return whether training at the best factor lowers the loss: it is finite, and no factor below was as good."""
        best = self.factor
        return math.isfinite(self.loss(best)) and (best > self.factors[0] or len(self.factors) == 1)

    def between(self) -> float:
        """Return the factor at the lowest point of a parabola that fits the losses around the best one, by log(factor).

        It is at most a factor of the square root of two from the best factor, and not above it if twice of it diverged.
        """
        best = self.factor
        near = [factor for factor in self.factors if 1 / 4 <= factor / best <= 4 and math.isfinite(self.loss(factor))]
        if len(near) < 3:
            return best
        curvature, slope, _ = np.polyfit([math.log2(factor / best) for factor in near], list(map(self.loss, near)), 2)
        highest = 0.5 if best * 2 in near else 0.0
        return best * 2.0 ** float(np.clip(-slope / (2 * curvature), -0.5, highest)) if curvature > 0 else best

    def best(self) -> list[Branch]:
        """Return the branches at the best factor."""
        return [branch for (factor, _), branch in self.branches.items() if factor == self.factor]

    def seconds(self) -> float:
        """Return the seconds of a step."""
        timed = self.timed or [branch for branch in self.branches.values() if branch.points]
        return statistics.median(branch.seconds for branch in timed)

    def curve(self, twice: float = 1.0) -> Curve:
        """Return the smoothed curve of all seeds at the best factor.

        Args:
            twice: what a step with twice the batch counts as, after the batch has doubled.
        """
        points = [point for each in self.best() for point in each.points]
        return smoothed(tuple((self.course.count(step, self.batch_size, twice), loss) for step, loss in points))


def levels(curves: Sequence[Curve], first: float | None = None) -> list[float]:
    """Return losses that all curves have reached, between a first loss and the lowest: close to the latter."""
    first = max(losses[0] for _, losses in curves) if first is None else first
    last = max(losses[-1] for _, losses in curves)
    return [last + (1 - share) * (first - last) for share in PROGRESS]


def steps_to(reached: list[float], curve: Curve) -> float:
    """Return the steps to losses, their geometric mean; infinite if one was not reached."""
    steps, losses = curve
    if losses[-1] > min(reached):
        return math.inf
    # Of equal losses the middle: the first ones are low by chance, the last ones high.
    values, first, counts = np.unique(losses, return_index=True, return_counts=True)
    middle = [steps[start : start + count].mean() for start, count in zip(first, counts, strict=True)]
    return math.exp(np.interp(reached, values, middle).mean())
