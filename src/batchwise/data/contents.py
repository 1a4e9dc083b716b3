"""What the examples of a split are, in a few numbers, so that a resume on other examples is noticed."""

from collections.abc import Iterator
from datetime import date, time
from functools import lru_cache
from itertools import chain
from math import isfinite
from numbers import Complex, Real
from pathlib import PurePath
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import read
from batchwise.batching.structure import named, rebuild

_PARTS = 64
_BUDGET = 2**26  # bytes, which take a tenth of a second
_MOST_VALUES = 2**14  # examples, where they are values of Python
_KNOWN = (str, bytes, Real, Complex, date, time, PurePath, np.generic, type(None))
"""Types whose equal values have the same `repr` in every process."""


def contents_of(fetch: Fetch) -> dict[str, Any] | None:
    """Return a summary of examples that are in memory or in mapped files; None: they are elsewhere.

    It is of a few examples, evenly spaced, and of as many as are read in a tenth of a second if they are in memory.
    Whole numbers and texts give checksums. Floats give weighted sums, because another machine, or another precision,
    may round them otherwise.
    """
    count = len(fetch)
    if not hasattr(fetch, "nbytes") or not count:
        return None
    few = _evenly(count, _PARTS)
    samples = {len(few): _fields(fetch, few)}
    if not getattr(fetch, "mapped", False):  # else each example may be a read of the disk
        first = read(fetch, few)
        leaves = [leaf for _, leaf in named((first.inputs, first.targets))]
        row = sum(len(part) for leaf in leaves for part in _bytes(leaf)) / len(few)
        most = int(_BUDGET / max(1, row, fetch.nbytes / count))  # type: ignore[attr-defined]
        many = _evenly(count, min(most, _MOST_VALUES) if any(isinstance(leaf, list) for leaf in leaves) else most)
        if len(many) > len(few):
            samples[len(many)] = _fields(fetch, many)
    return {"examples": count, "samples": samples}


def others(split: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Iterator[str]:
    """Yield one line for each thing that has changed in a split. If a summary is missing, yield nothing."""
    if old is None or new is None:
        return
    if old["examples"] != new["examples"]:
        yield f"the {split} split: {old['examples']:,} -> {new['examples']:,} examples"
        return
    most = max(old["samples"].keys() & new["samples"].keys())
    one, other = old["samples"][most], new["samples"][most]
    for name in one.keys() | other.keys():
        before, after = one.get(name, []), other.get(name, [])
        if len(before) != len(after) or not all(map(_same, before, after)):
            yield f"the {split} split: {name} are not as they were"


def _evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, max(1, most)), dtype=torch.float64).round().long()


def _fields(fetch: Fetch, index: Tensor) -> dict[str, list]:
    fields: dict[str, list] = {}
    for part in index.chunk(_PARTS):
        batch = read(fetch, part)
        for name, leaf in named((batch.inputs, batch.targets)):
            fields.setdefault(name, []).append(_summary(leaf))
    return fields


def _summary(leaf: Any) -> int | list[float]:
    if isinstance(leaf, Tensor) and leaf.is_complex():
        leaf = torch.view_as_real(leaf)
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        values = leaf.detach().cpu().double().flatten()
        size = float(values.norm(1))
        if not isfinite(size):
            values = values.nan_to_num(0.0, 0.0, 0.0).clamp(-1e100, 1e100)
            size = float(values.norm(1))
        return [float(values @ _weights(len(values))), size, float(leaf.itemsize)]
    return crc32(b"".join(_bytes(leaf)))


@lru_cache(2)
def _weights(count: int) -> Tensor:
    """Return a number from 1 to 2 for each place, so that values which change places change the sum."""
    return torch.arange(1, count + 1, dtype=torch.float64).mul_(0.618034).frac_().add_(1)


def _bytes(leaf: Any) -> Iterator[bytes]:
    if isinstance(leaf, Tensor):
        values = leaf.detach().cpu()
        values = torch.view_as_real(values) if values.is_complex() else values
        yield (values.double() if values.is_floating_point() else values).numpy().tobytes()
    elif isinstance(leaf, list):
        found: list[Any] = []
        rebuild(leaf, found.append)
        yield from chain.from_iterable(map(_bytes, found))
    else:
        yield (repr(leaf) if isinstance(leaf, _KNOWN) else type(leaf).__name__).encode()


def _same(one: int | list[float], other: int | list[float]) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    tolerance = 1e-5 if min(one[2], other[2]) >= 4 else 1e-2
    return abs(one[0] - other[0]) <= tolerance * max(one[1], other[1])
