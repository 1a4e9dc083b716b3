"""Whether a metric gives another value when its examples come in parts: from micro-batches, and from devices."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.wrappers import Running

from batchwise.tasks.exchange import lists_of, parts_of, sync_whole


def depends_on(metric: Metric, values: tuple[Any, ...]) -> str | None:
    """Return on what the value of a metric depends beside its examples: "micro-batches", "devices" or None.

    Args:
        metric: it stays as it is.
        values: those of one update, each of which has one element per example: tensors [N, ...] or lists.
    """
    sizes = {len(value) if isinstance(value, list) or getattr(value, "ndim", 0) else 0 for value in values}
    if len(sizes) != 1 or max(sizes) < 4 or not _is_light(metric):
        return None
    if any(isinstance(part, Running) for part in parts_of(metric)):
        return "micro-batches"  # of which it counts some of the last
    # Of parts of one size, means of means are right by chance.
    cut = max(2, sizes.pop() // 3)
    first, second = tuple(value[:cut] for value in values), tuple(value[cut:] for value in values)
    try:
        whole = _fed(metric, values).compute()
        cut_value = _fed(metric, first, second).compute()
        merged = _over_two(_fed(metric, first), _fed(metric, second))
    except Exception:  # so few examples are no data for it, such as for R2
        return None
    return "micro-batches" if not _same(whole, cut_value) else None if _same(whole, merged) else "devices"


def _is_light(metric: Metric) -> bool:
    """Return whether copies take no time: there is no network and no reference data in it."""
    held = [value for part in metric.modules() for value in (*vars(part).values(), *part.buffers(recurse=False))]
    many = any(len(value) > 10_000 for value in held if isinstance(value, list | tuple | dict | set))
    wide = any(value.nbytes > 2**20 for value in held if isinstance(value, Tensor | np.ndarray))
    return not many and not wide and not any(True for _ in metric.parameters())


def alone(metrics: Any) -> Any:
    """Return a copy of a metric, or of a collection of them, in whose values other processes take no part."""
    new = deepcopy(metrics)
    new.reset()
    for part in parts_of(new):
        part.distributed_available_fn = lambda: False
    return new


def _fed(metric: Metric, *parts: tuple[Any, ...]) -> Metric:
    new = alone(metric)
    for values in parts:
        new.update(*values)
    return new


def _over_two(mine: Metric, theirs: Metric) -> Any:
    """Return the value over two processes, as the first computes it."""
    for one, other in zip(parts_of(mine), parts_of(theirs), strict=True):
        one.dist_sync_fn, one.distributed_available_fn = _gather(other), lambda: True
        if lists := {name: getattr(other, name) for name in lists_of(other)}:
            one._sync_dist = partial(sync_whole, one, one._sync_dist, lambda own, lists=lists: [own, lists])
    return mine.compute()


def _gather(theirs: Metric) -> Callable[..., list[Tensor]]:
    """Return what gathers a state of a metric and that of another process, in the order in which a metric asks."""
    states: list[Tensor] = []
    for name in theirs._reductions:
        state: Any = getattr(theirs, name)
        if name in lists_of(theirs):
            continue
        if isinstance(state, list):
            state = dim_zero_cat(state) if state else torch.tensor([], device=theirs.device, dtype=theirs.dtype)
        states.append(state)
    left = iter(states)
    return lambda mine, group=None: [mine, next(left)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and all(_same(value, other.get(name)) for name, value in one.items())
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Real) and isinstance(other, Real):
        one, other = torch.tensor(float(one)), torch.tensor(float(other))
    if not isinstance(one, Tensor):
        return type(one) is type(other)
    if not isinstance(other, Tensor) or one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
