"""The progress bar: optimizer steps, time left, loss, examples per second."""

from time import perf_counter

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.progress import ProgressColumn

from batchwise.batching.loader import Batch
from batchwise.tasks.task import Task


class ProgressBar(RichProgressBar):
    """Lightning's rich progress bar, with examples per second in place of iterations, and epochs counted from 1.

    It is drawn at most twice a second, because drawing takes as long as several small steps.
    """

    _drawn = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Draw, if it is time or the epoch is over."""
        if perf_counter() - self._drawn > 0.5 or trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._drawn = perf_counter()

    def configure_columns(self, trainer: pl.Trainer) -> list[ProgressColumn]:
        """Leave room for the metrics on a terminal of 80 columns."""
        description, bar, batches, time, _ = super().configure_columns(trainer)
        bar.bar_width = 8
        return [description, bar, batches, time]

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict:
        """Show the figures of the newest row, without a version number."""
        metrics: dict = super().get_metrics(trainer, pl_module)
        metrics |= pl_module._measures.shown if isinstance(pl_module, Task) else {}
        metrics.pop("v_num", None)
        if "examples/s" in metrics:
            metrics["examples/s"] = f"{float(metrics['examples/s']):,.0f}"
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}"
