"""Data sets that the library `datasets` of Hugging Face reads: from the hub, or from local files without a network."""

from dataclasses import replace
from functools import cached_property
from io import BytesIO
from math import prod
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.data.labels import check_alike, label_numbers, sorted_labels
from batchwise.data.split import ALIASES, Fractions
from batchwise.errors import optional
from batchwise.sources.checking import check_column, check_images, plain_column
from batchwise.sources.columns import is_date, is_list, numbers
from batchwise.sources.images import ImageFormat, Resize

FILES = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}


class Hub(Fractions):
    """A data set of numbers, arrays of one shape, or images, from the hub by name or from local files.

    Each read is a whole micro-batch, in one of `num_workers` processes. The rest of the data is not in memory. Columns
    with one number per example become inputs [N, F]. Arrays are [N, ...]. Images are [N, channels, height, width], from
    -1 to 1. Targets are class numbers [N] (of the sorted labels, if labels are text), or float64. Dates and durations
    are days.

    Data that stays in an object store is read by `batchwise.sources.shards.Shards`.

    Args:
        source: a .parquet, .json, .jsonl, .csv or .arrow file; a folder of such files, or of images by class; a folder
            that `save_to_disk` wrote; or the name of a data set on the hub, which is downloaded.
        inputs: the column or columns that the network takes.
        target: the column to predict.
        name: name of the data set's configuration, if it has several.
        revision: a commit of the data set on the hub, so that the data cannot change.
        size: height and width of images in pixels; one number: a square.
        channels: channels of images: 3 (RGB) or 1 (grey).
        resize: crop (resize, then cut off both ends of the longer side), stretch, or pad with black.
        **kwargs: those of `Fractions`.
    """

    shares_learnt = True

    @typed
    def __init__(
        self,
        source: str,
        inputs: str | list[str],
        target: str = "label",
        name: str | None = None,
        revision: str | None = None,
        size: int | tuple[int, int] = 64,
        channels: int = 3,
        resize: Resize = "crop",
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.source, self.name, self.revision = expanduser(source), name, revision
        self.inputs, self.target = [inputs] if isinstance(inputs, str) else inputs, target
        self.format = ImageFormat.of(size, channels, resize)

    def load(self, split: str) -> "Columns | None":
        """Return the examples of a split. They are read when they are needed."""
        return self._parts.get(split)

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Scale images on the device, so that bytes travel there and not floats."""
        if not self._images:
            return batch
        return replace(batch, inputs=batch.inputs.to(torch.get_default_dtype()).div_(127.5).sub_(1))

    def stored(self, split: str, index: Tensor) -> dict[str, Any]:
        """Return the columns that shards get: the bytes of image files, other values as they are, and labels as texts.

        Args:
            split: name of the split.
            index: numbers of examples within the split, int64 [N].
        """
        part = self._parts[split]
        rows = part.rows(index.tolist())
        if part.is_image:
            (name,) = self.inputs
            rows[name] = [image["bytes"] or Path(image["path"]).read_bytes() for image in rows[name]]
        if part.names is not None:
            rows[self.target] = [part.names[number] for number in rows[self.target]]
        return rows

    def labels(self) -> Tensor | None:
        """Return the training targets [examples] if they are whole numbers."""
        train = self.load("train")
        if train is None:
            return None
        targets = train.targets()
        return None if targets.is_floating_point() or targets.ndim > 1 else targets

    @cached_property
    def _sets(self) -> dict[str, Any]:
        """The data sets by split."""
        datasets = optional("datasets", "hub")
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else the hub hears of each use, even of local files
        path = Path(self.source)
        try:
            if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
                found = datasets.load_from_disk(str(path))
            elif path.suffix in FILES:
                if not path.is_file():
                    raise FileNotFoundError("there is no such file")
                found = datasets.load_dataset(FILES[path.suffix], data_files=str(path))
            else:
                found = datasets.load_dataset(self.source, self.name, revision=self.revision)
        except Exception as error:  # a dozen libraries raise their own
            reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"data.source {self.source} cannot be read: {reason}") from error
        sets = dict(found) if isinstance(found, dict) else {"train": found}
        sets = {ALIASES[name]: part for name, part in sets.items() if name in ALIASES}
        if "train" not in sets:
            raise ValueError(f"data.source {self.source} has no training split: it has {', '.join(found)}")
        for column in (*self.inputs, self.target):
            if column not in sets["train"].features:
                raise ValueError(
                    f"data.source {self.source} has no column '{column}': write data.inputs and data.target from "
                    f"{', '.join(sets['train'].features)}"
                )
        return sets

    def learn(self) -> dict[str, Any]:
        """The labels, in the order of their numbers; None if targets are numbers."""
        return {"classes": self._labels}

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The labels that training has seen, in the order of their numbers; None if targets are numbers."""
        return self.learnt["classes"]

    @cached_property
    def _labels(self) -> list[str] | None:
        feature = self._sets["train"].features[self.target]
        if hasattr(feature, "names"):
            return feature.names
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            return None
        labels = {label for part in self._sets.values() for label in part.unique(self.target) if label is not None}
        check_alike(labels, f"column '{self.target}'")
        return sorted_labels(labels)

    @property
    def _images(self) -> bool:
        features = self._sets["train"].features
        return any(type(features[column]).__name__ == "Image" for column in self.inputs)

    @cached_property
    def _parts(self) -> dict[str, "Columns"]:
        if self._images and len(self.inputs) > 1:
            raise ValueError(
                f"data.inputs {self.inputs} has images beside another column: write one column, or combine them in "
                "a data module of your own"
            )
        for split, part in self._sets.items():
            for name in (*self.inputs, self.target):
                where = f"column '{name}' of the {split} split"
                if self._images and name != self.target:
                    check_images(_arrow(part, name), where)
                else:
                    check_column(_arrow(part, name), where, "label" if name == self.target else "input")
        parts = {split: Columns(part, self) for split, part in self._sets.items()}
        if "val" not in parts or len(parts) == 1:
            train = parts["train"]
            labels = train.targets() if self.class_names else torch.zeros(len(train))
            for split, index in self.divide(labels, test=len(parts) == 1).items():
                parts[split] = Columns(train.dataset, self, index)
        return parts


def _arrow(dataset: Any, name: str) -> Any:
    """Return a column, without reading more of the file than that."""
    return dataset.with_format("arrow")[name] if dataset._indices else dataset.data.column(name)


class Columns(Dataset):
    """Examples of a data set of Hugging Face, as inputs and targets: all of them, or those in `index`."""

    def __init__(self, dataset: Any, data: Hub, index: Tensor | None = None) -> None:
        self.dataset, self.index = dataset, torch.arange(len(dataset)) if index is None else index
        self.inputs, self.target, self.format = data.inputs, data.target, data.format
        self.is_image = data._images
        self.known = list(data.class_names or ())
        # The numbers of labels are those of this data set, and training may have given them other numbers.
        self.names: list[str] | None = getattr(dataset.features[self.target], "names", None)
        view = dataset.select_columns([*self.inputs, self.target])
        if self.is_image:
            (column,) = self.inputs
            view = view.cast_column(column, type(dataset.features[column])(decode=False))
        # As numbers of NumPy, the library would round float64 to float32.
        self.view = view.with_format("arrow")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[Tensor, ...]:
        """Return the fields of one example."""
        return tuple(field[0] for field in self.__getitems__([number]))

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, ...]:
        """Return the fields of some examples, [N, ...] each."""
        rows = self.rows(numbers)
        if self.is_image:
            files = [
                BytesIO(image["bytes"]) if image["bytes"] else Path(image["path"]) for image in rows[self.inputs[0]]
            ]
            inputs = [torch.from_numpy(self.format.decode_all(files))]
        else:
            inputs = [torch.from_numpy(rows[name].astype(np.float32)) for name in self.inputs]
            if all(column.ndim == 1 for column in inputs):
                inputs = [torch.stack(inputs, 1)]
        return *inputs, self._targets(rows[self.target])

    def rows(self, numbers: list[int]) -> dict[str, Any]:
        """Return the columns of some examples by name: arrays [N, ...], or lists of images or texts."""
        rows = self.view[self.index[numbers].tolist()]
        return {name: _values(rows[name], name) for name in rows.column_names}

    def targets(self) -> Tensor:
        """Return the targets of all examples, [N]."""
        return self._targets(_values(_arrow(self.view, self.target), self.target))[self.index]

    def _targets(self, values: np.ndarray | list) -> Tensor:
        if self.known:
            names = self.names
            labels = list(values) if names is None else [names[number] for number in values]
            return label_numbers(labels, self.known, f"column '{self.target}'")
        numbers = np.asarray(values)
        return torch.from_numpy(numbers.astype(np.float64 if numbers.dtype.kind == "f" else np.int64))


def _values(column: Any, name: str) -> np.ndarray | list:
    """Return a column of Arrow as numbers [N, ...], as days for dates and durations, or as a list."""
    from pyarrow import chunked_array, compute, types

    values, shape = plain_column(column), [len(column)]
    while is_list(values):
        values = plain_column(compute.list_flatten(values))  # type: ignore[attr-defined]
        shape.append(len(values) // prod(shape))
    kind = values.type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind):
        return values.to_numpy(zero_copy_only=False).reshape(shape)
    if types.is_decimal(kind) or is_date(values):
        form = "date" if is_date(values) else "number"
        return numbers(chunked_array([values]), name, "data.source", form).reshape(shape)
    return values.to_pylist()
