"""Images in folders, one folder per class; or a list of image files with their labels."""

import os
from dataclasses import replace
from functools import cached_property
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.fetch import Rows
from batchwise.batching.loader import MicroBatch
from batchwise.data.labels import label_numbers, sorted_labels
from batchwise.data.split import Fractions
from batchwise.ranges import PositiveInt
from batchwise.sources.images import ImageFormat, Resize, cached_images, white_of
from batchwise.sources.layout import Listing, find_images, image_files

_COUNTED = 1024  # the most training images that mean and std are taken from
_LOOKED_AT = 64  # the most training images whose bits are looked at


class Folder(Fractions):
    """Images of any size and format that Pillow reads, and their classes.

    Inputs are [N, channels, height, width], normalised with mean and std of each channel over the training split (over
    1,024 of its images, if it has more). Targets are class numbers [N] of the sorted labels. Images are decoded once,
    into a memory-mapped cache. So an epoch costs no decoding, and the data may be larger than the memory.

    Args:
        path: a folder with a sub-folder of images per class; or a folder with train, val and test folders that have
            such sub-folders (without val, a fraction of train is taken); or a .csv, .tsv or .jsonl file with `path`,
            `label` and, if you like, `split`.
        size: height and width in pixels; one number: a square.
        channels: 3 (RGB) or 1 (grey).
        resize: crop (resize, then cut off both ends of the longer side), stretch, or pad with black.
        white: value that becomes white in images of more than 8 bits; null: the smallest of 255, 1,023, 4,095, 16,383
            and 65,535 that 64 of the training images do not exceed.
        cache: folder of the cache; null: `.cache` beside the images.
        predict_path: an image to predict, or a folder of images at any depth; null: the test split.
        **kwargs: those of `Fractions`. Up to `max_unreadable` images that cannot be read are left out.
    """

    shares_learnt = True

    @typed
    def __init__(
        self,
        path: str,
        size: int | tuple[int, int] = 64,
        channels: int = 3,
        resize: Resize = "crop",
        white: PositiveInt | None = None,
        cache: str | None = None,
        predict_path: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.format = ImageFormat.of(size, channels, resize)._replace(white=white)
        self.path, self.cache = Path(path).expanduser(), cache and expanduser(cache)
        self.predict_path = predict_path and expanduser(predict_path)
        self.has_predict_split = predict_path is not None

    def load(self, split: str) -> tuple[Rows, ...] | tuple[Rows, Tensor] | None:
        """Return images uint8 [N, C, H, W] in a memory map and class numbers [N]; just images for `predict_path`."""
        if split == "predict":
            return (Rows(self._to_predict[1], self._readable),)
        index = self._index.get(split)
        if index is None:
            return None
        return Rows(self._images[0], index), self._targets[index]

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Normalise on the device, so that bytes travel there and not floats."""
        inputs = batch.inputs.to(torch.get_default_dtype())
        mean, std = (inputs.new_tensor(self.learnt[name]).view(-1, 1, 1) for name in ("mean", "std"))
        return replace(batch, inputs=inputs.sub_(mean).div_(std))

    def learn(self) -> dict[str, Any]:
        """The labels, in the order of their numbers; mean and std of each channel, from 0 to 255."""
        mean, std = self._statistics
        return {"classes": sorted_labels(self._listing.labels), "mean": mean.tolist(), "std": std.tolist()} | {
            "white": self._format.white
        }

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return the path of each image."""
        if self.has_predict_split:
            names, numbers = self._to_predict[0], self._readable
        else:
            names, numbers = self._listing.names, self._index["test"]
        # Names need not be UTF-8, but a file of predictions is.
        return {"path": [os.fsencode(names[number]).decode(errors="replace") for number in numbers[index]]}

    def stored(self, split: str, index: Tensor) -> dict[str, list]:
        """Return the bytes of image files, and labels."""
        root, names, labels, _ = self._listing
        numbers = self._index[split][index].tolist()
        return {
            "image": [(root / names[number]).read_bytes() for number in numbers],
            "label": [labels[number] for number in numbers],
        }

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The labels that training has seen, in the order of their numbers. Labels that are numbers are sorted so."""
        return self.learnt["classes"]

    # Where the images are

    @cached_property
    def _listing(self) -> Listing:
        return find_images(self.path, train=not self.recalled)

    @cached_property
    def _targets(self) -> Tensor:
        return label_numbers(self._listing.labels, self._classes, f"data.path {self.path}")

    @property
    def _classes(self) -> list[str]:
        # What is learnt needs the targets, if the splits are fractions of each class.
        return self.learnt["classes"] if self.recalled else sorted_labels(self._listing.labels)

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        """The images of each split that can be read."""
        splits = np.array(self._listing.splits)
        parts = {split: torch.from_numpy((splits == split).nonzero()[0]) for split in np.unique(splits)}
        if not parts:
            parts = self.divide(self._targets)
        elif "train" in parts and "val" not in parts and self.fractions["val"]:
            train = parts["train"]
            parts |= {split: train[index] for split, index in self.divide(self._targets[train], test=False).items()}
        _, unreadable = self._images
        left_out = f", {len(unreadable):,} unreadable ones left out" if unreadable else ""
        names, white = self._classes, self._format.white
        bits = f", 0 to {white:,} become 0 to 255" if white is not None else ""
        classes = f"{len(names):,} classes: {', '.join(names[:10])}"
        self.say(f"{self.path}: {len(self._targets):,} images{left_out}{bits}, {classes}")
        readable = torch.tensor([name not in unreadable for name in self._listing.names])
        parts = {split: index[readable[index]] for split, index in parts.items()}
        if not self.recalled and not len(parts.get("train", ())):
            raise ValueError(f"data.path {self.path} has no images for training")
        return parts

    # What they look like

    @cached_property
    def _images(self) -> tuple[np.memmap, dict[str, str]]:
        return self._decoded(self._listing.root, self._listing.names)

    @cached_property
    def _to_predict(self) -> tuple[list[str], np.memmap, dict[str, str]]:
        root = Path(self.predict_path or "")
        root, names = (root.parent, [root.name]) if root.is_file() else (root, image_files(root))
        if not names:
            raise ValueError(f"data.predict_path {root} has no images")
        return names, *self._decoded(root, names)

    @cached_property
    def _readable(self) -> Tensor:
        names, _, unreadable = self._to_predict
        return torch.tensor([number for number, name in enumerate(names) if name not in unreadable])

    @cached_property
    def _format(self) -> ImageFormat:
        if self.format.white is not None:
            return self.format
        if self.recalled:
            return self.format._replace(white=self.learnt["white"])
        root, names, _, splits = self._listing
        train = [name for name, split in zip(names, splits or ["train"] * len(names), strict=True) if split == "train"]
        return self.format._replace(white=white_of(root / name for name in train[:: -(-len(train) // _LOOKED_AT) or 1]))

    def _decoded(self, root: Path, names: list[str]) -> tuple[np.memmap, dict[str, str]]:
        return cached_images(root, names, self._format, Path(self.cache or root / ".cache"), self.max_unreadable)

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        index, images = self._index["train"], self._images[0]
        some = index[:: -(-len(index) // _COUNTED)]
        parts = (images[part.numpy()].swapaxes(0, 1).reshape(images.shape[1], -1) for part in some.split(64))
        counts = np.sum([[np.bincount(channel, minlength=256) for channel in part] for part in parts], axis=0)
        share = counts / counts.sum(1, keepdims=True)
        mean = share @ np.arange(256)
        std = np.sqrt(share @ np.arange(256) ** 2 - mean**2).clip(1.0)
        return mean, std
