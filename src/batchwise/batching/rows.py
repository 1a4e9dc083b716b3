"""Rows of tensors and of files, gathered by their numbers."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchwise.batching.device import send


class Rows:
    """Some rows of an array, in an order of their own: a split of a large file, without a copy.

    Args:
        array: [M, ...], in memory or a memory-mapped file.
        index: the rows, int64 [N].
    """

    def __init__(self, array: np.ndarray, index: Tensor) -> None:
        self.mapped = isinstance(array, np.memmap)
        self.array, self.index = as_tensor(array), index

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        """Bytes of these rows."""
        return self.array[:1].nbytes * len(self)

    def to(self, device: torch.device) -> Tensor:
        """Return a copy of the rows on a device. It is copied in parts, so that the host needs little memory."""
        copy = torch.empty(len(self), *self.array.shape[1:], dtype=self.array.dtype, device=device)
        for part, index in zip(copy.split(_PART), self.index.split(_PART), strict=True):
            part.copy_(gather(self.array, index))
        return copy

    def gather(self, index: Tensor, pinned: bool) -> Tensor:
        """Return some of the rows."""
        return gather(self.array, self.index.index_select(0, index), pinned)


_PART = 2**12  # rows


class Joined:
    """Rows of several tensors, one after the other, without a copy.

    Args:
        parts: tensors, arrays or `Rows`, each [M, ...], of the same type and shape of a row.
    """

    def __init__(self, parts: Sequence[Tensor | np.ndarray | Rows]) -> None:
        self.mapped = any(map(is_mapped, parts))
        self.parts = [part if isinstance(part, Rows) else as_tensor(part) for part in parts]
        self.ends = torch.tensor([len(part) for part in parts]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)

    def to(self, device: torch.device) -> Tensor:
        """Return a copy on a device."""
        return torch.cat([part.to(device) for part in self.parts])

    def gather(self, index: Tensor, pinned: bool) -> Tensor:
        """Return some of the rows, int64 [N] on the host."""
        which = torch.bucketize(index, self.ends, right=True)
        order = which.argsort(stable=True)
        pieces, first = [], 0
        for part, places in zip(
            self.parts, order.split(which.bincount(minlength=len(self.parts)).tolist()), strict=True
        ):
            pieces.append(gather(part, index[places] - first))
            first += len(part)
        return gather(torch.cat(pieces), order.argsort(), pinned)


def as_tensor(field: Tensor | np.ndarray) -> Tensor:
    """Return a tensor on the host, which shares the memory of an array there.

    Raises:
        ValueError: no tensor can hold these values.
    """
    if isinstance(field, np.ma.MaskedArray):
        raise ValueError("load gave a masked array, whose mask a tensor cannot hold: write .filled(...) with a value")
    if isinstance(field, Tensor) and field.layout != torch.strided:
        raise ValueError(f"load gave a tensor of layout {field.layout}: write .to_dense()")
    if isinstance(field, Tensor) and (field.is_nested or field.is_meta):
        kind, instead = ("nested tensor", "Ragged(...)") if field.is_nested else ("tensor on meta", "one with values")
        raise ValueError(f"load gave a {kind}: write {instead}")
    with warnings.catch_warnings():  # about files that are mapped for reading only: nothing here writes to them
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        if isinstance(field, np.ndarray) and any(stride < 0 for stride in field.strides):
            field = field.copy()  # torch has no negative strides
        try:
            return torch.as_tensor(field).detach().cpu()  # examples do not learn
        except (TypeError, ValueError):  # ValueError: of another order of bytes
            raise ValueError(
                f"load gave an array of {field.dtype}, which no tensor can be: write .astype(...) with float32, int64 "
                "or another type that PyTorch has"
            ) from None


def is_mapped(leaf: Any) -> bool:
    """Return whether a leaf is in a file that is mapped into memory."""
    if getattr(leaf, "mapped", False):
        return True
    while leaf is not None and not isinstance(leaf, np.memmap):  # a view of a memory map is none
        leaf = getattr(leaf, "base", None)
    return leaf is not None


def gather(field: Tensor | Rows | Joined, index: Tensor, pinned: bool = False) -> Tensor:
    """Return field[index], on the device of the field. `index_select` takes a quarter of the time of `[]` on a CPU.

    Args:
        field: [M, ...].
        index: int64 [N], on the host.
        pinned: return pinned memory.
    """
    if isinstance(field, Rows | Joined):
        return field.gather(index, pinned)
    if field.dtype in _SIGNED:
        return gather(field.view(_SIGNED[field.dtype]), index, pinned).view(field.dtype)
    if pinned:
        out = torch.empty(len(index), *field.shape[1:], dtype=field.dtype, pin_memory=True)
        return torch.index_select(field, 0, index, out=out)
    return field.index_select(0, send(index, field.device))


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""The types of the same size for those that `index_select` lacks."""
