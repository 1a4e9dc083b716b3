"""The base of all tasks: a subclass gives one loss per target; the exact batch gradient is inherited."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torchmetrics import MetricCollection

from project.batching.loader import Batch, Share
from project.callbacks.record import Record, row_is_due
from project.data.module import SPLITS, DataModule
from project.models import place
from project.models.compiled import compile_network
from project.models.flops import count_flops
from project.models.norm import has_batchnorm
from project.models.shard import shard
from project.optim.scaling import RULES, scale
from project.optim.schedule import Schedule
from project.tasks.step import ExactStep, Losses, Sums


class Task(ExactStep):
    """Owns network, loss, optimizer and metrics. A subclass gives one loss per target, in `losses`.

    Args:
        network: any module that takes `batch.inputs`.
        optimizer: any class from `torch.optim`, or another that is called in the same way.
        schedule: the learning rate over the training.
        reference_batch_size: the batch size at which the optimizer's rate is quoted; null: it is used as it stands.
        scaling: how the rate follows the batch from there: linear, sqrt or none; null: by the class of the optimizer.
        decay_matrices_only: leave biases and norms (parameters with fewer than two dimensions) out of weight decay.
        **kwargs: those of `ExactStep`.
    """

    monitor: ClassVar[tuple[str, str]] = ("val/loss", "min")
    """The metric that decides which checkpoint is the best, and whether it should be "min" or "max"."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[Iterable], Optimizer] = AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
        decay_matrices_only: bool = False,
        reference_batch_size: int | None = None,
        scaling: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        if reference_batch_size is not None and reference_batch_size < 1:
            raise ValueError(f"model.reference_batch_size is {reference_batch_size}: write a number of examples")
        if scaling not in (None, *RULES):
            raise ValueError(f"model.scaling is {scaling}: write {', '.join(RULES)}, or null")
        if scaling is not None and reference_batch_size is None:
            raise ValueError(f"model.scaling is {scaling}, but model.reference_batch_size is not set: write it too")
        self.reference_batch_size, self.scaling = reference_batch_size, scaling
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.decay_matrices_only = decay_matrices_only
        self.channels_last = False
        self.metrics: MetricCollection | None = None
        self.step_metrics: MetricCollection | None = None
        """The same metrics, of one training batch."""
        self.row_is_due = False
        self.shown: dict[str, float] = {}
        """What the progress bar shows. Lightning's `self.log` would cost a millisecond, and more at each later step."""
        self.flops_per_example: float | None = None
        """Of the forward pass; None: not known."""

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

    def forward(self, inputs: Any) -> Tensor:
        """Apply the network to the inputs; a tuple of inputs is passed as several arguments."""
        if self.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return self.network(*inputs) if isinstance(inputs, tuple) else self.network(inputs)

    def lay_out(self, channels_last: bool) -> None:
        """Lay images and the weights of convolutions out with the channels last, or not. Changes speed alone."""
        self.channels_last = channels_last
        layout = torch.channels_last if channels_last else torch.contiguous_format
        for parameter in self.network.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=layout)

    def configure_model(self) -> None:
        """Lay the network out, shard it, and compile it, as the trainer says."""
        self.lay_out(getattr(self.trainer, "channels_last", False))
        if self.device_mesh is not None:
            shard(self.network, self.device_mesh)
        if getattr(self.trainer, "compile", False):
            compile_network(self.network, self.trainer.strategy.root_device)

    def measure(self, *values: Tensor) -> None:
        """Update the metrics: of the running evaluation, or in training of the step, where a row in the log is due."""
        stands_in = place.current is not None and not place.current.counts
        metrics = self.metrics if not self.training else self.step_metrics if self.row_is_due else None
        if metrics is not None and not stands_in:
            metrics.update(*values)

    def prepare(self, data: DataModule, split: str) -> None:
        """Try the network on the first examples of a split and make the metrics, before anything is trained.

        Raises:
            ValueError: the network cannot take the data, or the data does not suit the task.
        """
        precision = data.trainer.precision_plugin if data.trainer is not None else Precision()
        precision.convert_module(self)
        with precision.forward_context():
            batch = data.to_device(data.examples(split, 2), self.device, training=False)
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), precision.forward_context():
                outputs, flops = count_flops(lambda: self(batch.inputs))
        except RuntimeError as error:
            shape = list(batch.inputs.shape[1:]) if isinstance(batch.inputs, Tensor) else type(batch.inputs).__name__
            raise ValueError(
                f"model.network {type(self.network).__name__} cannot take the data, whose inputs are {shape} per "
                f"example: {str(error).splitlines()[0]}"
            ) from error
        finally:
            self.train(training)
        self.flops_per_example = flops and flops / len(batch)
        self.check(data, outputs)
        if data.plan is not None:
            self._check_training(data)
        if self.metrics is None:
            metrics = self.make_metrics(outputs)
            self.metrics = None if metrics is None else metrics.to(self.device)
            self.step_metrics = None if metrics is None else metrics.clone()

    def _check_training(self, data: DataModule) -> None:
        self._new_optimizer()
        self._examples_in_all(data)
        first = data.examples("train", 32)
        if isinstance(first.inputs, Tensor) and len(first) > 1 and bool((first.inputs == first.inputs[:1]).all()):
            warnings.warn(f"the inputs of the first {len(first)} training examples are all the same", stacklevel=2)
        plan = data.plan
        assert plan is not None
        if plan.unit != self.unit:
            raise ValueError(f"the plan keeps {plan.unit} examples together, but the network needs {self.unit}")
        if has_batchnorm(self.network) and plan.accumulation * plan.devices > 1:
            warnings.warn(
                f"the network has batch norm: its statistics are over the {plan.largest_micro_batch} examples that run "
                f"at once and not over the batch of {plan.batch_size}, so the result depends on how the batch is "
                f"executed; write model.ghost_batch_size, such as {min(32, plan.largest_micro_batch)}",
                stacklevel=2,
            )

    def metric_names(self) -> list[str]:
        """Return the names that a checkpoint or early stopping may monitor; add what a subclass gives to `record`."""
        return ["val/loss", *(f"val/{name}" for name in self.metrics or ()), "train/loss_epoch"]

    def setup(self, stage: str) -> None:
        """Prepare for the stage, unless that was done before."""
        if self.metrics is None:
            self.prepare(self.data, SPLITS[stage][0])

    def configure_callbacks(self) -> list[Callback]:
        """Return the callback that writes training figures to the log."""
        return [Record()]

    # Figures

    def on_train_batch_start(self, batch: Share, batch_idx: int) -> None:
        """Measure the step, if a row in the log is due after it."""
        super().on_train_batch_start(batch, batch_idx)
        self.row_is_due = self.step_metrics is not None and row_is_due(self.trainer, batch.step + 1)

    def forget_pass(self) -> None:
        """Measure the step anew."""
        if self.row_is_due and self.step_metrics is not None:
            self.step_metrics.reset()

    def measured(self) -> dict[str, float]:
        """Return the metrics of the training batch that was measured, over all devices."""
        if self.step_metrics is None:
            return {}
        values = {f"train/{name}": value.item() for name, value in self.step_metrics.compute().items()}
        self.step_metrics.reset()
        return values

    def on_train_epoch_end(self) -> None:
        """Give the exact mean loss of the epoch."""
        self.record({"train/loss_epoch": torch.tensor(self.epoch_sums.mean(), dtype=torch.float64)})
        self.epoch_sums = Sums()

    # Evaluation: every example once, over all devices

    def _start_evaluation(self) -> None:
        self.sums = Sums()
        if self.metrics is not None:
            self.metrics.to(self.device).reset()

    def _evaluate(self, batch: Batch) -> None:
        loss, count = self.summed_loss(self.data.to_device(batch, self.device, training=False))
        self.sums = self.sums.plus(loss, count)

    def _end_evaluation(self, stage: str) -> None:
        mean = self.reduce_sums(self.sums).mean()
        values = {f"{stage}/loss": torch.tensor(mean, dtype=torch.float64)}
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
        self.log_dict({name: value.detach().float() for name, value in values.items()}, logger=False)
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            numbers = {name: value.item() for name, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(numbers, step=self.trainer.global_step)

    # Optimizer

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
        if isinstance(optimizer, SGD | Adam):
            for group in optimizer.param_groups:  # one kernel for all parameters, unless something else was asked for
                if group["fused"] is None and not group["foreach"] and not group["differentiable"]:
                    group["fused"] = all(_has_fused(parameter) for parameter in group["params"])
        return optimizer

    def configure_optimizers(self) -> Optimizer:
        """Return the optimizer. Its learning rate is set before each step, so that it depends on the step alone."""
        optimizer = self._new_optimizer()
        plan = self.data.plan
        if plan is not None and self.reference_batch_size not in (None, plan.batch_size):
            before = optimizer.param_groups[0]["lr"]
            rule = scale(optimizer, plan.batch_size, self.reference_batch_size, self.scaling)
            if self.trainer.is_global_zero:
                after = optimizer.param_groups[0]["lr"]
                print(
                    f"learning rate {before:.4g} at {self.reference_batch_size} examples per step is {after:.4g} at "
                    f"{plan.batch_size} (model.scaling {rule})",
                    flush=True,
                )
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self._settings = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        self.examples_in_all = self._examples_in_all(self.data)
        return optimizer

    def on_train_start(self) -> None:
        """Bring what a checkpoint put into the optimizer in line with this run.

        The settings are those of the configuration (with --force they may be new); and the state has the memory format
        of the parameters, which fused kernels take for granted.
        """
        super().on_train_start()
        for optimizer in self.trainer.optimizers:
            for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
                group.update(settings)
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also number the optimizer's parameters as the model has them, which a sharded strategy takes for granted.

        PyTorch numbers them as the optimizer's groups have them, and takes any numbers where it loads.
        """
        super().on_save_checkpoint(checkpoint)
        if self.device_mesh is not None:
            return  # it has
        numbers = {parameter: number for number, parameter in enumerate(self.parameters())}
        for optimizer, state in zip(self.trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            ours = [numbers[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            state["state"] = {ours[number]: values for number, values in state["state"].items()}
            for group in state["param_groups"]:
                group["params"] = [ours[number] for number in group["params"]]

    def before_step(self, optimizer: Any) -> None:
        """Set the learning rate of the step that is due."""
        plan, step = self.data.plan, self.trainer.global_step
        assert plan is not None
        factor = self.schedule.factor(plan.examples_at(step), plan.examples_at(step + 1), self.examples_in_all)
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def _examples_in_all(self, data: DataModule) -> float:
        steps = data.total_steps()
        if steps == math.inf and self.schedule.needs_end:
            raise ValueError(
                f"model.schedule {self.schedule.shape} needs to know how long training is: "
                "write trainer.max_epochs or trainer.max_steps"
            )
        assert data.plan is not None
        return steps if steps == math.inf else data.plan.examples_at(int(steps))


def _has_fused(parameter: nn.Parameter) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
