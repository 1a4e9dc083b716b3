"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels in 10 classes, on every machine."""

from dataclasses import replace
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.data.split import Fractions
from batchwise.ranges import PositiveInt


@cache
def read_digits() -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [1797, 1, 8, 8] with values 0 to 16, and their digits, int64 [1797]."""
    # The file is read directly, because importing scikit-learn takes longer than training.
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 8, 8).contiguous(), table[:, -1].long()


class Digits(Fractions):
    """Handwritten digits (Alpaydin and Kaynak 1998), from the copy inside scikit-learn.

    Inputs are grey values [N, 1, 8, 8], normalised with mean and std of the training split. Targets are the digits [N].
    Each split has each digit in its proportion.

    Args:
        classes: only these digits; the target of a digit is its place in this list; null: all ten.
        examples_per_class: the most training images of each digit; null: all.
        **kwargs: those of `Fractions`.
    """

    @typed
    def __init__(
        self, classes: list[int] | None = None, examples_per_class: PositiveInt | None = None, **kwargs
    ) -> None:
        super().__init__(**kwargs)
        self.classes = list(range(10)) if classes is None else classes
        if not self.classes or sorted(set(self.classes) & {*range(10)}) != sorted(self.classes):
            raise ValueError(f"data.classes is {classes}: write different digits from 0 to 9")
        self.examples_per_class = examples_per_class

    def load(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Return images uint8 [N, 1, 8, 8] with values 0 to 16 and targets int64 [N]."""
        if split not in self._index:
            return None
        (images, digits), index = read_digits(), self._index[split]
        targets = torch.empty(10, dtype=torch.int64)
        targets[self.classes] = torch.arange(len(self.classes))
        return images[index], targets[digits[index]]

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Normalise on the device, so that bytes travel there and not floats."""
        mean, std = self.learnt["mean"], self.learnt["std"]
        return replace(batch, inputs=batch.inputs.to(torch.get_default_dtype()).sub_(mean).div_(std))

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        digits, wanted = read_digits()[1], torch.tensor(self.classes)
        parts = self.divide(digits, most_per_class=self.examples_per_class)
        return {split: index[torch.isin(digits[index], wanted)] for split, index in parts.items()}

    def learn(self) -> dict[str, Any]:
        """Mean and std of the training images, from 0 to 16."""
        images = read_digits()[0][self._index["train"]].double()
        return {"mean": images.mean().item(), "std": images.std().item()}

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The digits, in the order of their numbers as targets."""
        return [str(digit) for digit in self.classes]
