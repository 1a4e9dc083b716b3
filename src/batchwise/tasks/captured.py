"""The step as CUDA graphs: recorded once for each shape, and replayed without Python between the kernels.

A graph repeats what the device did, in the same memory. So all that changes from step to step is in tensors that stay
where they are: the examples, the key and the position of the random numbers, the size of the batch, the learning rates.
The host decides nothing in between; the optimizer's kernels find out by themselves whether a step is skipped.

One graph runs a micro-batch forward and backward, another ends the step. Steps with a row in the log are ordinary ones.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from batchwise.batching.gradients import Number, parameters, scale_gradients
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.models import place
from batchwise.models.kept import kept_buffers
from batchwise.tasks.fixed import Fixed, Recorded, Replay, Unfit, shape_of, tensors_of
from batchwise.tasks.ledger import Made, skips_by_itself
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.passes import begin
from batchwise.tasks.sums import Sums
from batchwise.tasks.watched import Watched, attributes_of, no_draws, only_the_device_decides, restore, state_of

if TYPE_CHECKING:
    from batchwise.tasks.step import Step
    from batchwise.tasks.task import Task

DEVICES = ("cuda",)
"""Kinds of devices on which steps are recorded."""
ORDINARY_STEPS = 3
"""Steps with micro-batches of a shape before it is recorded. They also prepare libraries and the optimizer."""
READ_IN_PLACE = {
    f"batch.{name}" for name in ("inputs", "targets", "weights", "key", "position", "counts", "rand", "randn")
}
"""What `losses` may read from a micro-batch without needing the numbers of its examples."""
MOST_SHAPES = 16
"""Shapes that are recorded. The others run in ordinary steps."""


class Captured:
    """Records steps and replays them. Where it cannot, it says why in one line, and steps are ordinary ones."""

    def __init__(self) -> None:
        self.replays = 0
        """Number of steps that were replayed."""
        self.stale = True
        """Something may have changed that a recording does not see, such as a mode: look before the next replay."""
        self.is_on = False
        """Whether steps are recorded and replayed."""
        self._said: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Forget all recordings."""
        self._passes: dict[Any, int | Recorded] = {}
        self._end: Replay | None = None
        self._fixed: Fixed | None = None
        self._state: Any = None

    def start(self, task: "Task", why_not: str | None) -> None:
        """Begin an epoch; `why_not` says why its steps must be ordinary ones."""
        self.is_on = bool(getattr(task.trainer, "capture", False))
        self.stale = True
        if self.is_on and why_not is not None:
            self._give_up(why_not)

    def _give_up(self, why_not: str) -> None:
        self.is_on = False
        self.forget()
        if why_not not in self._said:
            self._said.add(why_not)
            print(f"trainer.capture: steps are not captured, because {why_not}", flush=True)

    def step(self, task: "Task", batch: Batch, key: int, optimizer: Optimizer) -> Sums | None:
        """Make a step. Return its sums, which later steps overwrite; None: make it an ordinary one."""
        if task._measures.row_is_due:
            return None
        try:
            if self.stale:
                self._look(task)
            shapes = [shape_of(micro_batch) for micro_batch in batch.micro_batches]
            if not all(map(self._is_ready, shapes)) or not self._record(task, batch, shapes, key, optimizer):
                return None
            return self._replay(task, batch, shapes, key, optimizer)
        except Unfit as reason:
            self._give_up(str(reason))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._give_up("memory is short")
        return None

    def _look(self, task: "Task") -> None:
        """Forget all recordings if something has changed that they do not see."""
        self.stale, state = False, state_of(task)
        if state != self._state:
            self.forget()
            self._state = state

    def _is_ready(self, shape: Any) -> bool:
        seen = self._passes.get(shape, 0)
        if not isinstance(seen, int):
            return True
        self._passes[shape] = seen + 1
        return seen >= ORDINARY_STEPS and sum(not isinstance(one, int) for one in self._passes.values()) < MOST_SHAPES

    # Recording

    def _record(self, task: "Task", batch: Batch, shapes: list[Any], key: int, optimizer: Optimizer) -> bool:
        """Record what is not recorded yet. Return False if the step before this one left no gradient."""
        if self._fixed is None:
            self._fixed = Fixed(task, optimizer)
        if not self._fixed.gradients:
            self._fixed = None
            return False
        for shape, micro_batch in zip(shapes, batch.micro_batches, strict=True):
            if isinstance(self._passes[shape], int):
                self._passes[shape] = self._record_pass(task, self._fixed, micro_batch, key, optimizer)
        settings = settings_of(optimizer)
        if self._end is None or settings != self._settings:
            if self._end is not None and self.replays - self._recorded < 2:
                raise Unfit("a scheduler changes more of the optimizer than the rate from step to step")
            self._settings, self._recorded = settings, self.replays
            self._end = self._record_end(task, self._fixed, optimizer)
        return True

    def _record_pass(
        self, task: "Task", fixed: Fixed, micro_batch: MicroBatch, key: int, optimizer: Optimizer
    ) -> Recorded:
        """Record one micro-batch, forward and backward."""
        begin(task, micro_batch, key)
        batch = task.data.to_device(micro_batch, task.device, training=True)._map(Tensor.clone)
        batch.index = batch.index.to(task.device)
        batch.key, batch.position = fixed.key, fixed.first  # type: ignore[assignment]
        where = place.Place(fixed.key, fixed.first, batch.counts, len(batch))  # type: ignore[arg-type]
        context = task.trainer.precision_plugin.train_step_context

        counts: list[Number] = [0.0]

        def run(seen: Any = batch) -> None:
            place.current = where
            with context():
                loss, count = task._summed_loss(seen)
            loss.backward((1 / fixed.size).to(loss.dtype).expand_as(loss))
            fixed.loss.add_(loss.detach())
            fixed.count.add_(count)
            counts[0] = count
            place.current = None

        with kept_buffers(task), fixed.own_gradients():
            read = self._try(task, run, batch, optimizer)
            replay = fixed.graph(run)
        fixed.zero()
        tensors = tensors_of(batch) + [batch.index] * bool(read - READ_IN_PLACE)
        return Recorded(tensors, replay, None if isinstance(counts[0], Tensor) else counts[0])

    def _try(self, task: "Task", run: Callable[[Any], None], batch: MicroBatch, optimizer: Optimizer) -> set[str]:
        """Run a micro-batch as it will be recorded, to find what a recording would miss.

        Returns:
            The names of what it reads from the micro-batch.

        Raises:
            Unfit: the host decides something in it, or it reads or changes what is not on the device.
        """
        assert self._fixed is not None
        if any(entry.meta.fx == "training_step" for entry in task._step._results.values()):
            raise Unfit("losses logs values")
        if task._measures.terms.names:
            raise Unfit("losses gives several terms")
        before, trainer, seen = attributes_of(task), task._trainer, set[str]()
        task._trainer = Watched(trainer, seen, "self.trainer.")  # type: ignore[assignment]
        try:
            with only_the_device_decides(task.device, is_compiled=trainer.compile), no_draws(task.device):  # type: ignore[union-attr]
                run(Watched(batch, seen, "batch."))
        except (RuntimeError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise Unfit(f"losses, or the network, cannot be recorded: {str(error).splitlines()[0]}") from None
        finally:
            task._trainer, place.current = trainer, None
            changed = restore(task, before)
        moving = sorted(name for name in seen if name == "batch.epoch" or name.startswith("self.trainer."))
        if moving:
            raise Unfit(f"losses reads {moving[0]}, which may change from step to step")
        if changed:
            raise Unfit(f"losses, or the network, changes its attribute {changed[0]}")
        if any(p.grad is not None and p not in self._fixed.gradients for p in parameters(optimizer)):
            raise Unfit("some parameters have a gradient only in some steps")
        return seen

    def _record_end(self, task: "Task", fixed: Fixed, optimizer: Optimizer) -> Replay:
        """Record the end of a step: from sums and gradients to new weights."""
        trainer: Any = task.trainer
        ledger = task._step.finite.start(task.device)

        def run() -> None:
            scale_gradients(fixed.gradients, fixed.size / (fixed.count + (fixed.count == 0)))
            fixed.skipped.zero_()
            if task._step.finite.most:
                ledger.check(fixed.loss, optimizer, fixed.skipped)
            task._step.move_running_statistics(task, fixed.skipped == 0)
            if trainer.gradient_clip_val:
                task.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            with fixed.own_rates(optimizer):
                optimizer.found_inf = fixed.skipped  # type: ignore[attr-defined]
                optimizer.step()
                optimizer.found_inf = None  # type: ignore[attr-defined]
            fixed.sums[0].copy_(fixed.loss)  # type: ignore[union-attr]
            fixed.sums[1].copy_(fixed.count)  # type: ignore[union-attr]
            fixed.zero()

        with fixed.own_gradients():
            return fixed.graph(run)

    # Replaying

    def _replay(self, task: "Task", batch: Batch, shapes: list[Any], key: int, optimizer: Optimizer) -> Sums:
        fixed, end = self._fixed, self._end
        assert fixed is not None
        assert end is not None
        fixed.set(key, batch.size, optimizer)
        for ghost in task._step.ghosts:
            ghost.zero_sums()
        count: float | None = 0.0
        for shape, micro_batch in zip(shapes, batch.micro_batches, strict=True):
            begin(task, micro_batch, key)
            fixed.start(micro_batch.position)
            recorded = self._passes[shape]
            assert not isinstance(recorded, int)
            recorded.take(task.data.to_device(micro_batch, task.device, training=True))
            recorded.replay()
            count = None if count is None or recorded.count is None else count + recorded.count
        place.current = None
        end()
        ledger = task._step.finite.start(task.device)
        ledger.line.copy_(fixed.skipped)
        made = Made(batch.step, batch.epoch, fixed.sums.count if count is None else count)
        task._step.finite.add(task, made, fixed.sums.loss)
        self.replays += 1
        return fixed.sums


def settings_of(optimizer: Optimizer) -> list[Any]:
    """Return the settings of an optimizer that a recording holds: all but the learning rates."""
    left_out = ("lr", "initial_lr", "params")
    return [value for group in optimizer.param_groups for name, value in group.items() if name not in left_out]


def why_not(step: "Step", task: "Task") -> str | None:
    """Return why steps cannot be captured, as far as it is known before they are made."""
    trainer, optimizers = task.trainer, task._turns()
    heard = [type(one).__name__ for one in step.hear_step if not getattr(one, "for_rows", False)]
    reasons = {
        f"{trainer.strategy.root_device} is no CUDA device": trainer.strategy.root_device.type not in DEVICES,
        "several devices train together": trainer.world_size > 1 or task.device_mesh is not None,
        "a callback, or the task, listens to steps": step.is_heard or step.own_zero or step.own_step,
        f"{', '.join(heard)} looks at the gradient of each step": bool(heard),
        f"trainer.precision {trainer.precision} waits for the device": not step.plain_backward,
        "configure_gradient_clipping is overridden": not step.plain_step,
        "there are several optimizers": len(optimizers) > 1 or optimizers[0][0] is not None,
        "the losses depend on the whole batch": task._couples,
        f"the optimizer {type(optimizers[0][1]).__name__} is not fused (Adam, AdamW and SGD may be)": not (
            skips_by_itself(optimizers[0][1])
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
