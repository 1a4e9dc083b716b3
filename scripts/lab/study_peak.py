"""Is the rate that `tune` finds in short trainings a good highest rate for a whole training with a cosine schedule?

`tune` compares constant rates in short trainings. A cosine schedule is half as high on average, and the training is
longer. Here `tune` gets a configuration with a cosine schedule. Then whole trainings of its batch size run with the
rate that it gives, and with a quarter, half, twice and four times of it. Their last validation losses are compared.

    python scripts/lab/study_peak.py --folder peaks

A file in the folder keeps each training, so the same command goes on where it was stopped.
"""

import contextlib
import json
import math
import statistics
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from problems import PROBLEMS, ready
from study_regret import arguments

from batchwise.choosing import short, tune
from batchwise.errors import TrainingStopped
from batchwise.tasks.task import Task

FACTORS = (1 / 4, 1 / 2, 1, 2, 4)
"""On the rate that `tune` gives."""
LENGTHS = (1, 4)
"""Of the trainings, in the usual number of epochs."""


class Last(Callback):
    """Sets the rate, and validates after the last step."""

    def __init__(self, factor: float, steps: int) -> None:
        self.factor, self.steps, self.loss = factor, steps, math.inf

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Set the rate."""
        pl_module._rates.times(self.factor)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Validate if it is the end."""
        trainer.val_check_batch = 1 if trainer.global_step >= self.steps else short.NEVER

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the loss."""
        self.loss = float(trainer.callback_metrics["val/loss"])


class Case:
    """A task with an optimizer and a cosine schedule, and the batch size and rate that `tune` finds for it.

    Args:
        name: the task.
        optimizer: name of the optimizer.
        folder: for what `tune` says.
    """

    def __init__(self, name: str, optimizer: str, folder: Path) -> None:
        self.problem, self.optimizer = PROBLEMS[name], optimizer
        self.folder = folder / f"{name}, {optimizer}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.problem.data(batch_size=64, seed=0)
        self.trainer = ready(self.data, self.folder, self.problem.epochs)

    def task(self, seed: int) -> Task:
        """Return a new task."""
        task = self.problem.make(self.optimizer, seed)
        task._rates.schedule = replace(task._rates.schedule, shape="cosine")
        return task

    def advice(self) -> tuple[int, float]:
        """Return batch size and factor on the rate, from a file if `tune` has been asked before."""
        path = self.folder / "advice.json"
        if not path.exists():
            with (self.folder / "said.txt").open("w") as file, contextlib.redirect_stdout(file):
                best = tune.tune(self.trainer, self.task(0), self.data, self.problem.budget, None, {}).best()
            assert best is not None
            path.write_text(json.dumps([best.batch_size, best.factor]))
        size, factor = json.loads(path.read_text())
        return size, factor

    def loss(self, size: int, factor: float, seed: int, length: int) -> float:
        """Return the last loss of a training of so many times the usual length."""
        task, data = self.task(seed), short.resized(self.data, size, None)
        task._rates.refer(64)
        data.seed = seed
        steps = round(length * self.data.total_examples() / size)
        last = Last(factor, steps)
        with contextlib.suppress(TrainingStopped):  # its loss is not finite any more
            short.train(self.trainer, task, data, steps, [last], validate=1.0)
        return last.loss


def main() -> None:
    """Ask `tune`, train, and print a table."""
    given = arguments(__doc__)
    path = given.folder / "losses.jsonl"
    known = {tuple(key): loss for key, loss in map(json.loads, path.read_text().splitlines() if path.exists() else [])}
    ratios: dict[tuple[int, float], list[float]] = {}
    print("| task | optimizer | length |", " | ".join(f"{factor:g}x" for factor in FACTORS), "|")
    print("|---|---|--:|" + "--:|" * len(FACTORS))
    for name, optimizer, length in product(given.problems, given.optimizers, LENGTHS):
        case = Case(name, optimizer, given.folder)
        size, own = case.advice()
        losses = []
        for factor in FACTORS:
            keys = [(name, optimizer, length, factor, seed) for seed in range(given.seeds)]
            for key in keys:
                if key not in known:
                    known[key] = case.loss(size, own * factor, key[-1], length)
                    with path.open("a") as file:
                        file.write(json.dumps([key, known[key]]) + "\n")
            losses.append(statistics.median(known[key] for key in keys))
        best = min(losses)
        cells = [f"**{loss:.4g}**" if loss == best else f"{loss:.4g}" for loss in losses]
        print(f"| {name} | {optimizer} | {length} |", " | ".join(cells), "|", flush=True)
        for factor, loss in zip(FACTORS, losses, strict=True):
            ratios.setdefault((length, factor), []).append(loss / best)
    for (length, factor), found in ratios.items():
        finite = [ratio for ratio in found if math.isfinite(ratio)]
        mean = statistics.geometric_mean(finite) if finite else math.nan
        worst, lost = max(finite, default=math.nan), len(found) - len(finite)
        print(f"length {length}, {factor:g}x: over the best {mean:.3f}, worst {worst:.2f}; not finite: {lost}")


if __name__ == "__main__":
    main()
