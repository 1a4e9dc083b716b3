"""Checkpoints that are never torn, and a `last` from which training resumes as if it had not stopped."""

import contextlib
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from project.errors import TrainingStopped


class DurableIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames: a reader sees the old file or the new, whole.

    Lightning writes through the temporary folder, from where a rename to another file system is a copy that can tear.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`.

        Raises:
            TrainingStopped: it cannot be written; whatever was at `path` before is untouched.
        """
        if "://" in str(path):  # an object store replaces whole objects anyway
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
            _flush_folder(target.parent)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            kept = f"; the one before it is whole: {target}" if target.exists() else ""
            raise TrainingStopped(f"cannot write the checkpoint {target}: {reason}{kept}") from error


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Last(Checkpoint):
    """Keeps `last.ckpt`, from which training resumes exactly, and `previous.ckpt`, the one before it.

    A checkpoint is taken when the next step is about to begin: only then is everything that belongs to the steps before
    (validation, schedules, the end of an epoch) done and counted.

    Args:
        every_n_steps: save every so many optimizer steps; null: at the start of each epoch. Always at the end.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}: write a number of optimizer steps, or null")
        self.every_n_steps = every_n_steps
        self._saved_at = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """There is nothing to save where training starts or resumes."""
        self._saved_at = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save the state after the steps before, if it is due."""
        step = trainer.global_step
        every = self.every_n_steps or pl_module.data.plan.steps_per_epoch
        if step % every == 0 and step != self._saved_at:
            self.save(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where `max_steps` ends training within an epoch: afterwards Lightning counts the epoch as done."""
        step = trainer.global_step
        if step == trainer.max_steps and step % pl_module.data.plan.steps_per_epoch:
            self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the end of training."""
        if trainer.global_step != self._saved_at:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`; what it was before becomes `previous.ckpt`."""
        last = folder(trainer) / "last.ckpt"
        if trainer.is_global_zero and last.exists():
            spare = last.with_name(".previous.part")
            spare.unlink(missing_ok=True)
            os.link(last, spare)
            os.replace(spare, last.with_name("previous.ckpt"))
        trainer.save_checkpoint(last)
        self._saved_at = trainer.global_step


def folder(trainer: pl.Trainer) -> Path:
    """Return where the checkpoints of this run are."""
    return Path(trainer.default_root_dir) / "checkpoints"
