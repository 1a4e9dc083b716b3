"""The log of training, with one row every `log_every_n_steps` optimizer steps."""

import warnings
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from batchwise.batching.gradients import full, gradients_of
from batchwise.batching.loader import Batch
from batchwise.callbacks.phases import Phases
from batchwise.host import peak_memory
from batchwise.tasks.task import Task


class Totals(NamedTuple):
    """The examples and seconds of training so far, in this process."""

    examples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """The part of `seconds` in which training waited for data."""


class Record(Callback):
    """Writes loss, learning rate, gradient norm, speed and peak memory.

    The loss is exact: the mean over all targets since the last row, over all micro-batches and devices. The metrics are
    those of the newest batch. The step is the number of optimizer steps done. Steps between two rows cost nothing,
    because nothing is read from the device.

    Speed is that of all devices together. The time of validation and checkpoints does not count. `data_wait` is the
    share of the time in which this process waited for its next batch. For `model_flops_per_second`, a backward pass
    counts as two forward passes. `mfu` is its share of the devices' peak (model FLOPs utilization: Chowdhery et al.
    2022, "PaLM", appendix B), if Lightning knows the peak.
    """

    for_rows = True
    """Looks at a step only with a row in the log."""

    def __init__(self) -> None:
        self.examples = 0
        self.began = self._row = Totals()
        self._peak_flops: float | None = None
        self._of_step: dict[str, float | torch.Tensor] = {}
        self._before_validation = ""

    def on_fit_start(self, trainer: Any, pl_module: Task) -> None:
        """Forget an earlier training with the same trainer, also where nothing is left to train."""
        self.examples = 0

    def on_train_start(self, trainer: Any, pl_module: Task) -> None:
        """Start the clock."""
        self._peak_flops = peak_flops(trainer)
        self.began = self._row = Totals(0, trainer.phases.seconds["training"], pl_module.data.waited)
        trainer.phases.enter("training")

    def on_validation_start(self, trainer: Any, pl_module: Task) -> None:
        """Stop the clock of training."""
        self._before_validation = trainer.phases.enter("validation")

    def on_validation_end(self, trainer: Any, pl_module: Task) -> None:
        """Start the clock again."""
        trainer.phases.enter(self._before_validation)

    def on_train_end(self, trainer: Any, pl_module: Task) -> None:
        """Stop the clock."""
        trainer.phases.enter("end")

    def totals(self, pl_module: Task) -> Totals:
        """Return the totals of now."""
        phases: Phases = pl_module.trainer.phases  # type: ignore[attr-defined]
        phases.enter(phases.now)  # updates the seconds
        return Totals(self.examples, phases.seconds["training"], pl_module.data.waited)

    def figures(self, pl_module: Task, since: Totals, until: Totals) -> dict[str, float]:
        """Return speed and peak memory between two totals, by their names in the log."""
        seconds = until.seconds - since.seconds
        rate = (until.examples - since.examples) / seconds
        figures = {"examples_per_second": rate, "data_wait": (until.waited - since.waited) / seconds}
        if flops := pl_module._measures.flops_per_example:
            figures["model_flops_per_second"] = 3 * flops * rate
            if self._peak_flops:
                figures["mfu"] = figures["model_flops_per_second"] / self._peak_flops
        figures["peak_memory_mib"] = peak_memory(pl_module.trainer.strategy.root_device) / 2**20
        return figures

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Task, optimizer: Optimizer) -> None:
        """If a row is due, note the learning rate, and the norm of the exact gradient before clipping."""
        if pl_module._measures.row_is_due:
            norm = full(torch.nn.utils.get_total_norm(gradients_of(optimizer)))
            # Schedulers change a rate that is a tensor in its place, before the row is written.
            self._of_step = {"learning_rate": float(optimizer.param_groups[0]["lr"]), "gradient_norm": norm}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Write the row, if it is due."""
        self.examples += batch.size
        if not pl_module._measures.row_is_due:
            return
        measures = pl_module._measures
        measured = measures.row(batch.size)  # waits for the device, so it comes before the clock is read
        totals = self.totals(pl_module)
        row = {
            **measured,
            **{name: float(value) for name, value in self._of_step.items()},
            "examples": pl_module.data.plan.examples_at(trainer.global_step),  # type: ignore[union-attr]
            "epoch": batch.epoch,
            **self.figures(pl_module, self._row, totals),
        }
        measures.shown = {"train/loss": measured["train/loss"], "examples/s": row["examples_per_second"]}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self._row, self._of_step = totals, {}  # a step that is skipped has none


def peak_flops(trainer: pl.Trainer) -> float | None:
    """Return the peak FLOP/s of all devices together, in the precision of the run; None: not known."""
    types = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    dtype = types.get(str(trainer.precision).split("-")[0])
    with warnings.catch_warnings(action="ignore"):  # about devices that it does not know
        one = get_available_flops(trainer.strategy.root_device, dtype) if dtype else None
    return one * trainer.world_size if one else None
