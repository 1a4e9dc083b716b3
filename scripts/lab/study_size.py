"""Single examples, mini-batches, the full batch: which learns fastest, in epochs, steps and time?

For each batch size the learning rate is tuned for the fewest epochs to 95% validation accuracy (plain SGD with a
constant rate). Then the examples per second at that size are measured, with one network at a time. Both give the time
to the target.

    python scripts/lab/study_size.py --png docs/study_size.png
"""

import math
import statistics
from collections.abc import Callable

import study
from side_by_side import train_all
from study import EXAMPLES, Run, Setting
from torch import nn

from batchwise.models.convnet import ConvNet
from batchwise.models.mlp import MLP

EQUAL = 10  # epochs
MOST = {1: 10, 4: 30, 16: 60}  # epochs; 150 for larger batches
RATES = {
    1: (0.01, 0.02),
    4: (0.04, 0.08),
    16: (0.08, 0.16, 0.32),
    32: (0.16, 0.32, 0.64),
    64: (0.32, 0.64, 1.28),
    128: (0.32, 0.64, 1.28),
    256: (0.64, 1.28, 2.56),
    EXAMPLES: (0.64, 1.28, 2.56),
}


def epochs(run: Run, target: float) -> float:
    """Return the epochs to the target, or 300 if it was not reached."""
    place = run.reached(target)
    return 300 if place is None else run.epochs[place]


def speed(size: int, make: Callable[[], nn.Module], seed: int, scale: float) -> float:
    """Return the examples per second of one network, after a warm-up epoch."""
    steps, watch = min(max(2, round(30 * scale)), -(-EXAMPLES // size)), study.Speed()
    setting = Setting(size, 0.01, epochs=3, network=make)
    study.train(setting, seed, 1.0, [watch], limit_train_batches=steps)
    return 2 * min(EXAMPLES, steps * size) / (watch.seconds[-1] - watch.seconds[0])


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__)
    sizes, target = study.few(given, RATES), 95 if given.scale >= 0.1 else 5
    base = 32 if 32 in sizes else sizes[-1]
    settings = {
        (size, rate): Setting(size, rate, MOST.get(size, 150), target=target, least=EQUAL)
        for size in sizes
        for rate in study.few(given, RATES[size])
    }
    runs = train_all(given, settings)
    took = {key: study.mean(epochs(run, target) for run in each) for key, each in runs.items()}
    best = {size: min((key for key in took if key[0] == size), key=lambda key: took[key])[1] for size in sizes}
    measured = {
        name: [{size: speed(size, make, seed, given.scale) for size in sizes} for seed in range(given.seeds)]
        for name, make in {"MLP": MLP, "ConvNet": ConvNet}.items()
    }
    ratio = {
        name: {size: statistics.median(each[size] / each[base] for each in turns) for size in sizes}
        for name, turns in measured.items()
    }
    rows, steps, time = [], {}, {}
    for size in sizes:
        tuned = runs[size, best[size]]
        reached = [run for run in tuned if run.reached(target) is not None]
        steps[size] = study.mean(run.steps[run.reached(target) or 0] for run in reached) if reached else math.nan
        time[size] = took[size, best[size]] / took[base, best[base]] / ratio["MLP"][size]
        rows.append(
            [
                f"{size} (all)" if size == EXAMPLES else size,
                best[size],
                f"{len(reached)} of {len(tuned)}",
                f"{steps[size]:,.0f}",
                study.spread(epochs(run, target) for run in reached) if reached else "-",
                f"{time[size]:.2f}",
                f"{ratio['MLP'][size]:.2f}",
                f"{ratio['ConvNet'][size]:.2f}",
                study.spread(run.accuracy[min(EQUAL, len(run.accuracy)) - 1] for run in tuned),
            ]
        )
    head = ["batch", "rate", f"reached {target}%", "steps", "epochs", f"time / that of {base}"]
    head += [f"examples/s, MLP / that of {base}", f"ConvNet / that of {base}", f"val. accuracy after {EQUAL} epochs"]
    figures = study.table(f"To {target}% of the validation images, rate tuned for each batch size", head, rows)

    figure, (left, right) = study.panels(2)
    left.plot(sizes, [steps[size] for size in sizes], "o-", label="steps")
    ideal = [steps[sizes[0]] * sizes[0] / size for size in sizes]
    left.plot(sizes, ideal, ":", color="gray", label="steps ~ 1 / batch")
    left.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=f"steps to {target}%")
    right.plot(sizes, list(ratio["MLP"].values()), "o-", label="examples/s, MLP")
    right.plot(sizes, list(ratio["ConvNet"].values()), "s-", label="examples/s, ConvNet")
    right.plot(sizes, list(time.values()), "^--", label=f"time to {target}%, MLP")
    right.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=f"ratio to batch {base}")
    for panel in (left, right):
        panel.legend()
    study.finish(given, figure, size=figures)


if __name__ == "__main__":
    main()
