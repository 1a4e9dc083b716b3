"""The pictures of `tune` and of `sweep`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from batchwise.choosing.findings import Advice, Findings
from batchwise.choosing.trials import Fit, Result
from batchwise.host import whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(path: Path, findings: Findings, best: Advice | None) -> None:
    """Draw the answer as a PNG, and the evidence below it. A panel stays empty if nothing is known for it.

    Args:
        path: path of the file.
        findings: the findings of `tune`.
        best: the recommendation; None: there is none.
    """
    from matplotlib.figure import Figure

    evidence = [_rates, *([_shapes] if findings.shapes else []), _gradient, _speed]
    figure = Figure(figsize=(4.2 * len(evidence), 9.5), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, len(evidence), height_ratios=[1.2, 1])
    answer = figure.add_subplot(grid[0, :])
    _answer(answer, findings, best)
    if answer.get_legend_handles_labels()[0]:
        answer.legend(loc="best", ncols=2)
    for column, fill in enumerate(evidence):
        panel = figure.add_subplot(grid[1, column])
        fill(panel, findings, best)
        if panel.get_legend_handles_labels()[0]:  # below the panel, away from the points
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    with whole(path) as part:
        figure.savefig(part, format="png")


def _answer(panel: "Axes", findings: Findings, best: Advice | None) -> None:
    choices = findings.choices()
    panel.set(title="Time to a target", xlabel="batch_size (examples)", ylabel="times as long as the fastest")
    if best is None or not choices:
        panel.text(0.5, 0.5, "no batch size is recommended", ha="center", transform=panel.transAxes)
        return
    panel.plot([each.batch_size for each in choices], [each.seconds for each in choices], "-", label="by the fit")
    fitted = findings.fitted()
    assert fitted is not None
    unit = min(fitted.steps(each.batch_size) * findings.seconds(each.batch_size) for each in choices)
    times = {size: findings.steps(size) * each.seconds() / unit for size, each in findings.rates.items()}
    panel.plot(list(times), list(times.values()), "o", label="short trainings, best rate")
    title = f"batch_size {best.batch_size:,} reaches a target first"
    if best.low < best.high:
        panel.axvspan(best.low, best.high, color="tab:green", alpha=0.15, label=f"as good: {best.low} to {best.high}")
        title += f"; {best.low:,} to {best.high:,} are as good"
    panel.set_title(title)
    panel.axvline(best.batch_size, color="tab:green", linestyle="--", label=f"recommended: {best.batch_size}")
    panel.axvline(findings.batch_size, color="gray", linestyle=":", label=f"configured: {findings.batch_size}")
    panel.set_xscale("log", base=2)
    ticks = [each.batch_size for each in choices]
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.set_yscale("log")
    top = max([*(each.seconds for each in choices), *(time for time in times.values() if math.isfinite(time))])
    marks = [mark for mark in (1, 1.5, 2, 3, 5, 10, 20, 50, 100) if mark <= 1.2 * top]
    panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
    panel.set_yticks([], minor=True)


def _rates(panel: "Axes", findings: Findings, best: Advice | None) -> None:
    panel.set(title="Which constant rate", xlabel="times the rate of the configuration", ylabel="loss at the end")
    for size, each in sorted(findings.rates.items()):
        known = [factor for factor in each.factors if math.isfinite(each.loss(factor))]
        panel.plot(known, [each.loss(factor) for factor in known], "o-", label=f"batch {size:,}")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    if best:
        factor = findings.factor(best.batch_size)
        label = f"batch {best.batch_size:,}: {factor:.2g}"
        panel.axvline(factor, color="tab:green", linestyle="--", label=label)


def _shapes(panel: "Axes", findings: Findings, best: Advice | None) -> None:
    chosen = findings.shape()
    for each in findings.shapes:
        steps, losses = each.curve()
        falls = each.course.falls
        assert falls is not None
        style, mark = (".-", " (recommended)") if each is chosen else ("-", "")
        label = f"{each.factor:.2g} times, falls from {falls:,}{mark}"
        panel.plot(np.exp(steps) * each.batch_size, losses, style, label=label)
    panel.set(title="Which shape of the rate", xlabel="examples seen", ylabel="loss", yscale="log")


def _gradient(panel: "Axes", findings: Findings, best: Advice | None) -> None:
    known = [(seen, each) for seen, each in findings.noise if not each.lost]
    lost = [(seen, each) for seen, each in findings.noise if each.lost]
    if known:
        centre = [each.scale for _, each in known]
        below = [each.scale - each.low for _, each in known]
        above = [each.high - each.scale for _, each in known]
        panel.errorbar([seen for seen, _ in known], centre, [below, above], fmt="o", capsize=3, label="95% interval")
    if lost:
        bounds = [each.low for _, each in lost]
        panel.plot([seen for seen, _ in lost], bounds, "^", color="tab:orange", label="more than")
    fitted = findings.fitted()
    if fitted and fitted.least:
        label = f"by the short trainings: {fitted.noise_scale:,.0f}"
        panel.axhline(max(1.0, fitted.noise_scale), color="tab:green", linestyle="--", label=label)
    panel.set(xlabel="examples seen", ylabel="gradient noise scale (examples)", title="What the gradient says")
    panel.set_yscale("log")


def _speed(panel: "Axes", findings: Findings, best: Advice | None) -> None:
    knee = findings.knee()
    panel.plot([size.examples for size in findings.sizes], [size.speed for size in findings.sizes], "o-")
    panel.axvline(knee.examples, color="tab:green", linestyle="--", label=f"knee: {knee.examples}")
    panel.set(xscale="log", xlabel="micro-batch (examples)", ylabel="examples per second", title="What is fast")
    panel.set_ylim(bottom=0)


def draw_sweep(path: Path, found: list[Result], curve: Fit | None, target: str) -> None:
    """Draw steps, examples and seconds to the target against the batch size as a PNG.

    Args:
        path: path of the file.
        found: a result for each batch size.
        curve: the prediction.
        target: the target, for the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=120, layout="constrained")
    reached = [each for each in found if math.isfinite(each.steps)]
    sizes, all_sizes = [each.batch_size for each in reached], [each.batch_size for each in found]
    figure.suptitle(f"{target}, at the best learning rate of each batch size")
    for panel, name in zip(figure.subplots(1, 3), ("steps", "examples", "seconds"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="batch_size (examples)", ylabel=f"{name} to the target")
        panel.set_xticks(all_sizes, all_sizes, minor=False)
        panel.set_xticks([], minor=True)
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:,.10g}")
        runs = [run for each in reached for run in each.runs if run.reached]
        panel.plot(
            [run.batch_size for run in runs], [getattr(run, name) for run in runs], ".", color="gray", label="each seed"
        )
        panel.plot(sizes, [getattr(each, name) for each in reached], "o-", label="median")
        if curve:
            steps = [curve.steps(size) for size in sizes]
            cost: dict[str, Sequence[float]] = {"steps": [1] * len(sizes), "examples": sizes}
            cost["seconds"] = [each.seconds / each.steps for each in reached]
            predicted = [a * b for a, b in zip(steps, cost[name], strict=True)]
            label = f"fit: S (1 + N / B), N = {curve.noise_scale:,.0f}" if curve.least else "fit: E / B"
            panel.plot(sizes, predicted, "--", color="tab:orange", label=label)
        never = [each.batch_size for each in found if math.isinf(each.steps)]
        if never:
            top = panel.get_ylim()[1]
            panel.plot(never, [top] * len(never), "x", color="tab:red", clip_on=False, label="not reached")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    with whole(path) as part:
        figure.savefig(part, format="png")
