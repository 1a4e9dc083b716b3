"""Your data: where the examples are, and how the network gets them. Its arguments are the keys under `data`."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from batchwise import DataModule, MicroBatch
from batchwise.data.split import split_examples
from batchwise.sources.digits import read_digits


class Digits(DataModule):
    """Handwritten digits: 1,797 grey images of 8 x 8 pixels, which come with scikit-learn.

    Args:
        val_fraction: share of the images for validation, the same of each digit; 0: no validation.
        test_fraction: share of the images for the test; 0: no test.
        **kwargs: those of `DataModule`, such as `batch_size`. Pass them on, and the batch is taken care of.
    """

    def __init__(self, val_fraction: float = 0.15, test_fraction: float = 0.15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def load(self, split: str) -> tuple[Tensor, Tensor] | None:
        """Return all examples of a split, "train", "val" or "test": inputs first, targets last. None: there are none.

        Return tensors or NumPy arrays (also memory-mapped), or a map-style data set. Do not shuffle or batch them.
        """
        images, digits = read_digits()  # uint8 [1797, 1, 8, 8] with values 0 to 16, int64 [1797]: read yours here
        index = split_examples(digits, self.val_fraction, self.test_fraction, seed=0)[split]
        return (images[index], digits[index]) if len(index) else None

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Return a micro-batch as the network takes it: `batch.inputs` [N, 1, 8, 8] and `batch.targets` [N].

        This runs on the device, so that the images travel there as bytes. Most of `data.augment` runs before it.
        """
        mean, std = 4.88, 6.02  # of the training images: the network learns best from numbers around 0
        return replace(batch, inputs=(batch.inputs - mean) / std)
