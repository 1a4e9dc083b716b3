"""The engine's own hooks, at the beginning and end of a training, an epoch and an evaluation, and in checkpoints."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

from batchwise.data.examples import SPLITS
from batchwise.tasks.making import refuse, start_momenta, take_states
from batchwise.tasks.task import Task

KEY = "batchwise"
"""The key of the engine's state in a checkpoint."""


class Recorder(Callback):
    """Starts and ends the measures, the rates and the step of a task. It is the trainer's first callback.

    None of this is in a hook of the task, so a subclass may override all hooks.
    """

    def __init__(self) -> None:
        self._saved: dict | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the task, unless the command line has done so."""
        if not isinstance(pl_module, Task):
            return
        self._saved = None
        if stage == "fit":  # forget an earlier training; a checkpoint is loaded later
            pl_module._measures.start_training()
            pl_module._step.finite.skipped_in_a_row = 0
            pl_module._rates.taken = set()
        # Lightning would load the weights of 64-true into float32, because it converts the module afterwards.
        trainer.precision_plugin.convert_module(pl_module)
        if pl_module._measures.metrics is None:
            pl_module.prepare(pl_module.data, SPLITS[stage][0])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an optimizer that cannot take the exact gradient."""
        if isinstance(pl_module, Task):
            pl_module._step.wrapped(pl_module)
            for optimizer in trainer.optimizers:
                refuse(optimizer)
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                # DDP would copy the running statistics of the first device before each forward pass. This takes time,
                # and would overwrite exact statistics.
                trainer.strategy.model.broadcast_buffers = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a training."""
        if isinstance(pl_module, Task):
            pl_module._step.start(pl_module)
            pl_module._rates.start(pl_module)
            states = (self._saved or {}).get("optimizer_states") or [None] * len(trainer.optimizers)
            for optimizer, state in zip(trainer.optimizers, states, strict=False):
                take_states(optimizer, state if pl_module.device_mesh is None else None)
                start_momenta(optimizer)
            self._saved = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the exact mean loss of the epoch."""
        if isinstance(pl_module, Task):
            mean = pl_module._measures.end_epoch()
            pl_module.record({"train/loss_epoch": torch.tensor(mean, dtype=torch.float64)})

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin an evaluation."""
        if isinstance(pl_module, Task):
            pl_module._measures.start_evaluation(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the exact loss and the metrics."""
        if isinstance(pl_module, Task):
            pl_module.record(pl_module._measures.end_evaluation(pl_module, "val"))

    on_test_epoch_start = on_validation_epoch_start

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the exact loss and the metrics."""
        if isinstance(pl_module, Task):
            pl_module.record(pl_module._measures.end_evaluation(pl_module, "test"))

    # Checkpoints

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Save the sums. Number the optimizer's parameters in the order of the model.

        PyTorch numbers them in the order of the optimizer's groups, and loads any numbers. A sharded strategy expects
        the order of the model.
        """
        if not isinstance(pl_module, Task):
            return
        checkpoint[KEY] = {
            "sums": pl_module._measures.state(),
            "skipped_in_a_row": pl_module._step.finite.skipped_in_a_row,
            "rates_taken": sorted(pl_module._rates.taken),
        }
        if pl_module.device_mesh is not None:
            return  # the strategy has numbered them so
        numbers = {parameter: number for number, parameter in enumerate(pl_module.parameters())}
        for optimizer, state in zip(trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            ours = [numbers[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            state["state"] = {ours[number]: values for number, values in state["state"].items()}
            for group in state["param_groups"]:
                group["params"] = [ours[number] for number in group["params"]]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Restore the sums."""
        state = checkpoint.get(KEY)
        if isinstance(pl_module, Task) and state and trainer.state.fn == "fit":
            pl_module._measures.restore(state["sums"])
            pl_module._step.finite.skipped_in_a_row = state["skipped_in_a_row"]
            pl_module._rates.taken = set(state["rates_taken"])
            self._saved = checkpoint
