"""How the learning rate should follow the batch, and whether large batches generalise worse.

A grid of batch sizes and learning rates, for SGD and for AdamW, with a cosine schedule over 20 epochs. One in five
training labels is wrong, so that a network can overfit. The grid gives the best rate of each batch size (linear or
square root?), and the accuracy of a batch size at another size's rate, at a scaled rate, and at its own best rate. Then
batch 256 is trained for as many steps as batch 16.

    python scripts/lab/study_rate.py --png docs/study_rate.png
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import study
import torch
from side_by_side import train_all
from study import FewDigits, Run, Setting

from batchwise.optim.schedule import Schedule

SIZES = (16, 64, 256, study.EXAMPLES)
REFERENCE = 64
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], str, list[float]]] = {
    "SGD": (torch.optim.SGD, "linear", [0.02 * 2**power for power in range(8)]),
    "AdamW": (torch.optim.AdamW, "square root", [0.001 * 2**power for power in range(7)]),
}


def best(runs: dict[float, list[Run]]) -> float:
    """Return the rate with the best mean validation accuracy."""
    return max(runs, key=lambda rate: study.mean(run.val for run in runs[rate]))


def slope(sizes: Sequence[int], rates: list[float]) -> float:
    """Return the exponent p of rate ~ batch^p, fitted by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(rate) for rate in rates]
    mx, my = study.mean(x), study.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__)
    data, sizes = partial(FewDigits, wrong=0.2), study.few(given, SIZES)
    reference = REFERENCE if REFERENCE in sizes else sizes[0]
    base = Setting(epochs=20, schedule=Schedule("cosine"), data=data, every=20)
    figure, axes = study.panels(len(OPTIMIZERS))
    tables, rules = {}, []
    for panel, (name, (optimizer, rule, rates)) in zip(axes, OPTIMIZERS.items(), strict=True):
        rates = study.few(given, rates)
        grid = {(s, rate): replace(base, batch_size=s, lr=rate, optimizer=optimizer) for s in sizes for rate in rates}
        runs = train_all(given, grid)
        by_size = {size: {rate: runs[size, rate] for rate in rates} for size in sizes}
        found = {size: best(by_size[size]) for size in sizes}
        power = 1.0 if rule == "linear" else 0.5

        def near(rate: float, rates: list[float] = rates) -> float:
            """Return the nearest rate of the grid."""
            return min(rates, key=lambda other: abs(math.log(other / rate)))

        def scaled(power: float, size: int, start: float = found[reference], near: Callable = near) -> float:
            """Return the best rate of the reference batch size, scaled."""
            return near(start * (size / reference) ** power)

        def accuracy(size: int, rate: float, by_size: dict = by_size) -> str:
            """Return the table's cell."""
            return study.spread(run.test for run in by_size[size][rate])

        smallest, large = sizes[0], sizes[-2]
        longer = {
            (size, rate): replace(grid[size, rate], epochs=base.epochs * size / smallest, every=10**9)
            for size in [large]
            for rate in (near(found[size] / 2), found[size])
        }
        long_runs = train_all(given, longer)
        rows = []
        for size in sizes:
            long = {rate: each for (s, rate), each in long_runs.items() if s == size} or by_size[smallest]
            rows.append(
                [
                    size,
                    accuracy(size, found[reference]),
                    accuracy(size, scaled(0.5, size)),
                    accuracy(size, scaled(1.0, size)),
                    f"{accuracy(size, found[size])} ({found[size]:.2g})",
                    study.spread(run.test for run in long[best(long)]) if size in (smallest, large) else "-",
                ]
            )
            means = [study.mean(run.test for run in by_size[size][rate]) for rate in rates]
            (line,) = panel.plot(rates, means, "o-", label=f"batch {size}")
            panel.axvline(found[size], color=line.get_color(), linestyle=":", linewidth=1)
        panel.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)", title=name)
        panel.legend(loc="lower center")
        head = ["batch", f"the best rate of {reference}", "scaled by square root", "scaled linearly"]
        head += ["its own best (rate)", f"its own best, as many steps as {smallest}"]
        tables[name] = study.table(f"{name}, test accuracy after {base.epochs} epochs", head, rows)
        rules.append([name, rule, f"{power}", f"{slope(sizes, [found[size] for size in sizes]):.2f}"])
    head = ["optimizer", "rule", "its exponent", "exponent of the best rates found"]
    tables["rules"] = study.table("What the best rates say", head, rules)
    study.finish(given, figure, **tables)


if __name__ == "__main__":
    main()
