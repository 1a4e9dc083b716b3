"""Checkpoints that are never torn."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

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
