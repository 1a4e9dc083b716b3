"""A run's folder, `<root>/<name>/<time>`: its configuration, its checkpoints, its log."""

import contextlib
import os
import time
from pathlib import Path

FOLDER = "PROJECT_RUN_FOLDER"
"""The environment variable that tells the processes of one training the folder that the first of them made."""


def new_folder(root: Path, name: str) -> Path:
    """Make a folder for a new run.

    Raises:
        ValueError: it cannot be written.
    """
    stem = root / name / time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in range(1, 1000):
        folder = stem if number == 1 else stem.with_name(f"{stem.name}_{number}")
        try:
            (folder / "checkpoints").mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                break
        except OSError as error:
            raise ValueError(_unwritable(folder, error)) from error
        else:
            return folder
    raise ValueError(_unwritable(stem, "a file is in the way"))


def remove_if_empty(folder: Path) -> None:
    """Remove the folder of a run that did not begin."""
    with contextlib.suppress(OSError):  # which a folder that holds something raises
        (folder / "checkpoints").rmdir()
        folder.rmdir()


def check_writable(folder: Path) -> None:
    """Raise ValueError where the folder of an earlier run cannot be written."""
    probe = folder / "checkpoints" / ".probe"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(_unwritable(folder, error)) from error


def _unwritable(folder: Path, error: object) -> str:
    return f"the run's folder {folder} cannot be written ({error}): write another trainer.default_root_dir"


def folder_of(checkpoint: Path) -> Path | None:
    """Return the run's folder that a checkpoint lies in, if it lies in one."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def share_folder(folder: Path) -> None:
    """Tell the processes that this one will start where the run's folder is."""
    os.environ[FOLDER] = str(folder)
