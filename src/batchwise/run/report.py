"""The texts of the command line: the plan before training, the results after it, and one line for a failure."""

import os
import re
import sys
import traceback
from pathlib import Path
from shlex import quote

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_only

from batchwise.batching.fetch import DataError
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, TrainingStopped, disk_is_full, lost_connection
from batchwise.output import nobody_reads
from batchwise.run import folders, program
from batchwise.run.explain import explain
from batchwise.run.main import CLOSED
from batchwise.run.redact import hide
from batchwise.run.wandb import WandbLogger
from batchwise.tasks.measures import MetricError
from batchwise.tasks.players import MISSING
from batchwise.tasks.task import Task
from batchwise.trainer import Trainer

OVER = "trainer.max_time is over"
GOES_ON = re.compile(r"[;:] (the same command with )?--ckpt_path last goes on[^;]*")
"""What is true of `fit` alone, in the message of an error that also ends other commands."""
UNUSED = ("parameters that were not used in producing the loss", "Expected to have finished reduction")
"""What Lightning and PyTorch say where DDP waits for a gradient that does not come."""


def plan(model: Task, data: DataModule, done: int, checkpoint: Path | None) -> None:
    """Print the batch plan as a table, and the step from which training resumes. Only the first process does.

    Args:
        model: its parameters are counted.
        data: has the plan.
        done: the optimizer steps that the checkpoint, or else an earlier training with the same trainer, has done.
        checkpoint: its file; None: there is none.
    """
    if data.plan is None or rank_zero_only.rank != 0:
        return
    total = data.total_steps()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    trainable = {} if learning == parameters else {"trainable_parameters": learning}
    for name, value in {"parameters": parameters, **trainable, **data.plan.table(total)}.items():
        print(f"{name:>24}  {value:,}")
    print(f"{'feeding':>24}  {data.feed('train')}")
    if summary := data.order.summary(data.plan.batch_size):
        print(summary)
    if done:
        print(f"resuming after step {done:,} {f'from {checkpoint}' if checkpoint else '(a new trainer begins anew)'}")
    if total == 0:
        key = "max_epochs" if data.trainer and data.trainer.max_epochs == 0 else "max_steps"
        print(f"trainer.{key} is 0: nothing is trained")
    if done and done >= total:
        print(f"already trained for {done:,} of {total:,} steps: write a larger trainer.max_epochs to go on")


def metrics(trainer: Trainer) -> None:
    """Print the metrics."""
    if trainer.is_global_zero:
        for name, value in trainer.callback_metrics.items():
            print(f"{name} {value:.4f}")


def stopped(trainer: Trainer) -> str | None:
    """Return why a training ended before its length; None: it did not."""
    if not trainer.should_stop:
        return None
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return callback.stopping_reason_message
        if isinstance(callback, Timer) and (callback.time_remaining() or 1) <= 0:
            return OVER
    return f"a callback stopped it after {trainer.global_step:,} steps"


def training(trainer: Trainer, folder: Path) -> None:
    """Print the best metric and the run's folder."""
    if not trainer.is_global_zero:
        return
    if trainer.global_step == 0 and any(isinstance(callback, Timer) for callback in trainer.callbacks):
        print("no step was trained within trainer.max_time: write more")
    elif reason := stopped(trainer):
        print(f"stopped early: {reason}")
    for callback in trainer.callbacks:
        if not isinstance(callback, ModelCheckpoint) or not callback.monitor:
            continue
        score, newest = callback.best_model_score, trainer.callback_metrics.get(callback.monitor)
        if callback.best_model_path and (score is None or score.isfinite()):
            value = "" if score is None else f" {score:.4f}"  # None: the processes that trained have ended
            print(f"best {callback.monitor}{value}: {callback.best_model_path}")
        elif newest is not None and not newest.isfinite():
            print(f"no checkpoint is the best: {callback.monitor} was never a finite number")
    print(f"run folder: {folder}")


def next_commands(trainer: Trainer, folder: Path, arguments: list[str]) -> None:
    """Print the commands that test a training and continue it, unless a callback has stopped it.

    Args:
        trainer: has trained.
        folder: the run's folder.
        arguments: of the command line.
    """
    if not trainer.is_global_zero:
        return
    saved = f"--config {quote(str(folder / 'config.yaml'))}"
    if (folder / "checkpoints" / "best.ckpt").exists():
        print(f"test it:    python -m {program.name} test {_configs(arguments) or saved} --ckpt_path best")
    lengths = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    longer = " ".join(f"--trainer.{name} {2 * length}" for name, length in lengths.items() if length and length > 0)
    if reason := stopped(trainer):  # more epochs would change nothing
        longer = "--trainer.max_time null" if reason == OVER else ""
    if longer and (folder / "checkpoints" / "last.ckpt").exists():
        print(f"go on:      python -m {program.name} fit {saved} --ckpt_path last {longer}")


def _configs(arguments: list[str]) -> str | None:
    """Return the configuration files of a command that has no other flags; None: it has some."""
    words, files = iter(arguments[1:]), []
    for word in words:
        name, _, value = word.partition("=")
        if name not in ("--config", "-c"):
            return None
        files.append(f"--config {quote(value or next(words, ''))}")
    return " ".join(files)


def findings(trainer: Trainer, folder: Path, picture: str | None) -> None:
    """Print the run's folder, which has the findings of `inspect`, `tune` or `sweep`, and the path of a picture."""
    if trainer.is_global_zero:
        print(f"run folder: {folder}")
        if picture:
            print(f"look at it: {folder / picture}")
    look(trainer)


def look(trainer: Trainer) -> None:
    """Print the commands that show the log of W&B beside those of the other runs of the experiment, and upload it."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and logger.folder and logger.offline_folder:
            place, name = os.path.split(os.path.relpath(logger.offline_folder))  # the name may be a pattern
            linked = folders.logs(Path(trainer.default_root_dir)) / logger.folder.name
            print(f"look at it: wandb leet {quote(os.path.relpath(linked.parent) if linked.exists() else place)}")
            print(f"upload it:  wandb sync {quote(place)}/{name}")


def unwritten(error: OSError, folder: Path | None, verb: str | None) -> str | None:
    """Return one line about a file of the run that could not be written; None: the error is about something else.

    Args:
        error: names the file, or else its traceback may pass through a logger.
        folder: of the run; None: there is none.
        verb: of the command.
    """
    file = Path(error.filename) if isinstance(error.filename, str) else None
    ours = file is not None and folder is not None and folder.absolute() in file.absolute().parents
    if error.errno is None or not (ours or disk_is_full(error)):
        return None
    frames = traceback.walk_tb(error.__traceback__)
    log = any("loggers" in Path(frame.f_code.co_filename).parts for frame, _ in frames)
    what = file or f"{'the log' if log else 'a file'} of {folder or 'this command'}"
    line = f"cannot write {what} ({os.strerror(error.errno)})"
    if folder is None or verb != "fit":
        return line
    last = folder / "checkpoints" / "last.ckpt"
    remedy = f"the same command with --ckpt_path last goes on from {last}" if last.exists() else "no checkpoint is left"
    return f"{line}: training has stopped; {remedy}"


def failure(error: Exception, folder: Path | None = None, verb: str | None = "fit") -> int | None:
    """Print one line about an error that the user can mend, and return the exit code; None: the error is a bug.

    If all processes have failed in the same way, only the first of them prints the line.

    Args:
        error: that has ended the command.
        folder: of the run; None: there is none.
        verb: of the command.
    """
    code = 1
    if isinstance(error, Mistake):
        code = 2
    elif isinstance(error, TrainingStopped):
        code = error.code
        if error.everywhere and rank_zero_only.rank != 0:
            return code
    elif isinstance(error, RuntimeError) and not isinstance(error, DataError) and lost_connection(error):
        detail = re.sub(r"^\[/.*?\] ", "", str(error).splitlines()[0]).partition(". This ")[0]
        reason = f"another process has died, or its machine cannot be reached ({detail})"
        error = TrainingStopped(f"{reason}: the same command with --ckpt_path last goes on")
    elif isinstance(error, RuntimeError) and any(words in str(error) for words in UNUSED):
        error = TrainingStopped(MISSING)
        if rank_zero_only.rank != 0:  # it is so in all of them
            return code
    elif isinstance(error, IndexError) and (label := re.fullmatch(r"Target (-?\d+) is out of bounds\.?", str(error))):
        remedy = f"write num_classes {int(label[1]) + 1}" if int(label[1]) >= 0 else "number the classes from 0"
        error = TrainingStopped(f"label {label[1]}, but the losses have other classes: {remedy}, or correct it")
    elif isinstance(error, BrokenPipeError) and nobody_reads():
        last = folder and folder / "checkpoints" / "last.ckpt"
        if verb == "fit" and last and last.exists():
            print(f"nobody reads the output: stopped; --ckpt_path last goes on from {last}", file=sys.stderr)
        return CLOSED
    elif isinstance(error, OSError) and (line := unwritten(error, folder, verb)):
        error = TrainingStopped(line)
    elif not isinstance(error, DataError | MetricError):
        return None
    line = str(error) if verb == "fit" else GOES_ON.sub("", str(error))
    print(f"error: {hide(explain(line))}", file=sys.stderr)
    return code
