"""The gradient noise scale while training, from the micro-batches that are run anyway."""

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

from batchwise.batching.gradients import gradients_of
from batchwise.batching.noise import FEWEST, Estimate, NoiseMeter, Sample, noise_scale, sample
from batchwise.errors import TrainingStopped
from batchwise.ranges import PositiveInt
from batchwise.tasks.hooks import row_is_due
from batchwise.tasks.step import reduce
from batchwise.tasks.task import Task


class NoiseScale(Callback, NoiseMeter):
    """Logs `noise_scale`, `noise_scale_low` and `noise_scale_high` (95%), in examples; where the signal is lost in the
    noise, `noise_scale_low` alone: the noise scale is more than that.

    On sampled steps, a hook on each parameter sees each micro-batch's own gradient on its way to where gradients are
    added up, and takes its norm. Nothing is run twice, nothing is copied, and the gradient trained on is not touched.
    It is seen before it crosses devices, so one micro-batch on each of several devices is enough.

    An example's gradient is that of the sum of its losses. What is drawn in training (dropout) counts as noise.

    Args:
        every_n_steps: steps between two samples.
        window: samples that are pooled, the newest ones. Nothing is logged before there are `FEWEST`.

    Raises:
        ValueError: `window` is below `FEWEST`.
        TrainingStopped: the strategy shards the gradient.
    """

    def __init__(self, every_n_steps: PositiveInt = 10, window: int = FEWEST) -> None:
        if window < FEWEST:
            raise ValueError(f"window is {window}: the noise scale of fewer than {FEWEST} batches says nothing")
        self.every_n_steps = every_n_steps
        self.samples: deque[Sample] = deque(maxlen=window)
        self._unread: list[tuple[int, Tensor]] = []
        self._handles: list[Any] = []
        self._norms: list[Tensor] = []  # of the micro-batch that is due, one per parameter
        self._squares: list[Tensor] = []  # one per micro-batch
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
        """Begin without samples; a checkpoint's come after."""
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TrainingStopped(
                f"NoiseScale cannot see the whole gradient under {type(trainer.strategy).__name__}: "
                "write trainer.strategy ddp, or leave it out",
                everywhere=True,
            )
        self.samples.clear()
        self._unread.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Warn where there is nothing to compare."""
        plan = pl_module.data.plan
        assert plan is not None
        if plan.accumulation * plan.devices == 1:
            warnings.warn(
                "the gradient noise scale compares parts of a batch, but each batch is run in one: "
                f"write data.micro_batch_size, such as {max(1, plan.batch_size // 4)}",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:
        """Begin to look, if a sample is due."""
        if batch.step % self.every_n_steps == 0:
            self._squares.clear()
            groups = trainer.optimizers[0].param_groups
            wanted = [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
            self._handles = [parameter.register_hook(self._see) for parameter in wanted]

    def _see(self, gradient: Tensor) -> None:
        self._norms.append(norm(gradient))

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Task, loss: Tensor) -> None:
        """Forget what a backward pass that ran out of memory has left."""
        self._norms.clear()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Task) -> None:
        """Take the squared norm of one micro-batch's gradient."""
        if self._norms:
            self._squares.append(torch.stack(self._norms).square().sum())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Task, optimizer: Optimizer) -> None:
        """Compare the parts with the whole, over all devices. A skipped step does not come here."""
        if not self._squares:
            return
        batch, sums = pl_module._step.batch, pl_module._step.sums
        assert batch is not None
        # After a pass that ran out of memory, the last ones are those of the step. A stand-in is no part.
        squares = zip(batch.micro_batches, self._squares[-len(batch.micro_batches) :], strict=True)
        small = torch.stack([square * (part.counts / len(part)) for part, square in squares]).sum()
        parts = torch.full_like(small, sum(part.counts for part in batch.micro_batches))
        # The step scales the sum of losses by world_size / size, and in fp16 the scaler scales it once more.
        small = small * (batch.size / trainer.world_size) ** 2
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            small = small / scaler.scale(torch.ones_like(small)) ** 2
        small, parts = reduce(pl_module, torch.stack([small, parts])).unbind()
        # This gradient is per target that counts; the parts' are per example.
        norms = [norm(gradient) for gradient in gradients_of(optimizer)]
        whole = (torch.stack(norms) * (sums.count / batch.size)).square()
        self._unread.append((batch.size, torch.stack([small, whole.sum().to(small), parts])))

    def on_train_batch_end(self, trainer: Any, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop looking; write the row, where it is due."""
        self._stop_looking()
        step = trainer.global_step
        if not self._unread or not row_is_due(trainer, step):
            return
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
        """Stop looking."""
        self._stop_looking()

    def _stop_looking(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._norms.clear()
        self._squares.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the samples as plain numbers."""
        self.estimate()
        return {"samples": [list(values) for values in self.samples]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the samples of a checkpoint."""
        self.samples.extend(Sample(*values) for values in state_dict["samples"])


def norm(gradient: Tensor) -> Tensor:
    """Return the norm in single precision at least: noise is a small difference between squares."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
