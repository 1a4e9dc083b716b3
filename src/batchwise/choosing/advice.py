"""What `tune` says: tables, the recommendation with its reasons, and an overlay."""

import math
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from batchwise.batching.schedule import BatchSizes
from batchwise.choosing.figure import draw
from batchwise.choosing.findings import NEAR, Advice, Findings
from batchwise.choosing.trials import Fit
from batchwise.data.module import DataModule
from batchwise.host import write_whole
from batchwise.tasks.task import Task

HINDERED = 0.2
"""From this share on, `tune` says that the machine was busy."""


def report(
    console: Console, findings: Findings, best: Advice | None, task: Task, lacks: str, seconds: float, examples: float
) -> None:
    """Print the findings.

    Args:
        console: for the tables.
        findings: the measurements.
        best: the recommendation; None: there is none.
        task: the task to be trained.
        lacks: the reason why something was not measured; empty if all was.
        seconds: what the measurements took.
        examples: examples of the whole training.
    """
    knee = findings.knee()
    table = Table("micro-batch", "examples/s", "peak MiB", "", title="what fits, what is fast", box=None)
    for size in findings.sizes:
        mark = "<- the knee" if size == knee else ""
        table.add_row(f"{size.examples:,}", f"{size.speed:,.0f}", f"{size.memory / 2**20:,.0f}", mark)
    console.print(table)
    print(f"largest micro-batch that was run: {findings.sizes[-1].examples:,} ({findings.no_larger})")
    if best is None or not findings.choices():
        print(f"no batch size is recommended ({lacks or why_none(findings, task)})")
    else:
        console.print(times(findings, best))
    if best is None:
        return
    for line in sentences(findings, best):
        print(line)
    if math.isfinite(examples):
        training = examples / best.batch_size * findings.seconds(best.batch_size)
        share = seconds / training
        relative = f"{share:.0%} of the time of" if share < 1 else f"{share:,.0f} times as long as"
        print(f"tune took {seconds:.1f} s, {relative} the training")


def times(findings: Findings, best: Advice) -> Table:
    """Return the table of the batch sizes and their costs."""
    table = Table("batch_size", "steps", "examples", "time", "", title="to a target, against the least", box=None)
    for choice in findings.choices():
        if choice.batch_size == best.batch_size:
            mark = "<- recommended"
        elif choice.batch_size == findings.batch_size:
            mark = "configured"
        else:
            mark = "" if choice.batch_size in findings.rates else "between those that were tried"
        figures = (f"{choice.steps:.2f}", f"{choice.examples:.2f}", f"{choice.seconds:.2f}")
        table.add_row(f"{choice.batch_size:,}", *figures, mark)
    return table


def why_none(findings: Findings, task: Task) -> str:
    """Return why there is no recommendation though all was measured."""
    if task._couples:
        return "the loss couples the examples of a batch, so that another batch is another loss"
    if not findings.rates:
        if findings.configured is not None and math.isfinite(findings.configured.loss(1.0)):
            return "the lowest rate of all that were tried is the best: look at the data, or lower model.optimizer.lr"
        return "the loss was not finite at any rate"
    return f"only {len(findings.rates)} batch sizes could be tried, and three are needed"


def shown(findings: Findings, batch_size: int, factor: float) -> str:
    """Return a learning rate at a batch size, in words, from its factor on that of the configuration."""
    if not findings.sets_rates():
        return "as configure_optimizers of the task sets it, at any batch size"
    rates = findings.rates.get(batch_size)
    if rates and (branch := rates.best()[0]).rate is not None:
        return f"{branch.rate / branch.factor * factor:.3g} ({_times(factor)} that of the configuration)"
    return f"{_times(factor)} that of the configuration"


def _times(factor: float) -> str:
    return f"{factor:.2g} times" if factor < 10 else f"{factor:,.0f} times"


def tried(findings: Findings) -> str:
    """Return the rates that were tried at the configured batch size, and their losses."""
    rates = findings.rates[findings.batch_size]
    return "tried: " + ", ".join(f"{rates.loss(factor):.4g} at {factor:g} times" for factor in rates.factors)


def sentences(findings: Findings, best: Advice) -> list[str]:
    """Return the recommendation and its reasons, a line each."""
    rate = shown(findings, best.batch_size, best.factor)
    if findings.choices():
        spread = f", as good from {best.low:,} to {best.high:,}" if best.low < best.high else ""
        said = [f"batch_size {best.batch_size}{spread}; learning rate: {rate}"]
        if (hindered := findings.hindered()) > HINDERED:
            lost = f"threads waited for a core {hindered:.2f} times as long as the steps took"
            said.append(f"the machine was busy ({lost}), so the range is wide: ask again when it is quiet")
    else:
        said = [f"learning rate at batch_size {best.batch_size}: {rate}", tried(findings)]
    said += course(findings, best)
    if fitted := findings.fitted():
        said += noise(findings, fitted)
        if findings.devices == 1 and best.batch_size <= findings.knee().examples:
            said.append("one device takes this batch whole: accumulating a larger one would take longer")
    if best.gain <= NEAR:
        said.append("leave it as it is: the gain is under 5%")
    elif math.isfinite(best.gain):
        said.append(f"the configuration would take {best.gain:.2f} times as long")
    else:
        said.append("the configuration did not get as far in its short training")
    return said


def course(findings: Findings, best: Advice) -> list[str]:
    """Return how rate and batch size are to change, a line each."""
    said, (falls, doubles) = [], best.course
    if falls is not None:
        gain = f" (it took {findings.shortened():.2f} times the steps of one that is held longer)"
        line = f"this rate is held for {falls:,} examples, and then falls with the square root of those seen"
        said.append(line + gain * (findings.shortened() < 1))
    if (ratio := findings.doubled()) is not None:
        after = findings.later[1].course.doubles
        verb = "pays" if doubles else "would not pay"
        said.append(f"twice the batch after {after:,} examples {verb}: {ratio:.2f} times the time to later losses")
    if findings.schedule.needs_end:
        said.append(f"this is the highest rate of model.schedule, {findings.schedule.shape}, which stays as it is")
    return said


def noise(findings: Findings, fitted: Fit) -> list[str]:
    """Return the gradient noise scale, and whether its two estimates disagree."""
    scale = findings.noise_scale()
    branches = f"{fitted.noise_scale:,.0f} examples" if fitted.least else "larger than could be seen"
    gradient = "not known" if scale is None else f"about {scale:,.0f}"
    said = [f"gradient noise scale: by the short trainings {branches}, by the gradient {gradient}"]
    if findings.disagree():
        said.append("these disagree: batch_size follows the short trainings, and the range has what either finds good")
    return said


def leave(
    folder: Path, findings: Findings, best: Advice | None, task: Task, data: DataModule, rates: dict[str, float]
) -> None:
    """Draw the picture, and write the overlay if there is something to change.

    Args:
        folder: the run's folder.
        findings: the measurements.
        best: the recommendation; None: there is none.
        task: the task to be trained.
        data: its data.
        rates: the learning rates in the configuration of the optimizer, by the names of its arguments.
    """
    draw(folder / "tune.png", findings, best)
    print(f"look at it: {folder / 'tune.png'}")
    if best is None or best.gain <= NEAR:
        return
    overlay: dict[str, Any] = {}
    if findings.choices():
        micro_batch = max(findings.unit, min(findings.share(best.batch_size), findings.knee().examples))
        sizes: dict[str, Any] = {"batch_size": best.batch_size, "micro_batch_size": micro_batch}
        if data.batch_tokens is not None:
            sizes["batch_tokens"] = None  # or it would contradict `batch_size`
        if type(data.batch_size_schedule) is not BatchSizes:
            print("data.batch_size_schedule stays as it is, and was not tried: compare its sizes with this batch_size")
        overlay |= {"trainer": {"accumulate_grad_batches": None}, "data": sizes}
    if findings.sets_rates():
        scaling, fitted = task._rates.scaling, findings.fitted()
        model: dict[str, Any] = {"reference_batch_size": scaling.reference or findings.batch_size}
        if scaling.limit is None and scaling.rule != "none" and fitted and fitted.least:
            largest = best.batch_size * (1 if best.course.doubles is None else 2)
            model["scaling_limit"] = max(model["reference_batch_size"], largest, math.ceil(fitted.noise_scale))
        if rates:
            new = {name: float(f"{rate * best.factor:.3g}") for name, rate in rates.items()}
            model["optimizer"] = {"init_args": new}
        if best.course.falls is not None:
            model["schedule"] = {"shape": "inverse_sqrt", "hold_examples": best.course.falls}
        if best.course.doubles is not None:
            growth = {"sizes": [2 * best.batch_size], "examples": [best.course.doubles]}
            kind = "batchwise.batching.schedule.Milestones"
            overlay["data"]["batch_size_schedule"] = {"class_path": kind, "init_args": growth}
        overlay["model"] = model
    head = "# tune recommends; the learning rate is that of reference_batch_size, and follows the batch\n"
    write_whole(folder / "tuned.yaml", head + yaml.safe_dump(overlay, sort_keys=False))
    print(f"use it:     --config {folder / 'tuned.yaml'}")
