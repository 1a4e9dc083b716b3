"""The runs of a sweep: the due ones, their file, and their results."""

import csv
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from batchwise.errors import Mistake
from batchwise.host import naming

GROWN = 2
"""The most rates that are added at each end of the grid."""


@dataclass(frozen=True)
class Run:
    """One training to the target; a row of the file."""

    config: str = ""
    """A hash of its other settings, and the target."""
    batch_size: int = 0
    seed: int = 0
    factor: float = 1.0
    """Factor on the learning rate that the rule gives."""
    learning_rate: float = 0.0
    reached: bool = False
    steps: int = 0
    """Optimizer steps to the target; if it was not reached, the steps that were allowed."""
    examples: int = 0
    seconds: float = 0.0
    """Seconds of the steps alone."""


def due(runs: list[Run], sizes: list[int], seeds: list[int], factors: list[float]) -> Iterator[tuple[int, int, float]]:
    """Yield (seed, batch size, factor) of the next runs, given the runs so far.

    Each size gets the whole grid. While its best rate is at an end of the grid, or no rate has reached the target,
    another rate is added beyond that end, at the same distance, but at most `GROWN`.
    """
    done = {(run.seed, run.batch_size, run.factor) for run in runs}
    wanted = [(seed, size, factor) for seed in seeds for size in sizes for factor in factors]
    for size in sizes if len(factors) > 1 else []:
        grid = list(factors)
        while all((seed, size, factor) in done for seed in seeds for factor in grid):
            best = choose(run for run in runs if run.batch_size == size and run.factor in grid)
            below, above = grid.index(factors[0]), len(grid) - 1 - grid.index(factors[-1])
            new = [grid[0] ** 2 / grid[1]] if best in (None, grid[0]) and below < GROWN else []
            new += [grid[-1] ** 2 / grid[-2]] if best in (None, grid[-1]) and above < GROWN else []
            if not new:
                break
            grid = sorted([*grid, *new])
            wanted += [(seed, size, factor) for factor in new for seed in seeds]
    yield from (each for each in wanted if each not in done)


def _median(runs: Iterable[Run], name: str = "steps") -> float:
    return statistics.median(getattr(run, name) if run.reached else math.inf for run in runs)


def choose(runs: Iterable[Run]) -> float | None:
    """Return the factor with the fewest steps, by the median over the seeds; None: most never reach the target."""
    by_factor: dict[float, list[Run]] = {}
    for run in runs:
        by_factor.setdefault(run.factor, []).append(run)
    best = min(by_factor, key=lambda factor: _median(by_factor[factor]))
    return best if math.isfinite(_median(by_factor[best])) else None


class Result(NamedTuple):
    """A batch size at its best rate: medians over the seeds, infinite if most did not reach the target."""

    batch_size: int
    runs: list[Run]
    """The runs at the best rate; all runs, if there is no best rate."""
    steps: float
    examples: float
    seconds: float


def results(runs: list[Run]) -> list[Result]:
    """Return the result of each batch size, in rising order."""
    found = []
    for size in sorted({run.batch_size for run in runs}):
        own = [run for run in runs if run.batch_size == size]
        best = choose(own)
        taken = [run for run in own if best in (None, run.factor)]
        medians = [math.inf if best is None else _median(taken, name) for name in ("steps", "examples", "seconds")]
        found.append(Result(size, taken, *medians))
    return found


class Fit(NamedTuple):
    """Steps to a target by batch size: S + E / B (McCandlish et al. 2018, equation 2.11)."""

    least: float
    """S, the least number of steps."""
    examples: float
    """E, the least number of examples."""

    @property
    def noise_scale(self) -> float:
        """The batch size that takes twice the least steps, and twice the least examples."""
        return self.examples / self.least if self.least else math.inf

    def steps(self, batch_size: int) -> float:
        """Return the steps at a batch size."""
        return self.least + self.examples / batch_size


def fit(found: list[Result]) -> Fit | None:
    """Return the fit to the batch sizes that reached the target; see `least_squares`."""
    return least_squares({each.batch_size: each.steps for each in found if math.isfinite(each.steps)})


def least_squares(steps: dict[int, float]) -> Fit | None:
    """Return the fit with the least squares of the relative errors; None: there are fewer than three batch sizes.

    Args:
        steps: steps to a target, by batch size.
    """
    if len(steps) < 3:
        return None
    from scipy.optimize import nnls

    sizes, counts = np.array(list(steps), float), np.array(list(steps.values()))
    least, _ = nnls(np.stack([1 / counts, 1 / (sizes * counts)], 1), np.ones(len(steps)))
    return Fit(float(least[0]), float(least[1]))


def read(path: Path) -> list[Run]:
    """Return the runs in a file, or no runs if there is no file. A last row that is torn, by a power cut, is none.

    Raises:
        Mistake: the file holds something else.
    """
    if not path.exists():
        return []
    kinds = {name: type(default) for name, default in asdict(Run()).items()}
    header, content = ",".join(kinds).encode(), path.read_bytes()

    def run(row: dict[str, str]) -> Run:
        values: dict[str, Any] = {name: kind(row[name]) for name, kind in kinds.items()}
        values["reached"] = row["reached"] == "True"  # bool("False") is true
        return Run(**values)

    try:
        if not header.startswith(content[: len(header)]):
            raise ValueError("its columns are others")
        return [run(row) for row in csv.DictReader(content[: _whole(content)].decode().splitlines())]
    except (TypeError, ValueError) as error:
        raise Mistake(f"{path} is not the file of a sweep ({error}): move it away") from error


def _whole(content: bytes) -> int:
    """Return the bytes up to the end of the last line: of a row without that, even the last number may be torn."""
    return content.rfind(b"\n") + 1


def append(path: Path, run: Run) -> None:
    """Append a run to the whole rows of a file that is there, and no part of a run.

    Raises:
        OSError: it cannot be written; it is as it was.
    """
    content = path.read_bytes()
    before = _whole(content)
    if before < len(content):  # else a row that another sweep appends at this moment would be lost
        os.truncate(path, before)
    try:
        with naming(path), path.open("a", newline="") as file:
            writer = csv.DictWriter(file, asdict(run))
            if not before:
                writer.writeheader()
            writer.writerow(asdict(run))
    except OSError:
        os.truncate(path, before)
        raise
