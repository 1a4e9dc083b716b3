"""Checkpoint files: written so that they are never torn, read so that they never run code."""

import contextlib
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from batchwise.errors import TrainingStopped

OF_LIGHTNING = "lightning.pytorch.cli.instantiate_module"
OBJECTS = "it holds code, or objects other than tensors and plain types"


class DurableIO(TorchCheckpointIO):
    """Writes beside the target, flushes to the disk, then renames. A reader sees the old file or the new one, whole.

    Lightning writes to the temporary folder first. From there a rename to another disk is a copy, which can tear.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save `checkpoint` at `path`.

        Raises:
            TrainingStopped: it cannot be written; the file that was at `path` before is untouched.
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


def unreadable(path: Path) -> str | None:
    """Return why a checkpoint cannot be read; None: it can. Only plain types are loaded."""
    try:
        read_checkpoint(path)
    except Exception as error:
        return why_unreadable(path, error)
    return None


def damage(path: Path) -> str | None:
    """Return the part of a readable checkpoint that is not as it was written; None: all of it is.

    It reads the whole file, to compare checksums. PyTorch does not, so it would load weights with a few wrong bytes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return str(error)
    return part and f"the checksum of {part} in it is wrong"


def why_unreadable(path: Path, error: Exception) -> str:
    """Return in a few words why PyTorch could not read a file. It must not advise to run the code in it."""
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        with path.open("rb") as file:
            begins = file.read(2)
        if begins[:1] != b"\x80" and begins != b"PK":  # a pickle, or an archive
            return "it is no file that torch.save has written"
    if "weights_only" in str(error):
        return OBJECTS
    if "mmap can only be used" in str(error):
        return "it is a pickle, and not an archive, as torch.save writes it"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_checkpoint(path: Path) -> dict:
    """Read a checkpoint without copying its tensors into memory.

    A checkpoint is an archive whose table of contents is written last, so a file that opens was written to its end.

    Raises:
        ValueError: it is not a checkpoint of this project, or it names code to run. PyTorch raises other errors if the
            file cannot be read.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError("it is not a checkpoint of this project")
    maker = (checkpoint.get("hyper_parameters") or {}).get("_instantiator", OF_LIGHTNING)
    if maker != OF_LIGHTNING:  # Lightning would import and call it to make a module from the checkpoint
        raise ValueError(f"it names code to run: {maker}")
    return checkpoint


def data_state(path: Path, data: object) -> dict[str, Any] | None:
    """Return the state of a data module in a checkpoint; None: it has none, or is no file that can be read here."""
    if not path.is_file() or unreadable(path) is not None:
        return None
    return state_of(read_checkpoint(path), data)


def state_of(checkpoint: dict[str, Any], data: object) -> dict[str, Any] | None:
    """Return the state of a data module in the content of a checkpoint; None: it has none.

    Lightning gives it the name of the class, which may have been another one since.
    """
    named = [checkpoint.get(type(data).__qualname__), *checkpoint.values()]
    return next((part for part in named if isinstance(part, dict) and {"fingerprint", "contents"} <= part.keys()), None)
