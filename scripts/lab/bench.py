"""Shared by all benchmarks: alternatives take turns in one process, on the same data; medians and ratios come out."""

import argparse
import json
import logging
import os
import platform
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

LAB = Path(__file__).parent
FIT = ("-m", "batchwise", "fit", "--config", f"{LAB}/digits.yaml")
CSV = ("--config", f"{LAB}/csv.yaml")


def arguments(description: str | None, pairs: int = 5) -> argparse.Namespace:
    """Return the command line that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=pairs, help="rounds after the warm-up; 0: the warm-up counts")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the work per turn; tests take a small one")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return prepare(parser)


def prepare(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set the number of threads and silence Lightning."""
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    return given


def interleave(alternatives: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Run each alternative once per round, after a warm-up round; return the measurements of each."""
    measured: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(pairs + 1):
        for name, run in alternatives.items():
            value = run()
            if number or not pairs:
                measured[name].append(value)
    return measured


def report(title: str, unit: str, measured: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Print and return each alternative's median, and the median over the rounds of its ratio to `base`."""
    print(f"\n{title}  (median of {len(measured[base])} rounds, {unit}; ratio to: {base})")
    figures = {}
    for name, values in measured.items():
        ratio = statistics.median(a / b for a, b in zip(values, measured[base], strict=True))
        figures[name] = {"median": statistics.median(values), "ratio": ratio}
        median = statistics.median(values)
        print(f"  {name:<52}{median:>14,.{0 if median >= 1000 else 2}f}{ratio:>9.2f}")
    return figures


def machine() -> dict[str, str | int]:
    """Return a description of this machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def save(path: Path | None, figures: dict) -> None:
    """Print the machine; write it and the figures to a file, if there is a path."""
    print(f"\n{machine()}")
    if path is not None:
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")
