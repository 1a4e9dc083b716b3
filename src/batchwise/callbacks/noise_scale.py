"""The gradient noise scale during training, from the gradients of the micro-batches."""

import math
import warnings
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from batchwise.arguments import typed
from batchwise.batching.gradients import gradients_of
from batchwise.batching.loader import Batch
from batchwise.batching.noise import FEWEST, Estimate, NoiseMeter, Sample, noise_scale, sample
from batchwise.errors import Mistake, TrainingStopped
from batchwise.ranges import PositiveInt
from batchwise.tasks.hooks import row_is_due
from batchwise.tasks.sums import reduce
from batchwise.tasks.task import Task


class NoiseScale(Callback, NoiseMeter):
    """Logs the gradient noise scale in examples: `noise_scale`, and the ends of its 95% interval, `noise_scale_low` and
    `noise_scale_high`. If the signal is lost in the noise, only the lower end is known, and only that is logged.

    On sampled steps, a hook on each parameter takes the norm of each micro-batch's gradient before it is accumulated.
    Nothing is run twice or copied, and training is not changed. The hook runs before gradients cross devices, so one
    micro-batch on each of several devices is enough.

    The gradient of an example is that of the sum of its losses. Random layers such as dropout count as noise.

    Args:
        every_n_steps: steps between two samples.
        window: the number of newest samples that are pooled. Nothing is logged before there are `FEWEST`.

    Raises:
        ValueError: `window` is below `FEWEST`.
        Mistake: the task has several optimizers.
        TrainingStopped: the strategy shards the gradient.
    """

    @typed
    def __init__(self, every_n_steps: PositiveInt = 10, window: int = FEWEST) -> None:
        if window < FEWEST:
            raise ValueError(f"window is {window}: the noise scale of fewer than {FEWEST} batches says nothing")
        self.every_n_steps = every_n_steps
        self.samples: deque[Sample] = deque(maxlen=window)
        self._unread: list[tuple[int, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._norms: list[Tensor] = []  # of the current micro-batch, one per parameter
        self._squares: list[Tensor] = []  # one per micro-batch
        self._is_new = False  # whether a sample was taken since the last row
        self._was_lost = False

    def estimate(self) -> Estimate | None:
        """Return the noise scale of the window, or None while there are too few samples. Waits for the device."""
        for examples, values in self._unread:
            small, whole, parts = values.tolist()
            if parts > 1 and math.isfinite(small + whole):
                self.samples.append(sample(small, whole, int(parts), examples))
        self._unread.clear()
        return noise_scale(self.samples) if len(self.samples) >= FEWEST else None

    # Lightning's hooks, in the order of a step

    def setup(self, trainer: pl.Trainer, pl_module: Task, stage: str) -> None:
        """Begin without samples. Those of a checkpoint are loaded later."""
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TrainingStopped(
                f"NoiseScale cannot see the whole gradient under {type(trainer.strategy).__name__}: "
                "write trainer.strategy ddp, or leave it out",
                everywhere=True,
            )
        if stage == "fit" and pl_module._players() != [()]:
            raise Mistake(
                "trainer.callbacks has NoiseScale, but with several optimizers the gradients of a micro-batch are "
                "those of several losses, so there is no noise scale: leave it out"
            )
        self.samples.clear()
        self._unread.clear()
        self._is_new = self._was_lost = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Warn if nothing will be logged: each batch is one micro-batch, or the training is too short."""
        plan = pl_module.data.plan
        assert plan is not None
        if plan.accumulation * plan.devices == 1:
            warnings.warn(
                "the gradient noise scale compares parts of a batch, but each batch is run in one: "
                f"write data.micro_batch_size, such as {max(1, plan.batch_size // 4)}",
                stacklevel=2,
            )
        steps = pl_module.data.total_steps()
        if steps <= (FEWEST - 1) * self.every_n_steps:
            remedy = (
                f"write every_n_steps {int(steps // FEWEST)}" if steps >= FEWEST else "leave it out, or train longer"
            )
            warnings.warn(
                f"the gradient noise scale needs {FEWEST} samples, one in {self.every_n_steps} steps, which this "
                f"training of {steps:,} steps does not have, so it will not be logged: {remedy}",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Task, batch: Batch, batch_idx: int) -> None:
        """Add the hooks, if a sample is due."""
        if batch.step % self.every_n_steps == 0:
            self._squares.clear()
            groups = trainer.optimizers[0].param_groups
            wanted = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
            self._handles = [parameter.register_hook(self._see) for parameter in wanted]

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(norm(gradient))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Task, loss: Tensor) -> None:
        """Forget the norms of a backward pass that ran out of memory."""
        self._norms.clear()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Take the squared norm of one micro-batch's gradient."""
        if self._norms:
            self._squares.append(torch.stack(self._norms).square().sum())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Task, optimizer: Optimizer) -> None:
        """Compare the micro-batches with the whole batch, over all devices. It is not called for a skipped step."""
        if not self._squares:
            return
        batch, sums = pl_module._step.batch, pl_module._step.sums
        assert batch is not None
        # After a pass that ran out of memory, only the last ones belong to the step. A stand-in does not count.
        squares = zip(batch.micro_batches, self._squares[-len(batch.micro_batches) :], strict=True)
        small = torch.stack([square * (part.counts / len(part)) for part, square in squares]).sum()
        parts = torch.full_like(small, sum(part.counts for part in batch.micro_batches))
        # The step scales the sum of losses by world_size / size, and in fp16 the scaler scales it once more.
        small = small * (batch.size / trainer.world_size) ** 2
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            small = small / scaler.scale(torch.ones_like(small)) ** 2
        small, parts = reduce(pl_module, torch.stack([small, parts])).unbind()
        # This gradient is per target that counts. Those of the micro-batches are per example.
        norms = [norm(gradient) for gradient in gradients_of(optimizer)]
        whole = (torch.stack(norms) * (sums.count / batch.size)).square()
        self._unread.append((batch.size, torch.stack([small, whole.sum().to(small), parts])))
        self._is_new = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Task, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Remove the hooks. Write the row, if it is due."""
        self._remove_hooks()
        step = trainer.global_step
        if not self._is_new or not row_is_due(trainer, step):
            return
        self._is_new = False
        estimate = self.estimate()
        if estimate is None:
            return
        row = {"noise_scale_low": estimate.low}
        if not estimate.lost:
            row |= {"noise_scale": estimate.scale, "noise_scale_high": estimate.high}
        elif not self._was_lost and trainer.is_global_zero:
            print(f"step {step:,}: the gradient noise scale is {estimate}; its signal is lost in the noise", flush=True)
        self._was_lost = estimate.lost
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)

    def on_exception(self, trainer: pl.Trainer, pl_module: Task, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.clear()
        self._squares.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the samples as plain numbers, and whether a row is still to be written of them."""
        self.estimate()
        samples = [list(values) for values in self.samples]
        return {"samples": samples, "is_new": self._is_new, "was_lost": self._was_lost}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the samples of a checkpoint."""
        self.samples.extend(Sample(*values) for values in state_dict["samples"])
        self._is_new, self._was_lost = state_dict.get("is_new", False), state_dict.get("was_lost", False)


def norm(gradient: Tensor) -> Tensor:
    """Return the norm at least in single precision, because noise is a small difference between squares."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
