"""Splits as random fractions of each class, which depend on a seed alone."""

import torch
from torch import Tensor

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
    labels: Tensor, val_fraction: float, test_fraction: float, seed: int, most_per_class: int | None = None
) -> dict[str, Tensor]:
    """Return the numbers of the examples of each split, sorted. Each split has each class in its proportion.

    If the classes are too small for that, a split is drawn from all classes together, and has one example or more.

    Args:
        labels: class of each example, integers [N]; all the same if there are no classes.
        val_fraction: share of the examples for validation.
        test_fraction: share of the examples for the test.
        seed: decides which examples are in which split.
        most_per_class: the most training examples of each class; None: all.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        val, test = (round(fraction * len(members)) for fraction in (val_fraction, test_fraction))
        for split, index in zip(parts, members.split([len(members) - val - test, val, test]), strict=True):
            parts[split].append(index[:most_per_class] if split == "train" else index)
    found = {split: torch.cat(index) for split, index in parts.items()}
    for split, fraction in (("val", val_fraction), ("test", test_fraction)):
        count = max(1, round(fraction * len(labels)))
        # Where each class is too small for its share, all classes give one together.
        if fraction and not len(found[split]) and len(found["train"]) > count:
            order = torch.randperm(len(found["train"]), generator=generator)
            found[split], found["train"] = found["train"][order].split([count, len(order) - count])
    return {split: index.sort().values for split, index in found.items()}


class Fractions(DataModule):
    """A data module that can divide one set of examples into splits.

    Args:
        val_fraction: share of the examples for validation, if the data has no such split; 0: no validation.
        test_fraction: share of the examples for the test, if the data has no such split; 0: no test.
        split_seed: decides which examples are in which split. It is not `seed`, so that runs with different seeds are
            comparable.
        **kwargs: those of `DataModule`.
    """

    def __init__(self, val_fraction: float = 0.15, test_fraction: float = 0.15, split_seed: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave no training examples: "
                "write two fractions from 0 that add up to less than 1"
            )
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed

    def divide(self, labels: Tensor, test: bool = True, most_per_class: int | None = None) -> dict[str, Tensor]:
        """Return the numbers of the examples of each split; a fraction of 0 makes no split.

        Args:
            labels: class of each example, integers [N].
            test: make a test split too.
            most_per_class: the most training examples of each class; None: all.
        """
        fractions = self.fractions if test else self.fractions | {"test": 0.0}
        parts = split_examples(labels, fractions["val"], fractions["test"], self.split_seed, most_per_class)
        return {split: index for split, index in parts.items() if fractions.get(split, 1) > 0}

    def say(self, line: str) -> None:
        """Print a line, once for all devices."""
        if self.trainer is None or self.trainer.is_global_zero:
            print(line, flush=True)
