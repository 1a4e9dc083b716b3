"""One example at a time, mini-batches, the full batch: which learns faster, in epochs, steps and time?

For each batch size the learning rate is tuned for the fewest epochs to 95% on the validation split (plain SGD with a
constant rate, at most 150 epochs); then steps, epochs and time to that target, the speed, and the accuracy after 10
epochs at that rate.

    python scripts/study_size.py --png docs/study_size.png
"""

import statistics
from dataclasses import replace
from functools import partial

import study
from study import EXAMPLES, Run, Setting

from project.models.convnet import ConvNet

MOST, EQUAL = 150, 10  # epochs
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
    """Return the epochs to the target; twice the most where it was not reached."""
    place = run.reached(target)
    return 2 * MOST if place is None else run.epochs[place]


def speed(run: Run, size: int) -> float:
    """Return the examples per second after the first epoch, or over all where there is one."""
    first = run.seconds[0] if len(run.seconds) > 1 else 0.0
    return EXAMPLES * (run.epochs[-1] - (1 if first else 0)) / (run.seconds[-1] - first)


def main() -> None:
    """Train, tell, draw."""
    given = study.arguments(__doc__)
    sizes, target = study.few(given, RATES), 95 if given.scale >= 0.1 else 5
    settings = {
        (size, rate): Setting(size, rate, MOST, target=target)
        for size in sizes
        for rate in study.few(given, RATES[size])
    }
    runs = study.train_all(given, settings)
    took = {key: study.mean(epochs(run, target) for run in each) for key, each in runs.items()}
    best = {size: min((key for key in took if key[0] == size), key=lambda key: took[key])[1] for size in sizes}
    tuned = {size: runs[size, best[size]] for size in sizes}
    equal = study.train_all(given, {size: Setting(size, best[size], EQUAL, every=EQUAL) for size in sizes})
    few_epochs = Setting(epochs=2, network=partial(ConvNet, norm="group"))
    convnet = study.train_all(given, {size: replace(few_epochs, batch_size=size) for size in sizes})

    base = 32 if 32 in sizes else sizes[-1]
    rows, drawn = [], {}
    for size in sizes:
        reached = [run for run in tuned[size] if run.reached(target) is not None]
        times = [
            a.seconds[-1] / b.seconds[-1]
            for a, b in zip(tuned[size], tuned[base], strict=True)
            if a.reached(target) is not None
        ]
        ratios = [
            statistics.median(speed(a, size) / speed(b, base) for a, b in zip(each[size], each[base], strict=True))
            for each in (equal if given.scale >= 0.1 else tuned, convnet)
        ]
        steps = study.mean(run.steps for run in reached) if reached else float("nan")
        time = statistics.median(times) if times else float("nan")
        drawn[size] = steps, time, *ratios
        rows.append(
            [
                f"{size} (all)" if size == EXAMPLES else size,
                best[size],
                f"{len(reached)} of {len(tuned[size])}",
                f"{steps:,.0f}",
                study.spread(epochs(run, target) for run in reached) if reached else "-",
                f"{time:.2f}",
                f"{ratios[0]:.2f}",
                f"{ratios[1]:.2f}",
                study.spread(run.test for run in equal[size]),
            ]
        )
    head = ["batch", "rate", f"reached {target}%", "steps", "epochs", f"time (ratio to {base})"]
    head += ["examples/s, MLP (ratio)", "examples/s, ConvNet (ratio)", f"test accuracy after {EQUAL} epochs"]
    figures = study.table("To 95% of the validation images, rate tuned for each batch size", head, rows)

    figure, (left, right) = study.panels(2)
    left.plot(sizes, [drawn[size][0] for size in sizes], "o-", label="steps")
    left.plot(
        sizes, [drawn[sizes[0]][0] * sizes[0] / size for size in sizes], ":", color="gray", label="steps ~ 1 / batch"
    )
    left.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel="steps to the target")
    right.plot(sizes, [drawn[size][2] for size in sizes], "o-", label="examples/s, MLP")
    right.plot(sizes, [drawn[size][3] for size in sizes], "s-", label="examples/s, ConvNet")
    right.plot(sizes, [drawn[size][1] for size in sizes], "^--", label="time to the target, MLP")
    right.set(xscale="log", yscale="log", xlabel="batch size (examples)", ylabel=f"ratio to batch {base}")
    for panel in (left, right):
        panel.legend()
    study.finish(given, figure, size=figures)


if __name__ == "__main__":
    main()
