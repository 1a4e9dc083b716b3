"""`sweep`: train each batch size to a target, with the learning rate tuned for each (Shallue et al. 2018)."""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, TypeVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchwise.batching.loader import Batch
from batchwise.choosing import short, trials
from batchwise.choosing.figure import draw_sweep
from batchwise.choosing.trials import Run
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, TrainingStopped, mistakes
from batchwise.host import wait_for
from batchwise.tasks.task import Task

Number = TypeVar("Number", int, float)


class Recipe(NamedTuple):
    """A maker of models, and a digest that identifies their training."""

    model: Callable[[int], Task]
    """Makes a new task, with the initial weights of a seed."""
    digest: str
    """A hash of all settings except batch size, rate, seed and length."""
    rates: dict[str, float]
    """The learning rates among the arguments of the optimizer."""


class Target(NamedTuple):
    """A value that a validation metric should reach, such as `val/accuracy>=0.97`."""

    metric: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str, known: list[str]) -> "Target":
        """Read a target.

        Raises:
            Mistake: the text is no target, or its metric is not known.
        """
        match = re.fullmatch(r"\s*([^<>=\s]+)\s*(>=|<=)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*", text)
        if match is None or match[1] not in known:
            raise Mistake(f"target is '{text}': write {' or '.join(known)}, then >= or <=, then a number")
        return cls(match[1], match[2], float(match[3]))

    def reached(self, value: float) -> bool:
        """Return whether a value of the metric reaches the target. One that is not finite does not."""
        return math.isfinite(value) and (value >= self.value if self.sign == ">=" else value <= self.value)


class Race(Callback):
    """Validates whenever the number of steps has grown by a share, stops at the target, and times the steps alone.

    So the steps to the target are known up to the same share, at any batch size.
    """

    def __init__(self, target: Target, factor: float, share: float, steps: int) -> None:
        self.target, self.factor, self.share, self.last = target, factor, share, steps
        self.reached, self.steps, self.learning_rate = False, 0, 0.0
        self._next, self._seconds, self._lap = 1, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Task, batch: Batch, batch_idx: int) -> None:
        """Set the rate, before the first step."""
        if batch.step == 0:
            rate = pl_module._rates.times(self.factor)
            if rate is None:
                raise Mistake(
                    "sweep tries learning rates, but configure_optimizers of the task sets them: write model.optimizer "
                    "and model.schedule in its place"
                )
            self.learning_rate = rate

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Take the time, and validate if it is due."""
        self.steps = trainer.global_step
        due = self.steps >= min(self._next, self.last)
        if due:
            wait_for(pl_module.device)
        now = perf_counter()
        self._seconds += now - self._lap if self.steps > 1 else 0.0
        self._lap = now
        trainer.val_check_batch = 1 if due else short.NEVER
        if due:
            self._next = max(self.steps + 1, math.ceil(self.steps * (1 + self.share)))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Stop at the target."""
        self.reached = self.target.reached(float(trainer.callback_metrics[self.target.metric]))
        trainer.should_stop = self.reached
        self._lap = perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of all steps. The first step has costs that come once, so it counts as the mean of the others."""
        return self._seconds * self.steps / max(1, self.steps - 1)


def sweep(
    trainer: pl.Trainer,
    task: Task,
    data: DataModule,
    recipe: Recipe | None,
    results: str | None,
    *,
    batch_sizes: str,
    target: str,
    seeds: int,
    rates: str,
    val_share: float,
) -> list[Run]:
    """Do the runs that are missing, print the table, draw `sweep.png` in the run's folder, and return all runs.

    Args:
        trainer: has the run's folder, device and precision, and the length of a training.
        task: the task to be trained; it stays as it is. The rate is constant after the warm-up in examples, so that the
            steps to the target do not depend on the length of a training. Callbacks take no part.
        data: has its plan.
        recipe: makes the tasks; None: all seeds have the weights of `task`.
        results: the file of all runs; None: `sweep.csv` beside the folders of the runs.
        batch_sizes: numbers with commas between them.
        target: see `Target`.
        seeds: number of trainings of each batch size at each rate.
        rates: the grid, as factors on the rate that the rule gives, with commas between them.
        val_share: growth of the number of steps from one validation to the next.

    Raises:
        Mistake: an argument makes no sense.
    """
    sizes, factors = sorted(_numbers("batch_sizes", batch_sizes, int)), sorted(_numbers("rates", rates, float))
    goal = Target.parse(target, [name for name in task.metric_names() if name.startswith("val/")])
    if trainer.world_size > 1:
        raise Mistake("sweep trains on one device: write trainer.devices 1")
    if data.split("val") is None:
        raise Mistake("sweep looks for a target in validation, but the data has no val split: give it one")
    if trainer.limit_val_batches == 0:
        raise Mistake("sweep looks for a target in validation, but trainer.limit_val_batches is 0: write at least 1")
    plan, steps = data.plan, data.total_steps()
    assert plan is not None
    assert data.seed is not None
    if steps == math.inf:
        raise Mistake("sweep must know how long a training may be: write trainer.max_epochs")
    budget = plan.examples_at(int(steps))
    path = Path(results) if results else Path(trainer.default_root_dir).parent / "sweep.csv"
    recipe = recipe or Recipe(lambda seed: copy.deepcopy(task), "", {})
    with mistakes():  # before the first training
        for size in sizes:
            short.resized(data, size, data.micro_batch_size).setup("fit")
    try:
        path.open("a").close()
    except OSError as error:
        raise Mistake(f"results {path} cannot be written ({error.strerror}): write another --results") from error
    config, all_seeds, console = f"{recipe.digest} {target}", [data.seed + number for number in range(seeds)], Console()

    def known() -> list[Run]:
        found = {  # two sweeps at once may both have done a run, and a longer sweep have done it again
            (run.batch_size, run.seed, run.factor): run
            for run in trials.read(path)
            if run.config == config
            and run.batch_size in sizes
            and run.seed in all_seeds
            and (run.reached or run.examples >= budget)
        }
        return list(found.values())

    before = len(known())
    with isolate_rng(), Progress(console=console, transient=True) as bars:
        bar, stopped = bars.add_task(""), None
        try:
            while waiting := list(trials.due(runs := known(), sizes, all_seeds, factors)):
                seed, size, factor = waiting[0]
                what = f"batch_size {size}, {factor:g} times the rate, seed {seed}"
                bars.update(bar, description=what, completed=len(runs), total=len(runs) + len(waiting))
                own = recipe.model(seed)
                own._rates.schedule = replace(own._rates.schedule, shape="constant", warmup=0.0)
                own._rates.refer(plan.batch_size)
                feed = short.resized(data, size, data.micro_batch_size)
                feed.seed = seed
                feed.setup("fit")
                assert feed.plan is not None
                epochs, rest = divmod(budget, feed.plan.examples_per_epoch)
                most = epochs * feed.plan.steps_per_epoch - (-rest // size)
                race = Race(goal, factor, val_share, most)
                try:
                    short.train(trainer, own, feed, most, [race], validate=trainer.limit_val_batches)
                except TrainingStopped:  # its loss is not finite any more
                    race.reached = False
                examples = feed.plan.examples_at(race.steps) if race.reached else budget
                done = (race.reached, race.steps if race.reached else most, examples, round(race.seconds, 6))
                trials.append(path, Run(config, size, seed, factor, race.learning_rate, *done))
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the former into the latter
            stopped = stop
            console.print("interrupted: the same command goes on from here")
    runs = known()
    if runs:
        found = trials.results(runs)
        report(console, found, target, budget)
        picture = Path(trainer.default_root_dir) / "sweep.png"
        draw_sweep(picture, found, trials.fit(found), target)
        print(f"look at it: {picture}\nall runs:   {path}" + (f" (of these, {before:,} were there)" if before else ""))
    if stopped is not None:
        raise stopped
    return runs


def _numbers(key: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        found = [kind(part) for part in text.strip("[] ").split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise Mistake(f"{key} is '{text}': write numbers above 0 with commas between them, such as 1,2,4")
    return list(set(found))


def report(console: Console, found: list[trials.Result], target: str, budget: int) -> None:
    """Print one row per batch size."""
    curve, least = trials.fit(found), min(each.seconds for each in found)
    table = Table("batch_size", "learning rate", "reached", "steps", "by fit", "examples", "seconds", "", box=None)
    table.title = f"to {target}: medians over the seeds, at the best rate"
    for each in found:
        first, reached = each.runs[0], sum(run.reached for run in each.runs)
        row = [f"{each.batch_size:,}", f"{first.learning_rate:.3g} ({first.factor:g}x)", f"{reached}/{len(each.runs)}"]
        if math.isinf(each.steps):
            row = [row[0], "none", row[2], "-", "-", f">{budget:,}", "-", "never"]
        else:
            predicted = f"{curve.steps(each.batch_size):,.0f}" if curve else "-"
            mark = "fastest" if each.seconds == least else ""
            row += [f"{each.steps:,.0f}", predicted, f"{each.examples:,.0f}", f"{each.seconds:.3g}", mark]
        table.add_row(*row)
    console.print(table)
    if curve and curve.least:
        print(f"steps = {curve.least:,.1f} (1 + {curve.noise_scale:,.0f} / batch_size), fitted")
