"""What is logged is added up over all devices before a callback monitors it."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping


class AddUp(EarlyStopping):
    """Sums logged values over the devices: before each validation, and at the end of each epoch.

    Lightning calls callbacks that monitor a value after all others, so that they may monitor what others log at the end
    of an epoch. It takes EarlyStopping and Checkpoint for such callbacks, and calls the former first.
    """

    def __init__(self) -> None:
        super().__init__(monitor="")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Do nothing."""

    def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Add up. All devices come here."""
        trainer.fit_loop.epoch_loop._results.add_up()

    def on_validation_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Add up the values of the newest step, also where they are in no row of the log. All devices come here."""
        if trainer.world_size > 1 and trainer.state.fn == "fit":
            results = trainer.fit_loop.epoch_loop._results
            results.add_up()
            trainer.callback_metrics.update(results.metrics(on_step=True)["callback"])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}
