"""Batch norm, dropout, neither, both: how accurate, at which learning rates, and how steadily?

A network with four hidden layers, SGD with momentum and a constant rate, batches of 64. There are few training images,
and one in ten of their labels is wrong, so that regularisation can help.

    python scripts/lab/study_norm.py --png docs/study_norm.png
"""

import statistics
from functools import partial

import study
import torch
from side_by_side import train_all
from study import FewDigits, Run, Setting

from batchwise.models.mlp import MLP

RATES = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
SHOWN = [0.01, 0.1, 0.3]
KINDS = {
    "neither": ("none", 0.0),
    "dropout": ("none", 0.3),
    "batch norm": ("batch", 0.0),
    "both": ("batch", 0.3),
    "layer norm": ("layer", 0.0),
}


def network(norm: str, dropout: float) -> MLP:
    """Return a new network."""
    return MLP(hidden_features=[128] * 4, norm=norm, dropout=dropout)


def unsteady(run: Run) -> float:
    """Return the sum of all rises of the training loss from epoch to epoch, divided by its first value."""
    rises = [max(0.0, b - a) for a, b in zip(run.loss, run.loss[1:], strict=False)]
    return sum(rises) / run.loss[0] if run.loss else float("nan")


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__, seeds=5)
    rates = study.few(given, RATES)
    data = partial(FewDigits, wrong=0.1)
    sgd = partial(torch.optim.SGD, momentum=0.9)
    makes = {kind: partial(network, *settings) for kind, settings in KINDS.items()}
    settings = {
        (kind, rate): Setting(64, rate, 20, optimizer=sgd, network=makes[kind], data=data)
        for kind in KINDS
        for rate in rates
    }
    runs = train_all(given, settings)
    shown = [rate for rate in rates if rate in SHOWN] or rates
    rows = []
    figure, (left, right) = study.panels(2)
    for kind in KINDS:
        by_rate = {rate: runs[kind, rate] for rate in rates}
        best = max(rates, key=lambda rate, by_rate=by_rate: study.mean(run.val for run in by_rate[rate]))
        cells = []
        for rate in shown:
            lost = sum(run.test < 50 for run in by_rate[rate])
            cells.append(study.spread(run.test for run in by_rate[rate]) + (f" ({lost} lost)" if lost else ""))
        rows.append([kind, *cells, f"{study.spread(run.test for run in by_rate[best])} ({best:g})"])
        means = [study.mean(run.test for run in by_rate[rate]) for rate in rates]
        left.plot(rates, means, "o-", label=kind)
        rough = [statistics.median(unsteady(run) for run in by_rate[rate]) for rate in rates]
        right.plot(rates, rough, "o-", label=kind)
    left.set(xscale="log", xlabel="learning rate", ylabel="test accuracy (%)")
    right.set(xscale="log", xlabel="learning rate", ylabel="rises of the training loss / its first value")
    left.legend(loc="lower center")
    head = ["", *[f"rate {rate:g}" for rate in shown], "at its best rate"]
    study.finish(given, figure, norm=study.table("Test accuracy after 20 epochs", head, rows))


if __name__ == "__main__":
    main()
