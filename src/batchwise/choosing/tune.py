"""`tune`: which batch size and learning rate to train with, by memory, speed, gradient noise and short branches."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import Progress

from batchwise.batching.loader import Batch
from batchwise.batching.noise import FEWEST
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.choosing import fits, short
from batchwise.choosing.advice import leave, report
from batchwise.choosing.branches import Branch, Branches
from batchwise.choosing.findings import Findings
from batchwise.choosing.speed import Stopwatch, Way
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
ROUNDS, TIMED = 7, 12
"""Rounds in which the steps of all batch sizes are timed, and steps in each."""
SHAPES = ((1, 1.0), (2, 1 / 4), (4, 1 / 16))
"""Rates that start so many times as high and are held for such a share of a branch. All end it at the same rate."""
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


def tune(
    trainer: pl.Trainer,
    task: Task,
    data: DataModule,
    budget: float,
    memory_gib: float | None,
    rates: dict[str, float],
) -> Findings:
    """Find batch size and learning rate, print tables, draw `tune.png`, and write `tuned.yaml` in the run's folder.

    All devices take part, as in `fit`. In the first phase each device runs micro-batches by itself, and all agree on
    the result of each. Then come short trainings.

    Args:
        trainer: has the run's folder, devices and precision.
        task: the task to be trained; it stays as it is.
        data: has the examples.
        budget: examples of the short trainings, as a share of those of the training; small trainings take more.
        memory_gib: memory that each device may use, in GiB; None: most of what is free.
        rates: the learning rates in the configuration of the optimizer, by the names of its arguments.

    Raises:
        ValueError: the task has several optimizers, or too few examples.
    """
    if task._players() != [()]:
        raise ValueError(
            "tune compares losses, and with several optimizers no loss says how far training is: "
            "compare batch sizes by a metric of yours, with sweep"
        )
    launcher = trainer.strategy.launcher
    if launcher is None:
        return _tune(trainer, task, data, budget, memory_gib, rates)
    return launcher.launch(_tune, trainer, task, data, budget, memory_gib, rates, trainer=trainer)


@isolate_rng()  # restores the generators
def _tune(
    trainer: pl.Trainer, task: Task, data: DataModule, budget: float, memory_gib: float | None, rates: dict[str, float]
) -> Findings:
    trainer.strategy.setup_environment()
    trainer.strategy.barrier()  # the first process has prepared the data
    data.setup("fit")
    started, plan, train, device = perf_counter(), data.plan, data.split("train"), trainer.strategy.root_device
    assert plan is not None
    assert train is not None

    def largest(value: float) -> float:
        values = torch.tensor(value, dtype=torch.float64, device=device)
        return float(trainer.strategy.reduce(values, reduce_op="max"))  # type: ignore[arg-type]

    agreed, unit = largest if trainer.world_size > 1 else float, plan.unit
    memory = -agreed(-(memory_gib * 2**30 if memory_gib else fits.free_memory(device, trainer.num_devices)))
    most = min(len(train), 2**14) // unit * unit
    if most == 0:
        raise ValueError(f"there are {len(train)} training examples, of which {unit} must stay together: give it more")
    way = Way(unit, str(trainer.precision), getattr(trainer, "channels_last", False), threads=torch.get_num_threads())
    findings = Findings(plan.batch_size, max(unit, most // 2), plan.devices, unit, schedule=task._rates.schedule)
    console = Console()
    with Progress(console=console, transient=True, disable=not trainer.is_global_zero) as bars:
        lacks = ""
        try:
            bar = bars.add_task("what fits, what is fast", total=math.log2(most))
            for size in fits.what_fits(Stopwatch(task, data, most, device), way, most, memory, unit, agreed):
                findings.sizes.append(size)
                bars.update(bar, completed=math.log2(size.examples))
            if not findings.sizes:
                raise ValueError(f"not even a micro-batch of {unit} fits: write a smaller model, or more memory_gib")
            findings.sizes.sort()
            findings.all_fit = findings.sizes[-1].examples == most
            bar = bars.add_task("short trainings", total=None)
            Search(trainer, task, data, findings, budget, agreed, lambda line: bars.update(bar, description=line)).go()
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the former into the latter
            lacks = "interrupted"
    if findings.sizes and trainer.is_global_zero:
        best = findings.best()
        report(console, findings, best, task, lacks, perf_counter() - started, data.total_examples())
        leave(Path(trainer.default_root_dir), findings, best, task, data, rates)
    return findings


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
        self._far = 0.0
        """The steps of a branch if there were no noise."""

    def go(self) -> None:
        """Train the branches, and time the steps of each batch size. The results go into the findings."""
        self._sizes()
        for _ in range(ROUNDS):  # in turn, so that other work on the machine falls on all alike
            for size, rates in self._findings.rates.items():
                branch = Branch(size, rates.factor, 0, TIMED)
                self._train(branch, self._knee)
                rates.times.append(branch.seconds)
        best = self._findings.best()
        if best is not None and self._findings.sets_rates() and not self._findings.schedule.needs_end:
            steps = self._length(best.batch_size)
            for by, share in SHAPES:
                shape = self._branches(best.batch_size, steps, math.ceil(share * steps * best.batch_size))
                for seed in (0, 1):
                    shape.run(best.factor * by, seed)
                self._findings.shapes.append(shape)

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
            size = int(guess * by)
            wanted = by in (1, 4, 1 / 4) or len(findings.rates) < LEAST
            if wanted and findings.unit <= size <= findings.largest and size not in findings.rates:
                at(size)
        for _ in range(WIDER):
            best = min(findings.choices(), key=lambda choice: choice.seconds, default=None)
            if best is None:
                return
            low, high, size = min(findings.rates), max(findings.rates), best.batch_size
            beyond = {high: (size * 4, size * 2), low: (size // 4, size // 2)}.get(size, ())
            new = next((each for each in beyond if findings.unit <= each <= findings.largest), None)
            if new is None:
                return
            at(new)

    def _length(self, size: int) -> int:
        """Return the steps in which a batch size gets as far as the others, by the noise scale."""
        return max(2, round(self._far * (1 + (self._findings.noise_scale() or self._findings.batch_size) / size)))

    def _branches(self, size: int, steps: int, hold: int | None = None) -> Branches:
        return Branches(size, steps, lambda branch: self._train(branch, self._knee), self._validates, hold)

    def _rates(self, size: int, steps: int, middle: float) -> float:
        """Search for the rate of a batch size, and return it as a factor."""
        rates = self._branches(size, steps)
        rates.search(middle)
        if size == self._findings.batch_size:
            schedule = self._findings.schedule
            falls = schedule.shape == "inverse_sqrt"
            hold = (schedule.hold_examples or schedule.warmup_examples) if falls else None
            self._findings.configured = self._branches(size, steps, hold)
            self._findings.configured.run(1.0, 0)
        if math.isfinite(rates.loss(rates.factor)):
            self._findings.rates[size] = rates
        return rates.factor

    def _train(self, branch: Branch, micro_batch: int, *callbacks: Callback) -> None:
        self._say(f"batch_size {branch.batch_size}, {branch.factor:g} times the rate")
        task, data = copy.deepcopy(self._task), short.resized(self._data, branch.batch_size, micro_batch)
        rates, shape = task._rates, "constant" if branch.hold is None else "inverse_sqrt"
        rates.refer(self._findings.batch_size)
        rates.schedule = replace(rates.schedule, shape=shape, hold_examples=branch.hold, warmup=0.0, floor=0.0)
        assert data.seed is not None
        data.seed += branch.seed
        try:
            short.train(self._trainer, task, data, branch.steps, [branch, *callbacks], validate=branch.validates)
        except TrainingStopped:  # its loss is not finite any more
            branch.diverged = True
        branch.agree(self._agreed)
