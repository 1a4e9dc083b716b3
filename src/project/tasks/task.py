"""The base of all tasks: a subclass gives one loss per target; the exact batch gradient is inherited."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from project.batching.gradients import scale_gradients, weighted_sum
from project.batching.loader import Batch, Share
from project.batching.random import mix
from project.callbacks.record import Record
from project.data.module import SPLITS, DataModule
from project.models.dropout import Dropout
from project.optim.schedule import Schedule

DRAWS = 0x647261
"""Tells what is drawn in training from what else is drawn from the same seed."""

Losses = Tensor | tuple[Tensor, Tensor]


class Task(pl.LightningModule, ABC):
    """Owns network, loss, optimizer and metrics. A subclass gives one loss per target, in `losses`.

    One item of the training loader is one optimizer step. Its micro-batches run inside `optimizer_step`; then come one
    all-reduce of (loss sum, count), one division of the gradient, clipping, and the step.

    Args:
        network: any module that takes `batch.inputs`.
        optimizer: any class from `torch.optim`, or another that is called in the same way.
        schedule: the learning rate over the training.
        decay_matrices_only: leave biases and norms (parameters with fewer than two dimensions) out of weight decay.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """The metric that decides which checkpoint is the best, and whether it should be "min" or "max"."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        decay_matrices_only: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.decay_matrices_only = decay_matrices_only
        for number, layer in enumerate(layer for layer in network.modules() if isinstance(layer, Dropout)):
            layer.number = number
        self.metrics: MetricCollection | None = None
        self.share: Share | None = None
        self._micro_batch = 0
        self._sums = torch.zeros(2)
        # Sums of (loss, count) over all devices: since the last log line, and since the epoch began.
        self.window = torch.zeros(2, dtype=torch.float64)
        self.epoch_sums = torch.zeros(2, dtype=torch.float64)

    # What a subclass writes

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """Return one loss per target, [N] or [N, T], never averaged; or (losses, weights) shaped alike.

        Call `measure` with what the metrics take.
        """

    def make_metrics(self, outputs: Tensor) -> MetricCollection | None:
        """Return the evaluation metrics, given the network's outputs for a few examples."""
        return None

    def predictions(self, batch: Batch) -> dict[str, Tensor]:
        """Return what `predict` writes for each example: columns [N] or [N, ...] by name."""
        return {"output": self(batch.inputs)}

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Raise ValueError where the data does not suit the task, given the network's outputs for a few examples."""

    # What is inherited: the network and its metrics

    @property
    def data(self) -> DataModule:
        """The data module that owns the batching."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise TypeError("a Task trains from a project.data.module.DataModule: pass datamodule= to the trainer")
        return data

    def forward(self, inputs: Any) -> Tensor:
        """Apply the network to the inputs; a tuple of inputs is passed as several arguments."""
        return self.network(*inputs) if isinstance(inputs, tuple) else self.network(inputs)

    def measure(self, *values: Tensor) -> None:
        """Update the metrics of the running evaluation; does nothing in training."""
        if self.metrics is not None and not self.training:
            self.metrics.update(*values)

    def prepare(self, data: DataModule, split: str) -> None:
        """Try the network on the first examples of a split and make the metrics, before anything is trained.

        Raises:
            ValueError: the network cannot take the data, or the data does not suit the task.
        """
        batch = data.to_device(data.examples(split, 2), self.device, training=False)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                outputs = self(batch.inputs)
        except RuntimeError as error:
            shape = list(batch.inputs.shape[1:]) if isinstance(batch.inputs, Tensor) else type(batch.inputs).__name__
            raise ValueError(
                f"model.network {type(self.network).__name__} cannot take the data, whose inputs are {shape} per "
                f"example: {str(error).splitlines()[0]}"
            ) from error
        finally:
            self.train(training)
        self.check(data, outputs)
        if data.plan is not None:
            self._new_optimizer()
            self._examples_in_all(data)
        if self.metrics is None:
            metrics = self.make_metrics(outputs)
            self.metrics = None if metrics is None else metrics.to(self.device)

    def metric_names(self) -> list[str]:
        """Return the names that a checkpoint or early stopping may monitor."""
        return ["val/loss", *(f"val/{name}" for name in self.metrics or ()), "train/loss_epoch"]

    def setup(self, stage: str) -> None:
        """Prepare for the stage, unless that was done before."""
        if self.metrics is None:
            self.prepare(self.data, SPLITS[stage][0])

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that writes training figures to the log."""
        return [Record()]

    # The exact step

    def on_train_start(self) -> None:
        """Put the running sums on the device."""
        # Sums in double precision where the device has it.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.window = torch.zeros(2, dtype=dtype, device=self.device)
        self.epoch_sums = self.epoch_sums.to(self.device, dtype)

    def on_train_batch_start(self, batch: Share, batch_idx: int) -> None:
        """Take this device's share of the next global batch."""
        if batch.step != self.trainer.global_step:
            raise RuntimeError(
                f"the loader gave the batch of step {batch.step}, but step {self.trainer.global_step} is due"
            )
        self.share = batch

    def training_step(self, batch: Share, batch_idx: int) -> Tensor:
        """Return the loss sum of one micro-batch, scaled so that the sum over all is near the mean of the batch."""
        micro_batch = self.data.to_device(batch.micro_batches[self._micro_batch], self.device, training=True)
        loss, count = self._weighted_sum(micro_batch)
        self._sums[0] += loss.detach()
        self._sums[1] += count
        # Data-parallel strategies average over devices. The nominal count keeps half-precision gradients in range.
        return loss * (self.trainer.world_size / batch.size)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Run the micro-batches, divide once, and step."""
        assert optimizer_closure is not None
        loss = self.gradient(optimizer, optimizer_closure)
        optimizer.step(closure=lambda: loss)

    def gradient(self, optimizer: Any, backward: Callable[[], Any]) -> Tensor:
        """Leave the exact gradient of the global batch in the parameters; return the exact loss.

        Args:
            optimizer: its gradients are zeroed first.
            backward: runs `training_step` and the backward pass of the micro-batch that is due.
        """
        share = self.share
        assert share is not None
        optimizer.zero_grad()
        self._sums = torch.zeros_like(self.window)
        loss = self._run_micro_batches(share, backward)
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        count = sums[1] + (sums[1] == 0)  # where no target counts, loss and gradient are zero
        scale_gradients(self.parameters(), share.size / count)
        self.window += sums
        self.epoch_sums += sums
        return loss.copy_(sums[0] / count)  # Lightning hands this very tensor to `on_train_batch_end`

    def _run_micro_batches(self, share: Share, backward: Callable[[], Any]) -> Tensor:
        key = mix(self.data.seed or 0, DRAWS, share.step)
        try:
            for number, micro_batch in enumerate(share.micro_batches):
                self._micro_batch = number
                # What `Dropout` draws depends on the step and the example; what other layers draw, also on where its
                # micro-batch begins.
                Dropout.place = (key, micro_batch.position)
                seed_generator(self.device, mix(key, micro_batch.position))
                # Gradients cross devices once per step, overlapped with the last backward pass.
                last = number == len(share.micro_batches) - 1
                with nullcontext() if last else self._no_sync():
                    loss: Tensor = backward()
        finally:
            Dropout.place = None
        return loss

    def _no_sync(self) -> Any:
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if block is None else block()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: gradients are zeroed once per global batch, in `gradient`, and not per micro-batch."""

    def _weighted_sum(self, batch: Batch) -> tuple[Tensor, Tensor]:
        losses = self.losses(batch)
        losses, weights = losses if isinstance(losses, tuple) else (losses, None)
        if losses.ndim == 0 or len(losses) != len(batch):
            raise ValueError(
                f"{type(self).__name__}.losses gave the shape {list(losses.shape)} for {len(batch)} examples: return "
                "one loss per target (reduction='none'), with the examples in the first dimension"
            )
        return weighted_sum(losses, batch.weights, weights)

    def on_train_epoch_end(self) -> None:
        """Give the exact mean loss of the epoch."""
        self.record({"train/loss_epoch": self.epoch_sums[0] / self.epoch_sums[1]})
        self.epoch_sums = torch.zeros_like(self.epoch_sums)

    # Evaluation: every example once, over all devices

    def _start_evaluation(self) -> None:
        self._sums = torch.zeros(2, dtype=self.window.dtype, device=self.device)
        if self.metrics is not None:
            self.metrics.to(self.device).reset()

    def _evaluate(self, batch: Batch) -> None:
        loss, count = self._weighted_sum(self.data.to_device(batch, self.device, training=False))
        self._sums[0] += loss
        self._sums[1] += count

    def _end_evaluation(self, stage: str) -> None:
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        values = {f"{stage}/loss": sums[0] / sums[1]}
        if self.metrics is not None:
            values |= {f"{stage}/{name}": value for name, value in self.metrics.compute().items()}
        self.record(values)

    def on_validation_epoch_start(self) -> None:
        """Zero the sums."""
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Give the exact loss and the metrics."""
        self._end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Zero the sums."""
        self._start_evaluation()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Give the exact loss and the metrics."""
        self._end_evaluation("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the predictions of one batch with the numbers of its examples."""
        on_device = self.data.to_device(batch, self.device, training=False)
        return {"index": batch.index, "predictions": self.predictions(on_device)}

    def record(self, values: dict[str, Tensor]) -> None:
        """Give values to the callbacks (as `monitor` keys) and to the loggers, at the number of steps done."""
        values = {name: value.detach().float() for name, value in values.items()}
        self.log_dict(values, logger=False)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            numbers = {name: value.item() for name, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, step=self.trainer.global_step)

    # Optimizer and checkpoint

    def parameter_groups(self) -> list[Any]:
        """Return the parameters for the optimizer."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not self.decay_matrices_only:
            return parameters
        vectors = [parameter for parameter in parameters if parameter.ndim < 2]
        matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def _new_optimizer(self) -> Optimizer:
        optimizer = self.make_optimizer(self.parameter_groups())
        if isinstance(optimizer, LBFGS):
            raise ValueError("model.optimizer LBFGS evaluates the loss several times per step: write another optimizer")
        return optimizer

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with the schedule stepped once per optimizer step."""
        optimizer = self._new_optimizer()
        plan, total = self.data.plan, self._examples_in_all(self.data)
        assert plan is not None

        def factor(step: int) -> float:
            return self.schedule.factor(plan.examples_at(step), plan.examples_at(step + 1), total)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _examples_in_all(self, data: DataModule) -> float:
        steps = data.total_steps()
        if steps == math.inf and self.schedule.needs_end:
            raise ValueError(
                f"model.schedule {self.schedule.shape} needs to know how long training is: "
                "write trainer.max_epochs or trainer.max_steps"
            )
        assert data.plan is not None
        return steps if steps == math.inf else data.plan.examples_at(int(steps))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the sums of the epoch, so that its mean loss is exact after a resume."""
        checkpoint["epoch_sums"] = self.epoch_sums.tolist()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums of the epoch."""
        self.epoch_sums = torch.tensor(checkpoint["epoch_sums"], dtype=self.epoch_sums.dtype)


def seed_generator(device: torch.device, seed: int) -> None:
    """Seed the generator that random layers on `device` draw from (`torch.manual_seed` visits all accelerators)."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)
