"""Which micro-batches fit and are fast. Each is run, by all devices, which agree on the result."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from batchwise.choosing.speed import Stopwatch, Way
from batchwise.host import available_memory, peak_memory, release_memory, reset_peak_memory

KNEE = 0.95
"""The knee is the smallest micro-batch that has this share of the best speed."""
BEYOND = 16
"""On a CPU, no micro-batch of more than so many times the knee is run."""


class Size(NamedTuple):
    """A micro-batch that was run: its examples, bytes at the peak, and examples per second (forward and backward)."""

    examples: int
    memory: int
    speed: float


def knee(sizes: list[Size]) -> Size:
    """Return the smallest micro-batch whose speed is within 5% of the best."""
    best = max(size.speed for size in sizes)
    return next(size for size in sorted(sizes) if size.speed >= KNEE * best)


def free_memory(device: torch.device, processes: int) -> float:
    """Return the bytes that a process may use at its peak: on a CPU, most of the free memory.

    Args:
        device: where the process trains. Devices other than a CPU raise an error when they are full.
        processes: processes on this machine, which share its memory.
    """
    return 0.8 * available_memory() / processes + peak_memory(device) if device.type == "cpu" else math.inf


def what_fits(
    watch: Stopwatch, way: Way, most: int, budget: float, unit: int, largest: Callable[[float], float] = float
) -> Iterator[Size]:
    """Yield micro-batches by doubling, then the largest that fits by bisection (to one part in 16). Each was run.

    On a CPU, a process that runs out of memory is killed. So there a size is not run if its memory would be over the
    budget, by a straight line through the two sizes before it. Nor is one that is far beyond the knee: it takes long,
    and would not be faster.

    Args:
        watch: runs the micro-batches.
        way: how to run them, in any size.
        most: the most examples.
        budget: the most bytes at the peak; the same on all devices.
        unit: examples that must stay together.
        largest: returns the largest of the values of all devices, so that the slowest and the fullest device decide.
            No device waits for another within a micro-batch, so a device that runs out of memory keeps none waiting.
    """
    size, fits, fails = unit, 0, most + 1
    seen: list[Size] = []
    while fits < size < fails:
        on_cpu = watch.device.type == "cpu"
        if on_cpu and seen and size > BEYOND * knee(seen).examples:
            return
        if on_cpu and len(seen) > 1 and _extended(seen[-2], seen[-1], size) > budget:
            fails = size
        else:
            reset_peak_memory(watch.device)
            seconds = largest(min(watch.seconds(replace(way, size=size)) for _ in range(2)))  # the first warms up
            peak = int(largest(peak_memory(watch.device)))
            if math.isinf(seconds) or (fits and peak > budget):
                fails = size
                release_memory(watch.device)
            else:
                fits = size
                seen.append(Size(size, peak, 1 / seconds))
                yield seen[-1]
        if fails - fits <= max(unit, fits // 16):
            return
        size = min(2 * fits, most) if fails > most else (fits + fails) // 2 // unit * unit


def why_no_larger(sizes: list[Size], most: int) -> str:
    """Return why `what_fits` ran no larger micro-batches than these."""
    largest = max(sizes).examples
    if largest == most:
        return "all of the training examples at once"
    return "more would not be faster" if 2 * largest > BEYOND * knee(sizes).examples else "more would not fit"


def again(watch: Stopwatch, way: Way, sizes: list[Size], largest: Callable[[float], float] = float) -> list[Size]:
    """Return sizes by examples, each with the better of its speed and another measurement.

    Other work on the machine comes and goes. If it came while some sizes were run, they were slow by chance.
    """

    def speed(examples: int) -> float:
        return 1 / largest(watch.seconds(replace(way, size=examples)))

    return [size._replace(speed=max(size.speed, speed(size.examples))) for size in sorted(sizes)]


def _extended(first: Size, second: Size, examples: int) -> float:
    slope = (second.memory - first.memory) / (second.examples - first.examples)
    return second.memory + max(0.0, slope) * (examples - second.examples)
