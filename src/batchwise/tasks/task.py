"""The base of all tasks: a subclass gives one loss per target; the exact batch gradient is inherited."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MetricCollection

from batchwise.batching.gradients import Number, weighted_sum
from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import on_tensors
from batchwise.data.module import DataModule
from batchwise.models.compiled import compile_network
from batchwise.models.norm import convert_batchnorm
from batchwise.models.shard import shard
from batchwise.optim.schedule import Schedule
from batchwise.tasks.finetuning import FineTuning
from batchwise.tasks.making import finish
from batchwise.tasks.measures import Measures
from batchwise.tasks.rates import Rates
from batchwise.tasks.step import Step
from batchwise.tasks.trying import try_task

Losses = Tensor | tuple[Tensor, Tensor]
"""One loss per target, or the losses and their weights."""

THE_ENGINES = {
    "training_step": "write losses",
    "validation_step": "write losses, and make_metrics",
    "test_step": "write losses, and make_metrics",
    "predict_step": "write predictions",
    "configure_model": "make the layers in __init__ of the network",
    "automatic_optimization": "for several optimizers, see batchwise.tasks.adversarial",
    "on_before_batch_transfer": "write transform in the data module",
    "on_after_batch_transfer": "write transform in the data module",
    "transfer_batch_to_device": "write transform in the data module",
}
"""What a subclass must not override, and what it does instead."""


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs


class Task(pl.LightningModule, ABC):
    """Owns network, loss, optimizer and metrics. A subclass gives one loss per target, in `losses`.

    All of Lightning's hooks are yours: the engine keeps its state in objects of its own (`_step`, `_measures`,
    `_rates`, `_tuning`), and none of its work is in a hook. What must not be overridden is refused when the class is
    made.

    Args:
        network: any module that takes `batch.inputs`.
        optimizer: any class from `torch.optim`, or another that is called in the same way.
        schedule: the learning rate over the training.
        decay_matrices_only: leave biases and norms (parameters with fewer than two dimensions) out of weight decay.
        reference_batch_size: the batch size at which the optimizer's rate is quoted; null: it is used as it stands.
        scaling: how the rate follows the batch from there: linear, sqrt or none; null: by the class of the optimizer.
        init_from: begin with the weights of this file, where they fit by name and shape: see `take_weights`.
        freeze: patterns of modules or parameters of the network that do not learn, such as `layers.1` or `*.bias`; a
            frozen batch norm uses and keeps its running statistics.
        lr_factors: factors on the learning rate by such patterns; of several that match, the first counts.
        ghost_batch_size: replace the network's batch norms by ghost batch norms over so many examples.
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; after so many in a row training
            stops. 0: do not look (on a GPU, looking waits for the device at each step).
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """The metric that decides which checkpoint is the best, and whether it should be "min" or "max"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, remedy in THE_ENGINES.items():
            if name in vars(cls) and not cls.__module__.startswith("batchwise."):
                raise TypeError(f"{cls.__name__}.{name} would take the place of the exact step: {remedy}")

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        decay_matrices_only: bool = False,
        reference_batch_size: int | None = None,
        scaling: str | None = None,
        init_from: str | None = None,
        freeze: list[str] | None = None,
        lr_factors: dict[str, float] | None = None,
        ghost_batch_size: int | None = None,
        max_skipped_steps: int = 10,
    ) -> None:
        super().__init__()
        if ghost_batch_size is not None and not convert_batchnorm(network, ghost_batch_size):
            raise ValueError(
                f"model.ghost_batch_size is {ghost_batch_size}, but the network has no batch norm: leave it out"
            )
        self.network = network
        self._make_optimizer, self._decay_matrices_only = optimizer, decay_matrices_only
        self._tuning = FineTuning(network, init_from, freeze or [], lr_factors or {})
        self._rates = Rates(schedule, reference_batch_size, scaling)
        self._step = Step(network, max_skipped_steps)
        self._measures = Measures()
        self._channels_last = False
        self._tuning.hold_norms(network)

    # What a subclass writes

    @abstractmethod
    def losses(self, batch: MicroBatch) -> Losses:
        """Return one loss per target, [N] or [N, T], never averaged; or (losses, weights) shaped alike.

        Call `measure` with the arguments of the metrics.
        """

    def make_metrics(self, outputs: Tensor) -> MetricCollection | None:
        """Return the evaluation metrics, given the network's outputs for a few examples.

        A confusion matrix among them is not logged as a number, but drawn.
        """
        return None

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return what `predict` writes for each example: columns [N] or [N, ...] by name."""
        return {"output": self(batch.inputs)}

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Raise ValueError where the data does not suit the task, given the network's outputs for a few examples."""

    # What it may use

    @property
    def data(self) -> DataModule:
        """The data module that owns the batching."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise TypeError("a Task trains from a batchwise.DataModule: pass datamodule= to the trainer")
        return data

    def forward(self, inputs: Any) -> Any:
        """Apply the network to the inputs: a tuple is passed as several arguments, a dict as keyword arguments.

        Of an object with `logits`, such as the outputs of Hugging Face's models, the logits are returned.
        """
        if self._channels_last:
            inputs = on_tensors(inputs, _channels_last)
        if isinstance(inputs, Tensor):
            outputs = self.network(inputs)
        elif isinstance(inputs, dict):
            outputs = self.network(**inputs)
        else:
            outputs = self.network(*inputs) if isinstance(inputs, tuple) else self.network(inputs)
        return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)

    def measure(self, *values: Tensor) -> None:
        """Update the metrics: of the running evaluation, or in training of the step, where a row in the log is due."""
        self._measures.update(self.training, values)

    def metric_names(self) -> list[str]:
        """Return the names that a checkpoint or early stopping may monitor; add what a subclass gives to `record`."""
        return ["val/loss", *(f"val/{name}" for name in self._measures.names()), "train/loss_epoch"]

    def record(self, values: dict[str, Tensor]) -> None:
        """Give values to the callbacks (as `monitor` keys) and to the loggers, at the number of steps done."""
        self.log_dict({name: value.detach().float() for name, value in values.items()}, logger=False, batch_size=1)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            numbers = {name: value.item() for name, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, step=self.trainer.global_step)

    def train(self, mode: bool = True) -> "Task":
        """Set training mode, but not for frozen batch norms."""
        super().train(mode)
        self._tuning.hold_norms(self.network)
        return self

    # What the engine calls

    def prepare(self, data: DataModule, split: str) -> None:
        """Try the network on the first examples of a split and make the metrics, before anything is trained.

        Raises:
            ValueError: the network cannot take the data, or the data does not suit the task.
        """
        try_task(self, data, split)

    def configure_model(self) -> None:
        """Lay the network out, shard it, and compile it, as the trainer says."""
        self._lay_out(getattr(self.trainer, "channels_last", False))
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh)
        if getattr(self.trainer, "compile", False):
            compile_network(self.network, self.trainer.strategy.root_device)

    def _lay_out(self, channels_last: bool) -> None:
        """Lay images and the weights of convolutions out with the channels last, or not. Changes speed alone."""
        self._channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, whose rate the engine sets before each step.

        Override it as Lightning documents it to give an optimizer or a scheduler of your own: then they decide.
        """
        optimizer = self._new_optimizer()
        self._rates.own(self, optimizer)
        return optimizer

    def _new_optimizer(self) -> Optimizer:
        return finish(self._make_optimizer(self._tuning.groups(self, self._decay_matrices_only)))

    def _turns(self) -> list[tuple[str | None, Optimizer]]:
        """Return who steps on a batch, one after the other, and with which optimizer."""
        return [(None, self.trainer.optimizers[0])]

    def _summed_loss(self, batch: MicroBatch, *player: str) -> tuple[Tensor, Number]:
        """Return the loss sum and the count of a micro-batch on the device."""
        losses = self.losses(batch, *player)
        losses, weights = losses if isinstance(losses, tuple) else (losses, None)
        if losses.ndim == 0 or len(losses) != len(batch):
            raise ValueError(
                f"{type(self).__name__}.losses gave the shape {list(losses.shape)} for {len(batch)} examples: return "
                "one loss per target (reduction='none'), with the examples in the first dimension"
            )
        return weighted_sum(losses, batch.weights, weights)

    def training_step(self, batch: MicroBatch, batch_idx: int, *player: str) -> tuple[Tensor, Number]:  # type: ignore[override]
        """Return the loss sum and the count of one micro-batch, which is still on the host."""
        if not isinstance(batch, MicroBatch):
            raise TypeError(f"a Task trains with batchwise.Trainer, not with {type(self.trainer).__module__}.Trainer")
        return self._summed_loss(self.data.to_device(batch, self.device, training=True), *player)

    def _evaluate(self, batch: MicroBatch) -> None:
        measures = self._measures
        loss, count = self._summed_loss(self.data.to_device(batch, self.device, training=False))
        measures.evaluation = measures.evaluation.plus(loss, count)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def predict_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        """Return the predictions of one batch with the numbers of its examples."""
        on_device = self.data.to_device(batch, self.device, training=False)
        return {"index": batch.index, "predictions": self.predictions(on_device)}
