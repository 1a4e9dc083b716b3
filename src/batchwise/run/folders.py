"""A run's folder, `<root>/<name>/<time>`: which one it is, and how the other processes of a training learn of it."""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path
from tempfile import TemporaryFile

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from batchwise.data.module import LIMIT_FILE
from batchwise.host import write_whole
from batchwise.run.lock import alone

FOLDER = "BATCHWISE_RUN_FOLDER"
"""The environment variable that tells the processes of a training the folder that the first of them made."""
STAMP = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:_(\d+))?")
"""The name of a run's folder: its time, and a number if another run has begun in the same second."""
PATIENCE = 120.0  # seconds in which the first process must have made it
REMEDY = "write another name or trainer.default_root_dir"
_until_the_end = contextlib.ExitStack()


def check_name(name: str, root: Path) -> None:
    """Raise ValueError if the name of an experiment is not the name of a folder in `root`."""
    if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable() or not Path(name).parts:
        raise ValueError(f"name is {name!r}: write the name of a folder that is to lie in {root}")


def choose_folder(root: Path, name: str, checkpoint: Path | None, restart: bool, trial: bool = False) -> Path:
    """Return the folder of this run, and tell the other processes of this training.

    It is the folder that another process of this training has made, or else the folder of the checkpoint, or else a
    new one.

    Args:
        root: `trainer.default_root_dir`.
        name: of the experiment.
        checkpoint: the file that this run starts from.
        restart: go on with the newest run. If it ran out of memory before its first checkpoint, its folder is taken,
            because it holds the limit of the micro-batch.
        trial: make a new one, and remove it at the end.

    Raises:
        ValueError: the folder cannot be written, or the first process has made none.
    """
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    theirs = wait_for_folder(root / name)
    if theirs is not None:
        return theirs
    if trial:
        folder = None
    elif checkpoint and checkpoint.parent.name == "checkpoints":
        folder = checkpoint.parent.parent
    else:
        folder = _out_of_memory(root / name) if restart and not checkpoint else None
    if folder is None:
        folder = _new_folder(root, name)
        if trial:
            _until_the_end.callback(shutil.rmtree, folder, ignore_errors=True)
    else:
        _check_writable(folder, "copy the checkpoint to another folder" if checkpoint else REMEDY)
    _share(folder)
    return folder


def hold(folder: Path) -> None:
    """Let no other training write into the folder, until this one has ended.

    Raises:
        ValueError: another one does.
    """
    _until_the_end.enter_context(alone(folder))


def run_id(folder: Path) -> str:
    """Return the id of a run in W&B, which takes fewer characters than the name of a folder may have."""
    return re.sub(r"[^\w.=-]+", "-", f"{folder.parent.name}-{folder.name}")


def newest_first(parent: Path) -> list[Path]:
    """Return the folders of an experiment's runs by the time in their names, which a copy does not change.

    A folder that was renamed, or is the copy of another, was put aside, so it comes after those that were not.
    """

    def age(folder: Path) -> tuple[str, int, str]:
        found = STAMP.fullmatch(folder.name)
        return (found[1], int(found[2] or 1), "") if found else ("", 0, folder.name)

    return sorted((path for path in parent.glob("*") if path.is_dir()), key=age, reverse=True)


def place_loggers(loggers: list | Namespace | bool | None, folder: Path) -> None:
    """Let the `save_dir` of each configured logger lie in the run's folder, and name W&B's run after the folder."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = logger.get("init_args") if isinstance(logger, Namespace) else None
        if arguments is not None and "save_dir" in arguments:
            arguments.save_dir = str((folder / (arguments.save_dir or ".")).absolute())
            if "id" in arguments and arguments.id is None:
                arguments.id = run_id(folder)


def _remove_if_empty(folder: Path) -> None:
    """Remove what a run has left empty: its folder, the one of its checkpoints, and that of its experiment."""
    for place in (folder / "checkpoints", folder, folder.parent):
        with contextlib.suppress(OSError):  # it holds something, or is not there
            place.rmdir()


def logs(folder: Path) -> Path:
    """Return the folder with links to the logs of all runs of an experiment, from the folder of one of them."""
    experiment = folder.parent
    return experiment.parent / "wandb" / experiment.name


def link(log: Path, others: Path) -> None:
    """Link a log to a folder with those of other runs, where they can be compared. Remove links that lead nowhere."""
    with contextlib.suppress(OSError):  # of a system without links
        others.mkdir(parents=True, exist_ok=True)
        for name in others.iterdir():
            if name.is_symlink() and not name.exists():
                name.unlink()
        (others / log.name).symlink_to(os.path.relpath(log, others))


def wait_for_folder(parent: Path) -> Path | None:
    """Return the folder that the first process of this training makes in `parent`; None: this process is to make it.

    Raises:
        ValueError: the first process has not made one within `PATIENCE` seconds.
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
    """Remove the note for the other processes, because all have read it. A restart of the job leaves another."""
    note = _note(Path(os.environ[FOLDER]).parent) if FOLDER in os.environ else None
    if note and rank_zero_only.rank == 0:
        note.unlink(missing_ok=True)


def forget(folder: Path | None = None) -> None:
    """Forget the folder that the processes share, because the training is over.

    Args:
        folder: what is empty of it is removed; None: the shared one.
    """
    _until_the_end.close()
    all_have_met()
    shared = os.environ.pop(FOLDER, None)
    folder = folder or (Path(shared) if shared else None)
    if folder and rank_zero_only.rank == 0:
        _remove_if_empty(folder)


def _share(folder: Path) -> None:
    """Tell the folder to the processes that this one will start, and to those that SLURM or torchrun has started."""
    os.environ[FOLDER] = str(folder)
    note = _note(folder.parent)
    if note:
        write_whole(note, folder.name)


def _note(parent: Path) -> Path | None:
    """Return the file of process 0's note for the processes that it has not started; None: there are none."""
    for names in (("SLURM_JOB_ID", "SLURM_STEP_ID"), ("TORCHELASTIC_RUN_ID", "MASTER_PORT")):
        if all(name in os.environ for name in names):
            return parent / f".{'-'.join(os.environ[name] for name in names)}.folder"
    return None


def _new_folder(root: Path, name: str) -> Path:
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


def _out_of_memory(parent: Path) -> Path | None:
    """Return the newest run's folder, if that run has left a limit of the micro-batch."""
    begun = (folder for folder in newest_first(parent) if (folder / "config.yaml").exists())  # `inspect` leaves none
    newest = next(begun, None)
    return newest if newest and (newest / LIMIT_FILE).exists() else None


def _check_writable(folder: Path, remedy: str) -> None:
    for place in (folder, folder / "checkpoints"):
        try:
            place.mkdir(exist_ok=True)  # that of the checkpoints was removed if it was empty
            TemporaryFile(dir=place).close()
        except OSError as error:
            raise ValueError(_unwritable(folder, error.strerror, remedy)) from error


def _unwritable(folder: Path, error: object, remedy: str = REMEDY) -> str:
    return f"the run's folder {folder} cannot be written ({error}): {remedy}"
