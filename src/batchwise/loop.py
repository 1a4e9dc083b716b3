"""Lightning's loop over an epoch, with the exact step; it costs next to nothing while nobody listens to a step."""

from typing import Any, cast

import lightning
import torch
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from batchwise.batching.device import widest
from batchwise.batching.loader import Batch
from batchwise.callbacks.checkpoint import Last
from batchwise.data.module import DataModule
from batchwise.errors import Mistake
from batchwise.tasks.hooks import STEP_HOOKS, before_step, is_ours, listeners, listens
from batchwise.tasks.logs import Results
from batchwise.tasks.task import Task

KNOWN = ("2.6.6",)
"""Versions of Lightning with which the short `advance` below has been compared."""


class BatchOptimization(_AutomaticOptimization):
    """One item of a data module is one optimizer step."""

    def run(self, optimizer: Optimizer, batch_idx: int, kwargs: Any) -> Any:
        """Run one global batch; return its exact loss, for `on_train_batch_end`."""
        task: Any = self.trainer.lightning_module
        self.step(task, kwargs["batch"])
        return {"loss": torch.as_tensor(task._step.loss(), dtype=widest(task.device))}

    def step(self, task: Task, batch: Batch) -> None:
        """Run one global batch and count it."""
        steps = self.optim_progress.optimizer.step  # which is `trainer.global_step`
        steps.increment_ready()
        if task._current_fx_name != "training_step":  # else `losses` could not log
            task._current_fx_name = "training_step"
        task._step.run(task, batch)
        steps.increment_completed()


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop. It has a short `advance`, and uses Lightning's own if somebody could notice the difference."""

    def __init__(self, trainer: Any, min_steps: int | None = None, max_steps: int = -1) -> None:
        super().__init__(trainer, min_steps=min_steps, max_steps=max_steps)
        self.automatic_optimization = BatchOptimization(trainer)
        self._results = Results(trainer, training=True)
        self._is_short = False
        self._validates: bool | None = None
        self._before: list[Any] = []
        self._at_start: list[Any] = []
        self._at_end: list[Any] = []

    def reset(self) -> None:
        """Begin an epoch, or go on in it. A batch that had only begun when it was saved begins again."""
        super().reset()
        self.batch_progress.total.reset_on_restart()

    def on_run_start(self, data_fetcher: Any) -> None:
        """Find out, at the start of each epoch, who listens."""
        super().on_run_start(data_fetcher)
        trainer: Any = self.trainer
        trainer.lightning_module._step.listen(trainer.lightning_module)
        self._validates = None
        self._is_short = self._may_be_short(data_fetcher)
        own = [callback for callback in trainer.callbacks if is_ours(callback)]
        self._before = before_step(trainer)
        self._at_start = [c.on_train_batch_start for c in own if listens(c, "on_train_batch_start")]
        self._at_end = [c.on_train_batch_end for c in own if listens(c, "on_train_batch_end")]

    def _may_be_short(self, data_fetcher: Any) -> bool:
        trainer: Any = self.trainer
        data = trainer.datamodule
        moves = ("on_before_batch_transfer", "on_after_batch_transfer", "transfer_batch_to_device")
        return (
            lightning.__version__ in KNOWN
            and isinstance(data, DataModule)
            and all(getattr(type(data), hook) is getattr(DataModule, hook) for hook in moves)
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and isinstance(trainer.profiler, PassThroughProfiler)
            and type(trainer.strategy).on_train_batch_start is Strategy.on_train_batch_start
            # Lightning tells all processes of a SIGTERM at each step. `Last` does so together with the sums of losses.
            and (trainer.world_size == 1 or any(isinstance(callback, Last) for callback in trainer.callbacks))
            and all(map(is_ours, listeners(trainer, STEP_HOOKS)))
            and all(result.meta.fx == "on_train_epoch_end" for result in self._results.values())  # nobody logs steps
        )

    def _should_check_val_epoch(self) -> bool:
        """Return Lightning's answer. It is kept for the epoch, because it does not change and asking takes long."""
        if self._validates is None:
            self._validates = super()._should_check_val_epoch()
        return self._validates

    def teardown(self) -> None:
        """Clean up, and forget whether to validate."""
        super().teardown()
        self._validates = None

    def advance(self, data_fetcher: Any) -> None:
        """Train on one global batch."""
        if not self._is_short or self.restarting:
            done, progress = self.global_step, cast(Any, self.batch_progress.current)
            try:
                super().advance(data_fetcher)
            except StopIteration:
                if progress.ready > progress.started:  # else there are no more batches
                    raise Mistake(
                        "on_train_batch_start returned -1, but no example of an epoch is left out: "
                        "write trainer.limit_train_batches"
                    ) from None
                raise
            # Where training was resumed, this was the step in which somebody may have begun to log.
            self._is_short = self._is_short and self._may_be_short(data_fetcher)
            if self.global_step > done:
                # In the epoch in which training was resumed, Lightning does not step a ReduceLROnPlateau. Here it must,
                # and its metric is there, because validation comes after a step.
                self.trainer.fit_loop._restarting = False
            return
        trainer: Any = self.trainer
        task: Any = trainer.lightning_module
        self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        logged = len(self._results)
        batch_idx, progress = self.batch_idx + 1, self.batch_progress
        progress.is_last_batch = data_fetcher.done
        progress.increment_ready()
        if trainer._logger_connector._first_loop_iter is not False:
            trainer._logger_connector.on_batch_start(batch)
        self._results.batch, self._results.batch_size = batch, None
        for hook in self._before:
            hook(trainer, task, batch)
        for hook in self._at_start:
            hook(trainer, task, batch, batch_idx)
        progress.increment_started()
        self.automatic_optimization.step(task, batch)
        progress.increment_processed()
        if trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        for hook in self._at_end:
            hook(trainer, task, None, batch, batch_idx)  # our callbacks do not need the loss
        self._is_short = len(self._results) == logged  # else somebody now logs at each step
        if not self._is_short:
            trainer._logger_connector.on_batch_end()
        self._results.batch = None
        progress.increment_completed()
        if not self._is_short:
            trainer._logger_connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validate if it is due. Save if training ends here, within an epoch.

        When training has ended, Lightning counts the epoch as done. A training resumed from there would be too short.
        """
        super().on_advance_end(data_fetcher)
        trainer: Any = self.trainer
        if self._num_ready_batches_reached():
            return
        if self._is_training_done or (trainer.should_stop and trainer.fit_loop._can_stop_early):
            for callback in trainer.callbacks:
                if isinstance(callback, Last):
                    callback.save_within_epoch(trainer)
