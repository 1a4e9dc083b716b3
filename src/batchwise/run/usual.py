"""What every training has, from the command line and in Python: its callbacks, and fewer warnings."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from torch import Tensor

from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.epoch_line import EpochLine
from batchwise.callbacks.progress import ProgressBar
from batchwise.callbacks.summary import Summary
from batchwise.tasks.task import Task

UNFOUNDED = (
    "sync_dist",  # a metric that is the same on all devices, by construction, need not be averaged over them
    "args parameter is intended to run from within Python",
    "Checkpoint directory .* exists and is not empty",
    "callbacks used to create the checkpoint need to be provided",
    "your dataloader is not resumable",  # ours is, by the step alone
    "LeafSpec",
    "could not find the monitored key",  # it was checked; validation has not run yet
    "`broadcast_buffers` is deprecated",
    "smaller than the logging interval",
    "with a model that overrides the configure_model callback",  # which shards only with FSDP
    "there is no last checkpoint available",  # OnExceptionCheckpoint asks for one
    "was called without a model",  # likewise
    "in eval mode at the start of training",  # frozen batch norms are meant to be
)
"""Warnings of Lightning and PyTorch that are wrong here, or that a user can do nothing about."""


def leave_out_unfounded_warnings() -> None:
    """Leave out the warnings of Lightning and PyTorch that are wrong here, and their notes on what they do."""
    for pattern in UNFOUNDED:
        warnings.filterwarnings("ignore", f".*{pattern}.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def usual_callbacks(task: Task, given: Sequence[Callback], saving: bool, folder: Path) -> list[Callback]:
    """Return the usual callbacks that are missing. Let all best checkpoints go into the run's folder.

    Args:
        task: says what the best checkpoint is.
        given: the callbacks that there are.
        saving: whether checkpoints are kept.
        folder: of the run.
    """

    def missing(kind: type) -> bool:
        return not any(isinstance(callback, kind) for callback in given)

    usual: list[Callback] = []
    if saving and missing(Last):
        usual.append(Last())
    if saving and missing(ModelCheckpoint):
        if tuple(task.monitor)[1:] not in (("min",), ("max",)):  # which a name alone is not either
            raise ValueError(f"{type(task).__name__}.monitor is {task.monitor!r}: write a name, and 'min' or 'max'")
        monitor, mode = task.monitor
        usual.append(ModelCheckpoint(monitor=monitor, mode=mode, filename="best"))
    for callback in (*given, *usual):
        if isinstance(callback, ModelCheckpoint):
            callback.dirpath = callback.dirpath or str(folder / "checkpoints")
            callback._enable_version_counter = False
            _compare_numbers_only(callback)
    return [*usual, *(kind() for kind in (EpochLine, Summary) if missing(kind))]


def _compare_numbers_only(callback: ModelCheckpoint) -> None:
    """Let a value that is not finite never be the best. Lightning takes an infinite one, and NaN if it is the first."""
    beats = callback.check_monitor_top_k

    def check(trainer: Trainer, current: Tensor | None = None) -> bool:
        counts = current is None or callback.save_top_k == -1 or bool(current.isfinite())
        return counts and beats(trainer, current)

    callback.check_monitor_top_k = check


def add_progress_bar(callbacks: list[Callback]) -> bool:
    """Add our progress bar in a terminal, unless there is another. Return whether there is one."""
    if any(isinstance(callback, AnyProgressBar) for callback in callbacks):
        return True
    if is_terminal := sys.stdout.isatty():
        callbacks.append(ProgressBar())
    return is_terminal
