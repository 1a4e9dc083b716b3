"""Your data: where the examples are, and how the network gets them."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from batchwise import DataModule, MicroBatch
from batchwise.data.split import split_examples
from batchwise.sources.digits import read_digits


class Digits(DataModule):
    """Handwritten digits: 1,797 grey images of 8 x 8 pixels, from the copy inside scikit-learn.

    Args:
        val_fraction: share of the images for validation, of each digit alike.
        test_fraction: share of the images for the test.
        **kwargs: those of `DataModule`, such as `batch_size`. Pass them on, and the batch is taken care of.
    """

    def __init__(self, val_fraction: float = 0.15, test_fraction: float = 0.15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.val_fraction, self.test_fraction = val_fraction, test_fraction

    def load(self, split: str) -> tuple[Tensor, Tensor]:
        """Return all examples of a split, "train", "val" or "test": inputs first, targets last.

        Return tensors or NumPy arrays (memory maps too), or a map-style data set. Nothing is shuffled or batched here.
        """
        images, digits = read_digits()  # uint8 [1797, 1, 8, 8] with values 0 to 16, int64 [1797]: put yours here
        index = split_examples(digits, self.val_fraction, self.test_fraction, seed=0)[split]
        return images[index], digits[index]

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Return a micro-batch as the network takes it. This runs on the device, so that small bytes travel there.

        `batch.inputs` are [N, 1, 8, 8], `batch.targets` [N]. In training, `data.augment` is applied before it.
        """
        mean, std = 4.88, 6.02  # of the training images
        return replace(batch, inputs=(batch.inputs - mean) / std)
