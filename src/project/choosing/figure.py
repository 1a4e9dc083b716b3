"""The picture of `tune`: what is fast, what the gradient says, what follows for the batch size."""

from pathlib import Path
from typing import Any


def draw(path: Path, findings: Any, choices: list[Any], configured: int, best: Any) -> None:
    """Draw three panels as a PNG.

    Args:
        path: of the file.
        findings: of `tune`.
        choices: what each batch size costs; may be empty.
        configured: the batch size of the configuration.
        best: the recommended choice.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.4), dpi=120, layout="constrained")
    fast, gradient, use = figure.subplots(1, 3)
    knee = findings.knee()
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
    gradient.axhline(configured, color="gray", linestyle=":", label=f"batch_size: {configured}")
    gradient.set(xlabel="examples seen", ylabel="gradient noise scale (examples)", title="What the gradient says")
    gradient.set_yscale("log")

    if choices:
        sizes = [choice.batch_size for choice in choices]
        use.plot(sizes, [choice.seconds for choice in choices], "o-", label="time")
        use.plot(sizes, [choice.examples for choice in choices], "s--", label="examples")
        use.plot(sizes, [choice.steps for choice in choices], "^:", label="steps")
        use.axvline(best.batch_size, color="tab:green", linestyle="--", label=f"recommended: {best.batch_size}")
    use.set(xlabel="batch_size (examples)", ylabel="cost to a target, against the least", title="What to use")
    use.set_xscale("log", base=2)
    use.set_yscale("log")
    for panel in (fast, gradient, use):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)  # below, where no point is
    figure.savefig(path)
