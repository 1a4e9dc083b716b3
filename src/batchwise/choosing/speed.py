"""The fastest way to run the batch on this machine, found by measuring. The result stays, up to rounding."""

import copy
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jsonargparse import Namespace
from torch import nn

from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import tensors
from batchwise.data.module import DataModule
from batchwise.errors import Mistake
from batchwise.host import wait_for
from batchwise.models.call import lay_out
from batchwise.models.compiled import compile_network
from batchwise.models.kept import dtype_of
from batchwise.models.norm import has_batchnorm
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.task import Task

_GAIN = 1.05  # a way replaces another if it is at least so many times as fast
_TURN = 0.1  # the least seconds of measuring at a time
_EXAMPLES = 256  # the most examples that are read; larger micro-batches repeat them
_LONG = 1200.0  # seconds of training from which compiling may pay
_OVERHEAD = 2e-4  # seconds that Python takes per micro-batch


def quickest(seconds: Sequence[float] | np.ndarray) -> float:
    """Return the lowest tenth of some measurements. Other work on the machine slows most of them, but hardly these."""
    return float(np.quantile(seconds, 0.1))


Settings = Namespace | dict[str, Any]
"""The settings of the trainer, by their keys."""


@dataclass(frozen=True)
class Way:
    """How micro-batches of `size` examples are run. The other names are keys of the trainer."""

    size: int
    precision: str = "32-true"
    channels_last: bool = False
    threads: int = 1
    compile: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("channels_last", "compile") if getattr(self, name)]
        return ", ".join([f"micro-batches of {self.size}", self.precision, f"{self.threads} thread(s)", *flags])


class Stopwatch:
    """Measures how fast the micro-batches of a task run. It runs a copy of the task.

    Args:
        task: the task to be trained.
        data: has the examples.
        size: size of the largest micro-batch.
        device: where to measure.
        rounds: number of rounds, in each of which each way has its turn.
    """

    def __init__(self, task: Task, data: DataModule, size: int, device: torch.device, rounds: int = 5) -> None:
        self.tasks = {False: copy.deepcopy(task).to(device).train()}
        self.data, self.device, self.rounds = data, device, rounds
        self.examples = data.examples("train", min(size, _EXAMPLES))

    def task(self, way: Way) -> Task:
        """Return a copy of the task, with the memory format of a way, and compiled if the way says so."""
        if way.compile not in self.tasks:
            self.tasks[True] = copy.deepcopy(self.tasks[False])
            compile_network(self.tasks[True].network, self.device)
        task = self.tasks[way.compile]
        task._channels_last = way.channels_last
        lay_out(task.network, way.channels_last)
        return task

    def seconds(self, way: Way) -> float:
        """Return the seconds per example of a forward and backward pass (inf: out of memory)."""
        micro_batch = self.examples.take(torch.arange(way.size) % len(self.examples))
        with _as_before():
            torch.set_num_threads(way.threads)
            task = self.task(way)
            laps = [perf_counter()]
            try:
                while len(laps) == 1 or laps[-1] - laps[0] < _TURN:
                    self._run(task, micro_batch, way.precision)
                    laps.append(perf_counter())
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    line = str(error).splitlines()[0]
                    raise Mistake(f"{type(task).__name__}.losses cannot be tried outside training ({line})") from error
                task.zero_grad()
                return float("inf")
            return (quickest(np.diff(laps)) + _OVERHEAD) / len(micro_batch)

    def _run(self, task: Task, micro_batch: MicroBatch, precision: str) -> None:
        mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        with torch.autocast(self.device.type, mixed) if mixed else nullcontext():
            on_device = self.data.to_device(micro_batch, self.device, training=True)
            loss, _ = task._summed_loss(on_device.cast(dtype_of(task.network)))
        loss.backward()
        task.zero_grad()
        wait_for(self.device)

    def compare(self, ways: list[Way]) -> list[float]:
        """Return the median seconds per example of each way, measured in turn."""
        rounds = [[self.seconds(way) for way in ways] for _ in range(self.rounds + 1)]
        return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]  # the first round warms up


@contextmanager
def _as_before() -> Iterator[None]:
    threads, generator = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(generator)


def candidates(
    task: Task, data: DataModule, trainer: Settings, device: torch.device, processes: int
) -> dict[str, list]:
    """Return the values to try, for each property of a way that the configuration does not set.

    Args:
        task: the task to be trained.
        data: has the examples, and a `batch_size`.
        trainer: the settings of the trainer.
        device: where the task is to be trained.
        processes: processes on this machine, which share its cores.
    """
    found: dict[str, list] = {}
    assert data.batch_size is not None
    inputs = data.examples("train", 1).inputs
    if device.type == "cpu" and trainer.get("threads") is None:
        found["threads"] = sorted({1, max(1, (os.cpu_count() or 1) // processes)})
    if trainer.get("precision") is None:
        found["precision"] = ["32-true", "bf16-mixed"]
    images = any(tensor.ndim == 4 for tensor in tensors(inputs))
    convolves = any(isinstance(layer, nn.Conv2d) for layer in task.network.modules())
    if convolves and images and trainer.get("channels_last") is None:
        found["channels_last"] = [False, True]
    settled = data.micro_batch_size or data.finds_micro_batch or trainer.get("accumulate_grad_batches")
    share = -(-data.batch_size // processes)
    unit = data.unit_for(task._step.unit)
    if not settled and share >= unit and not has_batchnorm(task):  # its result depends on the micro-batch
        powers = [2**power // unit * unit for power in range(5, 13)]
        # A larger share is not tried whole: on a CPU, a process that runs out of memory is killed.
        found["size"] = [*(size for size in powers if 0 < size < share), *([share] if share <= powers[-1] else [])]
    if trainer.get("compile") is None:
        found["compile"] = [False, True]
    return found


def choose(watch: Stopwatch, way: Way, tried: dict[str, list], examples: float) -> tuple[Way, list[str]]:
    """Return the fastest way, found one property after the other, and the measurements as the lines of a table.

    Args:
        watch: measures.
        way: the first way.
        tried: see `candidates`.
        examples: number of examples that training will see. A compiler takes minutes, so it is tried only if training
            takes far longer.
    """
    lines = ["    examples/s  ratio"]
    for key, values in tried.items():
        ways = [way, *(other for value in values if (other := replace(way, **{key: value})) != way)]
        if len(ways) == 1 or (key == "compile" and examples * watch.seconds(way) < _LONG):
            continue
        seconds = watch.compare(ways)
        best = min(range(len(ways)), key=seconds.__getitem__)
        chosen = best if seconds[0] > _GAIN * seconds[best] else 0
        for number, (each, took) in enumerate(zip(ways, seconds, strict=True)):
            mark = "  <- taken" if number == chosen else ""
            lines.append(f"{1 / took:>14,.0f}{seconds[0] / took:>7.2f}  {each}{mark}")
        way = ways[chosen]
    return way, lines
