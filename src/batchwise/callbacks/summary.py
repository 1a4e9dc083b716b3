"""A table of speed, memory and time at the end of training."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from batchwise.callbacks.record import Record
from batchwise.errors import TrainingStopped
from batchwise.tasks.task import Task


class Summary(Callback):
    """Prints speed, memory and the seconds of each phase at the end, and logs them once, as `summary/...`.

    The figures are those of this process, so a resumed training counts from its resumption. A training that a signal
    stops has a summary too.
    """

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Print and log."""
        self._conclude(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Task, exception: BaseException) -> None:
        """Print and log, if training was stopped and did not fail."""
        if isinstance(exception, TrainingStopped | KeyboardInterrupt):
            self._conclude(trainer, pl_module)

    def _conclude(self, trainer: Any, pl_module: Task) -> None:
        record = next((callback for callback in trainer.callbacks if isinstance(callback, Record)), None)
        if record is None or not record.examples or not trainer.is_global_zero:
            return
        figures = record.figures(pl_module, record.began, record.totals(pl_module))
        figures |= {f"{phase}_seconds": seconds for phase, seconds in trainer.phases.seconds.items()}
        for logger in trainer.loggers:
            logger.log_metrics({f"summary/{name}": value for name, value in figures.items()}, step=trainer.global_step)
        for name, value in figures.items():
            share = name in ("data_wait", "mfu")
            kind = ".1%" if share else ",.2f" if value < 1e3 else ",.0f" if value < 1e8 else ".3g"
            print(f"{name:>24}  {value:{kind}}", flush=True)
