"""`tune`: which batch size to train with: what fits, what is fast, what the gradient says, and what follows from it."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from project.callbacks.noise_scale import NoiseScale
from project.choosing.figure import draw
from project.choosing.noise import FEWEST, Estimate
from project.choosing.speed import Stopwatch, Way
from project.data.module import DataModule
from project.host import available_memory, peak_memory, reset_peak_memory
from project.tasks.task import Task

KNEE = 0.95
"""Share of the best speed that is good enough: the smallest micro-batch that has it is the knee."""
PARTS = 4  # micro-batches, of whose gradients the noise scale is taken


class Size(NamedTuple):
    """A micro-batch that was run: its examples, bytes at the peak, and examples per second (forward and backward)."""

    examples: int
    memory: int
    speed: float


class Choice(NamedTuple):
    """A batch size and what it costs to reach a target, against the cheapest of each."""

    batch_size: int
    steps: float
    examples: float
    seconds: float


@dataclass
class Findings:
    """What is known so far."""

    sizes: list[Size]
    noise: list[tuple[int, Estimate]]
    """Examples seen, and the noise scale of the batches before."""
    all_fit: bool = False
    overhead: float = 0.0
    """Seconds of an optimizer step besides forward and backward passes."""

    def knee(self) -> Size:
        """Return the smallest micro-batch whose speed is within 5% of the best."""
        best = max(size.speed for size in self.sizes)
        return next(size for size in self.sizes if size.speed >= KNEE * best)

    def speed(self, batch_size: int) -> float:
        """Return the examples per second of a batch, in micro-batches up to the knee."""
        most = min(batch_size, self.knee().examples)
        return max((size.speed for size in self.sizes if size.examples <= most), default=self.sizes[0].speed)

    def noise_scale(self) -> float | None:
        """Return the median noise scale over the run; a lost signal counts with its lower bound."""
        values = sorted(each.low if each.lost else each.scale for _, each in self.noise)
        values = [value for value in values if 0 < value < math.inf]
        return values[len(values) // 2] if values else None

    def choices(self, most: int) -> list[Choice]:
        """Return what each batch size costs: steps ~ 1 + noise / B (McCandlish et al. 2018, equation 2.11).

        Args:
            most: the largest batch size to look at.
        """
        noise = self.noise_scale()
        if noise is None:
            return []
        found = []
        for batch_size in (2**power for power in range(2, most.bit_length())):
            steps = 1 + noise / batch_size
            seconds = steps * (self.overhead + batch_size / self.speed(batch_size))
            found.append(Choice(batch_size, steps, steps * batch_size / noise, seconds))
        fastest = min((choice.seconds for choice in found), default=1.0)
        return [choice._replace(seconds=choice.seconds / fastest) for choice in found]


class Pace(Callback):
    """Notes the noise scale as training goes on, or how long a step takes."""

    def __init__(self, findings: Findings, noise: NoiseScale | None, progress: Callable[[int], None]) -> None:
        self.findings, self.noise, self.progress = findings, noise, progress
        self.started = self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the samples of the last `FEWEST` batches, and forget them."""
        step = trainer.global_step
        self.progress(step)
        if self.noise is None:
            self.started = perf_counter() if step == _WARM_UP else self.started
            self.seconds = (perf_counter() - self.started) / max(1, step - _WARM_UP)
        elif estimate := self.noise.estimate():
            self.findings.noise.append((pl_module.data.plan.examples_at(step), estimate))
            self.noise.samples.clear()


_WARM_UP, _TIMED = 5, 25  # steps


def what_fits(watch: Stopwatch, way: Way, most: int, budget: float, unit: int) -> Iterator[Size]:
    """Yield micro-batches by doubling, then the largest that fits by bisection (to one part in 16). Each was run.

    On a CPU, a size is not run whose memory, extended from the two before it in proportion, is over the budget: there,
    to run out of memory is to be killed.
    """
    size, fits, fails = unit, 0, most + 1
    seen: list[Size] = []
    while fits < size < fails:
        if watch.device.type == "cpu" and len(seen) > 1 and _extended(seen[-2], seen[-1], size) > budget:
            fails = size
        else:
            reset_peak_memory(watch.device)
            seconds = min(watch.seconds(replace(way, size=size)) for _ in range(3))  # the first one warms up
            if math.isinf(seconds) or (fits and peak_memory(watch.device) > budget):
                fails = size
            else:
                fits = size
                seen.append(Size(size, peak_memory(watch.device), 1 / seconds))
                yield seen[-1]
        if fails - fits <= max(unit, fits // 16):
            return
        size = min(2 * fits, most) if fails > most else (fits + fails) // 2 // unit * unit


def _extended(first: Size, second: Size, examples: int) -> float:
    slope = (second.memory - first.memory) / (second.examples - first.examples)
    return second.memory + max(0.0, slope) * (examples - second.examples)


def _train(trainer: pl.Trainer, task: Task, data: DataModule, steps: int, callbacks: list[Callback]) -> None:
    """Train a copy for some steps on one device, in the precision and memory format of this trainer."""
    short = type(trainer)(
        max_steps=steps,
        accelerator="gpu" if trainer.strategy.root_device.type == "cuda" else "cpu",
        devices=1,
        precision=trainer.precision,  # type: ignore[arg-type]
        channels_last=getattr(trainer, "channels_last", False),  # type: ignore[call-arg]
        gradient_clip_val=trainer.gradient_clip_val,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        default_root_dir=trainer.default_root_dir,
    )
    short.fit(copy.deepcopy(task), datamodule=data)


def tune(trainer: pl.Trainer, task: Task, data: DataModule, steps: int, memory_gib: float | None) -> None:
    """Find out, print tables, draw `tune.png`, and leave `tuned.yaml` in the run's folder.

    Args:
        trainer: has the run's folder, device and precision.
        task: what is to be trained; it stays as it is.
        data: has its plan.
        steps: most optimizer steps of the short run.
        memory_gib: what may be used, in GiB; None: most of what is free.

    Raises:
        ValueError: what was asked for makes no sense.
    """
    if steps < FEWEST:
        raise ValueError(f"steps is {steps}: the noise scale needs at least {FEWEST}")
    if memory_gib is not None and memory_gib <= 0:
        raise ValueError(f"memory_gib is {memory_gib}: write a number above 0")
    plan, train = data.plan, data.split("train")
    assert plan is not None
    assert train is not None
    device, batch_size, unit = trainer.strategy.root_device, plan.batch_size, plan.unit
    budget = memory_gib * 2**30 if memory_gib else 0.8 * available_memory() + peak_memory(device)
    most = min(len(train), 2**14) // unit * unit
    if most == 0:
        raise ValueError(f"there are {len(train)} training examples, of which {unit} must stay together: give it more")
    way = Way(unit, str(trainer.precision), getattr(trainer, "channels_last", False), threads=torch.get_num_threads())
    findings, interrupted, console = Findings([], []), False, Console()
    with isolate_rng(), Progress(console=console, transient=True) as bars:
        try:
            bar = bars.add_task("what fits, what is fast", total=math.log2(most))
            for size in what_fits(Stopwatch(task, data, most, device), way, most, budget, unit):
                findings.sizes.append(size)
                bars.update(bar, completed=math.log2(size.examples))
            if not findings.sizes:
                raise ValueError(f"not even a micro-batch of {unit} fits: write a smaller model, or more memory_gib")
            findings.sizes.sort()
            findings.all_fit = findings.sizes[-1].examples == most
            micro_batch = min(batch_size, findings.knee().examples)
            pace = Pace(findings, None, lambda step: None)
            _train(trainer, task, data.resized(batch_size, micro_batch), _WARM_UP + _TIMED, [pace])
            findings.overhead = max(0.0, pace.seconds - batch_size / findings.speed(batch_size))
            total = min(steps, data.total_steps())
            bar = bars.add_task("what the gradient says", total=total)
            noise, part = NoiseScale(every_n_steps=1), max(unit, batch_size // PARTS // unit * unit)
            pace = Pace(findings, noise, lambda step: bars.update(bar, completed=step))
            _train(trainer, task, data.resized(batch_size, part), int(total), [noise, pace])
        except (KeyboardInterrupt, SystemExit):  # the latter is what Lightning makes of the former
            interrupted = True
    if findings.sizes:
        report(console, findings, batch_size, most, interrupted)
        _leave(Path(trainer.default_root_dir), findings, batch_size, most, task, unit)


def report(console: Console, findings: Findings, batch_size: int, most: int, interrupted: bool) -> None:
    """Print what was found."""
    knee = findings.knee()
    table = Table("micro-batch", "examples/s", "peak MiB", "", title="what fits, what is fast", box=None)
    for size in findings.sizes:
        mark = "<- the knee" if size == knee else ""
        table.add_row(f"{size.examples:,}", f"{size.speed:,.0f}", f"{size.memory / 2**20:,.0f}", mark)
    console.print(table)
    end = "all of the training examples at once" if findings.all_fit else "more would not fit"
    print(f"largest micro-batch that was run: {findings.sizes[-1].examples:,} ({end})")
    choices = findings.choices(most // 4)
    if not choices:
        why = "interrupted" if interrupted else f"it needs {FEWEST} steps of at least two micro-batches"
        print(f"no noise scale ({why}): no batch size is recommended")
        return
    table = Table("batch_size", "steps", "examples", "time", "", title="to a target, against the least", box=None)
    best = recommended(choices)
    for choice in choices:
        mark = "<- recommended" if choice == best else "configured" if choice.batch_size == batch_size else ""
        figures = (f"{choice.steps:.2f}", f"{choice.examples:.2f}", f"{choice.seconds:.2f}")
        table.add_row(f"{choice.batch_size:,}", *figures, mark)
    console.print(table)
    noise = findings.noise_scale()
    assert noise is not None
    micro_batch, extra = min(best.batch_size, knee.examples), findings.overhead * 1e3
    print(
        f"batch_size {best.batch_size} in micro-batches of {micro_batch}: the gradient noise scale is about "
        f"{noise:,.0f} examples, and a step costs {extra:.2f} ms besides its examples"
    )


def recommended(choices: list[Choice]) -> Choice:
    """Return the batch size of the least predicted time; of those within 5% of it, the one of the fewest examples."""
    return min((choice for choice in choices if choice.seconds <= 1.05), key=lambda choice: choice.examples)


def _leave(folder: Path, findings: Findings, batch_size: int, most: int, task: Task, unit: int) -> None:
    choices = findings.choices(most // 4)
    draw(folder / "tune.png", findings, choices, batch_size, recommended(choices) if choices else None)
    print(f"look at it: {folder / 'tune.png'}")
    if choices:
        best = recommended(choices)
        overlay = {
            "trainer": {"accumulate_grad_batches": None},
            "data": {
                "batch_size": best.batch_size,
                "micro_batch_size": max(unit, min(best.batch_size, findings.knee().examples)),
            },
            "model": {"reference_batch_size": task.reference_batch_size or batch_size},  # the rate follows by rule
        }
        (folder / "tuned.yaml").write_text("# tune recommends\n" + yaml.safe_dump(overlay, sort_keys=False))
        print(f"use it:     --config {folder / 'tuned.yaml'}")
