"""The data of the runs of `kill.py`, the callback that records their steps, and the checks of these records."""

import contextlib
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from batchwise.batching.loader import MicroBatch
from batchwise.batching.shards import BlockShuffled
from batchwise.sources.digits import Digits
from batchwise.sources.shard_files import opened, plain_table, read_shard
from batchwise.sources.shards import Shards

EXAMPLES, BATCH_SIZE = 1259, 100
TOLERANCE = 1e-10
PHASES = {"step": 0.06, "write": 0.003, "validation": 0.03}  # what a kill may hit, and its duration in seconds, about


class Source(Digits):
    """The digits: tensors without workers, a map-style data set with workers."""

    def load(self, split: str) -> Any:
        """Return tensors, or a map-style data set of the same examples."""
        fields = super().load(split)
        assert fields is not None
        return TensorDataset(*fields) if self.num_workers else fields


class Sharded(Shards):
    """The digits in shards."""

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Scale grey values to [0, 1]."""
        return replace(batch, inputs=batch.inputs.to(torch.get_default_dtype()) / 16)


class Whole(Sharded):
    """The same in memory, in the same order, without a cache."""

    def load(self, split: str) -> Any:
        """Return the examples of all shards."""
        shards = [read_shard(Path(str(self.store.local), shard.name), shard.name) for shard in self.index.of(split)]
        if split == "train":
            self.order = Within(self.order, torch.tensor([len(shard) for shard in shards]))
        parts = []
        for table in map(plain_table, shards, ["a shard"] * len(shards)):
            columns: dict[str, Any] = opened(table)
            names = columns["targets"][np.arange(len(table))]  # the label of a digit is its name
            parts.append((torch.from_numpy(columns["inputs"]), torch.tensor([int(bytes(name)) for name in names])))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class Within(BlockShuffled):
    """`BlockShuffled` for examples that are in no files."""

    def __init__(self, order: Any, shards: Tensor) -> None:
        super().__init__(order.window)
        self.own = shards

    def prepare(self, *arguments: Any, **others: Any) -> Any:
        """Set the sizes of the shards too."""
        return super().prepare(*arguments[:6], shards=self.own)


class Trace(pl.Callback):
    """Records the examples of each step and the loss of each validation, in a file per process.

    Args:
        path: path of the files, without the rank, which is appended.
        pause: seconds to wait at each step and validation, so that a kill can hit them.
    """

    def __init__(self, path: str, pause: float = 0.02) -> None:
        self.path, self.pause = path, pause

    def _write(self, trainer: pl.Trainer, **event: Any) -> None:
        with open(f"{self.path}.{trainer.global_rank}", "ab", buffering=0) as file:
            file.write(json.dumps(event).encode() + b"\n")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record the run's folder."""
        self._write(trainer, folder=trainer.default_root_dir)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record this process's examples of the step, each with its position in the global batch."""
        counted = [part for part in batch.micro_batches if part.counts]
        examples = [pair for part in counted for pair in enumerate(part.index.tolist(), part.position)]
        self._write(trainer, step=batch.step, examples=examples)
        time.sleep(self.pause)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record that validation begins."""
        self._write(trainer, validating=trainer.global_step)
        time.sleep(self.pause)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record the loss."""
        self._write(trainer, validated=trainer.global_step, loss=trainer.callback_metrics["val/loss"].item())


def read_trace(trace: str, rank: int) -> list[dict[str, Any]]:
    """Return the events of a process, without a last line that was cut short."""
    file = Path(f"{trace}.{rank}")
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def checkpoints(trace: str) -> Path:
    """Return the folder of the checkpoints of a run."""
    return Path(read_trace(trace, 0)[0]["folder"]) / "checkpoints"


def is_writing(trace: str, since: int) -> bool:
    """Return whether a checkpoint is being written, or was being written when the run was killed."""
    with contextlib.suppress(FileNotFoundError):
        return any(part.stat().st_mtime_ns > since for part in checkpoints(trace).glob(".*.part"))
    return False


def what_was_hit(trace: str, since: int) -> str:
    """Return the phase in which a run was killed."""
    return "write" if is_writing(trace, since) else "validation" if "validating" in read_trace(trace, 0)[-1] else "step"


def read_weights(trace: str) -> dict[str, Tensor]:
    """Return the last and the best weights of a run."""
    weights = {}
    for name in ("last", "best"):
        saved = torch.load(checkpoints(trace) / f"{name}.ckpt", weights_only=True)["state_dict"]
        weights |= {f"{name} {key}": value for key, value in saved.items()}
    return weights


@dataclass
class Report:
    """The record of a chain, and what is wrong with it."""

    kills: Counter[tuple[str, int]] = field(default_factory=Counter)  # by phase and number of processes
    afresh: int = 0  # kills before there was a checkpoint
    again: int = 0  # steps that were trained again
    torn: int = 0
    same: bool = False  # processes and micro-batches
    difference: float = 0.0
    batches: list[tuple[int, bool, list[list[int]]]] = field(default_factory=list)  # step, all processes?, examples
    losses: list[tuple[int, float]] = field(default_factory=list)  # of validations
    weights: dict[str, Tensor] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


def look_at_checkpoints(folder: Path, report: Report) -> int:
    """Read every checkpoint of a chain; return the step of `last.ckpt`, or 0 if there is none."""
    first = 0
    for path in folder.glob("runs/*/*/checkpoints/*.ckpt"):
        try:
            step = torch.load(path, weights_only=True)["global_step"]
            first = max(first, step) if path.name == "last.ckpt" else first
        except Exception as error:  # any error means that it is torn
            report.torn += 1
            report.violations.append(f"{path} is torn: {error}")
    return first


def follow(report: Report, trace: str, processes: int, first: int, killed: bool) -> None:
    """Add the steps and losses of a run, which began at the step `first`, to the report."""
    events = [event for rank in range(processes) for event in read_trace(trace, rank)]
    done = [event for event in events if "step" in event]
    known, steps = {step for step, *_ in report.batches}, sorted({event["step"] for event in done})
    if steps != list(range(first, first + len(steps))):
        report.violations.append(f"{trace}: trained the steps {steps} after {first} steps")
    for step in steps:
        shares = [event["examples"] for event in done if event["step"] == step]
        complete = len(shares) == processes
        if not complete and not (killed and step == steps[-1]):
            report.violations.append(f"{trace}: {len(shares)} of {processes} processes trained step {step}")
        report.batches.append((step, complete, [pair for share in shares for pair in share]))
    report.again += len(known.intersection(steps))
    report.losses += [(event["validated"], event["loss"]) for event in events if "validated" in event]


def check_passes(report: Report) -> None:
    """Check that each epoch of the uninterrupted run trains on each example once, in batches of `BATCH_SIZE`."""
    steps = -(-EXAMPLES // BATCH_SIZE)
    for epoch in range(len(report.batches) // steps):
        pairs = [pair for step, _, examples in report.batches if step // steps == epoch for pair in examples]
        places, seen = [place for place, _ in pairs], sorted(index for _, index in pairs)
        if seen != list(range(EXAMPLES)) or places != [place % BATCH_SIZE for place in range(EXAMPLES)]:
            report.violations.append(f"epoch {epoch} of the uninterrupted run is not one pass over the examples")


def check(report: Report, reference: Report, same: bool) -> None:
    """Compare a chain with the uninterrupted run: bit for bit if it had the `same` processes and micro-batches."""
    report.same = same
    order = {step: examples for step, _, examples in reference.batches}
    for step, complete, examples in report.batches:
        if examples != order[step] and (complete or not all(pair in order[step] for pair in examples)):
            report.violations.append(f"step {step} trained on {examples}, not on {order[step]}")
    if {step for step, complete, _ in report.batches if complete} != order.keys():
        report.violations.append("not every step was trained")
    losses, measured = dict(reference.losses), {step for step, _ in report.losses}
    if measured != losses.keys():
        report.violations.append(f"validated after the steps {sorted(measured)}, not {sorted(losses)}")
    for step, loss in report.losses:
        if not abs(loss - losses.get(step, loss)) <= (0 if same else TOLERANCE):
            report.violations.append(f"validation after step {step} gave {loss}, not {losses[step]}")
    for name, weight in reference.weights.items():
        difference = (report.weights[name] - weight).abs().max().item()
        report.difference = max(report.difference, difference)
        if not (torch.equal(report.weights[name], weight) if same else difference <= TOLERANCE):
            report.violations.append(f"{name} differs by {difference:.1e}")


def table(reports: list[Report], seconds: float) -> str:
    """Return the figures of all chains together, a line each."""
    kills = sum((report.kills for report in reports), Counter())
    differences = [(report.same, report.difference) for report in reports[1:]]
    processes = sorted({number for _, number in kills})
    rows = {
        **{f"kills in a {phase}": sum(kills[phase, number] for number in processes) for phase in PHASES},
        **{f"kills of {number} process(es)": sum(kills[phase, number] for phase in PHASES) for number in processes},
        "kills before a checkpoint": sum(report.afresh for report in reports),
        "restarts": kills.total(),
        "chains": len(differences),
        "steps trained again": sum(report.again for report in reports),
        "torn files": sum(report.torn for report in reports),
        "difference, same topology": max((value for same, value in differences if same), default=math.nan),
        "difference, other topology": max((value for same, value in differences if not same), default=math.nan),
        "violations": sum(len(report.violations) for report in reports),
        "seconds": round(seconds),
    }
    return "\n".join(f"{name:>28}  {value:.3g}" for name, value in rows.items())
