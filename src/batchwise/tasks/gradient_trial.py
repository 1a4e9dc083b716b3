"""The gradient of a few examples is computed before anything is trained."""

import warnings
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import DDPStrategy

from batchwise.batching.gradients import weighted_sum
from batchwise.tasks.memory import is_out_of_memory
from batchwise.tasks.terms import Parts

if TYPE_CHECKING:
    from batchwise.tasks.task import Task


def check_gradients(task: "Task", trainer: Any, parts: Parts, player: tuple[str, ...]) -> None:
    """Raise ValueError where there is no gradient, it is not that of the mean loss, or processes would wait for it.

    Args:
        task: has the parameters.
        trainer: has the strategy; None: there is none.
        parts: losses and weights of a few examples, by term.
        player: the name of one of several optimizers, if there are some.
    """
    name = f"{type(task).__name__}.losses"
    learning = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    if any(weights is not None and bool((weights < 0).any()) for _, weights in parts.values()):
        raise ValueError(
            f"{name} gives weights below 0, but the sum of losses is divided by the sum of weights: write weights from "
            "0, and turn the sign of the losses"
        )
    if any(weights is not None and weights.requires_grad for _, weights in parts.values()):
        raise ValueError(
            f"{name} gives weights that have a gradient, but the sum of weights, by which the sum of losses is "
            "divided, counts as a constant: write weights.detach(), or multiply the losses by them"
        )
    total = torch.stack([weighted_sum(losses, None, weights)[0] for losses, weights in parts.values()]).sum()
    if not learning:
        return
    if not total.requires_grad:
        raise ValueError(f"{name} gives losses without a gradient: let them follow from the network, without detach()")
    try:
        found = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0]
        raise ValueError(f"the backward pass of {name} fails on a few examples: {said}") from error
    for parameter, gradient in zip(learning, found, strict=True):
        if gradient is not None and gradient.layout != torch.strided:
            raise ValueError(f"{parameter} has a sparse gradient, and here they are dense: write sparse=False")
    if bool(total.isfinite()) and any(gradient is not None and bool(gradient.isnan().any()) for gradient in found):
        warnings.warn(
            f"the gradient of a few examples is not a number, although their losses are: where {name} leaves a target "
            "out by a weight of 0, its loss must be finite, as after nan_to_num",
            stacklevel=2,
        )
    strategy: Any = getattr(trainer, "strategy", None)
    waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters")
    unused = [name for name, gradient in zip(learning, found, strict=True) if gradient is None]
    if unused and waits and not task._couples and not player:
        raise ValueError(
            f"{len(unused)} parameter(s) had no gradient in a few examples, such as {unused[0]}, and processes "
            "that train together wait for it: write trainer.strategy ddp_find_unused_parameters_true, or model.freeze"
        )
