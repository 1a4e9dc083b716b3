"""A run's folder, `<root>/<name>/<time>`: its configuration, its checkpoints, its log."""

import contextlib
import os
import time
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

FOLDER = "BATCHWISE_RUN_FOLDER"
"""The environment variable that tells the processes of one training the folder that the first of them made."""
PATIENCE = 120.0  # seconds in which the first process must have made it


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
    """Tell the other processes of this training where the run's folder is: those that it will start, and those that
    SLURM or torchrun has started besides.
    """
    os.environ[FOLDER] = str(folder)
    note = _note(folder.parent)
    if note:
        part = note.with_suffix(".part")
        part.write_text(folder.name)
        part.replace(note)


def wait_for_folder(parent: Path) -> Path | None:
    """Return the folder that the first process of this training makes in `parent`; None: it is for this one to make.

    Raises:
        ValueError: it has not made one.
    """
    note = _note(parent)
    if note is None or rank_zero_only.rank == 0:
        return None
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if note.exists():
            return parent / note.read_text()
        time.sleep(0.05)
    raise ValueError(
        f"process 0 has made no folder in {parent}: write a trainer.default_root_dir that all machines see"
    )


def all_have_met() -> None:
    """Take the note for the other processes back: all are past it. A restart of the job leaves another."""
    note = _note(Path(os.environ[FOLDER]).parent) if FOLDER in os.environ else None
    if note and rank_zero_only.rank == 0:
        note.unlink(missing_ok=True)


def _note(parent: Path) -> Path | None:
    """Return where process 0 leaves a note for those that it has not started; None: there are none."""
    for names in (("SLURM_JOB_ID", "SLURM_STEP_ID"), ("TORCHELASTIC_RUN_ID", "MASTER_PORT")):
        if all(name in os.environ for name in names):
            return parent / f".{'-'.join(os.environ[name] for name in names)}.folder"
    return None
