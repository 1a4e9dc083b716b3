"""The checkpoint from which training resumes as if it had not stopped: when it is taken, and that it is on a signal."""

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from batchwise.checkpoints import read_checkpoint, unreadable
from batchwise.errors import TrainingStopped
from batchwise.ranges import PositiveInt

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Last(Checkpoint):
    """Keeps `last.ckpt`, from which training resumes exactly, and `previous.ckpt`, the one before it.

    A checkpoint is taken when the next step is about to begin: only then is everything that belongs to the steps before
    (validation, schedules, the end of an epoch) done and counted.

    SIGTERM and SIGUSR1, to any of the processes, let the step finish, save, and end the run with exit code 143. Under
    SLURM, SIGUSR1 (`sbatch --signal=USR1@90`) also puts the job back into the queue.

    Args:
        every_n_steps: save every so many optimizer steps; null: at the start of each epoch. Always at the end.
    """

    def __init__(self, every_n_steps: PositiveInt | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._saved_at = 0
        self._handlers: dict[int, Any] = {}
        self._signal: int | None = None
        self._rotate: bool | None = None
        self._within_epoch = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Listen for signals. There is nothing to save where training starts or resumes."""
        self._saved_at = trainer.global_step
        self._rotate, self._within_epoch = None, False
        _leave_whole_epochs(trainer.fit_loop)

        def note(number: int, _: Any) -> None:
            # A handler runs between any two instructions, so it only leaves a note.
            self._signal, pl_module._step.stop_requested = number, True

        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, note) for number in SIGNALS}

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Save the state after the steps before, if it is due; stop, if a signal came."""
        step = trainer.global_step
        stop = pl_module._step.stop_agreed(pl_module)
        every = self.every_n_steps
        due = step % every == 0 if every else step == pl_module.data.plan.first_step(batch.epoch)
        if step != self._saved_at and (stop or due):
            self.save(trainer)
        if stop:
            if self._signal == signal.SIGUSR1 and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            raise TrainingStopped(
                f"stopped by a signal after step {step:,}; saved, and the same command with --ckpt_path last goes on",
                code=128 + signal.SIGTERM,
                everywhere=True,
            )

    def save_within_epoch(self, trainer: pl.Trainer) -> None:
        """Save where training is about to end within an epoch: afterwards Lightning counts the epoch as done."""
        if trainer.global_step != self._saved_at:
            self.save(trainer)
        self._within_epoch = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save the end of training."""
        if trainer.global_step != self._saved_at:
            self.save(trainer)
        elif not self._within_epoch:
            self._refresh(trainer)
        self._stop_listening()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the signals as they were."""
        self._stop_listening()

    def save(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`; what it was before becomes `previous.ckpt`, if it can be read."""
        last = _path(trainer)
        if trainer.is_global_zero and last.exists():
            if self._rotate is None:  # an unreadable one of an earlier process must not take a readable one's place
                self._rotate = unreadable(last) is None
            if self._rotate:
                spare = last.with_name(".previous.part")
                spare.unlink(missing_ok=True)
                os.link(last, spare)
                os.replace(spare, last.with_name("previous.ckpt"))
        trainer.save_checkpoint(last)
        self._rotate = True
        self._saved_at = trainer.global_step

    def _refresh(self, trainer: pl.Trainer) -> None:
        """Bring what callbacks know up to date: the best score, where a validation came after the last save."""
        if trainer.is_global_zero and _path(trainer).exists():
            checkpoint = read_checkpoint(_path(trainer))
            states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
            states = {key: state for key, state in states.items() if state}
            if checkpoint["global_step"] == trainer.global_step and _differ(states, checkpoint["callbacks"]):
                checkpoint["callbacks"] = states
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, _path(trainer))
        trainer.strategy.barrier("refresh")


def _path(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def _differ(new: dict[str, Any], old: dict[str, Any]) -> bool:
    return any(str(state) != str(old.get(key)) for key, state in new.items())


def _leave_whole_epochs(loop: Any) -> None:
    """Let the next epoch begin where a checkpoint holds whole epochs only.

    Lightning takes any checkpoint of a training that is bounded by `max_steps` for one from within an epoch, and would
    count an epoch without steps.
    """
    done = loop.epoch_progress.current
    if loop.restarting and done.ready == done.completed == done.processed:
        loop._restarting = False
        loop.epoch_loop.restarting = False
