"""The engine's own hooks, at the beginning and end of a training, an epoch and an evaluation, and in checkpoints."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.states import TrainerStatus
from torch.nn.parallel import DistributedDataParallel

from batchwise.batching.loader import Batch
from batchwise.callbacks.checkpoint import Last
from batchwise.checkpoints import state_of
from batchwise.data.contents import others
from batchwise.data.examples import SPLITS
from batchwise.data.module import DataModule
from batchwise.errors import Mistake, TrainingStopped
from batchwise.tasks.exchange import gather_objects
from batchwise.tasks.finite import Finite
from batchwise.tasks.hooks import row_is_due
from batchwise.tasks.making import refuse, start_momenta, take_states
from batchwise.tasks.rehearsal import rehearse
from batchwise.tasks.task import Task

KEY = "batchwise"
"""The key of the engine's state in a checkpoint."""


class Recorder(Callback):
    """Starts and ends the measures, the rates and the step of a task. It is the trainer's first callback.

    None of this is in a hook of the task, so a subclass may override all hooks.
    """

    def __init__(self) -> None:
        self._saved: dict | None = None
        self._learnt: dict[str, bool] = {}
        self._restored: dict[str, bool] = {}  # which parameters learn, as a checkpoint says
        self._ahead = 0  # epochs, where a training goes on with another batch size than before

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepare the task, unless the command line has done so."""
        if not isinstance(pl_module, Task):
            raise TypeError(
                f"{type(pl_module).__name__} is no batchwise.Task: write `losses` in one, or use lightning.Trainer"
            )
        self._saved = None
        if stage == "fit":  # forget an earlier training; a checkpoint is loaded later
            pl_module._measures.start_training()
            pl_module._step.finite = Finite(pl_module._step.finite.most)
            pl_module._rates.taken = set()
        # Lightning would load the weights of 64-true into float32, because it converts the module afterwards.
        trainer.precision_plugin.convert_module(pl_module)
        if trainer.world_size > 1:
            _check_alike(pl_module.data, stage)
        tried, plan = pl_module._measures.tried, pl_module.data.plan
        if not tried or (stage == "fit" and tried is not plan):
            pl_module.prepare(pl_module.data, SPLITS[stage][0])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Refuse an optimizer that cannot take the exact gradient, and a scheduler of another length than before."""
        if pl_module.device_mesh is not None and not pl_module._tuning.save_frozen:
            raise Mistake("model.save_frozen is false, but sharded checkpoints hold all parameters: leave it out")
        self._learnt = _learning(pl_module)
        pl_module._step.wrapped(pl_module)
        for optimizer in trainer.optimizers:
            refuse(optimizer)
        if self._saved is not None:
            pl_module._rates.check_lengths(pl_module, self._saved)
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            # DDP would copy the running statistics of the first device before each forward pass. This takes time, and
            # would overwrite exact statistics.
            trainer.strategy.model.broadcast_buffers = False

    def on_train_start(self, trainer: Any, pl_module: Task) -> None:
        """Begin a training."""
        saved, self._saved = self._saved or {}, None
        self._ahead = trainer.current_epoch - pl_module.data.plan.epoch(trainer.global_step)  # type: ignore[union-attr]
        _leave_whole_epochs(trainer.fit_loop)
        learning = saved.get(KEY, {}).get("learning")
        self._restored = {} if learning is None else self._learnt | learning
        self._restore_learning(pl_module)
        pl_module._tuning.watch(pl_module)
        pl_module._step.stop_requested = False
        pl_module._measures.to(pl_module.device)
        if not pl_module._measures.rehearsed:
            rehearse(pl_module, pl_module.data)
        pl_module._rates.start(pl_module)
        states = saved.get("optimizer_states") or [None] * len(trainer.optimizers)
        kept = saved.get("state_dict", {})
        weights: dict[Any, Any] = {
            parameter: kept[name] for name, parameter in pl_module.named_parameters() if name in kept
        }
        for optimizer, state in zip(trainer.optimizers, states, strict=False):
            take_states(optimizer, state if pl_module.device_mesh is None else None, weights)
            start_momenta(optimizer)
        trainer.callback_metrics.update(saved.get(KEY, {}).get("monitored", {}))
        logs = saved.get(KEY, {}).get("logs", [])
        trainer.fit_loop.epoch_loop._results.restore(logs, trainer.is_global_zero)

    def before_step(self, trainer: Any, pl_module: Task, batch: Batch) -> None:
        """Set Lightning's count of steps, under which its callbacks log. After a resume it would be one too large."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = batch.step
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning does not call in the middle of an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """After a resume, let the parameters learn that learnt before it, whatever other hooks have frozen since."""
        self._restore_learning(pl_module)
        self._restored = {}

    def _restore_learning(self, pl_module: Task) -> None:
        for name, learns in self._restored.items():
            pl_module.get_parameter(name).requires_grad_(learns)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Log the exact mean loss of the epoch, and of each term."""
        pl_module._step.finite.settle(pl_module)
        means = pl_module._measures.end_epoch()
        pl_module.record({name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()})

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Begin an evaluation."""
        pl_module._measures.start_evaluation(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Log the exact loss and the metrics."""
        pl_module.record(pl_module._measures.end_evaluation(pl_module, "val"))

    on_test_epoch_start = on_validation_epoch_start  # type: ignore[assignment]

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Log the exact loss and the metrics."""
        pl_module.record(pl_module._measures.end_evaluation(pl_module, "test"))

    # Checkpoints

    def on_train_end(self, trainer: Any, pl_module: Task) -> None:
        """Forget the recordings. Save, before Lightning's averages replace the weights, which a resume needs."""
        pl_module._step.captured.forget()
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
            for callback in trainer.callbacks:
                if isinstance(callback, Last) and trainer.global_step != callback._saved_at:
                    callback.save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: Task, exception: BaseException) -> None:
        """Forget the recordings: they hold memory, and the gradients of a step that broke off."""
        if isinstance(pl_module, Task):
            pl_module._step.captured.forget()

    def on_save_checkpoint(self, trainer: Any, pl_module: Task, checkpoint: dict) -> None:
        """Save the sums, the epoch, and which parameters learn. Number the optimizer's parameters in the model's order.

        PyTorch numbers them in the order of the optimizer's groups, and loads any numbers. A sharded strategy expects
        the order of the model.
        """
        pl_module._step.finite.settle(pl_module)
        pl_module._rates.look(pl_module)
        pl_module._tuning.thin(pl_module, checkpoint["state_dict"])
        learning, plan, step = _learning(pl_module), pl_module.data.plan, trainer.global_step
        ends_epoch = plan is None or plan.begins_epoch(step)
        if plan is not None:
            # Lightning counts an epoch as done where training has ended within it, and does not yet count it where a
            # callback saves at its end, which would then come twice.
            loop = checkpoint["loops"]["fit_loop"]
            for done in (loop["epoch_progress"]["current"], loop["epoch_progress"]["total"]):
                done["processed"] = done["completed"] = plan.epoch(step) + self._ahead
            loop["epoch_loop.batch_progress"]["is_last_batch"] = False
        checkpoint[KEY] = {
            "sums": pl_module._measures.state(row_is_due(trainer, step), ends_epoch),
            "skipped_in_a_row": pl_module._step.finite.skipped_in_a_row,
            # What a scheduler or callback monitors may have been measured before.
            "monitored": dict(trainer.callback_metrics),
            "settings_taken": sorted(map(list, pl_module._rates.taken)),
            # Of parameters that callbacks have thawed or frozen. After a resume they may not do so again.
            "learning": {name: now for name, now in learning.items() if now != self._learnt.get(name, now)},
        }
        if pl_module._measures.epoch.count and not ends_epoch:  # the epoch has begun
            # In an exception the other devices need not be here.
            together = trainer.state.status == TrainerStatus.RUNNING
            checkpoint[KEY]["logs"] = trainer.fit_loop.epoch_loop._results.state(together)
        if pl_module.device_mesh is not None:
            return  # the strategy has numbered them so
        numbers = {parameter: number for number, parameter in enumerate(pl_module.parameters())}
        for optimizer, state in zip(trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            # A parameter may be none of the model's.
            ours = [numbers.setdefault(parameter, len(numbers)) for parameter in parameters]
            state["state"] = {ours[number]: values for number, values in state["state"].items()}
            for group in state["param_groups"]:
                group["params"] = [ours[number] for number in group["params"]]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Task, checkpoint: dict) -> None:
        """Restore the sums. Restore the data module too, if its class was renamed: Lightning finds it by the name."""
        data, state = pl_module.data, checkpoint.get(KEY)
        if type(data).__qualname__ not in checkpoint and (saved := state_of(checkpoint, data)):
            data.load_state_dict(saved)
        if state and trainer.state.fn == "fit":
            pl_module._measures.restore(state["sums"])
            pl_module._step.finite.skipped_in_a_row = state["skipped_in_a_row"]
            pl_module._rates.taken = {(number, key) for number, key in state["settings_taken"]}
            self._saved = checkpoint
            if trainer.strategy.restore_checkpoint_after_setup:  # the schedulers have been made already
                pl_module._rates.check_lengths(pl_module, checkpoint)


def _learning(module: Task) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def _check_alike(data: DataModule, stage: str) -> None:
    """Stop if a process has other examples, or another order of them, than the first: each takes a part of each batch.

    All processes must call it.
    """
    lengths = {f"the number of {name} examples": len(fetch) for name, fetch in data.loaded() if name in SPLITS[stage]}
    (known, first), *rest = gather_objects((lengths | data.fingerprint(), data.contents(stage)))
    for rank, (settings, contents) in enumerate(rest, 1):
        differ = [
            f"{key} ({value!r} and {settings.get(key)!r})" for key, value in known.items() if settings.get(key) != value
        ]
        differ += [f"the {name} examples" for name, one in contents.items() if any(others(name, first.get(name), one))]
        if differ:
            raise TrainingStopped(
                f"process 0 and process {rank} differ in {differ[0]}, but each takes a part of the same batch: let "
                "`load` and your script do the same in every process, and seed what they draw",
                code=2,
                everywhere=True,
            )


def _leave_whole_epochs(loop: _FitLoop) -> None:
    """Begin the next epoch, if the checkpoint was saved between two epochs.

    If training is bounded by `max_steps`, Lightning takes each checkpoint for one from within an epoch. It would count
    an epoch without steps.
    """
    done = loop.epoch_progress.current
    if loop.restarting and done.ready == done.completed == done.processed:  # type: ignore[attr-defined]
        loop._restarting = False
        loop.epoch_loop.restarting = False
