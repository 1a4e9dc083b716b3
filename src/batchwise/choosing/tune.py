"""`tune`: which batch size and learning rate to train with, by memory, speed, gradient noise and short branches."""

import math
from pathlib import Path
from time import perf_counter

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import Progress

from batchwise.batching.device import number_on
from batchwise.choosing import fits
from batchwise.choosing.advice import leave, report
from batchwise.choosing.findings import Findings
from batchwise.choosing.search import Search
from batchwise.choosing.speed import Stopwatch, Way
from batchwise.data.module import DataModule
from batchwise.errors import Mistake
from batchwise.tasks.task import Task


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
        Mistake: the task has several optimizers, the strategy cuts the model, or there are too few examples.
    """
    if task._players() != [()]:
        raise Mistake(
            "tune compares losses, and with several optimizers no loss says how far training is: "
            "compare batch sizes by a metric of yours, with sweep"
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise Mistake(
            "tune has the whole model on each device, and trainer.strategy cuts it: write trainer.strategy ddp"
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
        return float(trainer.strategy.reduce(number_on(device, value), reduce_op="max"))  # type: ignore[arg-type]

    agreed, unit = largest if trainer.world_size > 1 else float, plan.unit
    memory = -agreed(-(memory_gib * 2**30 if memory_gib else fits.free_memory(device, trainer.num_devices)))
    most = min(len(train), 2**14) // unit * unit
    if most == 0:
        raise Mistake(f"there are {len(train)} training examples, of which {unit} must stay together: give it more")
    way = Way(unit, str(trainer.precision), getattr(trainer, "channels_last", False), threads=torch.get_num_threads())
    sizes = plan.batch_size, max(unit, most // 2), plan.devices, unit, data.order.copies
    findings = Findings(*sizes, schedule=task._rates.schedule)
    console = Console()
    with Progress(console=console, transient=True, disable=not trainer.is_global_zero) as bars:
        stopped: BaseException | None = None
        try:
            bar = bars.add_task("what fits, what is fast", total=math.log2(most))
            watch = Stopwatch(task, data, most, device)
            for size in fits.what_fits(watch, way, most, memory, unit, agreed):
                findings.sizes.append(size)
                bars.update(bar, completed=math.log2(size.examples))
            if not findings.sizes:
                raise Mistake(f"not even a micro-batch of {unit} fits: write a smaller model, or more memory_gib")
            findings.no_larger = fits.why_no_larger(findings.sizes, most)
            findings.sizes = fits.again(watch, way, findings.sizes, agreed)
            bar = bars.add_task("short trainings", total=None)
            Search(trainer, task, data, findings, budget, agreed, lambda line: bars.update(bar, description=line)).go()
        except (KeyboardInterrupt, SystemExit) as stop:  # Lightning turns the former into the latter
            stopped = stop
    if findings.sizes and trainer.is_global_zero:
        best = findings.best()
        lacks = "interrupted" if stopped else ""
        report(console, findings, best, task, lacks, perf_counter() - started, data.total_examples())
        leave(Path(trainer.default_root_dir), findings, best, task, data, rates)
    if stopped is not None:
        raise stopped
    return findings
