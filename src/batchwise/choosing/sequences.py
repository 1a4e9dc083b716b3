"""Sequences of tokens, as `inspect` shows them: their lengths, their padding and their text."""

from statistics import median
from typing import Protocol, runtime_checkable

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from batchwise.batching.loader import MicroBatch
from batchwise.choosing.look import main_field
from batchwise.data.module import DataModule

EXAMPLES, CHARACTERS = 4, 240  # most that are shown


@runtime_checkable
class Decodes(Protocol):
    """A data module whose inputs are tokens."""

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens [T]."""
        ...


def are_unequal(data: DataModule) -> bool:
    """Return whether inputs are sequences [N, T], and no rows of a table."""
    return isinstance(data, Decodes) or hasattr(data.split("train"), "lengths")


def are_tokens(data: DataModule) -> bool:
    """Return whether inputs are sequences of whole numbers."""
    first = main_field(data.examples("train", 1).inputs)
    return are_unequal(data) and isinstance(first, Tensor) and not first.is_floating_point()


class Sequences:
    """The lengths of sequences, and the places that micro-batches have for them, padding included."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.places = 0

    def add(self, tokens: Tensor | list) -> None:
        """Take a micro-batch [N, T] with -1 for padding."""
        assert isinstance(tokens, Tensor)
        self.lengths += (tokens >= 0).sum(1).tolist()
        self.places += tokens.numel()

    def figures(self) -> dict[str, str]:
        """Return the figures by name, as text."""
        low, high, mean = min(self.lengths), max(self.lengths), sum(self.lengths) / len(self.lengths)
        return {
            "tokens per sequence": f"{low:,} to {high:,}, mean {mean:,.1f}, median {median(self.lengths):,.0f}",
            "padding": f"{1 - sum(self.lengths) / self.places:.1%} of the tokens in micro-batches",
        }


def texts(data: Decodes, batch: MicroBatch) -> Table:
    """Return the first examples of a batch as text.

    Args:
        data: decodes.
        batch: as the network sees it.
    """
    table = Table("example", "as the network sees it", box=None, title="text")
    for number, tokens in zip(batch.index.tolist(), main_field(batch.inputs)[:EXAMPLES], strict=False):
        text = repr(data.decode(tokens))[1:-1]
        table.add_row(str(number), escape(text[:CHARACTERS] + "..." * (len(text) > CHARACTERS)))
    return table
