"""States of metrics that are lists are exchanged whole, because devices may hold unequal numbers of elements."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Gather = Callable[[Any], list[Any]]
"""Gives the object of each process."""


def gather_objects(mine: Any) -> list[Any]:
    """Return the object of each process. All must call it."""
    of_all: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, mine)
    return of_all


def parts_of(module: nn.Module) -> list[Metric]:
    """Return the metrics in a module; a metric itself is one of them."""
    return [part for part in module.modules() if isinstance(part, Metric)]


def lists_of(metric: Metric) -> list[str]:
    """Return the names of the states that torchmetrics exchanges element by element, such as those of retrieval.

    A state to be concatenated is exchanged in one piece.
    """
    return [
        name
        for name, default in metric._defaults.items()
        if isinstance(default, list) and metric._reductions[name] is not dim_zero_cat
    ]


@contextmanager
def lists_whole(metrics: nn.Module) -> Iterator[None]:
    """Exchange the lists of metrics whole. Element by element, processes with unequal numbers would wait for ever."""
    parts = [part for part in parts_of(metrics) if any(isinstance(each, list) for each in part._defaults.values())]
    for part in parts:
        part._sync_dist = partial(sync_whole, part, part._sync_dist, gather_objects)
    try:
        yield
    finally:
        for part in parts:
            del part._sync_dist


def sync_whole(metric: Metric, sync: Callable[..., None], gather: Gather, *args: Any, **kwargs: Any) -> None:
    """Do what a metric's `_sync_dist` does, and exchange its lists as they are."""
    mine = {name: getattr(metric, name) for name in lists_of(metric)}
    for name, default in metric._defaults.items():
        state = getattr(metric, name)
        if name in mine:
            setattr(metric, name, [])
        elif isinstance(default, list) and state:  # torchmetrics leaves a single number as it is, of another shape
            setattr(metric, name, [dim_zero_cat(state)])
    sync(*args, **kwargs)
    of_all = [move_data_to_device(one, metric.device) for one in gather(mine)]
    for name in mine:
        state, reduce = [element for one in of_all for element in one[name]], metric._reductions[name]
        setattr(metric, name, reduce(state) if callable(reduce) else state)
