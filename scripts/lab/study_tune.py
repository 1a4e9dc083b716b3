"""Does `tune` recommend a fast batch size? Its choice against a sweep of all sizes, on two data sets.

Time is taken on the thread's own clock, which stops while another process has the core. The time of a batch size is the
median time of a step over all its runs, times the median steps to the target.

    python scripts/lab/study_tune.py --folder study
"""

import argparse
import json
import logging
import math
import pydoc_data.topics
import statistics
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from batchwise.batching.loader import MicroBatch
from batchwise.choosing import speed, sweep, trials, tune
from batchwise.choosing.sweep import Recipe
from batchwise.data.module import DataModule
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer


class Characters(DataModule):
    """Predict the next character of Python's own documentation (`pydoc_data.topics`) from the eight before it.

    Inputs are character codes uint8 [N, 8] from 0 to 127, which become one-hot vectors. Targets are codes [N].
    """

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return every 16th position of the first nine tenths of the text ("train"), or of the last tenth."""
        text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")))
        windows = text.unfold(0, 9, 16)
        border = len(windows) * 9 // 10
        part = windows[:border] if split == "train" else windows[border:]
        return part[:, :8].byte().contiguous(), part[:, 8].long()

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Convert codes to one-hot vectors [N, 1024]."""
        return replace(batch, inputs=torch.nn.functional.one_hot(batch.inputs.long(), 128).flatten(1).float())


class Problem(NamedTuple):
    """A data set, a network and a target."""

    data: type[DataModule]
    network: Any
    lr: float
    target: str
    epochs: int


PROBLEMS = {
    "digits": Problem(Digits, partial(MLP, 64, 10, [512], norm="layer", dropout=0.2), 3e-3, "val/accuracy>=0.97", 20),
    "characters": Problem(Characters, partial(MLP, 1024, 128, [128]), 3e-3, "val/accuracy>=0.42", 8),
}


def study(name: str, folder: Path, sizes: list[int], seeds: int, rates: str, steps: int) -> dict[str, Any]:
    """Tune, then sweep; print and return the table."""
    problem = PROBLEMS[name]

    def model(seed: int) -> Classification:
        torch.manual_seed(seed)
        optimizer = partial(torch.optim.AdamW, lr=problem.lr, weight_decay=0.05)
        return Classification(problem.network(), optimizer=optimizer, decay_matrices_only=True)

    folder.mkdir(parents=True, exist_ok=True)
    data, task = problem.data(batch_size=64, seed=0), model(0)
    trainer = Trainer(accelerator="cpu", max_epochs=problem.epochs, logger=False, default_root_dir=folder)
    data.trainer = trainer
    data.setup("fit")
    data.trainer = trainer
    task.prepare(data, "train")
    overlay = folder / "tuned.yaml"
    if not overlay.exists():
        tune.tune(trainer, task, data, steps, None)
    recommended = yaml.safe_load(overlay.read_text())["data"]["batch_size"]
    runs = sweep.sweep(
        trainer, task, data, Recipe(model, ""), str(folder / "sweep.csv"),
        batch_sizes=",".join(map(str, sorted({*sizes, recommended}))), target=problem.target, seeds=seeds, rates=rates,
        val_share=0.05,
    )  # fmt: skip
    rows = {}
    for each in trials.results(runs):
        own = [run for run in runs if run.batch_size == each.batch_size]
        step = statistics.median(run.seconds / run.steps for run in own if run.reached or not math.isfinite(each.steps))
        by_rule = statistics.median(run.steps if run.reached else float("inf") for run in own if run.factor == 1)
        rows[each.batch_size] = {
            "factor": each.runs[0].factor,
            "learning_rate": each.runs[0].learning_rate,
            "steps": each.steps,
            "of_each_seed": [run.steps if run.reached else None for run in each.runs],
            "examples": each.examples,
            "step_ms": step * 1e3,
            "seconds": each.steps * step,
            "seconds_by_rule": by_rule * step,
        }
    least = min(row["seconds"] for row in rows.values())
    print(f"\n{name}, to {problem.target}; tune recommends {recommended}\n")
    heads = ("batch_size", "best rate", "steps", "of each seed", "examples", "ms per step", "seconds")
    print(f"| {' | '.join(heads)} | against the best | at the rule's rate |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    for size, row in rows.items():
        seen = ", ".join("never" if steps is None else str(steps) for steps in row["of_each_seed"])
        print(
            f"| {f'**{size}**' if size == recommended else size} | {row['learning_rate']:.2g} ({row['factor']:g}x) "
            f"| {row['steps']:g} | {seen} | {row['examples']:,.0f} | {row['step_ms']:.2f} | {row['seconds']:.3g} "
            f"| {row['seconds'] / least:.2f} | {row['seconds_by_rule'] / least:.2f} |"
        )
    return {"recommended": recommended, "ratio": rows[recommended]["seconds"] / least, "rows": rows}


def main() -> None:
    """Study each data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="0.5,1,2")
    parser.add_argument("--steps", type=int, default=400, help="steps in which tune measures the noise scale")
    parser.add_argument("--folder", type=Path, default=Path("study"), help="for the runs; the same command goes on")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for module in (speed, tune, sweep):
        module.perf_counter = time.thread_time  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    figures = {
        name: study(name, given.folder / name, given.sizes, given.seeds, given.rates, given.steps)
        for name in given.problems
    }
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
