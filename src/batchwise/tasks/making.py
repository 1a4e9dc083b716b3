"""What is done to an optimizer when it is made, and when a checkpoint is loaded into it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

from batchwise.errors import Mistake


def finish(optimizer: Optimizer) -> Optimizer:
    """Multiply the rates by the factors of their groups, and take the fused kernels, where there are any.

    Raises:
        Mistake: the optimizer evaluates the loss several times per step.
    """
    refuse(optimizer)
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_factor", 1.0)
        # One kernel for all parameters, unless something else was asked for.
        free = isinstance(optimizer, SGD | Adam) and group["fused"] is None
        if free and not group["foreach"] and not group["differentiable"]:
            group["fused"] = all(_has_fused(parameter) for parameter in group["params"])
    return optimizer


def refuse(optimizer: Any) -> None:
    """Raise Mistake for an optimizer that evaluates the loss several times per step, and for none."""
    if isinstance(optimizer, LBFGS):
        raise Mistake("model.optimizer LBFGS evaluates the loss several times per step: write another optimizer")
    if not optimizer.param_groups:  # Lightning's stand-in
        raise Mistake("configure_optimizers gives None: return an optimizer")


def start_momenta(optimizer: Optimizer) -> None:
    """Give fused SGD the momenta that it has not, as zeros: a first step from zero is the gradient, as without.

    Fused SGD fails where some parameters of a group have a momentum and others have none yet: those that had no
    gradient so far, such as an expert that no batch has used. With dampening a first step is another one, so then the
    kernel is not fused.
    """
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            if group["fused"] and group["momentum"] and group["dampening"]:
                group["fused"] = False
            elif group["fused"] and group["momentum"]:
                for parameter in group["params"]:
                    if optimizer.state[parameter].get("momentum_buffer") is None:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def take_states(optimizer: Optimizer, saved: dict[str, Any] | None) -> None:
    """Bring what a checkpoint put into an optimizer in line with the parameters, and with what was saved.

    A state has the memory format of its parameter, which fused kernels take for granted. And it has the type that was
    saved: PyTorch rounds it to that of the parameter, though some optimizers count in another.
    """
    types: dict[int, dict[str, Any]] = {}
    if saved:
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        owners = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        types = {id(owner): saved["state"].get(number, {}) for number, owner in zip(numbers, owners, strict=False)}
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            before = types.get(id(parameter), {}).get(name)
            if isinstance(before, Tensor) and before.dtype != value.dtype and before.shape == value.shape:
                value = state[name] = before.to(value.device)
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _has_fused(parameter: nn.Parameter) -> bool:
    # On a CPU, fused SGD leaves most of a half-precision parameter as it was (torch 2.13), without a word.
    kinds = ("cpu", "cuda") if parameter.dtype.itemsize >= 4 else ("cuda",)
    return parameter.device.type in kinds and parameter.is_floating_point()
