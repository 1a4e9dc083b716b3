"""Raising the batch size instead of lowering the learning rate (Smith et al. 2017, arXiv 1711.00489).

Plain SGD for 20 epochs, from batches of 16 and a rate of 0.3. After half of the epochs, and again after three quarters,
the rate is divided by four or the batch is multiplied by four. One in ten training labels is wrong, so that a rate that
stays high costs accuracy.

    python scripts/lab/study_schedule.py --png docs/study_schedule.png
"""

from dataclasses import dataclass, replace
from functools import partial

import study
from side_by_side import train_all
from study import FewDigits, Setting

from batchwise.batching.schedule import Milestones
from batchwise.optim.schedule import Schedule

SHARES, FACTOR = [0.5, 0.75], 4


@dataclass(frozen=True)
class Steps(Schedule):
    """The rate divided by `FACTOR` after each of `SHARES` of the training."""

    @property
    def needs_end(self) -> bool:
        """The milestones are shares of the training, so its end must be known."""
        return True

    def factor(self, before: int, after: int, total: float) -> float:
        """Return the factor for one optimizer step."""
        return FACTOR ** -sum(before >= share * total for share in SHARES)


def main() -> None:
    """Train, print, draw."""
    given = study.arguments(__doc__, seeds=10)
    base = Setting(16, 0.3, 20, data=partial(FewDigits, wrong=0.1))
    grown = Milestones([base.batch_size * FACTOR, base.batch_size * FACTOR**2], shares=SHARES)
    raised = replace(base, data=partial(base.data, batch_size_schedule=grown))
    settings = {
        "neither": base,
        "rate lowered: 0.3, 0.075, 0.019": replace(base, schedule=Steps()),
        "batch raised: 16, 64, 256": raised,
        "batch raised, rate with it: 0.3, 1.2, 4.8": replace(raised, reference_batch_size=base.batch_size),
    }
    runs = train_all(given, settings)
    rows = []
    figure, (left, right) = study.panels(2)
    for name, each in runs.items():
        rows.append(
            [
                name,
                f"{study.mean(run.steps[-1] for run in each):,.0f}",
                study.spread((run.loss[-1] for run in each), 3),
                study.spread(run.test for run in each),
            ]
        )
        loss = [study.mean(values) for values in zip(*(run.loss for run in each), strict=False)]
        accuracy = [study.mean(values) for values in zip(*(run.accuracy for run in each), strict=False)]
        left.plot(range(1, len(loss) + 1), loss, label=name)
        right.plot(range(1, len(accuracy) + 1), accuracy, label=name)
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    right.legend(fontsize=8)
    head = ["after half, and after three quarters", "steps", "training loss", "test accuracy"]
    study.finish(given, figure, schedule=study.table("20 epochs of SGD", head, rows))


if __name__ == "__main__":
    main()
