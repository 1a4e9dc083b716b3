"""The checkpoint from which training resumes as if it had not stopped, and the signals that ask for one."""

import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from batchwise.arguments import typed
from batchwise.batching.loader import Batch
from batchwise.checkpoints import damage, read_checkpoint, unreadable
from batchwise.errors import TrainingStopped
from batchwise.output import write_nowhere
from batchwise.ranges import PositiveInt
from batchwise.tasks.task import Task

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Last(Checkpoint):
    """Keeps `last.ckpt`, from which training resumes exactly, and `previous.ckpt`, the checkpoint before it.

    A checkpoint is saved just before a step begins. By then all that belongs to the steps before it (validation,
    schedules, the end of an epoch) is done and counted.

    After SIGTERM, SIGUSR1, SIGHUP (the terminal was closed) or Ctrl-C to any process, the running step finishes, a
    checkpoint is saved, and the run ends with exit code 143 (129 after SIGHUP, 130 after Ctrl-C). Under SLURM, SIGUSR1
    (`sbatch --signal=USR1@90`) also puts the job back into the queue. A second Ctrl-C stops at once, and saves nothing.

    Args:
        every_n_steps: optimizer steps between two checkpoints; null: one at the start of each epoch. The end of
            training is always saved.
    """

    @typed
    def __init__(self, every_n_steps: PositiveInt | None = None) -> None:
        self.every_n_steps = every_n_steps
        self._saved_at = 0
        self._handlers: dict[int, Any] = {}
        self._signal = 0  # none
        self._rotate: bool | None = None
        self._within_epoch = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Listen for signals. The step at which training starts or resumes counts as saved."""
        self._saved_at = trainer.global_step
        self._signal, self._rotate, self._within_epoch = 0, None, False

        def note(number: int, _: object) -> None:
            # A handler may run between any two instructions, so it sets flags, and writes past Python's buffers.
            if number == self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal, pl_module._step.stop_requested = number, True
            if number == signal.SIGHUP:
                write_nowhere()
            if number == signal.SIGINT and trainer.is_global_zero:
                os.write(2, b"\nstopping after this step, to save; Ctrl-C again stops at once, without saving\n")

        if threading.current_thread() is threading.main_thread():
            # nohup has SIGHUP ignored
            heard = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]
            self._handlers = {number: signal.signal(number, note) for number in heard}

    def _stop_listening(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def before_step(self, trainer: pl.Trainer, pl_module: Task, batch: Batch) -> None:
        """Save the state after the steps so far, if a checkpoint is due. Stop, if a signal came.

        It runs before any `on_train_batch_start`, which may change what is saved, and runs again on resume.
        """
        step = batch.step
        stop = pl_module._step.stop_agreed(pl_module)
        every, plan = self.every_n_steps, pl_module.data.plan
        due = step % every == 0 if every else step == plan.first_step(batch.epoch)  # type: ignore[union-attr]
        if step != self._saved_at and (stop or due):
            self.save(trainer)
        if stop:
            if self._signal == signal.SIGUSR1 and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=False)
            raise TrainingStopped(
                f"stopped by a signal after step {step:,}; saved, and the same command with --ckpt_path last goes on",
                code=128 + (self._signal if self._signal in (signal.SIGINT, signal.SIGHUP) else signal.SIGTERM),
                everywhere=True,
            )

    def save_within_epoch(self, trainer: pl.Trainer) -> None:
        """Save before training ends within an epoch, because afterwards Lightning counts the epoch as done."""
        if trainer.global_step != self._saved_at:
            self.save(trainer)
        self._within_epoch = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Save the end of training."""
        if trainer.global_step != self._saved_at:
            self.save(trainer)
        elif not self._within_epoch:
            self._refresh(trainer)
        self._stop_listening()

    def on_exception(self, trainer: pl.Trainer, pl_module: Task, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._stop_listening()

    def save(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt`. The old one becomes `previous.ckpt`, if it is whole. A trial writes none."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        last = _path(trainer)
        if trainer.is_global_zero and last.exists():
            if self._rotate is None:  # a bad file of an earlier process must not replace a good one
                self._rotate = unreadable(last) is None and damage(last) is None
            if self._rotate:
                spare = last.with_name(".previous.part")
                spare.unlink(missing_ok=True)
                os.link(last, spare)
                os.replace(spare, last.with_name("previous.ckpt"))
        trainer.save_checkpoint(last)
        self._rotate = True
        self._saved_at = trainer.global_step

    def _refresh(self, trainer: pl.Trainer) -> None:
        """Update the callbacks' states in `last.ckpt`, because a validation may have changed the best score since."""
        if trainer.is_global_zero and _path(trainer).exists():
            checkpoint = read_checkpoint(_path(trainer))
            states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}  # type: ignore[attr-defined]
            states = {key: state for key, state in states.items() if state}
            saved = checkpoint["callbacks"]
            changed = any(str(state) != str(saved.get(key)) for key, state in states.items())
            if checkpoint["global_step"] == trainer.global_step and changed:
                checkpoint["callbacks"] = states
                trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, _path(trainer))
        trainer.strategy.barrier("refresh")


def _path(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
