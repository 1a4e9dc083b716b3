"""The base class of all tasks. A subclass gives one loss per target, and inherits the exact gradient of the batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, final

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MetricCollection

from batchwise.arguments import typed
from batchwise.batching.gradients import Number, weighted_sum
from batchwise.batching.loader import Batch, MicroBatch
from batchwise.data.module import DataModule
from batchwise.models import place
from batchwise.models.call import call, lay_out
from batchwise.models.compiled import compile_network, do_not_compile
from batchwise.models.dropout import convert_dropout
from batchwise.models.frozen import fill_in
from batchwise.models.norm import convert_batchnorm
from batchwise.models.shard import shard
from batchwise.optim.scaling import Scaling
from batchwise.optim.schedule import Schedule
from batchwise.tasks.finetuning import FineTuning
from batchwise.tasks.logs import as_lightning_takes_it
from batchwise.tasks.losses import Losses, checked, checked_columns, losses_of
from batchwise.tasks.making import made
from batchwise.tasks.measures import Measures
from batchwise.tasks.names import check_attribute, check_class
from batchwise.tasks.rates import Rates
from batchwise.tasks.step import Step
from batchwise.tasks.terms import Terms
from batchwise.tasks.trying import try_task


class Task(pl.LightningModule, ABC):
    """Owns network, loss, optimizer and metrics. A subclass gives one loss per target, in `losses`.

    You may override all of Lightning's hooks, with or without `super()`: the engine keeps its state in objects of its
    own. A name of yours that would take the place of one of the engine's is refused.

    Args:
        network: any module that takes `batch.inputs`.
        optimizer: a class from `torch.optim`, or another callable with the same arguments.
        schedule: the learning rate over the training.
        decay_matrices_only: no weight decay for biases and norms (parameters with fewer than two dimensions).
        reference_batch_size: the batch size that the optimizer's settings are for; null: they do not follow the batch.
        scaling: how the rate follows the batch: linear, sqrt or none; null: by the class of the optimizer.
        scaling_limit: the batch size beyond which the rate stays, such as the noise scale; null: no such size.
        scaling_keeps: which of weight_decay, beta2, eps and momentum do not follow the batch; null: momentum.
        init_from: file of initial weights, which are used if name and shape fit: see `take_weights`.
        freeze: patterns of modules or parameters that do not learn, such as `layers.1` or `*.bias`; batch norms, too.
        lr_factors: factors on the learning rate, by such patterns. If several match, the first counts.
        save_frozen: false: checkpoints leave out the parameters that never learn. They are checked when one is loaded:
            the network must have the same ones, from where it is made or from `init_from`.
        exact_dropout: replace PyTorch's dropout layers by layers that draw the same numbers in any micro-batches.
        ghost_batch_size: replace the network's batch norms by ghost batch norms over this many examples.
        max_skipped_steps: a step is skipped if its loss or gradient is not finite. After this many skipped steps in a
            row, training stops. 0: no check (on a GPU, it waits for the device, except for fused optimizers).
        coefficients: factors on the terms of the loss, by name, where `losses` gives several; 1 for the others.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """The metric that decides which checkpoint is the best, and its direction: "min" or "max"."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_class(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check_attribute(self, name, value)
        super().__setattr__(name, value)

    @typed
    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        decay_matrices_only: bool = False,
        reference_batch_size: int | None = None,
        scaling: str | None = None,
        scaling_limit: int | None = None,
        scaling_keeps: list[str] | None = None,
        init_from: str | None = None,
        freeze: list[str] | None = None,
        lr_factors: dict[str, float] | None = None,
        save_frozen: bool = True,
        exact_dropout: bool = False,
        ghost_batch_size: int | None = None,
        max_skipped_steps: int = 10,
        coefficients: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if ghost_batch_size is not None and not convert_batchnorm(network, ghost_batch_size):
            raise ValueError(
                f"model.ghost_batch_size is {ghost_batch_size}, but the network has no batch norm: leave it out"
            )
        if exact_dropout and not convert_dropout(network):
            raise ValueError("model.exact_dropout is true, but the network has no dropout layer: leave it out")
        self.network = network
        self._make_optimizer, self._decay_matrices_only = optimizer, decay_matrices_only
        self._tuning = FineTuning(network, init_from, freeze or [], lr_factors or {}, save_frozen)
        self._rates = Rates(schedule, Scaling(reference_batch_size, scaling, scaling_limit, scaling_keeps))
        self._step = Step(self, max_skipped_steps)
        self._measures = Measures(Terms(coefficients or {}, type(self).counts is not Task.counts))
        self._channels_last = False
        self._own_data: DataModule | None = None  # where there is no trainer: in a trial, and in a task that is loaded
        self._tuning.hold_norms(network)

    # What a subclass writes

    @abstractmethod
    def losses(self, batch: MicroBatch) -> Losses:
        """Return one loss per target, [N] or [N, T], never averaged; or (losses, weights) of the same shape.

        Or return several such terms by name. Each is divided by its own count over the global batch (its number of
        targets, or the sum of its weights), times its coefficient, and is logged by name. Return the same names each
        time. Call `measure` with the arguments of the metrics.
        """

    def counts(self, batch: MicroBatch) -> dict[str, float | Tensor] | None:
        """Return the number of targets of each example, or its sum of weights, by term: [N], [N, T] or one for all.

        Without it, a batch of several micro-batches goes through `losses` twice, if a term has weights or `[N, T]`.
        """

    def make_metrics(self, outputs: Tensor) -> MetricCollection | None:
        """Return the evaluation metrics, given the network's outputs for a few examples.

        Each that gives one number is logged. A confusion matrix is drawn as a picture.
        """
        return None

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the columns that `predict` writes, [N] or [N, ...], by name."""
        return {"output": self(batch.inputs)}

    def check(self, data: DataModule, outputs: Tensor) -> None:
        """Raise ValueError if the data does not fit the task, given the network's outputs for a few examples."""

    # What it may use

    @property
    @final
    def data(self) -> DataModule:
        """The data module, which owns the batch."""
        data = self._own_data or getattr(self._trainer, "datamodule", None)
        if not isinstance(data, DataModule):
            raise TypeError("a Task trains from a batchwise.DataModule: pass datamodule= to the trainer")
        return data

    def forward(self, inputs: Any) -> Any:
        """Apply the network: a tuple of inputs is passed as several arguments, a dict as keyword arguments."""
        return call(self.network, inputs, self._channels_last)

    @final
    def measure(self, *values: Tensor) -> None:
        """Update the metrics of the running evaluation, or in training those of the step if a row in the log is due."""
        self._measures.update(self.training, values)

    def metric_names(self) -> list[str]:
        """Return the names that callbacks may monitor. A subclass adds the names that it gives to `record`."""
        measured = [f"val/{name}" for name in self._measures.names()]
        of_epochs = [f"train/{name}_epoch" for name in ("loss", *(self._measures.terms.names or ()))]
        return ["val/loss", *measured, *of_epochs, *sorted(self._measures.logged)]

    def record(self, values: dict[str, Tensor]) -> None:
        """Give values to the callbacks (as `monitor` keys) and to the loggers, with the number of steps done."""
        self.log_dict(values, rank_zero_only=True)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Log a value, in `losses` or in any hook of Lightning's that may log.

        The value of a step, of an epoch or of an evaluation is exact over all micro-batches and devices. Loggers get it
        with the number of optimizer steps done, and callbacks may monitor it.

        Args:
            name: its name everywhere; `name_step` and `name_epoch` where it is logged in both ways.
            value: a number or scalar tensor, the mean over the examples of the micro-batch (in hooks: of the batch);
                or one value per example [N, ...], or of some of them, each of which counts once; or a torchmetrics
                metric, of which the epoch's value is logged.
            **kwargs: those of Lightning's `log`. `batch_size` and `sync_dist` are not needed. In an evaluation there
                are no steps, so `on_step` is left out there.

        Raises:
            ValueError: a name is logged with different arguments, or a metric object for each step.
        """
        if self._own_data is not None:
            self._measures.logged.add(name)
            return
        super().log(name, **as_lightning_takes_it(value, kwargs))

    def train(self, mode: bool = True) -> "Task":
        """Set training mode; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        self._step.captured.stale = True
        self._tuning.hold_norms(self.network)
        return self

    # What the engine calls

    @final
    def prepare(self, data: DataModule, split: str) -> None:
        """Try the network on the first examples of a split and make the metrics, before anything is trained.

        Raises:
            ValueError: the network cannot take the data, or the data does not fit the task.
        """
        try_task(self, data, split)

    def configure_model(self) -> None:
        """Set the memory format of the network, shard it and compile it, as the trainer says."""
        trainer: Any = self._trainer  # None in `load_from_checkpoint`
        self._channels_last = getattr(trainer, "channels_last", False)
        lay_out(self.network, self._channels_last)
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh)
        if getattr(trainer, "compile", False):
            compile_network(self.network, trainer.strategy.root_device)
        else:
            do_not_compile(self.network)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load. Buffers with statistics of the data, such as a mean, take the shape that was saved."""
        self._tuning.loaded(name.removeprefix(prefix) for name in state_dict)
        fill_in(self, state_dict, prefix)
        for name in self._buffers:
            saved = state_dict.get(prefix + name)
            if saved is not None:
                self._buffers[name] = torch.empty_like(saved, device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def configure_optimizers(self) -> Any:
        """Return the optimizer. The engine sets its rate before each step.

        Override it, as Lightning documents it, for an optimizer or a scheduler of your own. Then they set the rate.
        """
        optimizer = self._new_optimizer()
        self._rates.own(self, optimizer)
        return optimizer

    def _new_optimizer(self) -> Optimizer:
        return made(self._make_optimizer, self._tuning.groups(self.named_parameters(), self._decay_matrices_only))

    _couples: ClassVar[bool] = False
    """Whether a loss depends on other examples of the batch, on purpose and exactly."""

    def _turns(self) -> list[tuple[str | None, Optimizer]]:
        """Return the players that step on a batch, in order, with their optimizers."""
        return [(None, self.trainer.optimizers[0])]

    def _outputs(self, batch: MicroBatch) -> Any:
        """Return the network's outputs, by which the task is tried before training."""
        return self(batch.inputs)

    def _look_ahead(self, batch: Batch, key: int) -> None:
        """Do what needs the whole batch before its first backward pass; `key` is that of its random numbers."""
        if self._measures.terms.names != []:
            self._measures.terms.look_ahead(self, batch, key)

    def _conclude_evaluation(self) -> None:
        """Add what only the end of an evaluation completes. All devices come here."""

    def _summed_loss(self, batch: MicroBatch, *player: str) -> tuple[Tensor, Number]:
        """Return the sum of losses and the count of a micro-batch that is on the device."""
        given = losses_of(self, batch, player)
        if isinstance(given, dict) or self._measures.terms.names:
            return self._measures.terms.summed(self, batch, given)
        losses, weights = checked(given, len(batch), f"{type(self).__name__}.losses")
        return weighted_sum(losses, batch.weights, weights)

    def _players(self) -> list[tuple[str, ...]]:
        """Return the further arguments of `losses` in training, for each optimizer."""
        return [()]

    def training_step(self, batch: MicroBatch, batch_idx: int, *player: str) -> tuple[Tensor, Number]:  # type: ignore[override]
        """Return the sum of losses and the count of one micro-batch that is still on the host."""
        return self._summed_loss(self.data.to_device(batch, self.device, training=True), *player)

    def _evaluate(self, batch: MicroBatch) -> None:
        loss, count = self._summed_loss(self.data.to_device(batch, self.device, training=False))
        self._measures.evaluation = self._measures.evaluation.plus(loss, count)

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        with place.evaluating(batch.index):
            self._evaluate(batch)

    test_step = validation_step

    def predict_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
        """Return the predictions of one batch with the numbers of its examples."""
        on_device = self.data.to_device(batch, self.device, training=False)
        with place.evaluating(batch.index):
            columns = checked_columns(self.predictions(on_device), len(batch), f"{type(self).__name__}.predictions")
        return {"index": batch.index, "predictions": columns}
