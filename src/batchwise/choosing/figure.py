"""The pictures of `tune` and of `sweep`."""

import math
from collections.abc import Sequence
from pathlib import Path

from batchwise.choosing.findings import Findings
from batchwise.choosing.trials import Result


def draw(path: Path, findings: Findings) -> None:
    """Draw four panels as a PNG. A panel stays empty if nothing is known for it.

    Args:
        path: path of the file.
        findings: the findings of `tune`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 4.4), dpi=110, layout="constrained")
    fast, gradient, use, rate = panels = figure.subplots(1, 4)
    knee, best, choices = findings.knee(), findings.best(), findings.choices()
    fast.plot([size.examples for size in findings.sizes], [size.speed for size in findings.sizes], "o-")
    fast.axvline(knee.examples, color="tab:green", linestyle="--", label=f"knee: {knee.examples}")
    fast.set(xscale="log", xlabel="micro-batch (examples)", ylabel="examples per second", title="What is fast")
    fast.set_ylim(bottom=0)

    known = [(seen, each) for seen, each in findings.noise if not each.lost]
    lost = [(seen, each) for seen, each in findings.noise if each.lost]
    if known:
        centre = [each.scale for _, each in known]
        below = [each.scale - each.low for _, each in known]
        above = [each.high - each.scale for _, each in known]
        gradient.errorbar([seen for seen, _ in known], centre, [below, above], fmt="o", capsize=3, label="95% interval")
    if lost:
        bounds = [each.low for _, each in lost]
        gradient.plot([seen for seen, _ in lost], bounds, "^", color="tab:orange", label="more than")
    gradient.axhline(findings.batch_size, color="gray", linestyle=":", label=f"batch_size: {findings.batch_size}")
    gradient.set(xlabel="examples seen", ylabel="gradient noise scale (examples)", title="What the gradient says")
    gradient.set_yscale("log")

    if best:
        sizes = [choice.batch_size for choice in choices]
        use.plot(sizes, [choice.seconds for choice in choices], "o-", label="time")
        use.plot(sizes, [choice.examples for choice in choices], "s--", label="examples")
        use.plot(sizes, [choice.steps for choice in choices], "^:", label="steps")
        use.axvline(best.batch_size, color="tab:green", linestyle="--", label=f"recommended: {best.batch_size}")
    use.set(xlabel="batch_size (examples)", ylabel="cost to a target, against the least", title="What to use")
    use.set_xscale("log", base=2)
    use.set_yscale("log")

    test = findings.rates
    if test and test.losses:
        rate.plot(test.rates[: len(test.losses)], test.losses, label="loss of each step")
        rate.axvline(test.rule, color="gray", linestyle=":", label=f"by the rule: {test.rule:.2g}")
        if steepest := test.steepest():
            rate.axvline(steepest, color="tab:green", linestyle="--", label=f"falls fastest: {steepest:.2g}")
        rate.set_ylim(0, 1.5 * max(test.losses[:5]))
    rate.set(xscale="log", xlabel="learning rate", ylabel="training loss", title="What the rate does")
    for panel in panels:
        if panel.get_legend_handles_labels()[0]:
            panel.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2
            )  # below the panel, away from the points
    figure.savefig(path)


def draw_sweep(path: Path, found: list[Result], curve: tuple[float, float] | None, target: str) -> None:
    """Draw steps, examples and seconds to the target against the batch size as a PNG.

    Args:
        path: path of the file.
        found: a result for each batch size.
        curve: (S, E) of the prediction, steps = S + E / batch size.
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
            steps = [curve[0] + curve[1] / size for size in sizes]
            cost: dict[str, Sequence[float]] = {"steps": [1] * len(sizes), "examples": sizes}
            cost["seconds"] = [each.seconds / each.steps for each in reached]
            predicted = [a * b for a, b in zip(steps, cost[name], strict=True)]
            label = f"fit: S (1 + N / B), N = {curve[1] / curve[0]:,.0f}" if curve[0] else "fit: E / B"
            panel.plot(sizes, predicted, "--", color="tab:orange", label=label)
        never = [each.batch_size for each in found if math.isinf(each.steps)]
        if never:
            top = panel.get_ylim()[1]
            panel.plot(never, [top] * len(never), "x", color="tab:red", clip_on=False, label="not reached")
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    figure.savefig(path)
