"""Images in folders, one folder per class; or a list of image files with their labels."""

import csv
import json
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from batchwise.batching.fetch import Rows
from batchwise.batching.loader import MicroBatch
from batchwise.data.labels import label_numbers, sorted_labels
from batchwise.data.split import ALIASES, Fractions
from batchwise.sources.images import ImageFormat, Resize, cached_images

_COUNTED = 1024  # the most training images that mean and std are taken from


class Listing(NamedTuple):
    """Image files by their names in `root`, their labels, and their splits if the data has splits."""

    root: Path
    names: list[str]
    labels: list[str]
    splits: list[str]


class Folder(Fractions):
    """Images of any size and format that Pillow reads, and their classes.

    Inputs are [N, channels, height, width], normalised with mean and std of each channel over the training split (over
    1,024 of its images, if it has more). Targets are class numbers [N] of the sorted labels. Images are decoded once,
    into a memory-mapped cache. So an epoch costs no decoding, and the data may be larger than the memory.

    Args:
        path: a folder with a sub-folder of images per class; or a folder with train, val and test folders that have
            such sub-folders (without val, a fraction of train is taken); or a .csv or .jsonl file with `path`, `label`
            and, if you like, `split`.
        size: height and width in pixels; one number: a square.
        channels: 3 (RGB) or 1 (grey).
        resize: crop (resize, then cut off both ends of the longer side), stretch, or pad with black.
        cache: folder of the cache; null: `.cache` beside the images.
        predict_path: a folder of images to predict, at any depth; null: the test split.
        **kwargs: those of `Fractions`. Up to `max_unreadable` images that cannot be read are left out.
    """

    def __init__(
        self,
        path: str,
        size: int | tuple[int, int] = 64,
        channels: int = 3,
        resize: Resize = "crop",
        cache: str | None = None,
        predict_path: str | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.format = ImageFormat.of(size, channels, resize)
        self.path, self.cache, self.predict_path = Path(path), cache, predict_path
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
        return {"classes": sorted_labels(self._listing.labels), "mean": mean.tolist(), "std": std.tolist()}

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return the path of each image."""
        if self.has_predict_split:
            names, numbers = self._to_predict[0], self._readable
        else:
            names, numbers = self._listing.names, self._index["test"]
        return {"path": [names[number] for number in numbers[index]]}

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The labels that training has seen, in the order of their numbers. Labels that are numbers are sorted so."""
        return self.learnt["classes"]

    # Where the images are

    @cached_property
    def _listing(self) -> Listing:
        if self.path.is_file():
            listing = listed(self.path)
        elif self.path.is_dir():
            listing = Listing(self.path, [], [], [])
            folders = subfolders(self.path)
            known = [name for name in folders if name in ALIASES]
            by_split = known == folders and (self.recalled or any(ALIASES[name] == "train" for name in known))
            for top in folders if by_split else [""]:
                for label in subfolders(self.path / top):
                    for name in image_files(self.path / top / label):
                        listing.names.append(os.path.join(top, label, name))
                        listing.labels.append(label)
                        listing.splits.extend([ALIASES[top]] if by_split else [])
        else:
            raise ValueError(f"data.path {self.path} does not exist: write a folder, or a .csv or .jsonl file")
        if not listing.names:
            raise ValueError(f"data.path {self.path} has no images: write a folder that has one sub-folder per class")
        return listing

    @cached_property
    def _targets(self) -> Tensor:
        return torch.from_numpy(label_numbers(self._listing.labels, self._classes, f"data.path {self.path}"))

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
        names = self._classes
        self.say(
            f"{self.path}: {len(self._targets):,} images{left_out}, {len(names):,} classes: {', '.join(names[:10])}"
        )
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
        names = image_files(root)
        if not names:
            raise ValueError(f"data.predict_path {root} has no images")
        return names, *self._decoded(root, names)

    @cached_property
    def _readable(self) -> Tensor:
        names, _, unreadable = self._to_predict
        return torch.tensor([number for number, name in enumerate(names) if name not in unreadable])

    def _decoded(self, root: Path, names: list[str]) -> tuple[np.memmap, dict[str, str]]:
        return cached_images(root, names, self.format, Path(self.cache or root / ".cache"), self.max_unreadable)

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


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[str]:
    """Return the names of the images in a folder, at any depth, sorted, without hidden ones."""
    kinds, found = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}, []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(parent, name) for name in files if os.path.splitext(name)[1].lower() in kinds]
    return sorted(os.path.relpath(path, folder) for path in found if not os.path.basename(path).startswith("."))


def listed(path: Path) -> Listing:
    """Return the images that a CSV or JSON-lines file lists. Their paths are relative to the file.

    Raises:
        ValueError: it is no such file, or a row lacks path or label, or has an unknown split.
    """
    with path.open(newline="") as file:
        try:
            lines = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            rows = list(lines)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"data.path {path} cannot be read as CSV (.csv) or JSON-lines: {error}") from error
    for number, row in enumerate(rows, 1):
        for key in ("path", "label"):
            if not isinstance(row, dict) or row.get(key) in (None, ""):
                raise ValueError(f"row {number} of {path} has no {key}: write `path` and `label` in each")
        if row.get("split", "train") not in ALIASES:
            raise ValueError(f"row {number} of {path} has the split '{row['split']}': write train, val or test")
    splits = [ALIASES[row["split"]] for row in rows if "split" in row]
    if len(splits) not in (0, len(rows)):
        raise ValueError(f"{len(rows) - len(splits):,} rows of {path} have no split: write it in all or in none")
    return Listing(path.parent, [row["path"] for row in rows], [str(row["label"]) for row in rows], splits)
