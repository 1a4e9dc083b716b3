"""One optimizer step from one global batch. It is exact, whatever the micro-batches and devices are."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from batchwise.batching.gradients import Number, drop_gradients, parameters, scale_gradients
from batchwise.batching.loader import Batch
from batchwise.batching.random import mix
from batchwise.models import place
from batchwise.models.dropout import number_layers
from batchwise.models.norm import GhostBatchNorm, ghosts_of, unit_of
from batchwise.tasks.captured import DEVICES, Captured, why_not
from batchwise.tasks.finite import Finite
from batchwise.tasks.hooks import STEP_HOOKS, call_hook, is_ours, listeners, listens, values_are_due
from batchwise.tasks.ledger import Made, skips_by_itself
from batchwise.tasks.logs import Results
from batchwise.tasks.memory import halve, is_out_of_memory, stop_if_another_ran_out
from batchwise.tasks.passes import begin
from batchwise.tasks.players import add_gradients, refuse_missing
from batchwise.tasks.sums import Sums, reduce, reduce_sums

if TYPE_CHECKING:
    from batchwise.tasks.task import Task

DRAWS = 0x647261
"""Salt that separates training draws from other draws with the same seed."""


class Step:
    """Runs the micro-batches of a global batch, adds the gradients, divides once, and makes the optimizer step.

    It is an object of its own, so that no attribute and no hook of a user's subclass can break its state.

    Args:
        task: has the network that is trained, and perhaps other layers.
        max_skipped_steps: see `Task`.
    """

    def __init__(self, task: "Task", max_skipped_steps: int) -> None:
        self._task = task
        self.finite = Finite(max_skipped_steps)
        self.ghosts: list[GhostBatchNorm] = []
        self.stop_requested = False
        """If it is set on any device, all devices stop after the same step."""
        self.sums = Sums()
        """Sums of the last step, over all devices. With several players, those of the first."""
        self.batch: Batch | None = None
        """The last batch."""
        self.captured = Captured()
        self._kept: dict[Any, Tensor] = {}
        self._devices, self._wrapped = 1, set[int]()
        self._results: Any = Results(None, True)

    def __reduce__(self) -> tuple:  # a copy of a task is in no training: what `listen` finds belongs to this one
        return Step, (self._task, self.finite.most)

    @property
    def unit(self) -> int:
        """Number of examples that must stay together."""
        return unit_of(self._task, self._task.network)

    def wrapped(self, task: "Task") -> None:
        """Note which parameters need a gradient when the strategy wraps the module."""
        self._wrapped = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}

    def listen(self, task: "Task") -> None:
        """Find the hooks that somebody overrides; the step skips all others."""
        trainer = task.trainer
        self._results, self._devices = trainer.fit_loop.epoch_loop._results, trainer.world_size
        self.ghosts = ghosts_of(task)
        number_layers(task)
        self.is_heard = not all(map(is_ours, listeners(trainer, STEP_HOOKS)))
        self._hears_zero = bool(listeners(trainer, ["on_before_zero_grad"]))
        self.own_zero, self.own_step = listens(task, "optimizer_zero_grad"), listens(task, "optimizer_step")
        # Use PyTorch's backward pass and step directly if nobody can notice the difference.
        self.finite.listen(task)
        plain = isinstance(trainer.strategy, SingleDeviceStrategy) and not self.finite.has_scaler
        quiet = not listens(task, "backward") and not listeners(trainer, ["on_before_backward", "on_after_backward"])
        self.plain_backward = plain and quiet
        # In full precision, Lightning's context of a training step does nothing.
        bare = plain and type(trainer.precision_plugin) is Precision
        self._forward: Any = task.training_step if bare else trainer.strategy.training_step
        self._no_sync = getattr(trainer.strategy, "block_backward_sync", nullcontext)
        self.hear_step = listeners(trainer, ["on_before_optimizer_step"])
        own = listens(task, "configure_gradient_clipping") or listens(task, "on_before_optimizer_step")
        self.plain_step = plain and not own and all(map(is_ours, self.hear_step))
        self.captured.start(task, why_not(self, task))
        # Nobody looks at a step but with a row, and nothing waits for the device anyway.
        self._is_unseen = (
            task.device.type in DEVICES
            and task.device_mesh is None
            and not self.finite.has_scaler
            and not self.is_heard
            and not self.own_step
            and all(getattr(callback, "for_rows", False) for callback in self.hear_step)
        )

    def run(self, task: "Task", batch: Batch) -> None:
        """Train on this device's share of one global batch.

        If the task has several optimizers, each takes its turns on the same batch.
        """
        step = task.trainer.global_step
        if batch.step != step:
            raise RuntimeError(f"the loader gave the batch of step {batch.step}, but step {step} is due")
        self.batch = batch
        task._measures.start_step(task, step)
        task._rates.set(task, step)
        turns = task._turns()
        if self.captured.is_on and (sums := self._replayed(task, batch, turns[0][1])) is not None:
            self.sums = sums
            return
        logs: Number = 0.0
        for turn, (player, optimizer) in enumerate(turns):
            logs += self._turn(task, batch, player, optimizer, turn)
        # Reading waits for the device, so only where somebody may look at the values.
        if self._devices > 1 and values_are_due(task.trainer, step + 1) and logs > 0:
            self._results.add_up()

    def loss(self) -> Number:
        """Return the exact loss of the last batch, over all devices. With several players, that of the first."""
        return self.sums.per_target()

    def _replayed(self, task: "Task", batch: Batch, optimizer: Optimizer) -> Sums | None:
        """Make the step by a recording, and return its sums; None: there is none."""
        self._cut(task, batch)
        return self.captured.step(task, batch, self._key(task, batch, 0), optimizer)

    def _cut(self, task: "Task", batch: Batch) -> None:
        data = task.data
        if data.micro_batch_limit is not None:
            batch.cut(data.micro_batch_limit, data.plan.unit)  # type: ignore[union-attr]

    def _key(self, task: "Task", batch: Batch, turn: int) -> int:
        """Return the key of the random numbers of a turn."""
        return mix(task.data.seed or 0, DRAWS, batch.step, *([turn] if turn else []))

    def _turn(self, task: "Task", batch: Batch, player: str | None, optimizer: Optimizer, turn: int) -> Number:
        """Make one step of one optimizer with the exact gradient. Skip it if loss or gradient is not finite.

        Returns:
            The number of devices on which something was logged.
        """
        logged = self._results.mark()
        sums = self._gradient(task, batch, player, optimizer, turn)
        made = Made(batch.step, batch.epoch, sums.count)
        finite: Tensor | bool = True
        if by_itself := self._may_skip_by_itself(task, player, optimizer):
            ledger = self.finite.start(task.device)
            line = optimizer.found_inf = ledger.line  # type: ignore[attr-defined]
            ledger.check(sums.loss, optimizer, line)
            if self.ghosts or task._measures.terms.names:
                finite = line == 0
        if turn == 0:
            self.sums = sums
        if not by_itself and not self.finite.passes(task, made, sums, optimizer):
            drop_gradients(optimizer)
            self._results.rewind(logged)
            return sums.logs
        if turn == 0 and not by_itself:
            task._measures.add(sums)
        if task._measures.terms.names:
            task._measures.terms.add(task, finite)
        self.move_running_statistics(task, finite)
        trainer: Any = task.trainer
        if self.own_step:
            wrapped = LightningOptimizer._to_lightning_optimizer(optimizer, trainer.strategy)
            task.optimizer_step(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, wrapped, sums.per_target)  # type: ignore[arg-type]
        elif not self.plain_step:
            trainer.strategy.optimizer_step(optimizer, sums.per_target)
        else:
            for callback in self.hear_step:
                callback.on_before_optimizer_step(trainer, task, optimizer)
            if trainer.gradient_clip_val:
                task.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            optimizer.step()
        if by_itself:
            optimizer.found_inf = None  # type: ignore[attr-defined]
            self.finite.add(task, made, sums.loss)
        return sums.logs

    def _may_skip_by_itself(self, task: "Task", player: str | None, optimizer: Optimizer) -> bool:
        """Return whether the device can decide on skipping the step: nobody needs to know before the next row."""
        return (
            self._is_unseen
            and player is None
            and bool(self.finite.most)
            and not task._measures.row_is_due
            and skips_by_itself(optimizer)
            and not self._results.has_news()
        )

    # The gradient

    def _gradient(self, task: "Task", batch: Batch, player: str | None, optimizer: Optimizer, turn: int) -> Sums:
        """Put the exact gradient of the global batch into the parameters. Return the sums over all devices."""
        if self._hears_zero:
            call_hook(task.trainer, "on_before_zero_grad", optimizer)
        sums, logged = None, self._results.mark()
        while sums is None:
            self._results.rewind(logged)
            self._zero(task, optimizer)
            self._cut(task, batch)
            sums = self._run_micro_batches(task, batch, player, turn)
        if self._devices > 1:
            sums = sums._replace(stops=float(self.stop_requested), logs=float(self._results.has_news()))
            self._add_what_the_strategy_does_not(task, player, optimizer)
            sums = reduce_sums(task, sums)
        # If no target counts, loss and gradient are zero.
        scale_gradients(parameters(optimizer), batch.size / (sums.count + (sums.count == 0)))
        return sums

    def _add_what_the_strategy_does_not(self, task: "Task", player: str | None, optimizer: Optimizer) -> None:
        """Sum gradients over the devices that DDP does not average.

        DDP averages the gradients of the parameters that needed one when it wrapped the module, and always all of
        them. So parameters that were frozen then are left over, and so are the parameters of a single player.
        """
        strategy = task.trainer.strategy
        if player is not None:
            add_gradients(parameters(optimizer), lambda values: reduce(task, values))
        elif isinstance(strategy, DDPStrategy):
            refuse_missing(strategy.model, (one for one in parameters(optimizer) if id(one) in self._wrapped))
            late = [one for one in parameters(optimizer) if one.requires_grad and id(one) not in self._wrapped]
            add_gradients(late, lambda values: reduce(task, values) / self._devices)

    def _zero(self, task: "Task", optimizer: Optimizer) -> None:
        drop_gradients(task.trainer.optimizers[0])  # those of all players
        if self.own_zero:
            trainer: Any = task.trainer
            task.optimizer_zero_grad(trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx, optimizer)
        task._measures.forget_step()
        for ghost in self.ghosts:
            ghost.zero_sums()

    def _run_micro_batches(self, task: "Task", batch: Batch, player: str | None, turn: int) -> Sums | None:
        """Run all micro-batches forward and backward. Return None if they must be run again, in smaller ones."""
        key = self._key(task, batch, turn)
        strategy: Any = task.trainer.strategy
        sums, last = Sums(), len(batch.micro_batches) - 1
        # Data-parallel strategies average over devices. The nominal count keeps half-precision gradients in range.
        scale, more = (1 if player else self._devices) / batch.size, () if player is None else (player,)
        try:
            task._look_ahead(batch, key)
            for number, micro_batch in enumerate(batch.micro_batches):
                begin(task, micro_batch, key)
                # Gradients cross devices once per step, overlapped with the last backward pass.
                with nullcontext() if number == last and player is None else self._no_sync():
                    loss, count = self._forward(micro_batch, number, *more)
                    if self.plain_backward:
                        loss.backward(self._constant(scale, loss))
                    else:
                        strategy.backward(loss * scale, None)
                sums = sums.plus(loss, count)
            return sums
        except RuntimeError as error:
            if not is_out_of_memory(error):
                stop_if_another_ran_out(task, error)
                raise
            message = str(error).splitlines()[0]
        finally:
            place.current = None
        # Not in the except clause, in which the tensors of the failed pass are still alive.
        halve(task, batch, message)
        return None

    def _constant(self, value: float, like: Tensor) -> Tensor:
        """Return a scalar on the device. It is kept, because to make one takes as long as a small layer."""
        kept = self._kept.get((value, like.dtype))
        if kept is None or kept.device != like.device:
            kept = self._kept[value, like.dtype] = torch.full_like(like, value)
        return kept

    def move_running_statistics(self, task: "Task", made: Tensor | bool) -> None:
        """Move the running statistics of ghost batch norms, if the step is made."""
        if self.ghosts:
            sums = reduce(task, torch.cat([ghost.sums for ghost in self.ghosts], dim=1))
            widths = [ghost.sums.shape[1] for ghost in self.ghosts]
            for ghost, own in zip(self.ghosts, sums.split(widths, dim=1), strict=True):
                ghost.move_running(own, made)

    def stop_agreed(self, task: "Task") -> bool:
        """Return whether any device was asked to stop before the last step. All devices get the same answer."""
        if self._devices == 1:
            return self.stop_requested
        trainer: Any = task.trainer
        # Reading waits for the device. On a CPU that is free. Elsewhere it is done with a row in the log, which waits.
        free = task.device.type == "cpu" or trainer.global_step % trainer.log_every_n_steps == 0
        return free and bool(self.sums.stops > 0)
