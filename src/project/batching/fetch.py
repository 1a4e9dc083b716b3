"""From example numbers to tensors: one whole micro-batch per read."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Example = tuple[Any, ...]
"""The fields of a micro-batch: inputs first, targets last (just inputs where there are no targets)."""


class Fetch(Protocol):
    """A source of examples."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Example]:
        """Yield the examples of each request (example numbers, int64 [N]), in order.

        Args:
            requests: may be asked for ahead of time.
            seed: of what the examples' own code draws at random in other processes.
        """
        ...


class InMemory:
    """Tensors [N, ...] that are indexed alike; a micro-batch is one gather from each.

    Raises:
        ValueError: the tensors differ in length.
    """

    def __init__(self, fields: Sequence[Tensor | np.ndarray]) -> None:
        self.fields = tuple(torch.as_tensor(field) for field in fields)
        lengths = [len(field) for field in self.fields]
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs and targets differ in length: {' and '.join(map(str, lengths))} examples")

    def __len__(self) -> int:
        return len(self.fields[0])

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Example]:
        """Yield one gather per request. `index_select` is four times as fast as `field[index]` on a CPU."""
        for index in requests:
            yield tuple(field.index_select(0, index) for field in self.fields)


class Workers:
    """A map-style data set whose examples must be made one by one, in `num_workers` processes (0: in this one).

    `__getitems__(list of int)` is used where the data set has it. Workers get whole micro-batches, in order.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(f"{type(dataset).__name__} has no __getitem__ and __len__: a data set must have both")
        self.dataset = dataset
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Example]:
        """Yield the collated examples of each request."""
        batches = (index.tolist() for index in requests)
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(seed),  # leaves the global one alone
        )
        yield from loader


def _collate(examples: list[Any]) -> Example:
    fields = default_collate(examples)
    return tuple(fields) if isinstance(fields, list | tuple) else (fields,)


def make_fetch(source: Fetch | Dataset | Sequence[Tensor | np.ndarray], num_workers: int = 0) -> Fetch:
    """Choose how to read `source`: tensors or arrays are gathered, a map-style data set is read example by example."""
    if isinstance(source, Tensor | np.ndarray):
        return InMemory((source,))
    if isinstance(source, tuple | list) and all(isinstance(field, Tensor | np.ndarray) for field in source):
        return InMemory(source)
    if hasattr(source, "stream"):
        return source  # type: ignore[return-value]
    return Workers(source, num_workers)  # type: ignore[arg-type]
