"""A task is tried on a few examples, before anything is trained."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn

from batchwise.batching.structure import shape
from batchwise.data.module import DataModule
from batchwise.models.flops import count_flops
from batchwise.models.norm import has_batchnorm

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def try_task(task: "Task", data: DataModule, split: str) -> None:
    """Take the first weights, apply the network to two examples, check the data, make the metrics.

    Raises:
        ValueError: the network cannot take the data, or the data does not suit the task.
    """
    data.check(task.network)
    precision: Any = data.trainer.precision_plugin if data.trainer is not None else Precision()
    precision.convert_module(task)
    if data.plan is not None:
        report = task._tuning.take(task.network)
        if report and (data.trainer is None or data.trainer.is_global_zero):
            print(report, flush=True)
    with precision.forward_context():
        batch = data.to_device(data.examples(split, 2), task.device, training=False)
    if data.trainer is None:  # whose precision it would have
        batch = batch.cast(dtype_of(task.network))
    outputs, flops = count_flops(lambda: _outputs(task, batch.inputs, precision))
    task._measures.flops_per_example = flops and flops / len(batch)
    task.check(data, outputs)
    if data.plan is not None:
        with precision.forward_context():
            _check_training(task, data)
    if task._measures.metrics is None:
        task._measures.make(task.make_metrics(outputs), task.device)


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the type of a network's floats."""
    types = (parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    return next(types, torch.get_default_dtype())


def _outputs(task: "Task", inputs: Any, precision: Any) -> Tensor:
    modes = [(module, module.training) for module in task.modules()]
    task.eval()
    try:
        with torch.no_grad(), precision.forward_context():
            return task(inputs)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, TypeError) and "argument" not in str(error):  # a fault within the network
            raise
        raise ValueError(
            f"model.network {type(task.network).__name__} cannot take the data, whose inputs are {shape(inputs)} per "
            f"example: {str(error).splitlines()[0]}"
        ) from error
    finally:
        for module, training in modes:  # a part may be meant to stay in evaluation mode
            module.training = training


def _check_training(task: "Task", data: DataModule) -> None:
    task._new_optimizer()
    task._rates.examples_in_all(data)
    first = data.examples("train", 32)
    if isinstance(first.inputs, Tensor) and len(first) > 1 and bool((first.inputs == first.inputs[:1]).all()):
        warnings.warn(f"the inputs of the first {len(first)} training examples are all the same", stacklevel=2)
    plan, unit, trainer = data.plan, task._step.unit, data.trainer
    assert plan is not None
    if data.augment:
        data.to_device(first, task.device, training=True)
    if plan.unit % unit:
        raise ValueError(f"the plan keeps {plan.unit} examples together, but the network needs {unit}")
    frozen = [task.network.get_submodule(name) for name in task._tuning.frozen.norms]
    if not has_batchnorm(task.network, frozen):
        return
    synchronised = plan.devices > 1 and getattr(trainer.strategy, "_layer_sync", None) is not None  # type: ignore[union-attr]
    if synchronised and trainer.strategy.root_device.type == "cpu":  # type: ignore[union-attr]
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
