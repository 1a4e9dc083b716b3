"""The examples of each split, and their way to a device."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from inspect import signature
from typing import Any, final

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.precision import Precision
from torch import Tensor, nn
from torch.utils.data import Dataset

from batchwise.batching.collate import stack
from batchwise.batching.device import has_float64
from batchwise.batching.fetch import Fetch, InMemory, make_fetch
from batchwise.batching.loader import MicroBatch, TrainLoader, read
from batchwise.batching.order import Order, Shuffled, Sources
from batchwise.batching.rows import Joined, Rows
from batchwise.data.augment import Augmentation, augment
from batchwise.data.contents import contents_of
from batchwise.data.names import Reserved

Field = Tensor | np.ndarray | Rows | Joined | Mapping[str, Any] | Sequence[Any]
"""Tensors or arrays [N, ...], dicts and tuples of them, or a list of one value per example."""
Source = Field | Dataset | Fetch
SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""The splits that each stage needs."""


class Examples(Reserved, pl.LightningDataModule, ABC):
    """The part of a data module that knows the examples. The arguments are some of those of `DataModule`."""

    def __init__(
        self,
        order: Order | None,
        seed: int | None,
        num_workers: int,
        max_unreadable: int,
        resident_share: float,
        augment: list[Augmentation | nn.Module] | None,
    ) -> None:
        super().__init__()
        self.order = Shuffled() if order is None else order
        self.seed = seed
        self.num_workers = num_workers
        self.max_unreadable = max_unreadable
        self.resident_share = resident_share
        self.augment = augment or []
        self.__loaded: dict[str, Fetch | None] = {}
        self.__fed: dict[tuple[str, torch.device], Fetch] = {}
        self.__contents: dict[str, dict[str, Any] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy. It has no trainer, loaders or data on a GPU: these belong to a training."""
        own = {
            name: None if isinstance(value, pl.Trainer | TrainLoader) else value for name, value in vars(self).items()
        }
        return own | {"_Examples__fed": {}}

    # What a subclass writes

    @abstractmethod
    def load(self, split: str) -> Source | None:
        """Return the examples of a split: a tuple of inputs and targets, or a map-style data set.

        Inputs and targets are tensors or arrays with the examples in the first dimension, or dicts or tuples of them. A
        list has one value per example.

        Args:
            split: "train", "val", "test" or "predict" (only with `has_predict_split`).
        """

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Return the batch as the network takes it. This runs on the device, so that small types travel there."""
        return batch

    def collate(self, examples: list) -> Any:
        """Return a micro-batch from examples of a map-style data set: inputs, or a tuple of inputs and targets.

        It runs in the processes that read. By default, tensors, arrays and numbers are stacked, in dicts and tuples
        too. Write it where examples differ in shape: pad them, or return a list, which has one value per example.
        """
        return stack(examples, range(len(examples)))

    class_names: list[str] | None = None
    """Names of the classes, in the order of their numbers, if they have names: `predict` writes them."""

    def describe(self, index: Tensor) -> dict[str, list]:
        """Return more columns for `predict` to write, by name, with a value for each of the given examples [N]."""
        return {}

    def check(self, network: nn.Module) -> None:
        """Raise ValueError if the network does not suit the data. This runs before the network does."""

    # What is inherited

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` needs.

        Raises:
            ValueError: one is missing, or has too few examples.
        """
        for name in SPLITS[stage]:
            fetch, (devices, _) = self.split(name), self.replicas
            if fetch is not None and len(fetch) == 0:
                raise ValueError(f"the {name} split has no examples: check where it is read from")
            lengths = getattr(fetch, "lengths", None)
            if getattr(fetch, "empty", "keep") == "refuse" and lengths is not None and not bool(lengths.all()):
                raise ValueError(
                    f"example {int(lengths.argmin())} of the {name} split has no values ({int((lengths == 0).sum()):,} "
                    "are empty), and a mean over it is not a number: write Ragged(..., empty='drop'), or 'keep'"
                )
            if fetch is not None and name != "train" and len(fetch) < devices:
                raise ValueError(f"the {name} split has {len(fetch)} examples: use at most {len(fetch)} devices")
            if fetch is None and (name != "val" or stage != "fit"):
                source = self.__source(name)
                keys = self._keys()
                raise ValueError(
                    f"{type(self).__name__}.load('{source}') gave nothing: this command needs that split"
                    + self._remedy(source)
                    + ", or data.predict_path with what is to be predicted"
                    * (name == "predict" and "predict_path" in keys)
                )

    def _keys(self) -> set[str]:
        return {key for each in type(self).__mro__ for key in signature(each.__init__).parameters}

    def _remedy(self, split: str) -> str:
        """Return what to write to have a split that is missing; an empty text where that is not known."""
        return f" (write data.{split}_fraction above 0)" * (f"{split}_fraction" in self._keys())

    @final
    def split(self, name: str) -> Fetch | None:
        """Return the examples of a split, loaded once."""
        if name not in self.__loaded:
            source = self.load(self.__source(name))
            collate = None if type(self).collate is Examples.collate else OnWorkers(self, "collate")
            workers = self.num_workers, self.max_unreadable
            self.__loaded[name] = None if source is None else make_fetch(source, *workers, collate)
        return self.__loaded[name]

    def __source(self, name: str) -> str:
        """Return the name by which `load` knows a split."""
        return "test" if name == "predict" and not self.has_predict_split else name

    @final
    def _forget(self) -> None:
        """Forget the splits, and all cached properties of a subclass."""
        self.__loaded, self.__fed, self.__contents = {}, {}, {}
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            delattr(self, name)

    has_predict_split = False
    """Whether `load` has a "predict" split. Without one, `predict` runs on the test split."""

    @final
    def loaded(self) -> list[tuple[str, Fetch]]:
        """Return the splits loaded so far, by name."""
        return [(name, fetch) for name, fetch in self.__loaded.items() if fetch is not None]

    @final
    def contents(self, stage: str = "fit") -> dict[str, Any]:
        """Return a summary of the examples of each split that a stage has loaded: see `contents_of`."""
        loaded = {name: fetch for name, fetch in self.loaded() if name in SPLITS[stage]}
        for name in loaded.keys() - self.__contents.keys():
            self.__contents[name] = contents_of(loaded[name])
        return {name: self.__contents[name] for name in loaded}

    @property
    @final
    def replicas(self) -> tuple[int, int]:
        """The number of devices, each of which has a share of each batch, and the rank of this process."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    @final
    def feed(self, name: str) -> Fetch:
        """Return a split as it is read for the device: from a copy there, if the copy is small enough."""
        fetch, trainer = self.split(name), self.trainer
        assert fetch is not None
        if trainer is None or type(fetch) is not InMemory:  # a subclass may read in a way of its own
            return fetch
        device = trainer.strategy.root_device
        if (name, device) not in self.__fed:
            self.__fed[name, device] = fetch.on(device, self.resident_share)
        return self.__fed[name, device]

    @final
    def examples(self, name: str, which: int | Tensor, position: int = 0) -> MicroBatch:
        """Return examples of a split as a micro-batch on the host, before `transform`.

        Args:
            name: name of the split.
            which: at most so many, the first ones; or their numbers, int64 [N].
            position: position of the first one in its batch.
        """
        fetch = self.split(name)
        assert fetch is not None
        index = which if isinstance(which, Tensor) else torch.arange(min(which, len(fetch)))
        return read(fetch, index, position)

    def labels(self) -> Tensor | None:
        """Return the training targets [examples] if they are whole numbers in memory. Some orders need them."""
        fields = getattr(self.split("train"), "fields", ())
        target = fields[-1] if len(fields) > 1 else None
        whole = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
        return target if whole else None

    def sources(self) -> Sources | None:
        """Return the training examples of each source by name, a range or int64 [n]. `Mixture` needs them."""
        return None

    def stored(self, split: str, index: Tensor) -> dict[str, Any] | None:
        """Return the columns that the command `shards` writes, by name; None: the examples as `load` gives them.

        Args:
            split: name of the split.
            index: numbers of examples within the split, int64 [N].
        """
        return None

    def transfer_batch_to_device(self, batch: object, device: torch.device, dataloader_idx: int) -> object:
        """Leave batches on the host. The task moves each micro-batch with `to_device`."""
        return batch

    def to_device(self, batch: MicroBatch, device: torch.device, training: bool) -> MicroBatch:
        """Return a micro-batch on the device, transformed and, in training, augmented.

        Its floats are in the precision of the trainer, whatever was stored, and whatever `transform` makes of them.
        """
        plugin, dtype = self.trainer.precision_plugin if self.trainer else None, None
        if plugin is not None:
            idle = type(plugin).convert_input is Precision.convert_input  # as in full and in mixed precision
            dtype = torch.float32 if idle else plugin.convert_input(_ONE).dtype
        if not has_float64(device):
            batch = batch.cast(torch.float32)
        batch = batch.copy() if device.type == "cpu" else batch.to(device)
        batch = batch if dtype is None else batch.cast(dtype)
        if not training or not self.augment:
            batch = self.transform(batch, training)
        else:
            batch = augment(batch, self.augment, False, self.seed or 0, self.order)
            batch = augment(self.transform(batch, training), self.augment, True, self.seed or 0, self.order)
        return batch if dtype is None else batch.cast(dtype)


_ONE = torch.ones(())


class OnWorkers:
    """A method of a data module that processes which read call.

    It is that of a copy without splits. They would not be needed there, and refer to the processes, which would then
    be found by the garbage collector alone, and end five seconds late.

    Args:
        data: the data module.
        name: of the method, which takes one argument.
    """

    def __init__(self, data: Examples, name: str) -> None:
        self.data, self.name = copy(data), name
        self.data._Examples__loaded = {}  # type: ignore[attr-defined]

    def __call__(self, argument: Any) -> Any:
        """Call the method."""
        return getattr(self.data, self.name)(argument)
