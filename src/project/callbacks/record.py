"""What goes into the log while training: one row every `log_every_n_steps` optimizer steps."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer


class Record(Callback):
    """Writes loss, learning rate, gradient norm, examples per second and peak memory.

    The loss is exact: the mean over all targets since the row before, over all micro-batches and devices. The step is
    the number of optimizer steps done. Steps between rows cost nothing: nothing is read from the device.
    """

    def __init__(self) -> None:
        self._gradient_norm: torch.Tensor | None = None
        self._learning_rate = self._since = self._seconds = 0.0
        self._examples = 0

    def _due(self, trainer: Any, steps: int) -> bool:
        return steps % trainer.log_every_n_steps == 0 or steps == trainer.max_steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: only training counts as training."""
        self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Where a row is due, take the rate of this step, and the norm of its divided gradient before clipping."""
        if self._due(trainer, trainer.global_step + 1):
            self._learning_rate = optimizer.param_groups[0]["lr"]
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the row, where it is due."""
        self._examples += batch.size
        if not self._due(trainer, trainer.global_step):
            return
        loss = pl_module.window.mean()  # waits for the device, so it comes before the clock is read
        now = time.perf_counter()
        seconds = self._seconds + now - self._since
        row = {
            "train/loss": loss,
            "learning_rate": self._learning_rate,
            "gradient_norm": float("nan") if self._gradient_norm is None else self._gradient_norm.item(),
            "examples_per_second": self._examples / seconds,
            "examples": pl_module.data.plan.examples_at(trainer.global_step),
            "epoch": batch.epoch,
            "peak_memory_mib": peak_memory(pl_module.device) / 2**20,
        }
        shown = {"train/loss": row["train/loss"], "examples/s": row["examples_per_second"]}
        pl_module.log_dict(shown, prog_bar=True, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        pl_module.window = type(pl_module.window)()
        self._since, self._seconds, self._examples = now, 0.0, 0


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: of the device where that is known, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
