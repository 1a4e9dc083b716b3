"""Do the settings of an optimizer have to follow the batch? Each rule, with and without, at four times and a quarter.

A perceptron predicts characters (`problems.Characters`), one pass over the data, cosine schedule. The rate is tuned at
batch 64. At 16 and at 256 the rules give the settings; then the rate is tuned once more. The figures are validation
losses after the pass.

    python scripts/lab/study_rules.py
"""

import contextlib
import math
import statistics
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import study
import torch
from problems import PROBLEMS, ready
from torch.optim import SGD, AdamW

from batchwise.choosing import short
from batchwise.errors import TrainingStopped
from batchwise.optim.scaling import FOLLOWING
from batchwise.optim.schedule import Schedule
from batchwise.tasks.classification import Classification

REFERENCE = 64
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW, beta2 0.999": partial(AdamW, lr=4e-3, weight_decay=0.05),
    "AdamW, beta2 0.95": partial(AdamW, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05),
    "SGD, momentum 0.9": partial(SGD, lr=0.08, momentum=0.9),
}
ALL = tuple(FOLLOWING)
ADAMS = {
    "all rules": (),
    "beta2 stays": ("beta2",),
    "eps stays": ("eps",),
    "decay stays": ("weight_decay",),
    "the rate alone follows": ALL,
    "nothing follows": None,
}
ALTERNATIVES: dict[str, dict[str, tuple[str, ...] | None]] = {
    "AdamW, beta2 0.999": ADAMS,
    "AdamW, beta2 0.95": ADAMS,
    "SGD, momentum 0.9": {"all rules": (), "momentum stays": ("momentum",), "nothing follows": None},
}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
SIZES = (16, 256)


class Study:
    """Trains, and remembers.

    Args:
        scale: share of the pass over the data.
    """

    def __init__(self, scale: float) -> None:
        self.problem = PROBLEMS["characters"]
        self.data = self.problem.data(batch_size=REFERENCE, seed=0)
        self.trainer = ready(self.data, ".")
        assert self.data.plan is not None
        self.examples = max(REFERENCE, round(scale * self.data.plan.examples_per_epoch))

    @cache  # noqa: B019
    def loss(self, optimizer: str, size: int, factor: float, keeps: tuple[str, ...] | None, seed: int) -> float:
        """Return the validation loss after the training, infinite if it diverged."""
        torch.manual_seed(seed)
        make: Any = OPTIMIZERS[optimizer]
        follow: dict[str, Any] = {"reference_batch_size": REFERENCE, "scaling_keeps": list(keeps or ())}
        task = Classification(
            self.problem.network(),
            optimizer=partial(make, lr=make.keywords["lr"] * factor),
            schedule=Schedule("cosine", warmup=0.05),
            decay_matrices_only=True,
            **({} if keeps is None else follow),
        )
        data, steps = short.resized(self.data, size, None), self.examples // size
        data.seed = seed
        last = _Last(steps)
        with contextlib.suppress(TrainingStopped):
            short.train(self.trainer, task, data, steps, [last], validate=1.0)
        return last.loss

    def mean(self, seeds: int, *setting: Any) -> float:
        """Return the mean over the seeds."""
        return statistics.mean(self.loss(*setting, seed) for seed in range(seeds))

    def best(self, optimizer: str, size: int, around: float, keeps: Any) -> float:
        """Return the best rate by two seeds, as a factor."""
        return min((around * by for by in FACTORS), key=lambda factor: self.mean(2, optimizer, size, factor, keeps))


class _Last(study.Callback):
    """Validates after the last step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.loss = steps, math.inf

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.val_check_batch = 1 if trainer.global_step == self.steps else short.NEVER

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.loss = float(trainer.callback_metrics["val/loss"])


def main() -> None:
    """Train and print."""
    given = study.arguments(__doc__)
    trainings, figures = Study(given.scale), {}
    for name, alternatives in ALTERNATIVES.items():
        tuned = trainings.best(name, REFERENCE, 1.0, None)
        rows = []
        for what, keeps in alternatives.items():
            cells: list[Any] = [what]
            for size in SIZES:
                best = trainings.best(name, size, tuned, keeps)
                for factor in (tuned, best):
                    losses = [trainings.loss(name, size, factor, keeps, seed) for seed in range(given.seeds)]
                    cells.append(study.spread(losses, 3))
                cells.append(f"{best / tuned:g}")
            rows.append(cells)
        base = study.spread((trainings.loss(name, REFERENCE, tuned, None, seed) for seed in range(given.seeds)), 3)
        head = [f"{name} (at {REFERENCE}: {base})"]
        for size in SIZES:
            head += [f"{size}: by the rules", f"{size}: rate tuned again", f"{size}: times"]
        figures[name] = study.table(name, head, rows)
    study.finish(given, None, **figures)


if __name__ == "__main__":
    main()
