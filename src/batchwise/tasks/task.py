"""The base of all tasks: a subclass gives one loss per target; the exact batch gradient is inherited."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torchmetrics import MetricCollection

from batchwise.batching.loader import Batch, MicroBatch
from batchwise.data.examples import SPLITS
from batchwise.data.module import DataModule
from batchwise.models import place
from batchwise.models.compiled import compile_network
from batchwise.models.flops import count_flops
from batchwise.models.frozen import Frozen, check_patterns
from batchwise.models.norm import has_batchnorm
from batchwise.models.shard import shard
from batchwise.models.weights import take_weights
from batchwise.optim.groups import parameter_groups
from batchwise.optim.scaling import RULES, scale
from batchwise.optim.schedule import Schedule
from batchwise.tasks.step import ExactStep, Losses, Sums, row_is_due


class Task(ExactStep):
    """Owns network, loss, optimizer and metrics. A subclass gives one loss per target, in `losses`.

    Args:
        network: any module that takes `batch.inputs`.
        optimizer: any class from `torch.optim`, or another that is called in the same way.
        schedule: the learning rate over the training.
        reference_batch_size: the batch size at which the optimizer's rate is quoted; null: it is used as it stands.
        scaling: how the rate follows the batch from there: linear, sqrt or none; null: by the class of the optimizer.
        decay_matrices_only: leave biases and norms (parameters with fewer than two dimensions) out of weight decay.
        init_from: begin with the weights of this file, where they fit by name and shape: see `take_weights`.
        freeze: patterns of modules or parameters of the network that do not learn, such as `layers.1` or `*.bias`; a
            frozen batch norm uses and keeps its running statistics.
        thaw_after_examples: they learn after so many examples; null: never, and then they cost no gradient.
        lr_factors: factors on the learning rate by such patterns; of several that match, the first counts.
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
        init_from: str | None = None,
        freeze: list[str] | None = None,
        thaw_after_examples: int | None = None,
        lr_factors: dict[str, float] | None = None,
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
        self._follows: int | None = None
        """The batch size that the rates are for."""
        self.init_from: str | None = init_from
        """None as soon as the weights are there, or where they come from a checkpoint."""
        self.lr_factors = lr_factors or {}
        check_patterns("model.lr_factors", self.lr_factors, network)
        if not all(factor > 0 for factor in self.lr_factors.values()):
            raise ValueError(f"model.lr_factors is {lr_factors}: write factors above 0 (model.freeze keeps weights)")
        if thaw_after_examples is not None and (not freeze or thaw_after_examples < 1):
            raise ValueError(
                f"model.thaw_after_examples is {thaw_after_examples}: write a number of examples, and model.freeze"
            )
        self.frozen, self.thaw_after = Frozen(network, freeze or []), thaw_after_examples
        if thaw_after_examples is None:
            for parameter in self.frozen.parameters:
                parameter.requires_grad_(False)
        self._set_frozen(True)
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
    def losses(self, batch: MicroBatch) -> Losses:
        """Return one loss per target, [N] or [N, T], never averaged; or (losses, weights) shaped alike.

        Call `measure` with what the metrics take.
        """

    def make_metrics(self, outputs: Tensor) -> MetricCollection | None:
        """Return the evaluation metrics, given the network's outputs for a few examples."""
        return None

    def predictions(self, batch: MicroBatch) -> dict[str, Tensor]:
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

    # What is frozen

    def _set_frozen(self, frozen: bool) -> None:
        self.is_frozen = frozen
        # What is to be thawed is among the parameters of optimizer and strategy all along; its gradient is dropped.
        self.held = self.frozen.parameters if frozen and self.thaw_after is not None else []
        for name in self.frozen.norms:
            self.network.get_submodule(name).train(not frozen)

    def frozen_norms(self) -> list[nn.Module]:
        """Return the batch norms that keep their statistics now."""
        return [self.network.get_submodule(name) for name in self.frozen.norms] if self.is_frozen else []

    def train(self, mode: bool = True) -> "Task":
        """Set training mode, but not for frozen batch norms."""
        super().train(mode)
        for layer in self.frozen_norms():
            layer.eval()
        return self

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
        data.check(self.network)
        precision = data.trainer.precision_plugin if data.trainer is not None else Precision()
        precision.convert_module(self)
        if data.plan is not None and self.init_from is not None:
            report, self.init_from = take_weights(self.network, self.init_from), None
            if data.trainer is None or data.trainer.is_global_zero:
                print(report, flush=True)
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
            with precision.forward_context():
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
        if data.augment:
            data.to_device(first, self.device, training=True)
        if plan.unit % self.unit:
            raise ValueError(f"the plan keeps {plan.unit} examples together, but the network needs {self.unit}")
        if not has_batchnorm(self.network, self.frozen_norms() if self.thaw_after is None else ()):
            return
        synchronised = plan.devices > 1 and getattr(data.trainer.strategy, "_layer_sync", None) is not None  # type: ignore[union-attr]
        if synchronised and data.trainer.strategy.root_device.type == "cpu":  # type: ignore[union-attr]
            raise ValueError(
                "trainer.sync_batchnorm is true, but PyTorch synchronises batch norm on GPUs alone: leave it out, and "
                "write model.ghost_batch_size"
            )
        if plan.accumulation * (1 if synchronised else plan.devices) > 1:
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

    # Figures

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Thaw what is to be thawed; measure the step, if a row in the log is due after it."""
        super().on_train_batch_start(batch, batch_idx)
        if self.thaw_after is not None:
            frozen = self.data.plan.examples_at(batch.step) < self.thaw_after  # type: ignore[union-attr]
            if frozen != self.is_frozen:
                self._set_frozen(frozen)
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

    def _evaluate(self, batch: MicroBatch) -> None:
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

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Give the exact loss and the metrics."""
        self._end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Zero the sums."""
        self._start_evaluation()

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one batch to the sums and metrics."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Give the exact loss and the metrics."""
        self._end_evaluation("test")

    def predict_step(self, batch: MicroBatch, batch_idx: int) -> dict[str, Any]:
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
        named = [(name.removeprefix("network."), parameter) for name, parameter in self.named_parameters()]
        return parameter_groups(named, self.lr_factors, self.decay_matrices_only)

    def _new_optimizer(self) -> Optimizer:
        optimizer = self.make_optimizer(self.parameter_groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.pop("lr_factor", 1.0)
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
        self._settings = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        if self.data.plan is not None:
            self._follow(optimizer, self.data.plan.batch_size)
        self.examples_in_all = self._examples_in_all(self.data)
        return optimizer

    def _follow(self, optimizer: Optimizer, batch_size: int) -> None:
        """Let the rate of each group follow the batch size; what it becomes is a function of the size alone."""
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update({key: settings[key] for key in ("lr", "weight_decay") if key in settings})
        before, reference = optimizer.param_groups[0]["lr"], self.reference_batch_size
        if reference not in (None, batch_size):
            rule = scale(optimizer, batch_size, reference, self.scaling)
            if batch_size != self._follows and self.trainer.is_global_zero:
                after = optimizer.param_groups[0]["lr"]
                print(
                    f"learning rate {before:.4g} at {reference} examples per step is {after:.4g} at {batch_size} "
                    f"(model.scaling {rule})",
                    flush=True,
                )
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self._follows = batch_size

    def on_train_start(self) -> None:
        """Bring what a checkpoint put into the optimizer in line with this run.

        The settings are those of the configuration (with --force they may be new); and the state has the memory format
        of the parameters, which fused kernels take for granted.
        """
        super().on_train_start()
        plan = self.data.plan
        assert plan is not None
        for optimizer in self.trainer.optimizers:
            for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
                group.update(settings)
            self._follow(optimizer, plan.size_at(self.trainer.global_step))
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
        """Set the learning rate of the step that is due, which follows the size of its batch."""
        plan, step = self.data.plan, self.trainer.global_step
        assert plan is not None
        if plan.changes and plan.size_at(step) != self._follows:
            if self.trainer.is_global_zero:
                print(f"step {step:,}: batch_size {plan.size_at(step)} from here", flush=True)
            self._follow(optimizer, plan.size_at(step))
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
        return data.total_examples()


def _has_fused(parameter: nn.Parameter) -> bool:
    # On a CPU, fused SGD leaves most of a half-precision parameter as it was (torch 2.13), without a word.
    kinds = ("cpu", "cuda") if parameter.dtype.itemsize >= 4 else ("cuda",)
    return parameter.device.type in kinds and parameter.is_floating_point()
