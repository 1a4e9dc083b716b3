"""Prints one line of text per epoch, which is readable in a terminal and in a file."""

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from batchwise.arguments import typed
from batchwise.tasks.task import Task


class EpochLine(Callback):
    """Prints `epoch 3  average loss 0.1234` after each epoch, with the validation metrics if there are any.

    Args:
        metrics: also print the validation metrics.
    """

    @typed
    def __init__(self, metrics: bool = True) -> None:
        self.metrics = metrics

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Print the line. The average loss is exact, over all targets of the epoch on all devices."""
        if not trainer.is_global_zero:
            return
        line = f"epoch {trainer.current_epoch + 1}  average loss {pl_module._measures.epoch_loss:.4f}"
        if self.metrics:
            measured = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
            line += "".join(f"  {key} {value:.4f}" for key, value in measured.items())
        print(line, flush=True)
