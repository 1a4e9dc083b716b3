"""From example numbers to tensors. Micro-batches are gathered together while they fit in a cache."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from math import gcd, lcm
from os import PathLike
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batchwise.batching.device import send
from batchwise.batching.rows import Joined, Rows, as_tensor, gather, is_mapped
from batchwise.batching.structure import named, rebuild, tensors

Example = tuple[Any, ...]
"""The fields of a micro-batch: inputs first, targets last; only inputs where there are no targets."""
Read = tuple[Example, Tensor | None]
"""The fields, and the weights of the examples, [N] (None: all one)."""


class Request(NamedTuple):
    """Micro-batches to read.

    Args:
        index: the examples of one micro-batch after the other, int64 [sum of sizes], on the host.
        sizes: number of examples in each micro-batch.
        positions: position of each micro-batch's first example in the epoch. The random numbers that an example's own
            code draws depend on its position, and not on the process that reads it.
    """

    index: Tensor
    sizes: list[int]
    positions: list[int]

    @classmethod
    def one(cls, index: Tensor, position: int = 0) -> "Request":
        """Return a request for a single micro-batch."""
        return cls(index, [len(index)], [position])


_Group = tuple[Tensor, list[int]]
"""The examples of some micro-batches, int64 [sum of sizes], and these sizes."""


class DataError(RuntimeError):
    """The data cannot be read; the message says which example, why, and what to do."""


class Fetch(Protocol):
    """A source of examples."""

    def __len__(self) -> int:
        """Return the number of examples."""
        ...

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield each micro-batch of each request, in order.

        Args:
            requests: may be consumed ahead of time, and in a thread.
            seed: for the random numbers that the examples' own code draws.
        """
        ...


def select(field: Any, index: Tensor, pinned: bool = False) -> Any:
    """Return the examples `index`, int64 [N], of a field: what `gather` takes, nested, and lists."""
    if isinstance(field, Tensor):
        return gather(field, index, pinned)
    return rebuild(
        field, lambda leaf: gather(leaf, index, pinned), lambda values: [values[place] for place in index.tolist()]
    )


def bytes_of(leaf: Any) -> int:
    """Return the bytes that a leaf takes. Those of a view are those of the memory that it looks at."""
    return min(leaf.nbytes, leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else getattr(leaf, "nbytes", 0)


def _parts(field: Any) -> list[Any]:
    """Return all leaves, also those within lists."""
    found: list[Any] = []
    rebuild(field, found.append)
    return found


def _as_field(leaf: Any) -> Any:
    if isinstance(leaf, Rows | Joined):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUS":  # text, or arrays of unequal shapes
        return _as_values(list(leaf))
    refuse_frame(leaf)
    if not isinstance(leaf, Tensor | np.ndarray) or leaf.ndim == 0:
        raise ValueError(
            f"load gave a {type(leaf).__name__} among inputs and targets: write tensors or arrays with the examples "
            "in the first dimension, dicts or tuples of them, or a list with one value per example"
        )
    return as_tensor(leaf)


def refuse_frame(value: Any) -> None:
    """Raise ValueError for a table or column of pandas or polars, whose items are columns, or follow an index."""
    if hasattr(value, "to_numpy") and not isinstance(value, Dataset):
        raise ValueError(
            f"load gave a {type(value).__name__}: write .to_numpy() of the columns with the inputs, and of that with "
            "the targets"
        )


def _as_values(values: list[Any]) -> Any:
    if values and all(isinstance(value, int | float | np.number) for value in values):
        return as_tensor(np.asarray(values))  # torch.tensor would round floats of Python to float32
    return rebuild(values, _as_value)


def _as_value(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):  # of any layout
        return leaf.detach().cpu()
    return as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf


def on_device(leaf: Any, device: torch.device) -> Any:
    """Return a leaf on a device. A view stays one."""
    if not isinstance(leaf, Tensor):
        return leaf.to(device) if isinstance(leaf, Rows | Joined) else leaf
    storage = leaf.untyped_storage()
    if storage.nbytes() >= leaf.nbytes:
        return leaf.to(device)
    whole = leaf.as_strided((storage.nbytes() // leaf.itemsize,), (1,), 0)
    return whole.to(device).as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())


class InMemory:
    """Tensors [N, ...] with one row per example, in memory or in memory-mapped files. A view is read as a view.

    Args:
        fields: inputs first, targets last: tensors or arrays, dicts or tuples of them, or lists of one value per
            example.
        pinned: return pinned memory, from which a GPU copies while the host goes on.

    Raises:
        ValueError: the tensors differ in length, or something is no tensor.
    """

    def __init__(self, fields: Sequence[Any], pinned: bool = False) -> None:
        self.mapped = any(map(is_mapped, chain.from_iterable(map(_parts, fields))))
        self.fields = tuple(rebuild(field, _as_field, _as_values) for field in fields)
        self.pinned = pinned
        self.home = torch.device("cpu")
        self.has_lists = any(isinstance(leaf, list) for _, leaf in named(self.fields))
        lengths = [len(leaf) for _, leaf in named(self.fields)]
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs and targets differ in length: {' and '.join(map(str, lengths))} examples")
        self.length = lengths[0]

    def __len__(self) -> int:
        return self.length

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return "mapped" if self.mapped else "resident" if not self.pinned else "pinned"

    @property
    def nbytes(self) -> int:
        """Bytes of all examples. A view, such as overlapping windows, takes those of the memory that it looks at."""
        return sum(map(bytes_of, chain.from_iterable(map(_parts, self.fields))))

    def on(self, device: torch.device, share: float) -> "InMemory":
        """Return what feeds `device`: a copy on it if that takes at most `share` of its free memory, else pinned."""
        if device.type != "cuda":
            return self
        fits = self.nbytes <= share * torch.cuda.mem_get_info(device)[0]
        fed = InMemory(self.fields, pinned=not fits)
        fed.mapped = self.mapped and not fits
        if fits:
            fed.fields = tuple(rebuild(field, lambda leaf: on_device(leaf, device)) for field in self.fields)
            fed.home = device
        return fed

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield each micro-batch. A thread reads ahead if the data goes to a GPU, or once a mapped file is slow."""
        groups = (group for request in requests for group in self._groups(request))
        ahead = self.pinned or self.mapped
        reads = _read_ahead(self._read, groups, self.pinned) if ahead else map(self._read, groups)
        return (read for group in reads for read in group)

    def _groups(self, request: Request) -> Iterator[_Group]:
        """Return the micro-batches that are gathered together. Their examples are where the fields are."""
        index = request.index
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
            raise IndexError(f"examples {int(index.min())} to {int(index.max())} were asked for, of {len(self)}")
        if self.home.type == "cuda" and not self.has_lists:
            index = send(index, self.home)  # once for all fields
        groups: list[list[int]] = []
        length, (unit, most) = 0, self._together
        for size in request.sizes:
            if not groups or length % unit or length + size > most:
                groups.append([])
                length = 0
            groups[-1].append(size)
            length += size
        return zip(index.split_with_sizes([*map(sum, groups)]), groups, strict=True)

    @cached_property
    def _together(self) -> tuple[int, int]:
        """The number of examples after which another micro-batch may begin in a group, and the most in a group.

        Each must begin where memory is aligned, as if it stood alone: else kernels may add in another order.
        """
        if self.has_lists or not len(self):
            return 1, 0
        rows = [leaf.nbytes // len(self) for _, leaf in named(self.fields)]
        most = _GROUP_ON_GPU if self.home.type == "cuda" else _GROUP
        unit = lcm(*(_ALIGNED // gcd(_ALIGNED, row) for row in rows))
        return unit, most // max(1, sum(rows))

    def _read(self, group: _Group) -> list[Read]:
        index, sizes = group
        fields = tuple(select(field, index, self.pinned) for field in self.fields)
        if len(sizes) == 1:
            return [(fields, None)]
        return [(parts, None) for parts in zip(*(_split(field, sizes) for field in fields), strict=True)]


def _split(field: Any, sizes: list[int]) -> Sequence[Any]:
    """Return the parts of a field that have these numbers of examples."""
    if isinstance(field, Tensor):
        return field.unsafe_split_with_sizes(sizes)  # so that autograd takes a change of one part for that part's alone
    parts = rebuild(field, lambda leaf: iter(leaf.unsafe_split_with_sizes(sizes)))
    return [rebuild(parts, next) for _ in sizes]


def _read_ahead(read: Callable[[_Group], list[Read]], groups: Iterator[_Group], slow: bool) -> Iterator[list[Read]]:
    """Yield read(group) for each group. A thread reads ahead after the first slow read.

    Before, it would cost more than it saves: to hand over a micro-batch takes longer than to gather it from memory.

    Args:
        read: reads the micro-batches of a group.
        groups: may be consumed in the thread.
        slow: start the thread at once.
    """
    while not slow:
        group = next(groups, None)
        if group is None:
            return
        start = perf_counter()
        made = read(group)
        bytes_read = sum(leaf.nbytes for fields, _ in made for leaf in tensors(fields))
        slow = perf_counter() - start > _SLOW + bytes_read / _DISK
        yield made
    reads, thread = map(read, groups), ThreadPoolExecutor(1)
    try:
        waiting = deque(thread.submit(next, reads, None) for _ in range(_AHEAD))
        while made := waiting.popleft().result():
            waiting.append(thread.submit(next, reads, None))
            yield made
    finally:
        thread.shutdown(cancel_futures=True)


_SLOW, _DISK = 1e-3, 2.5e8  # seconds, and bytes per second: memory takes a tenth of either
_AHEAD = 4  # groups of micro-batches
_GROUP, _GROUP_ON_GPU = 2**18, 2**22  # bytes: on a CPU, more leaves the cache, and takes new pages each time
_ALIGNED = 256  # bytes: cuBLAS looks no further


def make_fetch(
    source: Any, num_workers: int = 0, max_unreadable: int = 0, collate: Callable[[list], Any] | None = None
) -> Fetch:
    """Return a way to read `source`: tensors and arrays are gathered, a map-style data set is read by workers.

    Raises:
        ValueError: it is nothing of which each example can be read by its number.
    """
    from batchwise.batching.workers import Workers  # here, because workers need the names above

    if isinstance(source, Tensor | np.ndarray | dict):
        return InMemory((source,))
    if isinstance(source, tuple):
        return InMemory(source)
    refuse_frame(source)
    dataset: Any = source
    if isinstance(source, str | bytes | PathLike):
        raise ValueError(f"load gave {source!r}: read it, and return tensors, arrays or a map-style data set")
    if isinstance(source, list) and source and all(isinstance(item, Tensor | np.ndarray | Rows) for item in source):
        raise ValueError(
            f"load gave a list of {len(source)} tensors: return a tuple of inputs and targets; one tensor per example "
            "is (list,), or (list, targets)"
        )
    return dataset if hasattr(dataset, "stream") else Workers(dataset, num_workers, max_unreadable, collate)
