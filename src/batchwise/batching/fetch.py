"""From example numbers to tensors: one whole micro-batch per read."""

import random
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from batchwise.batching.random import mix

Example = tuple[Any, ...]
"""The fields of a micro-batch: inputs first, targets last (just inputs where there are no targets)."""
Read = tuple[Example, Tensor | None]
"""The fields, and the weights of the examples, [N]; None: all one."""


class Request(NamedTuple):
    """Micro-batches to read.

    Args:
        index: numbers of their examples, one micro-batch after the other, int64 [sum of sizes], on the host.
        sizes: examples of each micro-batch.
        positions: place of each micro-batch's first example in the epoch. What an example's own code draws at random
            depends on its place, and not on the process that reads it.
    """

    index: Tensor
    sizes: list[int]
    positions: list[int]

    @classmethod
    def one(cls, index: Tensor, position: int = 0) -> "Request":
        """Return a request for a single micro-batch."""
        return cls(index, [len(index)], [position])


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
            requests: may be asked for ahead of time, and from a thread.
            seed: of what the examples' own code draws at random.
        """
        ...


class Rows:
    """Some rows of an array, in an order of their own, without a copy of them: a split of a large file.

    Args:
        array: [M, ...], in memory or a memory-mapped file.
        index: the rows, int64 [N].
    """

    def __init__(self, array: np.ndarray, index: Tensor) -> None:
        self.array, self.index = array, index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.array[:1].nbytes * len(self)

    def to(self, device: torch.device) -> Tensor:
        """Return a copy on a device, which is made in parts."""
        copy = torch.empty(len(self), *self.array.shape[1:], dtype=as_tensor(self.array[:0]).dtype, device=device)
        for part, index in zip(copy.split(_PART), self.index.split(_PART), strict=True):
            part.copy_(torch.from_numpy(self.array[index.numpy()]))
        return copy


_PART = 2**12  # rows copied to a device at a time


def as_tensor(field: Tensor | np.ndarray) -> Tensor:
    """Return a tensor that shares the memory of an array."""
    with warnings.catch_warnings():  # of maps that are open for reading only, which is all that is done with them
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(field)


class InMemory:
    """Tensors [N, ...] that are indexed alike, in memory or in memory-mapped files: a micro-batch is one gather each.

    Args:
        fields: inputs first, targets last.
        pinned: hand out pinned memory, from which a GPU copies while the host goes on.

    Raises:
        ValueError: the tensors differ in length.
    """

    def __init__(self, fields: Sequence["Tensor | np.ndarray | Rows"], pinned: bool = False) -> None:
        self.mapped = any(isinstance(getattr(field, "array", field), np.memmap) for field in fields)
        self.fields = tuple(field if isinstance(field, Rows) else as_tensor(field) for field in fields)
        self.pinned = pinned
        self._spare: list[list[_Gather]] = []  # of epochs that are over; their memory is good for the next
        lengths = [len(field) for field in self.fields]
        if len(set(lengths)) != 1:
            raise ValueError(f"inputs and targets differ in length: {' and '.join(map(str, lengths))} examples")

    def __len__(self) -> int:
        return len(self.fields[0])

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return "mapped" if self.mapped else "resident" if not self.pinned else "pinned"

    @property
    def nbytes(self) -> int:
        """Bytes of all examples."""
        return sum(field.nbytes for field in self.fields)

    def on(self, device: torch.device, share: float) -> "InMemory":
        """Return the way to feed `device`: a copy there, where it takes at most `share` of what is free; or pinned."""
        if device.type != "cuda":
            return self
        if self.nbytes <= share * torch.cuda.mem_get_info(device)[0]:
            return InMemory([field.to(device) for field in self.fields])
        pinned = InMemory(self.fields, pinned=True)
        pinned.mapped = self.mapped
        return pinned

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Gather from each field by itself.

        A thread gathers ahead where the data goes to a GPU, and from when on it turns out to come from a disk: where it
        is in memory, it costs more to hand it over than to gather it.
        """
        gathers = self._spare.pop() if self._spare else [_Gather(field, self.pinned) for field in self.fields]
        reads, row_bytes = self._gather(requests, gathers), self.nbytes // max(1, len(self))
        if self.pinned:
            return _ahead(reads, row_bytes)
        return _ahead_if_slow(reads, row_bytes, gathers) if self.mapped else reads

    def _gather(self, requests: Iterable[Request], gathers: list["_Gather"]) -> Iterator[Read]:
        try:
            for request in requests:
                index = request.index
                if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self)):
                    raise IndexError(
                        f"examples {int(index.min())} to {int(index.max())} were asked for, of {len(self)}"
                    )
                for fields in zip(*(gather(request) for gather in gathers), strict=True):
                    yield fields, None
        finally:  # nobody asks for more than there is, so this generator is not exhausted but closed
            self._spare.append(gathers)


_BLOCK = 2**19  # bytes gathered at a time: about what stays in the cache of a core until it is used


class _Gather:
    """Gathers rows, into memory that is used again as soon as no tensor of it is left: fresh memory costs more."""

    def __init__(self, rows: Tensor | Rows, pinned: bool) -> None:
        self.which = rows.index if isinstance(rows, Rows) else None
        field = self.field = as_tensor(rows.array) if isinstance(rows, Rows) else rows
        self.pinned = pinned
        self.most = max(1, _BLOCK * len(field) // max(1, field.nbytes))
        # NumPy's gather is as fast as torch's, on one core, and needs no cores that others use. It has no bfloat16.
        # Of what is not contiguous it would first copy everything.
        plain = field.device.type == "cpu" and field.dtype != torch.bfloat16 and field.is_contiguous()
        self.rows = field.numpy() if plain else None
        self.arrays: list[np.ndarray] = []
        self.slow = False
        """The last gather took far longer than memory takes."""

    def __call__(self, request: Request) -> Iterator[Tensor]:
        """Yield the rows of each micro-batch; several are gathered at once, for a gather has a price of its own."""
        for index, sizes in _blocks(request, self.most):
            index = index if self.which is None else self.which.index_select(0, index)
            if len(sizes) > 1:
                yield from self._rows(index).split_with_sizes(sizes)
            else:
                yield self._rows(index)

    def _rows(self, index: Tensor) -> Tensor:
        """Return field[index] (which, written so, takes four times as long on a CPU)."""
        if self.pinned:  # torch itself uses pinned memory again, after the copy from it
            shape = len(index), *self.field.shape[1:]
            memory = torch.empty(shape, dtype=self.field.dtype, pin_memory=True)
            return torch.index_select(self.field, 0, index, out=memory)
        if self.rows is None:
            return self.field.index_select(0, index.to(self.field.device, non_blocking=True))
        array, start = self._memory(index.numel()), perf_counter()
        np.take(self.rows, index.numpy(), 0, out=array, mode="clip")  # "raise" would copy once more
        self.slow = perf_counter() - start > _SLOW + array.nbytes / _DISK
        return torch.from_numpy(array)

    def _memory(self, rows: int) -> np.ndarray:
        for array in self.arrays:
            # A tensor made of an array holds the array for as long as any view of the tensor lives.
            if sys.getrefcount(array) == _FREE and len(array) >= rows:
                return array if len(array) == rows else array[:rows]
        assert self.rows is not None
        array = np.empty((rows, *self.rows.shape[1:]), self.rows.dtype)
        self.arrays = [array, *self.arrays[: _KEPT - 1]]
        return array


_KEPT = 16  # buffers: one that is written, one that is read, and those that a thread has made ahead
_FREE = 3  # references to an array that nobody uses: the list's, the loop's, and the question's


def _ahead_if_slow(reads: Iterator[Read], row_bytes: int, gathers: list[_Gather]) -> Iterator[Read]:
    """Yield the reads, ahead of time as soon as a gather was slow."""
    for read in reads:
        slow = any(gather.slow for gather in gathers)
        yield read
        if slow:
            yield from _ahead(reads, row_bytes)


_SLOW, _DISK = 1e-3, 2.5e8  # seconds, and bytes per second: memory takes a tenth of either


def _ahead(reads: Iterator[Read], row_bytes: int, count: int = 2) -> Iterator[Read]:
    """Yield the reads, of which a thread makes up to `count` parcels of about `_PARCEL` bytes ahead of time.

    Args:
        reads: what is yielded.
        row_bytes: bytes of an example.
        count: parcels.
    """

    def parcel() -> list[Read]:
        made, size = [], 0
        for read in reads:
            made.append(read)
            size += row_bytes * len(read[0][0])
            if size >= _PARCEL:
                break
        return made

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(parcel) for _ in range(count))
        while made := waiting.popleft().result():
            waiting.append(thread.submit(parcel))
            yield from made


_PARCEL = 2**20  # bytes handed over at a time


def _blocks(request: Request, most: int) -> Iterable[tuple[Tensor, list[int]]]:
    """Return index and sizes of micro-batches that have up to `most` examples together, or of one."""
    blocks: list[list[int]] = []
    total = most
    for size in request.sizes:
        if not blocks or total + size > most:
            blocks.append([])
            total = 0
        blocks[-1].append(size)
        total += size
    return zip(request.index.split_with_sizes([sum(sizes) for sizes in blocks]), blocks, strict=True)


class Workers:
    """A map-style data set whose examples must be made one by one, in `num_workers` processes (0: in this one).

    `__getitems__(list of int)` is used where the data set has it; it returns a list of examples or, in a tuple, fields
    that are tensors of all of them. Workers get whole micro-batches, in order, and live as long as this object.

    What an example's code draws from the generators of torch, numpy and Python is a function of the seed and of the
    example's place in the epoch (with `__getitems__`: of the micro-batch's place).

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
        self.max_unreadable = max_unreadable
        self.unreadable: set[int] = set()
        self.num_workers = num_workers
        self._requests = _Requests()
        self._loader = DataLoader(
            _Reader(dataset),
            batch_size=None,
            sampler=self._requests,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the global one alone
        )

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return f"{self.num_workers} workers" if self.num_workers else "one by one"

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield the collated examples of each request.

        Raises:
            DataError: too many examples cannot be read, or a process died.
        """
        self._requests.current = (
            (part.tolist(), seed, position)
            for index, sizes, positions in requests
            for part, position in zip(index.split(sizes), positions, strict=True)
        )
        try:
            for fields, weights, problems in self._loader:
                for index, problem in problems.items():
                    self._leave_out(index, problem)
                yield fields, weights
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
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


class _Requests(Sampler):
    """What the workers are asked for in this epoch: they outlive it."""

    current: Iterable[tuple[list[int], int, int]] = ()

    def __iter__(self) -> Iterator[tuple[list[int], int, int]]:
        return iter(self.current)


class _Reader(Dataset):
    """Reads whole micro-batches of a data set, in whatever process it is in."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, request: tuple[list[int], int, int]) -> tuple[Example, Tensor | None, dict[int, str]]:
        """Return fields, weights (None: all one) and what cannot be read, by number of the example."""
        state = None if get_worker_info() else (torch.get_rng_state(), np.random.get_state(), random.getstate())
        try:
            return self._examples(*request)
        finally:
            if state is not None:  # this process draws from its generators for other ends
                torch.set_rng_state(state[0])
                np.random.set_state(state[1])
                random.setstate(state[2])

    def _examples(self, indices: list[int], seed: int, position: int) -> tuple[Example, Tensor | None, dict[int, str]]:
        whole = getattr(self.dataset, "__getitems__", None)
        if whole is not None:
            try:
                _seed(mix(seed, position))
                examples = whole(indices)
                return examples if isinstance(examples, tuple) else _collate(examples), None, {}
            except Exception:  # one of them: which, is found below
                pass
        examples = [self._read(index, mix(seed, position + place)) for place, index in enumerate(indices)]
        problems = {index: problem for index, (_, problem) in zip(indices, examples, strict=True) if problem}
        if not problems:
            return _collate([example for example, _ in examples]), None, {}
        # Another example keeps the place, with weight zero, so that shapes and positions stay what they were.
        others = chain(examples, (self._read(index, seed) for index in range(len(self.dataset))))  # type: ignore[arg-type]
        spare = next((example for example, problem in others if not problem), None)
        if spare is None:
            raise DataError(f"no example can be read; example {indices[0]}: {problems[indices[0]]}")
        kept = [spare if problem else example for example, problem in examples]
        return _collate(kept), torch.tensor([0.0 if problem else 1.0 for _, problem in examples]), problems

    def _read(self, index: int, seed: int) -> tuple[Any, str | None]:
        _seed(seed)
        try:
            return self.dataset[index], None
        except Exception as error:
            return None, f"{type(error).__name__}: {error}"


def _seed(seed: int) -> None:
    """Seed the generators that an example's code may draw from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # the legacy generator, which transforms draw from
    random.seed(seed)


def _as_it_is(item: Any) -> Any:
    return item


def _collate(examples: list[Any]) -> Example:
    fields = default_collate(examples)
    return tuple(fields) if isinstance(fields, list | tuple) else (fields,)


def make_fetch(
    source: Fetch | Dataset | Sequence[Tensor | np.ndarray | Rows], num_workers: int = 0, max_unreadable: int = 0
) -> Fetch:
    """Choose how to read `source`: tensors or arrays are gathered, a map-style data set is read example by example."""
    if isinstance(source, Tensor | np.ndarray):
        return InMemory((source,))
    if isinstance(source, tuple | list) and all(isinstance(field, Tensor | np.ndarray | Rows) for field in source):
        return InMemory(source)
    if hasattr(source, "stream"):
        return source  # type: ignore[return-value]
    return Workers(source, num_workers, max_unreadable)  # type: ignore[arg-type]
