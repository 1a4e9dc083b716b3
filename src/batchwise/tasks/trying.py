"""A trial of a task on a few examples, before training."""

import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from batchwise.batching.device import has_float64
from batchwise.batching.loader import MicroBatch
from batchwise.batching.structure import shape
from batchwise.data.module import DataModule
from batchwise.models.compiled import do_not_compile
from batchwise.models.flops import count_flops
from batchwise.models.kept import home_of, kept_modes
from batchwise.models.norm import batchnorms, has_batchnorm
from batchwise.tasks.losses import about_kinds
from batchwise.tasks.metric_trial import try_metrics
from batchwise.tasks.rehearsal import as_it_was, on_device, rehearse

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def try_task(task: "Task", data: DataModule, split: str) -> None:
    """Load the initial weights, apply the network to two examples, check the data, make the metrics.

    Raises:
        ValueError: the network cannot take the data, the data does not fit the task, or a callback does not work.
    """
    data.check(task.network)
    do_not_compile(task.network)  # an earlier trainer may have; this one does so after the trial
    precision: Any = data.trainer.precision_plugin if data.trainer is not None else Precision()
    precision.convert_module(task)
    if data.plan is not None or not task._tuning.save_frozen:
        report = task._tuning.take(task.network)
        if report and (data.trainer is None or data.trainer.is_global_zero):
            print(report, flush=True)
    if data.trainer is not None and isinstance(data.trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        device = data.trainer.strategy.root_device
        _check_floats(task, device)
        task.to(device)  # where it will be trained, whole
    with precision.forward_context():
        batch = on_device(task, data, data.examples(split, 2), training=False)
    outputs, flops = count_flops(lambda: outputs_of(task, data, batch, precision))
    task._measures.flops_per_example = flops and flops / len(batch)
    task.check(data, outputs)
    if data.plan is not None:
        with precision.forward_context():
            _check_training(task, data)
            rehearse(task, data)
    task._measures.make(lambda: task.make_metrics(outputs), home_of(task))
    if split != "predict":  # which may have no targets
        with precision.forward_context():
            try_metrics(task, data, split if split != "train" or data.split("val") is None else "val")
    task._measures.tried = data.plan or True


def _check_floats(task: "Task", device: torch.device) -> None:
    """Raise ValueError if weights or buffers are wider than the device's floats."""
    held = chain(task.named_parameters(), task.named_buffers())
    wide = next((name for name, value in held if value.is_floating_point() and value.dtype.itemsize > 4), None)
    if wide is not None and not has_float64(device):
        raise ValueError(
            f"{wide} is float64, which accelerator {device.type} does not have: write trainer.accelerator cpu, or "
            "trainer.precision 32-true and weights in float32"
        )


def outputs_of(task: "Task", data: DataModule, batch: MicroBatch, precision: Any) -> Any:
    """Return the outputs for a batch that is on the device, without a graph and in evaluation mode.

    Raises:
        ValueError: the network cannot take the data.
    """
    task._own_data = data
    try:
        with kept_modes(task), torch.no_grad(), precision.forward_context():
            task.eval()
            return task._outputs(batch)
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        # IndexError: of an embedding, such as for the padding -1
        called = isinstance(error, RuntimeError | IndexError) or "argument" in str(error)
        if not called and not about_kinds(task._outputs, error, batch):  # a fault within the network
            raise
        said = str(error).splitlines()[0]
        if "index out of range in self" in said:
            said = "an embedding got a number that it does not have; the padding of sequences is -1"
        raise ValueError(
            f"model.network {type(task.network).__name__} cannot take the data, whose inputs are "
            f"{shape(batch.inputs)} per example: {said}"
        ) from error
    finally:
        task._own_data = None


REFUSED: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "cannot change a batch: write data.batch_size_schedule",
    LearningRateFinder: "cannot run the exact step: leave it out; the command tune finds a learning rate",
    BatchSizeFinder: "cannot run the exact step: leave it out; the command tune finds a batch size",
}
"""Callbacks of Lightning that do not work with a task, and what to do instead."""


def _refuse_callbacks(task: "Task", callbacks: list[Callback]) -> None:
    """Raise ValueError if a callback would not do what it says."""
    for callback in callbacks:
        for kind, remedy in REFUSED.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks: {kind.__name__} {remedy}")
        if isinstance(callback, BackboneFinetuning) and not hasattr(task, "backbone"):
            raise ValueError(
                f"trainer.callbacks: BackboneFinetuning needs {type(task).__name__}.backbone: write a property of that "
                "name, or model.freeze"
            )
        if isinstance(callback, StochasticWeightAveraging) and any(batchnorms(task.network)):
            raise ValueError(
                "trainer.callbacks: StochasticWeightAveraging leaves the statistics of batch norm as they are: write "
                "batchwise.callbacks.ema.EMA, which averages them too"
            )


def _check_training(task: "Task", data: DataModule) -> None:
    if not task.training:
        raise ValueError(
            f"{type(task).__name__} is in evaluation mode, in which dropout and norms do not learn: write task.train()"
        )
    _refuse_callbacks(task, getattr(data.trainer, "callbacks", []))
    note_settings(task)
    task._rates.examples_in_all(data)
    first = data.examples("train", 32)
    if isinstance(first.inputs, Tensor) and len(first) > 1 and bool((first.inputs == first.inputs[:1]).all()):
        warnings.warn(f"the inputs of the first {len(first)} training examples are all the same", stacklevel=2)
    plan, unit, trainer = data.plan, task._step.unit, data.trainer
    assert plan is not None
    if data.augment:
        on_device(task, data, first, training=True)
    if plan.unit % unit:
        raise ValueError(f"the plan keeps {plan.unit} examples together, but the network needs {unit}")
    if not has_batchnorm(task):
        return
    synchronised = plan.devices > 1 and getattr(trainer.strategy, "_layer_sync", None) is not None  # type: ignore[union-attr]
    if synchronised and trainer.strategy.root_device.type == "cpu":  # type: ignore[union-attr]
        raise ValueError(
            "trainer.sync_batchnorm is true, but PyTorch synchronises batch norm on GPUs alone: leave it out, and "
            "write model.ghost_batch_size"
        )
    if plan.smallest_micro_batch == 1 and not synchronised:
        _check_one_example(task, data)
    if plan.accumulation * (1 if synchronised else plan.devices) > 1:
        where, remedy = "task", "batchwise.models.norm.GhostBatchNorm in its place"
        if has_batchnorm(task.network):
            where, remedy = "network", f"model.ghost_batch_size, such as {min(32, plan.largest_micro_batch)}"
        warnings.warn(
            f"the {where} has batch norm: its statistics are over the {plan.largest_micro_batch} examples that run "
            f"at once and not over the batch of {plan.batch_size}, so the result depends on how the batch is "
            f"executed; write {remedy}",
            stacklevel=2,
        )


def note_settings(task: "Task") -> None:
    """Make an optimizer, to find what is wrong with its settings, and to note them."""
    optimizer = task._new_optimizer()
    if task.configure_optimizers.__module__ == "batchwise.tasks.task":  # not overridden
        task._rates.note(optimizer)


ONE = "more than 1 value per channel"
"""What PyTorch's batch norm says of a single example."""


def _check_one_example(task: "Task", data: DataModule) -> None:
    """Raise ValueError if the network, or the task, has a batch norm that fails on a micro-batch of one example."""
    norms = [norm for _, norm in batchnorms(task) if norm.training]
    try:
        with as_it_was(task, data), torch.no_grad():
            for norm in norms:
                norm.train()
            one = on_device(task, data, data.examples("train", 1), training=True)
            task._outputs(one)
            try:
                task.losses(one, *task._players()[0])
            except Exception as error:  # the rehearsal says what else is wrong with it
                if ONE in str(error):
                    raise
    except ValueError as error:
        if ONE not in str(error):
            raise
        ghosts = "model.ghost_batch_size, " * has_batchnorm(task.network)
        raise ValueError(
            f"the {'network' if ghosts else 'task'} has batch norm, and a micro-batch has one example, of which there "
            f"is no variance: write {ghosts}data.drop_last true, or a larger data.micro_batch_size"
        ) from None
