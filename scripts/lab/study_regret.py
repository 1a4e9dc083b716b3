"""How good is what `tune` recommends? Its batch size and rate against a grid of all batch sizes and rates.

Time is taken on the thread's own clock, which stops while another process has the core. The time of a training is its
steps to a target times the time of a step of its batch size; the steps of all sizes are timed in turn. Validation does
not count.

    python scripts/lab/study_regret.py --folder study

A file in the folder keeps each training, so the same command goes on where it was stopped.
"""

import argparse
import contextlib
import json
import logging
import math
import statistics
import time
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from grid import Grid
from problems import DEVELOPED_ON, OPTIMIZERS, PROBLEMS, USUAL, ready

from batchwise.choosing import branches, speed, tune
from batchwise.choosing.branches import CONSTANT, Course


def tuned(grid: Grid, folder: Path) -> dict[str, Any]:
    """Return what `tune` says of a task, from a file if it has been asked before."""
    path = folder / f"{grid.name}, {grid.optimizer}.json"
    if not path.exists():
        own = folder / path.stem
        own.mkdir(exist_ok=True)
        task, data = grid.problem.make(grid.optimizer, 0), grid.problem.data(batch_size=64, seed=0)
        trainer = ready(data, own, grid.problem.epochs)
        started = time.thread_time()
        with (own / "said.txt").open("w") as file, contextlib.redirect_stdout(file):
            findings = tune.tune(trainer, task, data, grid.problem.budget, None, {"lr": 1.0})
        seconds, advice = time.thread_time() - started, findings.best()
        overlay = own / "tuned.yaml"
        size, factor, course = 64, 1.0, CONSTANT
        if overlay.exists():
            given = yaml.safe_load(overlay.read_text())
            size, model = given["data"]["batch_size"], given["model"]
            factor, growth = model["optimizer"]["init_args"]["lr"], given["data"].get("batch_size_schedule")
            doubles = growth and growth["init_args"]["examples"][0]
            course = Course(model.get("schedule", {}).get("hold_examples"), doubles)
        found = {
            "size": size, "factor": factor, "course": course, "seconds": seconds, "noise": findings.noise_scale(),
            "range": advice and (advice.low, advice.high), "knee": findings.knee().examples,
            "by_noise": findings.first_guess(),
            "predicted": {each.batch_size: each.steps for each in findings.choices()},
        }  # fmt: skip
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def judge(grid: Grid, said: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Return the times of the recommendation and of its rivals, over those of the best of the grid, for each target."""
    sizes = grid.problem.sizes

    def nearest(size: float) -> int:
        return min(sizes, key=lambda other: abs(math.log(other / size)))

    rivals: dict[str, tuple[int, float, Course]] = {
        "tune": (said["size"], said["factor"], Course(*said["course"])),
        "32, as configured": (32, 1.0, CONSTANT),
        "largest": (max(sizes), 1.0, CONSTANT),
        "knee": (nearest(said["knee"]), 1.0, CONSTANT),
        "noise scale": (nearest(said["by_noise"]), 1.0, CONSTANT),
    }
    for size, factor, course in rivals.values():
        for seed in range(seeds):
            grid.train(size, factor, seed, course)
    grid.clock(sorted({*sizes, said["size"], *([2 * said["size"]] if said["course"][1] else [])}))
    row: dict[str, Any] = {"said": said, "targets": []}
    for target in (0, 1):
        times = {}
        for size in sizes:
            best = grid.best(size, target, seeds)
            times[size] = math.inf if best is None else grid.median(size, best, target)
        whole = min(math.ceil(grid.examples / size) * grid.step(size) for size in sizes)
        least = min([*times.values(), whole])  # if none has got there, the time in which it has not
        fastest = min(times, key=lambda size: times[size])
        found: dict[str, Any] = {
            name: grid.median(size, factor, target, course) / least for name, (size, factor, course) in rivals.items()
        }
        found |= {"best": fastest, "best factor": grid.best(fastest, target, seeds), "least": least}
        steps = {size: times[size] / grid.step(size) for size in sizes}
        off = {
            int(size): predicted / steps[int(size)]
            for size, predicted in said["predicted"].items()
            if 1 / 4 <= int(size) / said["size"] <= 4 and math.isfinite(steps.get(int(size), math.inf))
        }
        if len(off) > 1:  # predictions are relative, so their scale is that at which they are nearest
            scale = statistics.geometric_mean(off.values())
            found["calibration"] = {size: ratio / scale for size, ratio in off.items()}
        row["targets"].append(found)
    for found, ratio in zip(row["targets"], one_for_both(grid, seeds), strict=True):
        found["one pair"] = ratio
    return row


def one_for_both(grid: Grid, seeds: int) -> list[float]:
    """Return the ratios of the one pair of batch size and rate whose product over both targets is least.

    No advice that does not know the target can be better than this, because the best rate depends on the target.
    """
    constant = [run for run in grid.runs if run.course == CONSTANT]
    pairs = {(run.size, run.factor) for run in constant if len(grid.at(run.size, run.factor)) >= seeds}
    times = [[grid.median(*pair, target) for target in (0, 1)] for pair in pairs if pair[0] in grid.clocked]
    least = [min(each) for each in zip(*times, strict=True)]
    ratios = [[a / b if math.isfinite(a) else a for a, b in zip(each, least, strict=True)] for each in times]
    return min(ratios, key=math.prod)


def arguments(about: str | None) -> argparse.Namespace:
    """Return the arguments of a study of the problems, with one thread and the thread's own clock."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=USUAL, choices=PROBLEMS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("study"), help="for the runs; the same command goes on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for module in (branches, speed):
        module.perf_counter = time.thread_time  # type: ignore[attr-defined]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    given.folder.mkdir(parents=True, exist_ok=True)
    return given


PAYS = 20
"""From so many times the time of `tune` on, a training is said with it."""
NAMES = ("tune", "one pair", "32, as configured", "largest", "knee", "noise scale")


def show(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Print the table."""
    print("| task | optimizer | target | best of the grid | tune says | tune took |", " | ".join(NAMES), "|")
    print("|---|---|--:|--:|--:|--:|" + "--:|" * len(NAMES))
    for (name, optimizer), row in rows.items():
        said = row["said"]
        for target, found in zip(PROBLEMS[name].targets, row["targets"], strict=True):
            cells = [f"{found[each]:.2f}" if math.isfinite(found[each]) else "never" for each in NAMES]
            factor = found["best factor"]
            best = f"{found['best']}, {factor:g}x: " if factor else "none has got there in "
            best += f"{found['least']:.2f} s"
            says = f"{said['size']}, {said['factor']:.2g}x" + "".join(
                f", {what} {examples:,}"
                for what, examples in zip(("falls from", "doubles at"), said["course"], strict=True)
                if examples
            )
            print(
                f"| {name} | {optimizer} | {target:g} | {best} | {says} | {said['seconds']:.1f} s |",
                " | ".join(cells),
                "|",
            )
    for (name, optimizer), row in rows.items():
        took = row["said"]["seconds"]
        for target, found in zip(PROBLEMS[name].targets, row["targets"], strict=True):
            if found["least"] >= PAYS * took:
                whole = found["tune"] + took / found["least"]
                print(f"{name}, {optimizer}, {target:g}: {whole:.2f} together with the time of tune")
    for what, chosen in (("developed on", DEVELOPED_ON), ("set before", set(USUAL) - set(DEVELOPED_ON))):
        pairs = [row["targets"] for (name, _), row in rows.items() if name in chosen]
        own = list(chain(*pairs))
        if not own:
            continue
        for each in NAMES:
            ratios = [found[each] for found in own if math.isfinite(found[each])]
            lost = len(own) - len(ratios)
            mean = math.exp(statistics.mean(map(math.log, ratios))) if ratios else math.nan
            worst = max(ratios, default=math.nan)
            print(f"{what}, {each}: geometric mean {mean:.2f}, worst {worst:.2f}; never: {lost} of {len(own)}")
        off = [found.get("calibration", {}) for found in own]
        both = [(found.get("calibration", {}) for found in pair) for pair in pairs]
        mean = [[math.sqrt(one[size] * other[size]) for size in one.keys() & other.keys()] for one, other in both]
        for of, values in (("", [each.values() for each in off]), (", means over both targets", mean)):
            all_of = list(chain(*values))
            near = sum(1 / 1.25 <= value <= 1.25 for value in all_of)
            print(f"{what}: predicted steps within 1.25 of the measured ones{of}: {near} of {len(all_of)}")


def main() -> None:
    """Train the grids, ask `tune`, and compare."""
    given = arguments(__doc__)
    rows = {}
    for name in given.problems:
        for optimizer in given.optimizers:
            grid = Grid(name, optimizer, given.folder / "runs.jsonl")
            grid.fill(given.seeds)
            rows[name, optimizer] = judge(grid, tuned(grid, given.folder), given.seeds)
    show(rows)


if __name__ == "__main__":
    main()
