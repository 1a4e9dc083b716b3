"""Splits as random fractions of each class, which depend on the labels and a seed alone."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.data.labels import class_numbers
from batchwise.data.module import DataModule

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
}
"""Our names of the splits, by the names that files give them."""


def split_examples(
    labels: Tensor | np.ndarray | Sequence[Any],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    most_per_class: int | None = None,
) -> dict[str, Tensor]:
    """Return the numbers of the examples of each split, int64 [n], sorted. Each split has each class in its proportion.

    If the classes are too small for that, and a split would miss its size by more than a fifth, it is drawn from all
    classes together: then it has one example or more, and of each class its share, rounded down or up.

    The same labels and seed give the same splits. A label more or less moves other examples, too: where data grow, keep
    the split of each example with the data.

    Args:
        labels: class of each example, numbers or texts [N]; all the same if there are no classes.
        val_fraction: share of the examples for validation; 0: none.
        test_fraction: share of the examples for the test; 0: none.
        seed: decides which examples are in which split.
        most_per_class: the most training examples of each class; None: all.

    Raises:
        ValueError: there is not one label for each example, or the fractions or the seed are out of range.
    """
    check_split(val_fraction, test_fraction, seed)
    classes = class_numbers(labels)
    generator = torch.Generator().manual_seed(int(seed))
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for members in _by_class(torch.arange(len(classes)), classes):
        members = members[torch.randperm(len(members), generator=generator)]
        val, test = (round(fraction * len(members)) for fraction in (val_fraction, test_fraction))
        for split, index in zip(parts, members.split([len(members) - val - test, val, test]), strict=True):
            parts[split].append(index)
    found = {split: torch.cat(index) for split, index in parts.items()}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        count, free = max(1, round(fraction * len(classes))), len(found["train"]) + len(found[split])
        # Where the share of each class is 2.5 or more, rounding misses by a fifth at most.
        if fraction and abs(len(found[split]) - count) > count / 5 and free > count:
            both = torch.cat([found["train"], found[split]])
            found[split], found["train"] = _draw(both, classes, count, generator)
    if not len(found["train"]):  # shares that are rounded up have taken all
        largest = max(("val", "test"), key=lambda split: len(found[split]))
        found["train"], found[largest] = found[largest][:1], found[largest][1:]
    if most_per_class is not None:
        found["train"] = torch.cat([index[:most_per_class] for index in _by_class(found["train"], classes)])
    return {split: index.sort().values for split, index in found.items()}


def check_split(val_fraction: float, test_fraction: float, seed: int) -> None:
    """Check how examples are to be divided.

    Raises:
        ValueError: the fractions leave no training examples, or the seed is no whole number of 64 bits.
    """
    fractions = (val_fraction, test_fraction)
    val, test, number = ("null" if value is None else value for value in (*fractions, seed))
    if not (all(isinstance(fraction, Real) and fraction >= 0 for fraction in fractions) and sum(fractions) < 1):
        raise ValueError(
            f"data.val_fraction {val} and data.test_fraction {test} leave no training examples: "
            "write two fractions from 0 that add up to less than 1"
        )
    if not (isinstance(seed, Integral) and abs(seed) < 2**63):
        raise ValueError(f"data.split_seed is {number}: write a whole number below 2^63, such as 0")


def _by_class(index: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
    """Return the examples of each class, in the order in which they are given."""
    given = classes[index]
    return index[given.argsort(stable=True)].split(given.bincount().tolist())


def _draw(index: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `count` of the examples, with each class in its proportion, rounded down or up; and the others."""
    # Evenly spaced places in a row of class after class: of any neighbours they take the share, rounded down or up.
    index = index[torch.randperm(len(index), generator=generator)]
    turn = torch.randperm(int(classes.max()) + 1, generator=generator)
    index = index[turn[classes[index]].argsort(stable=True)]
    start = torch.randint(len(index), (), generator=generator)
    drawn = torch.zeros(len(index), dtype=torch.bool)
    drawn[(torch.arange(count) * len(index) + start) // count] = True
    return index[drawn], index[~drawn]


class Fractions(DataModule):
    """A data module that can divide one set of examples into splits.

    Args:
        val_fraction: share of the examples for validation, if the data has no such split; 0: no validation.
        test_fraction: share of the examples for the test, if the data has no such split; 0: no test.
        split_seed: decides which examples are in which split. It is not `seed`, so that runs with different seeds are
            comparable.
        **kwargs: those of `DataModule`.
    """

    @typed
    def __init__(self, val_fraction: float = 0.15, test_fraction: float = 0.15, split_seed: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        check_split(val_fraction, test_fraction, split_seed)
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed

    def divide(
        self, labels: Tensor | np.ndarray | Sequence[Any], test: bool = True, most_per_class: int | None = None
    ) -> dict[str, Tensor]:
        """Return the numbers of the examples of each split; a fraction of 0 makes no split.

        Args:
            labels: class of each example, numbers or texts [N].
            test: make a test split too.
            most_per_class: the most training examples of each class; None: all.

        Raises:
            ValueError: there is not one label for each example.
        """
        fractions = self.fractions if test else self.fractions | {"test": 0.0}
        parts = split_examples(labels, fractions["val"], fractions["test"], self.split_seed, most_per_class)
        self._note_division(
            fractions, {"examples": len(labels), "checksum": crc32(class_numbers(labels).numpy().tobytes())}
        )
        return {split: index for split, index in parts.items() if fractions.get(split, 1) > 0}

    def _note_division(self, fractions: dict[str, float], others: dict[str, Any] | None = None) -> None:
        """Keep what decides the division into splits. It goes into checkpoints, and `check_division` compares it."""
        shares = {f"data.{split}_fraction": share for split, share in fractions.items()}
        self._division = (others or {}) | shares | {"data.split_seed": self.split_seed}

    def _remedy(self, split: str) -> str:
        if self.fractions.get(split):
            return f" (the data comes in splits, so data.{split}_fraction does nothing: add {split} to the data)"
        return super()._remedy(split)

    def say(self, line: str) -> None:
        """Print a line, once for all devices."""
        if self.trainer is None or self.trainer.is_global_zero:
            print(line, flush=True)
