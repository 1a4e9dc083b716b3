"""Grids of small trainings: each batch size at each learning rate, until two targets are reached.

Time is taken on the thread's own clock, which stops while another process has the core.
"""

import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from problems import PROBLEMS, Problem, ready

from batchwise.choosing import short
from batchwise.choosing.branches import CONSTANT, Course
from batchwise.errors import TrainingStopped

SHARE = 0.07
"""The growth of the number of steps from one validation to the next."""


@dataclass(frozen=True)
class Run:
    """A training. The steps are those to each target, infinite if it was not reached."""

    problem: str
    optimizer: str
    size: int
    factor: float
    """Times the rate that the rule gives."""
    seed: int
    steps: tuple[float, float]
    step_seconds: float
    course: Course = CONSTANT
    """How rate and batch size change."""


class Curve(Callback):
    """Validates whenever the number of steps has grown by a share, until both targets are reached."""

    def __init__(self, problem: Problem | None = None, factor: float = 1.0) -> None:
        self.problem, self.factor = problem, factor
        self.found = [math.inf, math.inf]
        self.times: list[float] = []
        self._next, self._lap = 1, 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Set the rate, before the first step."""
        if batch.step == 0:
            pl_module._rates.times(self.factor)
        self._lap = time.thread_time()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the time, and validate if it is due."""
        self.times.append(time.thread_time() - self._lap)
        due = trainer.global_step >= self._next and self.problem is not None
        trainer.val_check_batch = 1 if due else short.NEVER
        if due:
            self._next = max(trainer.global_step + 1, math.ceil(trainer.global_step * (1 + SHARE)))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note a target that is reached."""
        assert self.problem is not None
        value = float(trainer.callback_metrics[self.problem.metric])
        for number, target in enumerate(self.problem.targets):
            if self.found[number] == math.inf and self.problem.reached(value, target):
                self.found[number] = trainer.global_step
        trainer.should_stop = math.isfinite(self.found[1])


class Grid:
    """The trainings of a task with an optimizer, those of a file first.

    Args:
        name: the task.
        optimizer: name of the optimizer.
        path: file of all trainings.
    """

    def __init__(self, name: str, optimizer: str, path: Path) -> None:
        self.name, self.optimizer, self.path, self.problem = name, optimizer, path, PROBLEMS[name]
        self.data = self.problem.data(batch_size=64, seed=0)
        self.trainer = ready(self.data, path.parent)
        plan = self.data.plan
        assert plan is not None
        self.examples = plan.examples_per_epoch * self.problem.epochs
        self.clocked: dict[int, float] = {}
        self.runs = [run for run in read(path) if (run.problem, run.optimizer) == (name, optimizer)]

    def at(self, size: int, factor: float | None = None, course: Course = CONSTANT) -> list[Run]:
        """Return the runs of a batch size, at a rate or at all."""
        return [run for run in self.runs if (run.size, run.course) == (size, course) and factor in (None, run.factor)]

    def train(self, size: int, factor: float, seed: int, course: Course = CONSTANT) -> Run:
        """Train, unless that has been done."""
        for run in self.at(size, factor, course):
            if run.seed == seed:
                return run
        task, data = self.problem.make(self.optimizer, seed), short.resized(self.data, size, None)
        task._rates.refer(64)
        course.set(task, data, size)
        data.seed = seed
        curve = Curve(self.problem, factor)
        steps = -(-self.examples // size)
        if known := [self.seconds(run, 1) for run in self.runs if math.isfinite(run.steps[1])]:
            steps = min(steps, math.ceil(self.problem.hopeless * min(known) / self.step(size)))
        with contextlib.suppress(TrainingStopped):  # its loss is not finite any more
            short.train(self.trainer, task, data, max(1, steps), [curve], validate=1.0)
        run = Run(
            self.name, self.optimizer, size, factor, seed, (curve.found[0], curve.found[1]),
            statistics.median(curve.times), course,
        )  # fmt: skip
        self.runs.append(run)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        return run

    def clock(self, sizes: Iterable[int]) -> None:
        """Measure a step of each batch size in turn, seven times 12 steps. From here on, times are by this."""
        path = self.path.with_name(f"{self.name}, {self.optimizer}, clock.json")
        known = json.loads(path.read_text()) if path.exists() else {}
        if not {str(size) for size in sizes} <= known.keys():
            found: dict[int, list[float]] = {size: [] for size in sizes}
            for _ in range(7):
                for size, times in found.items():
                    task, data, curve = (
                        self.problem.make(self.optimizer, 0),
                        short.resized(self.data, size, None),
                        Curve(),
                    )
                    short.train(self.trainer, task, data, 13, [curve])
                    times.append(statistics.median(curve.times[1:]))
            known = {str(size): statistics.median(times) for size, times in found.items()}
            path.write_text(json.dumps(known))
        self.clocked = {int(size): seconds for size, seconds in known.items()}

    def step(self, size: int) -> float:
        """Return the seconds of a step; of a batch size that is not known, two milliseconds."""
        found = [run.step_seconds for run in self.runs if run.size == size] or [2e-3]
        return self.clocked.get(size) or statistics.median(found)

    def seconds(self, run: Run, target: int) -> float:
        """Return the seconds to a target."""
        one = self.step(run.size)
        twice = 1.0 if run.course.doubles is None else self.step(2 * run.size) / one
        return run.course.count(run.steps[target], run.size, twice) * one

    def median(self, size: int, factor: float, target: int, course: Course = CONSTANT) -> float:
        """Return the median of the seconds over the seeds."""
        found = [self.seconds(run, target) for run in self.at(size, factor, course)]
        return statistics.median_high(found) if found else math.inf

    def best(self, size: int, target: int, seeds: int) -> float | None:
        """Return the best rate among those that were trained with so many seeds, as a factor."""
        factors = {run.factor for run in self.at(size) if len(self.at(size, run.factor)) >= seeds}
        best = min(factors, key=lambda factor: self.median(size, factor, target), default=None)
        return best if best is not None and math.isfinite(self.median(size, best, target)) else None

    def fill(self, seeds: int) -> None:
        """Train all batch sizes: each rate with one seed, and those around the best with all."""
        sizes = sorted(self.problem.sizes, key=lambda size: abs(math.log2(size / 128)))
        for size in sizes:
            near = [best for other in self.problem.sizes for t in (0, 1) if (best := self.best(other, t, 1))]
            middle = 2.0 ** round(statistics.median(map(math.log2, near))) if near else 1.0
            for factor in (middle, middle / 2, middle * 2):
                self.train(size, factor, 0)
            for number in range(1, 6):  # while the best rate of a target is at an end
                factors = sorted({run.factor for run in self.at(size)})
                bests = [self.best(size, target, 1) for target in (0, 1)]
                new = [factors[0] / 2] * (factors[0] in bests or (None in bests and number < 3))
                new += [factors[-1] * 2] * (factors[-1] in bests or (None in bests and number < 3))
                for factor in new:
                    self.train(size, factor, 0)
            for _ in range(3):
                for target in (0, 1):
                    bests = {self.best(size, target, number) for number in (1, seeds)} - {None}
                    for factor in sorted({best * by for best in bests if best for by in (0.5, 1, 2)}):
                        for seed in range(seeds):
                            self.train(size, factor, seed)
            print(f"{self.name}, {self.optimizer}, {size}: {len(self.runs)} trainings", flush=True)


def read(path: Path) -> Iterator[Run]:
    """Yield the runs of a file."""
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        yield Run(**row | {"steps": tuple(row["steps"]), "course": Course(*row.get("course", ()))})
