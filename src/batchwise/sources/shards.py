"""Data in many files (shards), on this machine or in an object store, of any size."""

import warnings
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from io import BytesIO
from os.path import expanduser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchwise.arguments import typed
from batchwise.batching.loader import MicroBatch
from batchwise.batching.order import Order
from batchwise.batching.plan import BatchPlan
from batchwise.batching.shards import BlockShuffled
from batchwise.data.examples import OnWorkers
from batchwise.data.labels import check_alike, label_numbers, sorted_labels
from batchwise.data.module import DataModule
from batchwise.errors import optional
from batchwise.ranges import NonNegativeInt, PositiveFloat
from batchwise.sources.images import ImageFormat, Resize
from batchwise.sources.shard_cache import Cache
from batchwise.sources.shard_index import Index, read_index
from batchwise.sources.shard_reading import ShardSet, Shelf, Values
from batchwise.sources.store import Store

LOOKED_AT = 1024
"""Examples of an epoch whose shards must be in the cache at once, if the order knows no windows."""


class Shards(DataModule):
    """Examples in shards: Arrow, Parquet, tar (WebDataset) or MDS (mosaicml-streaming), with an index.

    `python -m project shards PATH` makes the index. The folder, or the first word of a file's name, says the split
    (such as train/0001.tar or val-0001.parquet); what says none is for training.

    Shards are fetched in the background, checked against the index, and kept in a cache of bounded size. `data.order`
    is `BlockShuffled` by default, which reads them window by window. Nothing else is in memory.

    Columns with one number per example become inputs [N, F]. Arrays keep their type, [N, ...]. Bytes are images, [N,
    channels, height, width]. Images, and arrays uint8 of this shape, are scaled from -1 to 1 on the device, arrays by
    their largest value. Targets are class numbers [N] (of the sorted labels, if labels are text), or float64. For
    anything else, override `fields`.

    Args:
        path: the folder, or an address such as s3://bucket/folder, gs://... or https://...; what `fsspec` reads.
        inputs: the column or columns that the network takes.
        target: the column to predict; null: there is none.
        size: height and width of images in pixels; one number: a square.
        channels: channels of images: 3 (RGB) or 1 (grey).
        resize: crop (resize, then cut off both ends of the longer side), stretch, or pad with black.
        cache: folder of the shards in use. Trainings and data sets may share it.
        cache_gib: its most GiB.
        patience: seconds for which a store that does not answer is asked again, before training stops.
        val_shards: shards that are set apart for validation, if none is named so; drawn by a hash of their names.
        predict_path: shards to predict, with an index, of which the target is not read; null: the test split.
        storage_options: of `fsspec`, such as {endpoint_url: ...}.
        order: the order of the training examples; null: `BlockShuffled`.
        **kwargs: those of `DataModule`.
    """

    @typed
    def __init__(
        self,
        path: str,
        inputs: str | list[str],
        target: str | None = "label",
        size: int | tuple[int, int] = 64,
        channels: int = 3,
        resize: Resize = "crop",
        cache: str = ".cache/shards",
        cache_gib: PositiveFloat = 32.0,
        patience: PositiveFloat = 600.0,
        val_shards: NonNegativeInt = 0,
        predict_path: str | None = None,
        storage_options: dict[str, Any] | None = None,
        order: Order | None = None,
        **kwargs,
    ) -> None:
        super().__init__(order=BlockShuffled() if order is None else order, **kwargs)
        if not inputs:
            raise ValueError("data.inputs is empty: write a column, or a list of columns")
        self.inputs, self.target = [inputs] if isinstance(inputs, str) else inputs, target
        self.format = ImageFormat.of(size, channels, resize)
        self.cache, self.limit, self.patience = Path(expanduser(cache)).absolute(), int(cache_gib * 2**30), patience
        self.store, self.val_shards = Store(path, storage_options), val_shards
        self.to_predict = None if predict_path is None else Store(predict_path, storage_options)
        self.has_predict_split = predict_path is not None
        self._checked: BatchPlan | None = None
        """The plan that was found to suit the shards."""

    # What the network is given

    def load(self, split: str) -> Shelf | None:
        """Return what reads the examples of a split."""
        optional("pyarrow", "shards")
        if split == "predict" and self.to_predict is not None:
            store, columns = self.to_predict, self.inputs
            shards = _index(store, columns, "data.predict_path").shards
        else:
            store, columns, shards = self.store, self._columns, self.index.of(split)
        if not shards:
            return None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache {self.cache} cannot be made ({error.strerror}): write another") from error
        processes = max(1, getattr(self.trainer, "num_devices", 1))
        cache = Cache(store, self.cache, self.limit, columns, self.patience)
        dataset = ShardSet(shards, cache, OnWorkers(self, "fields"))
        return Shelf(dataset, self.num_workers, self.max_unreadable, self.limit // 2 // processes)

    def fields(self, values: Values) -> tuple[Any, ...]:
        """Return the fields of some examples: inputs first, the target last. It runs in the processes that read.

        Args:
            values: the columns in `inputs` and `target` by name: arrays [N, ...], or a list of bytes for each example.
        """
        inputs = [self._input(values[name]) for name in self.inputs]
        if all(column.ndim == 1 for column in inputs):
            inputs = [torch.stack([column.float() for column in inputs], 1)]
        if self.target is None or self.target not in values:
            return tuple(inputs)
        target = values[self.target]
        if isinstance(target, list):
            names = self.class_names
            if names is None:
                raise ValueError(f"data.target '{self.target}' holds bytes, which are no labels: override `fields`")
            labels = [bytes(label).decode() for label in target]
            return *inputs, label_numbers(labels, names, f"column '{self.target}'")
        numbers = torch.from_numpy(target)
        return *inputs, numbers.double() if numbers.is_floating_point() else numbers.long()

    def _input(self, values: np.ndarray | list[memoryview]) -> Tensor:
        if isinstance(values, list):
            return torch.from_numpy(self.format.decode_all([BytesIO(image) for image in values]))
        return torch.from_numpy(values)

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Scale images on the device, so that bytes travel there and not floats."""
        images = batch.inputs
        if not (isinstance(images, Tensor) and images.dtype == torch.uint8 and images.ndim == 4):
            return batch
        return replace(batch, inputs=images.to(torch.get_default_dtype()).div_(self.learnt["white"] / 2).sub_(1))

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return the shard of each example, and its row there, from 0."""
        shelf = self.split("predict")
        assert isinstance(shelf, Shelf)
        shards, rows = shelf.dataset.find(index.numpy())
        return {"shard": [shelf.dataset.files[shard].name for shard in shards], "row": rows.tolist()}

    def learn(self) -> dict[str, Any]:
        """The labels in the order of their numbers, the largest value of images, and a hash of the training shards."""
        hashes = "".join(shard.sha256 for shard in self.index.of("train"))
        white = self.index.columns[self.inputs[0]].largest or 255
        return {"classes": self._labels, "white": white, "shards": sha256(hashes.encode()).hexdigest()[:16]}

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The labels that training has seen, in the order of their numbers; None if targets are numbers."""
        return self.learnt["classes"]

    @cached_property
    def _labels(self) -> list[str] | None:
        column = self.index.columns[self.target] if self.target is not None else None
        if column is None or "string" not in column.type:
            return None
        if column.values is None:
            raise ValueError(
                f"data.target '{self.target}' has too many different texts to be labels: write another column"
            )
        check_alike(column.values, f"column '{self.target}'")
        return sorted_labels(column.values)

    # The shards

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` needs, and check that the order suits the shards and the cache."""
        super().setup(stage)
        plan, shelf = self.plan, self.split("train") if stage == "fit" else None
        if plan is None or plan is self._checked or not isinstance(shelf, Shelf):
            return
        self._checked = plan
        in_place = shelf.dataset.cache.direct(shelf.dataset.files[0]) is not None
        sizes = sorted((file.size for file in shelf.dataset.files), reverse=True)
        if isinstance(self.order, BlockShuffled):
            count = self.order.at_once
            self._compare_shards(self.order, plan.batch_size)
        else:
            some = min(max(plan.batch_size, LOOKED_AT), plan.positions)
            count = len(shelf.files_of(self.order.indices(0, 0, some)))
        need = 2 * sum(sizes[:count])
        if need > self.limit and not in_place:
            raise ValueError(
                f"data.order {self.order} needs {count:,} shards at once, and as many that come next: "
                f"{need / 2**30:.3g} GiB, and data.cache_gib is {self.limit / 2**30:.3g}: write a larger one, or an "
                "order that reads fewer, such as batchwise.batching.shards.BlockShuffled with a smaller window"
            )

    def _compare_shards(self, order: BlockShuffled, batch_size: int) -> None:
        """Warn if the window is too small for shards as unlike one another as these."""
        alike = self.index.columns[self.target].alike if self.target is not None else 0.0
        worth = order.worth(batch_size, alike)
        if worth < batch_size / 2 and (self.trainer is None or self.trainer.is_global_zero):
            warnings.warn(
                f"the shards differ in '{self.target}' ({alike:.0%} of its variance is between them), so a batch of "
                f"{batch_size:,} says as much as {worth:.3g} random ones: write a window of "
                f"{order.enough(batch_size, alike):,} or more, or write the shards anew with the command shards, "
                "which shuffles",
                stacklevel=3,
            )

    @property
    def _columns(self) -> list[str]:
        return list(dict.fromkeys([*self.inputs, *([] if self.target is None else [self.target])]))

    @cached_property
    def index(self) -> Index:
        """What is in the shards.

        Raises:
            ValueError: there is no index, a column is missing or has values that nothing can be learnt from, or
                `val_shards` leaves none for training.
        """
        index, count = _index(self.store, self._columns, "data.path"), self.val_shards
        train = index.of("train")
        if count >= len(train) > 0:
            raise ValueError(f"data.val_shards is {count}, and there are {len(train)} for training: write fewer")
        if count and not index.of("val"):
            apart = set(sorted(train, key=lambda shard: sha256(shard.name.encode()).digest())[:count])
            index.shards = [shard._replace(split="val") if shard in apart else shard for shard in index.shards]
        return index


def _index(store: Store, columns: list[str], key: str) -> Index:
    """Return the index of a folder that has some columns, whose values are all there and finite."""
    index = read_index(store)
    for name in columns:
        if name not in index.columns:
            raise ValueError(
                f"{key} {store.address} has no column '{name}': write data.inputs and data.target from "
                f"{', '.join(index.columns)}"
            )
        if index.columns[name].wrong:
            raise ValueError(
                f"column '{name}' of {key} {store.address} has values that are missing or not finite, first in shard "
                f"{index.columns[name].wrong}: write the shards without them"
            )
        if index.columns[name].uneven:
            raise ValueError(
                f"column '{name}' of {key} {store.address}, {index.columns[name].uneven}: cut or pad them to one length"
            )
    return index
