"""Measures speed and memory before training, and chooses by them if `speed` or `micro_batch_size` is auto."""

import math
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from batchwise.choosing import fits, speed
from batchwise.choosing.speed import Settings, Stopwatch, Way
from batchwise.data.module import DataModule
from batchwise.host import release_memory, reset_peak_memory, write_whole
from batchwise.tasks.task import Task

FILE = "speed.yaml"
"""The file with the choice, in the run's folder: a configuration to put over others."""


def measure(
    task: Task, data: DataModule, trainer: Settings, path: Path, device: torch.device, processes: int, everything: bool
) -> None:
    """Choose the way to run a batch on this machine, print the measurements, and write the choice to `path`.

    Args:
        task: the task to be trained.
        data: has the examples.
        trainer: the settings of the trainer.
        path: file of the choice; if it exists, it stays.
        device: where the task is to be trained.
        processes: processes on this machine, which share its cores.
        everything: choose all settings that are not set (`speed: auto`), not only the micro-batch.

    Raises:
        ValueError: this cannot be measured.
    """
    if path.exists():  # from the process that started this one, or from the run that is resumed
        return
    key = "speed" if everything else "data.micro_batch_size"
    if max(int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "SLURM_NTASKS")) > 1:
        raise ValueError(
            f"{key} is auto, but several processes were started at once, and one has to measure: run it in one "
            f"process, and give its {FILE} with --config"
        )
    if data.batch_size is None:
        raise ValueError(f"{key} is auto, but data.batch_size is not set: write it, or leave {key} out")
    accumulation = trainer.get("accumulate_grad_batches")
    if data.finds_micro_batch and accumulation is not None:
        raise ValueError(
            f"data.micro_batch_size is auto, but trainer.accumulate_grad_batches is {accumulation}: leave one out"
        )
    tried = speed.candidates(task, data, trainer, device, processes) if everything else {}
    share = -(-data.batch_size // processes)
    sizes = tried.get("size", [data.micro_batch_size or (min(share, 256) if data.finds_micro_batch else share)])
    names = ("precision", "channels_last", "threads", "compile")
    given = {name: value for name in names if (value := trainer.get(name)) is not None}
    threads = min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // processes))
    start = Way(max((size for size in sizes if size <= 256), default=sizes[0]), **{"threads": threads, **given})
    steps, epochs = trainer.get("max_steps"), trainer.get("max_epochs")
    examples = steps * data.batch_size if steps not in (None, -1) else math.inf
    train = data.split("train")
    assert train is not None
    examples = min(examples, epochs * len(train) if epochs not in (None, -1) else math.inf)
    watch = Stopwatch(task, data, max(sizes), device)
    way, lines = speed.choose(watch, start, tried, examples)
    if data.finds_micro_batch:
        unit, budget = data.unit_for(task._step.unit), fits.free_memory(device, processes)
        fitting = list(fits.what_fits(watch, way, max(1, share // unit) * unit, budget, unit))
        if not fitting:
            raise ValueError(f"not even a micro-batch of {unit} fits: write a smaller model")
        fitting = fits.again(watch, way, fitting)
        way = replace(way, size=fits.knee(fitting).examples)
        for each in fitting:
            mark = "  <- taken" if each.examples == way.size else ""
            ratio, run = each.speed / fitting[0].speed, replace(way, size=each.examples)
            lines.append(f"{each.speed:>14,.0f}{ratio:>7.2f}  {run}{mark}")
    said = [f"{key}: auto, forward and backward pass:", *lines, f"chosen: {way}; written to {path}"]
    print("\n".join(said), flush=True)
    overlay: dict[str, dict | None] = {
        "speed": None,
        "trainer": {key: value for key, value in asdict(way).items() if key in tried and key != "size"},
    }
    if "size" in tried or data.finds_micro_batch:
        overlay["data"] = {"micro_batch_size": way.size}
    write_whole(path, f"# measured on {platform.node()}\n" + yaml.safe_dump(overlay, sort_keys=False))
    release_memory(device)
    reset_peak_memory(device)
