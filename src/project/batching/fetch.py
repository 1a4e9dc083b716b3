"""From example numbers to tensors: one whole micro-batch per read."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

Example = tuple[Any, ...]
"""The fields of a micro-batch: inputs first, targets last (just inputs where there are no targets)."""
Read = tuple[Example, Tensor | None]
"""The fields, and the weights of the examples, [N]; None: all one."""


class DataError(RuntimeError):
    """The data cannot be read; the message says which example, why, and what to do."""


class Fetch(Protocol):
    """A source of examples."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Read]:
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

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Read]:
        """Gather many requests at once and yield each its part: a gather has a price of its own, about that of 64 rows.

        `index_select` is four times as fast as `field[index]` on a CPU.
        """
        rows = sum(field[0].numel() * field.element_size() for field in self.fields) if len(self) else 1
        most = max(1, _BLOCK // max(1, rows))
        for block in _blocks(requests, most):
            sizes = [index.numel() for index in block]
            index = block[0] if len(block) == 1 else torch.cat(block)
            gathered = [field.index_select(0, index).split(sizes) for field in self.fields]
            for fields in zip(*gathered, strict=True):
                yield fields, None


_BLOCK = 2**19  # bytes gathered at a time


def _blocks(requests: Iterable[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Yield lists of requests of up to `most` examples together, or of one request."""
    block, size = [], 0
    for index in requests:
        if block and size + index.numel() > most:
            yield block
            block, size = [], 0
        block.append(index)
        size += index.numel()
    if block:
        yield block


class Workers:
    """A map-style data set whose examples must be made one by one, in `num_workers` processes (0: in this one).

    `__getitems__(list of int)` is used where the data set has it. Workers get whole micro-batches, in order.

    Args:
        dataset: has `__len__` and `__getitem__`.
        num_workers: processes.
        max_unreadable: examples that may turn out unreadable. They are said, and left out: weight zero. 0: none may.

    Raises:
        ValueError: the data set has no length or no items.
    """

    def __init__(self, dataset: Dataset, num_workers: int = 0, max_unreadable: int = 0) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ValueError(f"{type(dataset).__name__} has no __getitem__ and __len__: a data set must have both")
        self.dataset = dataset
        self.num_workers = num_workers
        self.max_unreadable = max_unreadable
        self.unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def stream(self, requests: Iterable[Tensor], seed: int = 0) -> Iterator[Read]:
        """Yield the collated examples of each request.

        Raises:
            DataError: too many examples cannot be read, or a process died.
        """
        loader = DataLoader(
            _Reader(self.dataset),
            batch_size=None,
            sampler=(index.tolist() for index in requests),  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator().manual_seed(seed),  # leaves the global one alone
        )
        try:
            for fields, weights, problems in loader:
                for index, problem in problems.items():
                    self._leave_out(index, problem)
                yield fields, weights
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that reads the data was killed, probably for want of memory: lower data.num_workers or "
                "data.micro_batch_size; --ckpt_path last goes on from the last checkpoint"
            ) from error

    def _leave_out(self, index: int, problem: str) -> None:
        if index in self.unreadable:
            return
        self.unreadable.add(index)
        line = f"example {index} cannot be read ({problem})"
        if len(self.unreadable) > self.max_unreadable:
            raise DataError(
                f"{line}: repair it; or data.max_unreadable {2 * len(self.unreadable)} leaves such examples out "
                f"(it is {self.max_unreadable})"
            )
        print(f"{line}; left out, {len(self.unreadable)} so far", flush=True)


class _Reader(Dataset):
    """Reads whole micro-batches of a data set, in whatever process it is in."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> tuple[Example, Tensor | None, dict[int, str]]:
        """Return fields, weights (None: all one) and what cannot be read, by number of the example."""
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is not None:
            try:
                return _collate(whole(indices)), None, {}
            except Exception:  # one of them: which, is found below
                pass
        examples = [self._read(index) for index in indices]
        problems = {index: problem for index, (_, problem) in zip(indices, examples, strict=True) if problem}
        if not problems:
            return _collate([example for example, _ in examples]), None, {}
        # Another example keeps the place, with weight zero, so that shapes and positions stay what they were.
        others = chain(examples, map(self._read, range(len(self.dataset))))  # type: ignore[arg-type]
        spare = next((example for example, problem in others if not problem), None)
        if spare is None:
            raise DataError(f"no example can be read; example {indices[0]}: {problems[indices[0]]}")
        kept = [spare if problem else example for example, problem in examples]
        return _collate(kept), torch.tensor([0.0 if problem else 1.0 for _, problem in examples]), problems

    def _read(self, index: int) -> tuple[Any, str | None]:
        try:
            return self.dataset[index], None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


def _as_it_is(item: Any) -> Any:
    return item


def _collate(examples: list[Any]) -> Example:
    fields = default_collate(examples)
    return tuple(fields) if isinstance(fields, list | tuple) else (fields,)


def make_fetch(
    source: Fetch | Dataset | Sequence[Tensor | np.ndarray], num_workers: int = 0, max_unreadable: int = 0
) -> Fetch:
    """Choose how to read `source`: tensors or arrays are gathered, a map-style data set is read example by example."""
    if isinstance(source, Tensor | np.ndarray):
        return InMemory((source,))
    if isinstance(source, tuple | list) and all(isinstance(field, Tensor | np.ndarray) for field in source):
        return InMemory(source)
    if hasattr(source, "stream"):
        return source  # type: ignore[return-value]
    return Workers(source, num_workers, max_unreadable)  # type: ignore[arg-type]
