"""Adjustments of an optimizer: when it is made, and when a checkpoint is loaded."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, SparseAdam

from batchwise.arguments import taken
from batchwise.errors import Mistake

LBFGS_REFUSED = "model.optimizer LBFGS evaluates the loss several times per step: write another optimizer"


def made(make: Callable[[list], Optimizer], groups: list, key: str = "model.optimizer") -> Optimizer:
    """Return an optimizer, with the rate of each group times its factor, and with fused kernels if there are any.

    Args:
        make: the class of the optimizer, with its arguments.
        groups: of parameters.
        key: of the optimizer.

    Raises:
        Mistake: nothing learns, or the optimizer refuses an argument, evaluates the loss several times per step, takes
            sparse gradients, or makes groups of its own, in which the factors are lost.
    """
    if isinstance(make, Optimizer) or not callable(make):
        raise Mistake(f"{key} is a {type(make).__name__}: write a class or function, such as partial(AdamW, lr=0.001)")
    if not any(group["params"] for group in groups):
        raise Mistake(f"{key} has nothing to train: write a network that has parameters")
    try:
        optimizer = make(groups)
    except ValueError as error:
        raise Mistake(LBFGS_REFUSED if "LBFGS" in str(error) else _refused(key, str(error))) from None
    except TypeError:
        if isinstance(make, partial) and isinstance(make.func, type):
            with suppress(NameError):  # a type that cannot be read
                taken(make.func.__init__, make.keywords, f"{key}.")
        raise
    refuse(optimizer)
    factors = {group["lr_factor"] for group in groups} - {1.0}
    if factors and not any("lr_factor" in group for group in optimizer.param_groups):
        kind = type(optimizer).__name__
        raise Mistake(f"model.lr_factors do nothing with {kind}, which groups parameters by itself: leave them out")
    for group in optimizer.param_groups:
        group["lr"] *= group.pop("lr_factor", 1.0)
        # One kernel for all parameters, unless the user chose something else.
        free = isinstance(optimizer, SGD | Adam) and group["fused"] is None
        if free and not group["foreach"] and not group["differentiable"]:
            group["fused"] = all(_has_fused(parameter) for parameter in group["params"])
    return optimizer


def _refused(key: str, message: str) -> str:
    """Return one line about an argument that an optimizer refuses. PyTorch writes `Invalid epsilon value: -1.0`."""
    found = re.match(r"Invalid (learning rate|beta|epsilon|eta|\w+)", message)
    name = found and {"learning rate": "lr", "beta": "betas", "epsilon": "eps", "eta": "etas"}.get(found[1], found[1])
    remedy = "values of at least 0 and below 1" if name == "betas" else "at least 0"
    return f"{key}.{name}: {message}: write {remedy}" if found else f"{key}: {message}"


def refuse(optimizer: Any) -> None:
    """Raise Mistake if an optimizer needs several losses per step or sparse gradients, or if there is none."""
    if isinstance(optimizer, LBFGS):
        raise Mistake(LBFGS_REFUSED)
    if isinstance(optimizer, SparseAdam):
        raise Mistake("model.optimizer SparseAdam takes sparse gradients, and here they are dense: write Adam")
    if not optimizer.param_groups:  # Lightning's stand-in
        raise Mistake("configure_optimizers gives None: return an optimizer")


def start_momenta(optimizer: Optimizer) -> None:
    """Give fused SGD the missing momenta, as zeros.

    Fused SGD fails if some parameters of a group have a momentum and others have none yet. A parameter has none if it
    has had no gradient, such as an expert that no batch has used. The first step from a momentum of zero is the same as
    without. This is not so with dampening; then the kernel is not fused.
    """
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            if group["fused"] and group["momentum"] and group["dampening"]:
                group["fused"] = False
            elif group["fused"] and group["momentum"]:
                for parameter in group["params"]:
                    if optimizer.state[parameter].get("momentum_buffer") is None:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def take_states(
    optimizer: Optimizer, saved: dict[str, Any] | None, weights: Mapping[Tensor, Tensor] | None = None
) -> None:
    """Correct the states that PyTorch has loaded from a checkpoint into an optimizer.

    A state gets the memory format of its parameter, because fused kernels need that. It gets back the type that was
    saved, if that was not the type of the parameter: PyTorch converts all to the type of the parameter, but some
    optimizers use another one on purpose.

    Args:
        optimizer: has loaded a checkpoint.
        saved: its state in the checkpoint; None: leave the types.
        weights: in the checkpoint, of each parameter; None: not known.
    """
    weights = weights or {}
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
            own = parameter not in weights or weights[parameter].dtype != getattr(before, "dtype", None)
            if own and isinstance(before, Tensor) and before.dtype != value.dtype and before.shape == value.shape:
                value = state[name] = before.to(value.device)
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _has_fused(parameter: nn.Parameter) -> bool:
    # On a CPU, fused SGD does not update most of a half-precision parameter, without an error (torch 2.13).
    kinds = ("cpu", "cuda") if parameter.dtype.itemsize >= 4 else ("cuda",)
    return parameter.device.type in kinds and parameter.is_floating_point()
