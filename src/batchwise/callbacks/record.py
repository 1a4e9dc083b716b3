"""What goes into the log while training: one row every `log_every_n_steps` optimizer steps."""

import warnings
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from batchwise.batching.gradients import full, gradients_of
from batchwise.callbacks.phases import Phases
from batchwise.host import peak_memory
from batchwise.tasks.task import Task


class Totals(NamedTuple):
    """What training came to so far, in this process."""

    examples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    """Seconds of those in which it waited for data."""


class Record(Callback):
    """Writes loss, learning rate, gradient norm, speed and peak memory.

    The loss is exact: the mean over all targets since the row before, over all micro-batches and devices; the task's
    metrics are of the row's own batch. The step is the number of optimizer steps done. Steps between rows cost nothing:
    nothing is read from the device.

    Speed is of training alone, without validation and checkpoints, and of all devices together. `data_wait` is the
    share of that time in which this process waited for its next batch. `model_flops_per_second` takes the backward pass
    for twice the forward pass, and `mfu` is its share of the devices' peak (model FLOPs utilization: Chowdhery et al.,
    "PaLM", 2022, appendix B), where Lightning knows that.
    """

    def __init__(self) -> None:
        self.examples = 0
        self._row = Totals()
        self._peak_flops: float | None = None
        self._gradient_norm: torch.Tensor | None = None
        self._learning_rate = 0.0
        self._before_validation = ""

    def on_train_start(self, trainer: Any, pl_module: Task) -> None:
        """Start the clock."""
        self._peak_flops = peak_flops(trainer)
        trainer.phases.enter("training")

    def on_validation_start(self, trainer: Any, pl_module: Task) -> None:
        """Stop the clock: only training counts as training."""
        self._before_validation = trainer.phases.enter("validation")

    def on_validation_end(self, trainer: Any, pl_module: Task) -> None:
        """Start the clock again."""
        trainer.phases.enter(self._before_validation)

    def on_train_end(self, trainer: Any, pl_module: Task) -> None:
        """Stop the clock."""
        trainer.phases.enter("end")

    def totals(self, pl_module: Task) -> Totals:
        """Return what training came to so far."""
        phases: Phases = pl_module.trainer.phases  # type: ignore[attr-defined]
        phases.enter(phases.now)
        return Totals(self.examples, phases.seconds["training"], pl_module.data.waited)

    def figures(self, pl_module: Task, since: Totals, until: Totals) -> dict[str, float]:
        """Return speed and peak memory, by their names in the log."""
        seconds = until.seconds - since.seconds
        rate = (until.examples - since.examples) / seconds
        figures = {"examples_per_second": rate, "data_wait": (until.waited - since.waited) / seconds}
        if flops := pl_module._measures.flops_per_example:
            figures["model_flops_per_second"] = 3 * flops * rate
            if self._peak_flops:
                figures["mfu"] = figures["model_flops_per_second"] / self._peak_flops
        figures["peak_memory_mib"] = peak_memory(pl_module.trainer.strategy.root_device) / 2**20
        return figures

    def on_before_optimizer_step(self, trainer: Any, pl_module: Task, optimizer: Optimizer) -> None:
        """Where a row is due, take the rate of this step, and the norm of its divided gradient before clipping."""
        if pl_module._measures.row_is_due:
            self._learning_rate = optimizer.param_groups[0]["lr"]
            self._gradient_norm = full(torch.nn.utils.get_total_norm(gradients_of(optimizer)))

    def on_train_batch_end(self, trainer: Any, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write the row, where it is due."""
        self.examples += batch.size
        if not pl_module._measures.row_is_due:
            return
        measures = pl_module._measures
        measured = measures.row()  # waits for the device, so it comes before the clock is read
        totals = self.totals(pl_module)
        row = {
            **measured,
            "learning_rate": self._learning_rate,
            "gradient_norm": float("nan") if self._gradient_norm is None else self._gradient_norm.item(),
            "examples": pl_module.data.plan.examples_at(trainer.global_step),  # type: ignore[union-attr]
            "epoch": batch.epoch,
            **self.figures(pl_module, self._row, totals),
        }
        measures.shown = {"train/loss": measured["train/loss"], "examples/s": row["examples_per_second"]}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)
        self._row = totals


def peak_flops(trainer: Any) -> float | None:
    """Return the most operations per second of all devices together, in the run's precision; None: it is not known."""
    types = {"16": torch.float16, "bf16": torch.bfloat16, "32": torch.float32, "64": torch.float64}
    dtype = types.get(str(trainer.precision).split("-")[0])
    with warnings.catch_warnings(action="ignore"):  # it warns of what it does not know
        one = get_available_flops(trainer.strategy.root_device, dtype) if dtype else None
    return one * trainer.world_size if one else None
