"""From example numbers to tensors: a data set whose examples are made one by one, in worker processes."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from batchwise.batching.collate import Collate, checked, first, numbers, stack
from batchwise.batching.fetch import DataError, Example, Read, Request
from batchwise.batching.random import mix
from batchwise.origin import said

_Part = tuple[list[int], int, int]
"""The numbers of the examples of a micro-batch, the seed, and the position of the first in the epoch."""


class Workers:
    """A map-style data set, whose examples are made in `num_workers` processes (0: in this one).

    If the data set has `__getitems__(list of int)`, it is used. It returns a list of examples, or a tuple of fields of
    all of them. A worker makes a whole micro-batch. The workers live as long as this object.

    The random numbers that an example's code draws from torch, NumPy and Python are a function of the seed and of the
    example's position in the epoch (with `__getitems__`: of the position of the micro-batch).

    Args:
        dataset: has `__len__` and `__getitem__`.
        num_workers: number of processes.
        max_unreadable: number of examples that may be unreadable. They are reported, and get the weight zero.
        collate: makes the fields of a micro-batch from a list of its examples; None: `stack`.

    Raises:
        ValueError: the data set has no length or no items.
    """

    def __init__(
        self, dataset: Dataset, num_workers: int = 0, max_unreadable: int = 0, collate: Collate | None = None
    ) -> None:
        refuse(dataset)
        self.dataset = dataset
        self.max_unreadable = max_unreadable
        self.unreadable: set[int] = set()
        self.num_workers = num_workers
        self._collate = collate
        self._requests = _Requests()
        self._loader = DataLoader(
            _Reader(dataset, collate),
            batch_size=None,
            sampler=self._requests,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the global one alone
        )

    def __reduce__(self) -> tuple:  # a copy has processes of its own
        return Workers, (self.dataset, self.num_workers, self.max_unreadable, self._collate)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """Return how the data is fed, for the plan's table."""
        return f"{self.num_workers} workers" if self.num_workers else "one by one"

    def stream(self, requests: Iterable[Request], seed: int = 0) -> Iterator[Read]:
        """Yield the collated examples of each micro-batch. Several streams may be read in turn.

        Raises:
            DataError: too many examples cannot be read, they make no micro-batch, or a process died.
        """
        parts = (
            (part.tolist(), seed, position)
            for index, sizes, positions in requests
            for part, position in zip(index.split(sizes), positions, strict=True)
        )
        asked: deque[_Part] = deque()

        def coming() -> Iterator[_Part]:
            yield from list(asked)
            for part in parts:
                asked.append(part)
                yield part

        ousted = True
        try:
            while ousted:
                self._requests.current = mine = coming()
                ousted = False
                for made in self._loader:
                    asked.popleft()
                    if isinstance(made, str):  # of a worker, whose exception would come with its traceback
                        raise DataError(made)
                    fields, weights, problems = made
                    for index, problem in problems.items():
                        self._leave_out(index, problem)
                    yield fields, weights
                    # Another stream may have taken the workers since, as where a callback reads a few examples.
                    if ousted := self._requests.current is not mine:
                        break
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            if "with exit code" in f"{error} {error.__cause__}":
                raise DataError(
                    "a process that reads the data has ended by itself, for the reason above: data.num_workers 0 needs "
                    "no process; where they do not start as copies of this one (macOS, Windows), the data set is a "
                    "class in a file that can be imported, and a script trains within if __name__ == '__main__'"
                ) from error
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


def refuse(source: object) -> None:
    """Raise ValueError for what cannot be read by number; the message says what to give instead."""
    kind = type(source).__name__
    if isinstance(source, DataLoader):
        instead = (
            "return its data set, loader.dataset; batch_size, order and num_workers are keys under data, and its "
            "collate_fn is the method collate of the data module"
        )
    elif isinstance(source, IterableDataset | Iterator):
        instead = (
            "any example must be there by its number, so that order and resume are exact: return a list of its "
            "examples if they fit into memory, else a data set with __getitem__ and __len__"
        )
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        return
    else:
        instead = "return a tuple of inputs and targets, or a data set, which has both"
    missing = "" if isinstance(source, DataLoader) else ", which has no __getitem__ and __len__"
    article = "an" if kind[0].lower() in "aeiou" else "a"
    raise ValueError(f"load gave {article} {kind}{missing}: {instead}")


class _Requests(Sampler):
    """The requests of the current epoch: the workers outlive it, and so does their sampler."""

    current: Iterable[_Part] = ()

    def __iter__(self) -> Iterator[_Part]:
        return iter(self.current)


class _Reader(Dataset):
    """Reads whole micro-batches of a data set, in a worker or in this process."""

    def __init__(self, dataset: Dataset, collate: Collate | None) -> None:
        self.dataset, self.collate = dataset, collate
        self.at_once: Callable[[list[int]], Any] | None = getattr(dataset, "__getitems__", None)
        self.dtype = torch.get_default_dtype()  # some precisions set another one, for a part of the time

    def __getitem__(self, request: _Part) -> tuple[Example, Tensor | None, dict[int, str]] | str:
        """Return the fields, the weights (None: all one), and the error of each unreadable example by its number."""
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            return self._examples(*request)
        except DataError as error:
            if get_worker_info() is None:
                raise
            return str(error)
        finally:  # this process has other uses for its generators
            torch.set_default_dtype(dtype)
            torch.set_rng_state(state[0])
            np.random.set_state(state[1])
            random.setstate(state[2])

    def _examples(self, indices: list[int], seed: int, position: int) -> tuple[Example, Tensor | None, dict[int, str]]:
        failure = None
        if self.at_once is not None:
            try:
                _seed(mix(seed, position))
                examples = self.at_once(indices)
            except DataError:
                raise
            except Exception as error:  # perhaps of one unreadable example, which is found below
                failure = error
            else:
                return self._fields(examples, indices), None, {}
        examples = [self._read(index, mix(seed, position + place)) for place, index in enumerate(indices)]
        problems = {index: problem for index, (_, problem) in zip(indices, examples, strict=True) if problem}
        if not problems:
            if failure is not None:
                raise DataError(
                    f"{numbers(indices)} cannot be read at once, though each can be alone: __getitems__ raised "
                    f"{said(failure)}"
                ) from failure
            return self._fields([example for example, _ in examples], indices), None, {}
        # The first readable example takes the place, with weight zero, so that positions stay as they are. It must not
        # depend on the micro-batch, because ghost batch norm sees it, and a neighbour may be mixed with it.
        others = (self._read(index, seed) for index in range(len(self.dataset)))  # type: ignore[arg-type]
        spare = next((example for example, problem in others if not problem), None)
        if spare is None:
            raise DataError(f"no example can be read; example {indices[0]}: {problems[indices[0]]}") from failure
        kept = [spare if problem else example for example, problem in examples]
        weights = torch.tensor([0.0 if problem else 1.0 for _, problem in examples])
        return self._fields(kept, indices), weights, problems

    def _read(self, index: int, seed: int) -> tuple[Any, str | None]:
        """Return an example, or why it cannot be read."""
        _seed(seed)
        try:
            if self.at_once is None:
                return self.dataset[index], None
            made = self.at_once([index])
            return first(made) if isinstance(made, tuple) else made[0], None
        except DataError:
            raise
        except Exception as error:
            return None, said(error)

    def _fields(self, examples: Any, indices: list[int]) -> Example:
        """Return the fields of a micro-batch from a list of its examples, or from what is already fields."""
        if isinstance(examples, tuple):
            return checked(examples, indices, "__getitems__")
        if self.collate is None:
            made = stack(examples, indices)
            return made if isinstance(made, tuple) else (made,)
        try:
            made = self.collate(examples)
        except Exception as error:
            raise DataError(f"{numbers(indices)} cannot be put together: collate raised {said(error)}") from error
        return checked(made, indices, "collate")


def _seed(seed: int) -> None:
    """Seed the global generators, which an example's code may draw from."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # the legacy generator, which many transforms use
    random.seed(seed)


def _as_it_is(item: Any) -> Any:
    return item
