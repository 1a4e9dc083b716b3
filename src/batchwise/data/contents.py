"""What the examples of a split are, in a few numbers, so that a resume on other examples is noticed."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from math import isfinite
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import read
from batchwise.batching.structure import named, rebuild, tensors

_PARTS = 64  # of a mapped file, so many examples, because each may be a read of the disk
_BUDGET = 2**26  # bytes, which take a tenth of a second


def contents_of(fetch: Fetch) -> dict[str, Any] | None:
    """Return a summary of examples that are in memory or in mapped files; None: they are elsewhere.

    Of many examples, it is that of some, evenly spaced. Whole numbers and texts give checksums. Floats give weighted
    sums, because another machine, or another precision, may round them otherwise.
    """
    count = len(fetch)
    if not hasattr(fetch, "nbytes") or not count:
        return None
    first = read(fetch, torch.zeros(1, dtype=torch.int64))
    row = max(sum(leaf.nbytes for leaf in tensors((first.inputs, first.targets))), fetch.nbytes / count, 1)  # type: ignore[attr-defined]
    most = max(_PARTS, 0 if getattr(fetch, "mapped", False) else int(_BUDGET / row))
    some = torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()
    fields: dict[str, list] = {}
    for index in some.chunk(_PARTS):
        batch = read(fetch, index)
        for name, leaf in named((batch.inputs, batch.targets)):
            fields.setdefault(name, []).append(_summary(leaf))
    return {"examples": len(fetch), "fields": fields}


def others(split: str, old: dict[str, Any] | None, new: dict[str, Any] | None) -> Iterator[str]:
    """Yield how the examples of a split differ from what they were; nothing, if one of both is not known."""
    if old is None or new is None:
        return
    if old["examples"] != new["examples"]:
        yield f"the {split} split: {old['examples']:,} -> {new['examples']:,} examples"
        return
    for name in old["fields"].keys() | new["fields"].keys():
        before, after = (one["fields"].get(name, []) for one in (old, new))
        if len(before) != len(after) or not all(map(_same, before, after)):
            yield f"the {split} split: {name} are not as they were"


def _summary(leaf: Any) -> int | list[float]:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        values = leaf.detach().cpu().double().flatten()
        size = float(values.norm(1))
        if not isfinite(size):
            values = values.nan_to_num(0.0, 0.0, 0.0)
            size = float(values.norm(1))
        return [float(values @ _weights(len(values))), size, float(leaf.itemsize)]
    return crc32(b"".join(_bytes(leaf)))


@lru_cache(2)
def _weights(count: int) -> Tensor:
    """Return a number from 1 to 2 for each place, so that values which change places change the sum."""
    return torch.arange(1, count + 1, dtype=torch.float64).mul_(0.618034).frac_().add_(1)


def _bytes(leaf: Any) -> Iterator[bytes]:
    if isinstance(leaf, Tensor):
        yield leaf.detach().cpu().numpy().tobytes()
    elif isinstance(leaf, list):
        found: list[Any] = []
        rebuild(leaf, found.append)
        yield from chain.from_iterable(map(_bytes, found))
    else:
        yield repr(leaf).encode()


def _same(one: int | list[float], other: int | list[float]) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    tolerance = 1e-5 if min(one[2], other[2]) >= 4 else 1e-2
    return abs(one[0] - other[0]) <= tolerance * max(one[1], other[1])
