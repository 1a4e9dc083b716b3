"""Short trainings of copies of a task, which find its learning rate, batch size, and the course of both."""

import copy
import math
from collections.abc import Callable

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from batchwise.batching.loader import Batch
from batchwise.batching.noise import FEWEST
from batchwise.batching.schedule import BatchSizes
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.choosing import short
from batchwise.choosing.branches import CONSTANT, Branch, Branches, Course
from batchwise.choosing.findings import Advice, Findings
from batchwise.data.module import DataModule
from batchwise.errors import TrainingStopped
from batchwise.tasks.task import Task

PARTS = 4  # micro-batches of a batch; the noise scale comes from their gradients
SHORTEST = 80
"""The fewest steps of a branch at the configured batch size, with the usual budget: fewer say little, by the noise."""
USUAL = 0.25
"""The usual budget."""
FEWEST_STEPS = 20
"""The fewest steps of a branch at the batch size of the first guess."""
BRANCHES = 30
"""Branches of full length that the budget is divided by."""
VALIDATED = 0.4
"""The most validation examples, as a share of those of a branch. With more, which take longer than the branch, the loss
of training says it: in so large a data set, a branch sees hardly an example twice."""
LEAST = 3
"""The fewest batch sizes: two figures, the noise scale and the fewest steps, come from them."""
FIRST_ROUNDS, ROUNDS, TURN, TIMED = 2, 7, 0.1, (12, 40)
"""Rounds in which the steps of all batch sizes are timed: before others are tried, and at the end. Then the seconds of
a turn, and its fewest and most steps."""
SHAPES = ((1, 1.0), (2, 1 / 4), (4, 1 / 16))
"""Rates that start so many times as high and are held for such a share of a branch. All end it at the same rate."""
LONG = 4
"""How much longer than a branch a training must be, to see whether a larger batch pays later."""
LONGEST = 8
"""The most steps of a branch, in those at the configured batch size: where they would be more, a size is not tried."""
WIDER = 2
"""Batch sizes that are added while the best one is at an end, each four times as large or as small."""


class Pace(Callback):
    """Notes the noise scale in the course of a training."""

    def __init__(self, findings: Findings, noise: NoiseScale) -> None:
        self.findings, self.noise = findings, noise

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Take an estimate from the samples since the last one, if there are enough."""
        if estimate := self.noise.estimate():
            assert pl_module.data.plan is not None
            self.findings.noise.append((pl_module.data.plan.examples_at(trainer.global_step), estimate))
            self.noise.samples.clear()


class Search:
    """Short trainings of copies of a task: rates at the configured batch size, its noise, other sizes, other shapes.

    Args:
        trainer: has devices and precision.
        task: stays as it is.
        data: has the examples.
        findings: gets the results.
        budget: examples of the short trainings, as a share of those of the training.
        agreed: returns the largest of the values of all devices.
        say: is told what runs.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        task: Task,
        data: DataModule,
        findings: Findings,
        budget: float,
        agreed: Callable[[float], float],
        say: Callable[[str], None],
    ) -> None:
        self._trainer, self._task, self._data, self._findings = trainer, task, data, findings
        self._agreed, self._say = agreed, say
        val = data.split("val")
        examples = min(data.total_examples(), 20 * len(data.split("train") or ()))
        most, least = math.ceil(examples / findings.batch_size), round(SHORTEST * min(1.0, budget / USUAL))
        steps = max(least, FEWEST_STEPS, round(examples * budget / BRANCHES / findings.batch_size))
        self._steps, self._knee = min(most, steps), findings.knee().examples
        self._validates = val is not None and len(val) <= VALIDATED * self._steps * findings.batch_size
        self._far: float | None = None
        """The steps of a branch if there were no noise; None: only the configured batch size is tried."""

    def go(self) -> None:
        """Train the branches, and time the steps of each batch size. The results go into the findings."""
        self._sizes()
        self._time(ROUNDS)
        best = self._findings.best()
        if best is not None and self._findings.sets_rates() and not self._findings.schedule.needs_end:
            self._shapes(best)
            self._later(best.batch_size)

    def _time(self, rounds: int) -> None:
        """Time the steps of all batch sizes in turn, so that other work on the machine falls on all alike."""
        for _ in range(rounds):
            for size, rates in self._findings.rates.items():
                branch = Branch(size, rates.factor, 0, round(float(np.clip(TURN / rates.seconds(), *TIMED))))
                self._train(branch, self._knee)
                rates.timed.append(branch)

    def _sizes(self) -> None:
        """Search for the rates of several batch sizes."""
        findings, own, steps = self._findings, self._findings.batch_size, self._steps
        factor = self._rates(own, steps, 1.0)
        if self._task._couples or not findings.rates:
            return
        part = max(findings.unit, own // PARTS // findings.unit * findings.unit)
        noise = NoiseScale(every_n_steps=1)
        self._train(Branch(own, factor, 0, max(FEWEST, steps)), part, noise, Pace(findings, noise))
        scale, guess = findings.noise_scale() or own, min(findings.first_guess(), findings.largest)
        self._far = max(steps / (1 + scale / own), FEWEST_STEPS / (1 + scale / guess))

        def at(size: int) -> None:
            near = min(findings.rates, key=lambda other: abs(math.log(other / size)))
            self._rates(size, self._length(size), findings.rates[near].factor)

        if self._far > steps / (1 + scale / own):
            at(own)
        for by in (1, 4, 1 / 4, 2, 1 / 2, 1 / 16):
            size = self._whole(guess * by)
            wanted = by in (1, 4, 1 / 4) or len(findings.rates) < LEAST
            if wanted and self._may_try(size) and size not in findings.rates:
                at(size)
        for _ in range(WIDER):
            self._time(FIRST_ROUNDS)
            best = min(findings.choices(), key=lambda choice: choice.seconds, default=None)
            if best is None:
                return
            low, high, size = min(findings.rates), max(findings.rates), best.batch_size
            beyond = {high: (4, 2), low: (1 / 4, 1 / 2)}.get(size, ())
            new = next((new for by in beyond if self._may_try(new := self._whole(size * by)) and new != size), None)
            if new is None:
                return
            at(new)

    def _shapes(self, best: Advice) -> None:
        """Try rates that fall, at the recommended batch size."""
        size, steps = best.batch_size, self._length(best.batch_size)
        for by, share in SHAPES:
            shape = self._branches(size, steps, Course(falls=math.ceil(share * steps * size)))
            for seed in (0, 1):
                shape.run(best.factor * by, seed)
            self._findings.shapes.append(shape)

    def _later(self, size: int) -> None:
        """See whether twice the batch pays after a branch, in branches that are twice as long."""
        findings, shape = self._findings, self._findings.shape()
        examples = size * self._length(size)
        fixed = not findings.choices() or type(self._data.batch_size_schedule) is not BatchSizes
        too_short = self._data.total_examples() < LONG * examples
        if shape is None or fixed or too_short or 2 * size > findings.largest:
            return
        stays = self._branches(size, 2 * examples // size, shape.course)
        doubles = self._branches(size, 3 * examples // (2 * size), shape.course._replace(doubles=examples))
        findings.later = [stays, doubles]
        for seed in (0, 1):  # the second only if the first says that it pays
            for each in findings.later:
                each.run(shape.factor, seed)
            if not findings.pays_to_double():
                return

    def _whole(self, size: float) -> int:
        """Return the batch size next below, or the least one."""
        copies = self._findings.copies
        return max(1, int(size) // copies) * copies

    def _may_try(self, size: int) -> bool:
        if not self._findings.unit <= size <= self._findings.largest:
            return False
        return self._length(size) <= LONGEST * self._length(self._findings.batch_size)

    def _length(self, size: int) -> int:
        """Return the steps in which a batch size gets as far as the others, by the noise scale."""
        if self._far is None:
            return self._steps
        return max(2, round(self._far * (1 + (self._findings.noise_scale() or self._findings.batch_size) / size)))

    def _branches(self, size: int, steps: int, course: Course = CONSTANT) -> Branches:
        return Branches(size, steps, lambda branch: self._train(branch, self._knee), self._validates, course)

    def _rates(self, size: int, steps: int, middle: float) -> float:
        """Search for the rate of a batch size, and return it as a factor."""
        rates = self._branches(size, steps)
        rates.search(middle)
        if size == self._findings.batch_size:
            schedule = self._findings.schedule
            falls = schedule.shape == "inverse_sqrt"
            course = Course((schedule.hold_examples or schedule.warmup_examples) if falls else None)
            self._findings.configured = self._branches(size, steps, course)
            self._findings.configured.run(1.0, 0)
        if rates.is_found():
            self._findings.rates[size] = rates
        return rates.factor

    def _train(self, branch: Branch, micro_batch: int, *callbacks: Callback) -> None:
        self._say(f"batch_size {branch.batch_size}, {branch.factor:g} times the rate")
        task, data = copy.deepcopy(self._task), short.resized(self._data, branch.batch_size, micro_batch)
        task._rates.refer(self._findings.batch_size)
        branch.course.set(task, data, branch.batch_size)
        assert data.seed is not None
        data.seed += branch.seed
        try:
            short.train(self._trainer, task, data, branch.steps, [branch, *callbacks], float(branch.validates))
        except TrainingStopped:  # its loss is not finite any more
            branch.diverged = True
        branch.agree(self._agreed)
