"""The learning-rate range test (Smith 2017, arXiv 1506.01186), which finds the rate at which the loss falls fastest."""

import math
from collections.abc import Callable

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback

from batchwise.batching.loader import Batch
from batchwise.tasks.task import Task

STEPS = 140
LOWEST, HIGHEST = 1e-4, 1e3  # times the rate that was configured
_DIVERGED = 2.0  # times the first loss
_WINDOW = 20  # steps: as many as the rate takes to grow tenfold


class RangeTest(Callback):
    """Raises the rate exponentially over `STEPS` steps, and notes the loss of each, until training diverges.

    Args:
        progress: is told the step.
    """

    def __init__(self, progress: Callable[[int], None]) -> None:
        self.progress = progress
        self.rule = math.nan
        """The rate that the configuration and its rule give."""
        self.rates: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Task, batch: Batch, batch_idx: int) -> None:
        """Set the rate of the step."""
        rates = pl_module._rates
        if not self.rates:
            self._first, self.rule = rates.base, rates.base[0]
        factor = LOWEST * (HIGHEST / LOWEST) ** (batch.step / (STEPS - 1))
        rates.base = [rate * factor for rate in self._first]
        self.rates.append(rates.base[0])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note the loss. Stop when it is far above the first ones."""
        self.losses.append(pl_module._step.sums.mean())
        self.progress(trainer.global_step)
        if not self.losses[-1] <= _DIVERGED * max(self.losses[:_WINDOW]):
            trainer.should_stop = True

    def steepest(self) -> float | None:
        """Return the rate at which the loss falls fastest, against the logarithm of the rate; None: it never falls.

        The slope is that of a straight line through the losses while the rate grows tenfold. So the noise of single
        batches cancels.
        """
        losses = np.array(self.losses)[np.isfinite(self.losses)]
        logs = np.log(self.rates[: len(losses)])
        windows = [slice(first, first + _WINDOW) for first in range(len(losses) - _WINDOW + 1)]
        slopes = [np.polyfit(logs[window], losses[window], 1)[0] for window in windows]
        if not slopes or min(slopes) >= 0:
            return None
        return float(np.exp(logs[windows[int(np.argmin(slopes))]].mean()))

    def __str__(self) -> str:
        """Return the findings as a sentence."""
        steepest, last = self.steepest(), self.rates[-1] if self.rates else 0.0
        falls = f"the loss falls fastest at about {steepest:.2g}" if steepest else "the loss does not fall"
        end = f"it diverges at {last:.2g}" if len(self.rates) < STEPS else f"{last:.2g} does not make it diverge"
        return f"{self.rule:.4g} by the rule; as the rate rises, {falls}, and {end}"
