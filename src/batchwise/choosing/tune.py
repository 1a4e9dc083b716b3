"""`tune`: which batch size to train with, by memory, speed and gradient noise."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from batchwise.batching.loader import Batch
from batchwise.batching.noise import FEWEST
from batchwise.callbacks.noise_scale import NoiseScale
from batchwise.choosing import fits, range_test, short
from batchwise.choosing.figure import draw
from batchwise.choosing.findings import Findings
from batchwise.choosing.range_test import RangeTest
from batchwise.choosing.speed import Stopwatch, Way
from batchwise.data.module import DataModule
from batchwise.optim.schedule import Schedule
from batchwise.tasks.task import Task

PARTS = 4  # micro-batches of a batch; the noise scale comes from their gradients


class Pace(Callback):
    """Notes the noise scale in the course of a training, or the time of a step."""

    def __init__(self, findings: Findings, noise: NoiseScale | None, progress: Callable[[int], None]) -> None:
        self.findings, self.noise, self.progress = findings, noise, progress
        self.started = self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Take an estimate from the samples since the last one, if there are enough."""
        step = trainer.global_step
        self.progress(step)
        if self.noise is None:
            self.started = perf_counter() if step == _WARM_UP else self.started
            self.seconds = (perf_counter() - self.started) / max(1, step - _WARM_UP)
        elif estimate := self.noise.estimate():
            assert pl_module.data.plan is not None
            self.findings.noise.append((pl_module.data.plan.examples_at(step), estimate))
            self.noise.samples.clear()


_WARM_UP, _TIMED = 5, 25  # steps


def tune(trainer: pl.Trainer, task: Task, data: DataModule, steps: int, memory_gib: float | None) -> None:
    """Find the batch size, print tables, draw `tune.png`, and write `tuned.yaml` in the run's folder.

    All devices take part, as in `fit`. In the first phase each device runs micro-batches by itself, and all agree on
    the result of each. Then come short trainings.

    Args:
        trainer: has the run's folder, devices and precision.
        task: the task to be trained; it stays as it is.
        data: has the examples.
        steps: the most optimizer steps of the short run.
        memory_gib: memory that each device may use, in GiB; None: most of what is free.

    Raises:
        ValueError: an argument makes no sense.
    """
    if steps < FEWEST:
        raise ValueError(f"steps is {steps}: the noise scale needs at least {FEWEST}")
    launcher = trainer.strategy.launcher
    if launcher is None:
        _tune(trainer, task, data, steps, memory_gib)
    else:
        launcher.launch(_tune, trainer, task, data, steps, memory_gib, trainer=trainer)


@isolate_rng()  # restores the generators
def _tune(trainer: pl.Trainer, task: Task, data: DataModule, steps: int, memory_gib: float | None) -> None:
    trainer.strategy.setup_environment()
    trainer.strategy.barrier()  # the first process has prepared the data
    data.setup("fit")
    plan, train = data.plan, data.split("train")
    assert plan is not None
    assert train is not None
    device, batch_size, unit = trainer.strategy.root_device, plan.batch_size, plan.unit

    def largest(value: float) -> float:
        values = torch.tensor(value, dtype=torch.float64, device=device)
        return float(trainer.strategy.reduce(values, reduce_op="max"))  # type: ignore[arg-type]

    agreed = largest if trainer.world_size > 1 else float
    budget = -agreed(-(memory_gib * 2**30 if memory_gib else fits.free_memory(device, trainer.num_devices)))
    most = min(len(train), 2**14) // unit * unit
    if most == 0:
        raise ValueError(f"there are {len(train)} training examples, of which {unit} must stay together: give it more")
    way = Way(unit, str(trainer.precision), getattr(trainer, "channels_last", False), threads=torch.get_num_threads())
    findings, console = Findings(batch_size, most // 4, plan.devices, unit), Console()
    lacks = f"it needs {FEWEST} steps of at least two micro-batches"
    if task._couples:
        lacks = "the loss couples the examples of a batch, so that no part of it has a gradient of its own"
    with Progress(console=console, transient=True, disable=not trainer.is_global_zero) as bars:

        def bar(name: str, total: float) -> Callable[[float], None]:
            number = bars.add_task(name, total=total)
            return lambda done: bars.update(number, completed=done)

        def train_copy(
            size: int, micro_batch: int, steps: int, callbacks: list[Callback], whatever_comes: bool = False
        ) -> None:
            own = copy.deepcopy(task)
            own._rates.reference = own._rates.reference or batch_size
            if whatever_comes:
                own._rates.schedule, own._step.finite.most = Schedule(), 0
            short.train(trainer, own, short.resized(data, size, micro_batch), steps, callbacks)

        try:
            progress = bar("what fits, what is fast", math.log2(most))
            for size in fits.what_fits(Stopwatch(task, data, most, device), way, most, budget, unit, agreed):
                findings.sizes.append(size)
                progress(math.log2(size.examples))
            if not findings.sizes:
                raise ValueError(f"not even a micro-batch of {unit} fits: write a smaller model, or more memory_gib")
            findings.sizes.sort()
            findings.all_fit = findings.sizes[-1].examples == most
            knee = findings.knee().examples
            pace = Pace(findings, None, lambda step: None)
            train_copy(batch_size, knee, _WARM_UP + _TIMED, [pace])
            findings.overhead = agreed(max(0.0, pace.seconds - findings.seconds(batch_size)))
            total = int(min(steps, data.total_steps()))
            noise, part = NoiseScale(every_n_steps=1), max(unit, batch_size // PARTS // unit * unit)
            pace = Pace(findings, noise, bar("what the gradient says", total))
            if not task._couples:
                train_copy(batch_size, part, total, [noise, pace])
            best = findings.best()
            findings.rates = RangeTest(bar("what the rate does", range_test.STEPS))
            size = best.batch_size if best else batch_size
            train_copy(size, knee, range_test.STEPS, [findings.rates], whatever_comes=True)
        except (KeyboardInterrupt, SystemExit):  # Lightning turns the former into the latter
            lacks = "interrupted"
    if findings.sizes and trainer.is_global_zero:
        report(console, findings, lacks)
        _leave(Path(trainer.default_root_dir), findings, task, data)


def report(console: Console, findings: Findings, lacks: str) -> None:
    """Print the findings.

    Args:
        console: for the tables.
        findings: the measurements.
        lacks: the reason why there is no noise scale; not used if there is one.
    """
    knee, best, noise = findings.knee(), findings.best(), findings.noise_scale()
    table = Table("micro-batch", "examples/s", "peak MiB", "", title="what fits, what is fast", box=None)
    for size in findings.sizes:
        mark = "<- the knee" if size == knee else ""
        table.add_row(f"{size.examples:,}", f"{size.speed:,.0f}", f"{size.memory / 2**20:,.0f}", mark)
    console.print(table)
    end = "all of the training examples at once" if findings.all_fit else "more would not fit"
    print(f"largest micro-batch that was run: {findings.sizes[-1].examples:,} ({end})")
    if best is None or noise is None:
        print(f"no noise scale ({lacks}): no batch size is recommended")
        if findings.rates:
            print(f"learning rate at batch_size {findings.batch_size}: {findings.rates}")
        return
    table = Table("batch_size", "steps", "examples", "time", "", title="to a target, against the least", box=None)
    for choice in findings.choices():
        mark = "<- recommended" if choice == best else "configured" if choice.batch_size == findings.batch_size else ""
        figures = (f"{choice.steps:.2f}", f"{choice.examples:.2f}", f"{choice.seconds:.2f}")
        table.add_row(f"{choice.batch_size:,}", *figures, mark)
    console.print(table)
    micro_batch, extra = min(findings.share(best.batch_size), knee.examples), findings.overhead * 1e3
    print(
        f"batch_size {best.batch_size} in micro-batches of {micro_batch}: the gradient noise scale is about "
        f"{noise:,.0f} examples, and a step costs {extra:.2f} ms besides its examples"
    )
    if findings.rates:
        print(f"learning rate at batch_size {best.batch_size}: {findings.rates}")


def _leave(folder: Path, findings: Findings, task: Task, data: DataModule) -> None:
    best = findings.best()
    draw(folder / "tune.png", findings)
    print(f"look at it: {folder / 'tune.png'}")
    if best:
        micro_batch = max(findings.unit, min(findings.share(best.batch_size), findings.knee().examples))
        sizes: dict[str, int | None] = {"batch_size": best.batch_size, "micro_batch_size": micro_batch}
        if data.batch_tokens is not None:
            sizes["batch_tokens"] = None  # or it would contradict `batch_size`
        overlay = {
            "trainer": {"accumulate_grad_batches": None},
            "data": sizes,
            "model": {"reference_batch_size": task._rates.reference or findings.batch_size},  # the rate follows
        }
        (folder / "tuned.yaml").write_text("# tune recommends\n" + yaml.safe_dump(overlay, sort_keys=False))
        print(f"use it:     --config {folder / 'tuned.yaml'}")
