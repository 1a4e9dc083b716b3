"""The examples of several data modules, in given proportions."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from batchwise.arguments import typed
from batchwise.batching.fetch import bytes_of
from batchwise.batching.loader import MicroBatch
from batchwise.batching.mixture import Mixture as MixtureOrder
from batchwise.batching.order import Sources
from batchwise.batching.ragged import Ragged
from batchwise.batching.rows import Joined, Rows, as_tensor, is_mapped
from batchwise.data.examples import Source
from batchwise.data.module import DataModule
from batchwise.ranges import PositiveInt

_OF_THE_WHOLE = ("batch_size", "micro_batch_size", "batch_tokens", "micro_batch_tokens", "augment")


class Mixture(DataModule):
    """Puts several data modules one after the other, and trains on them in given proportions.

    Their inputs and targets must have the same structure, shapes and types. Tensors and arrays in memory are copied
    into one, and so are the sequences of `Ragged`. Mapped files, `Rows`, views and map-style data sets are not copied.
    A split of the evaluation has all examples of all modules that have this split, source after source.

    The modules load the examples. The first one transforms them, and has what a task may ask for, such as names of the
    classes. What it learns from its training examples holds for all of its kind, if they have `shares_learnt`: two
    tables have the means, categories and labels of the first. All else is set here.

    Args:
        modules: data modules by name.
        proportions: share of each in every batch, by name, as in `batchwise.batching.mixture.Mixture`.
        epoch_examples: positions in an epoch; null: as many as all modules together have examples.
        **settings: those of `DataModule`, without `order`.

    Raises:
        ValueError: a module has settings that are set here, the modules differ in `transform` or `class_names`, or
            their examples differ in structure, shape or type.
    """

    @typed
    def __init__(
        self,
        modules: Mapping[str, DataModule],
        proportions: Mapping[str, float],
        epoch_examples: PositiveInt | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(order=MixtureOrder(proportions, epoch_examples), **settings)
        if not modules:
            raise ValueError("modules are {}: write data modules by name")
        self.modules, self._first = modules, next(iter(modules.values()))
        self._sizes: dict[str, int] = {}
        self.has_predict_split = any(module.has_predict_split for module in modules.values())
        for name, module in modules.items():
            for setting in _OF_THE_WHOLE:
                if getattr(module, setting):
                    raise ValueError(f"data.modules.{name} sets {setting}: write it at data.{setting}")
            if not all(getattr(type(module), at) is getattr(type(self._first), at) for at in ("transform", "collate")):
                raise ValueError(
                    f"data.modules.{name} is a {type(module).__name__}, which transforms or collates its examples in "
                    f"another way than {type(self._first).__name__}: do this in load"
                )

    def prepare_data(self) -> None:
        """Let each module prepare its data."""
        for module in self.modules.values():
            module.prepare_data()

    def _teacher(self, name: str) -> str:
        """Return the module that learns for a module: the first with the same `learn` if they share it, else itself."""
        own = self.modules[name]
        same = (one for one, each in self.modules.items() if type(each).learn is type(own).learn)
        return next(same) if own.shares_learnt else name

    def learn(self) -> dict[str, Any]:
        """What each module learns for itself or for others, by its name."""
        return {name: module.learn() for name, module in self.modules.items() if self._teacher(name) == name}

    def _pass_on(self, state: Mapping[str, Any] | None) -> None:
        """Call `recall` of each module, with what was learnt for it and its own division into splits."""
        divisions = (state or {}).get("divisions", {})
        for name, module in self.modules.items():
            learnt = self.learnt.get(self._teacher(name), {}) if self.recalled else None
            module.recall(None if learnt is None else {"learnt": learnt, "division": divisions.get(name)})

    def setup(self, stage: str) -> None:
        """Load the splits that `stage` needs. A module for which another learns gets that first."""
        for name, module in self.modules.items():
            if not self.recalled and (teacher := self._teacher(name)) != name:
                module.recall({"learnt": self.modules[teacher].learnt})
        super().setup(stage)
        for module in self.modules.values():
            module.check_division("val" if stage in ("fit", "validate") else "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a data module, and the division of each module into splits."""
        return super().state_dict() | {"divisions": {name: one._division for name, one in self.modules.items()}}

    def load(self, split: str) -> Source | None:
        """Return the examples of a split of all modules, source after source."""
        loaded = {
            name: module.load(split)
            for name, module in self.modules.items()
            if split != "predict" or module.has_predict_split
        }
        loaded = {name: source for name, source in loaded.items() if source is not None}
        if split == "train" and len(loaded) < len(self.modules):
            raise ValueError(f"data.modules.{min(self.modules.keys() - loaded)} has no train split: leave it out")
        if not loaded:
            return None
        sources: list[Any] = list(loaded.values())
        in_memory = [isinstance(source, Tensor | np.ndarray | dict | tuple) for source in sources]
        if all(in_memory):
            joined: Any = _join("examples", list(loaded), sources)
            joined = joined if isinstance(joined, tuple) else (joined,)
            sizes = [_length(source) for source in sources]
        elif all(isinstance(source, Ragged) for source in sources):
            joined, sizes = _join_ragged(list(loaded), sources), [len(source) for source in sources]
        elif not any(in_memory) and not any(hasattr(source, "stream") for source in sources):
            joined, sizes = ConcatDataset(sources), [len(source) for source in sources]
        else:
            kinds = ", ".join(f"{name} gives {type(source).__name__}" for name, source in loaded.items())
            raise ValueError(f"data.modules: {kinds}: load tensors and arrays, Ragged, or data sets in all")
        if split == "train":
            self._sizes = dict(zip(loaded, sizes, strict=True))
        return joined

    def sources(self) -> Sources:
        """Return where the training examples of each module stand."""
        self.split("train")
        ends = np.cumsum([0, *self._sizes.values()]).tolist()
        return {name: range(*ends[number : number + 2]) for number, name in enumerate(self._sizes)}

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        """Return the batch as the first module transforms it."""
        return self._first.transform(batch, training)

    def collate(self, examples: list) -> Any:
        """Return a micro-batch as the first module collates it."""
        return self._first.collate(examples)

    @property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """The names of the classes, the same in all modules."""
        names = self._first.class_names
        for name, module in self.modules.items():
            if module.class_names != names:
                raise ValueError(f"data.modules.{name} has the classes {module.class_names}, and the first one {names}")
        return names

    def check(self, network: nn.Module) -> None:
        """Check that the network suits all modules."""
        for name, module in self.modules.items():
            module.check(network)
            separator, first = (getattr(data, "separator", None) for data in (module, self._first))
            if separator != first:
                raise ValueError(
                    f"data.modules.{name} has the separator {separator}, and the first one {first}: write a vocabulary "
                    "that is the same in all, such as bytes"
                )

    def __getattr__(self, name: str) -> Any:
        """Return what a task asks of its data, such as `decode`, of the first module."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._first, name)


def _length(source: Any) -> int:
    """Return the number of examples in nested tensors."""
    if isinstance(source, dict | tuple):
        return _length(next(iter(source.values() if isinstance(source, dict) else source)))
    return len(source)


def _join(place: str, names: list[str], parts: list[Any]) -> Any:
    """Return nested tensors, arrays and lists of the same structure, one after the other."""
    parts = [list(part) if isinstance(part, np.ndarray) and part.dtype.kind in "OUS" else part for part in parts]
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if _kind(part) != _kind(first):
            raise ValueError(
                f"data.modules.{name} has {place} of {_kind(part)}, and {names[0]} of {_kind(first)}: make them the "
                "same in load"
            )
    if isinstance(first, dict):
        return {key: _join(f"{place}[{key!r}]", names, [part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        items = [_join(f"{place}[{i}]", names, [part[i] for part in parts]) for i in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    if isinstance(first, list):
        return [value for part in parts for value in part]
    if not isinstance(first, Tensor | np.ndarray | Rows):
        raise ValueError(f"data.modules.{names[0]} has {place} of {_kind(first)}: load tensors, arrays and lists")
    if any(isinstance(part, Rows) or is_mapped(part) or bytes_of(part) < part.nbytes for part in parts):
        return Joined(parts)
    return torch.cat([as_tensor(part) for part in parts])


def _join_ragged(names: list[str], parts: list[Ragged]) -> Ragged:
    """Return the sequences of all, one after the other."""
    ends = [(int(part.offsets[0]), int(part.offsets[-1])) for part in parts]
    values = [part.values[start:stop] for part, (start, stop) in zip(parts, ends, strict=True)]
    others = _join("other fields", names, [part.fields[1:] for part in parts])
    lengths = torch.cat([part.lengths for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    empty = "refuse" if any(part.empty == "refuse" for part in parts) else "keep"
    return Ragged(_join("sequences", names, values), offsets, *others, empty=empty)


def _kind(part: Any) -> str:
    """Return what must be the same for all parts."""
    array = part.array if isinstance(part, Rows) else part
    if isinstance(array, Tensor | np.ndarray):
        return f"{str(array.dtype).removeprefix('torch.')} [N{''.join(f', {size}' for size in array.shape[1:])}]"
    if isinstance(part, dict):
        return f"keys {', '.join(map(repr, part))}"
    return f"{len(part)} parts" if isinstance(part, tuple) else type(part).__name__
