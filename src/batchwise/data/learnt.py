"""What training has learnt from its examples is part of the model: it is in the checkpoint, and is used from there."""

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from batchwise.data.examples import Examples
from batchwise.data.labels import shown
from batchwise.errors import Mistake


class Saved(NamedTuple):
    """What a checkpoint has of a data module.

    Args:
        learnt: by `learn`.
        class_names: names of the classes.
        division: how one set of examples was divided into splits.
    """

    learnt: dict[str, Any]
    class_names: list[str] | None
    division: dict[str, Any] | None


class Learnt(dict):
    """What was learnt from the training examples, read from a checkpoint. A missing key is a mistake."""

    def __missing__(self, key: str) -> Any:
        raise Mistake(
            f"the checkpoint has learnt no {key!r}, but {', '.join(self) or 'nothing'}: use the data module with which "
            "it was trained, or start afresh"
        )


class Learning(Examples):
    """The part of a data module that knows what was learnt from the training examples."""

    __own: dict[str, Any] | None = None
    __saved: Saved | None = None
    __told: str | None = None
    shares_learnt = False
    """Whether the first module of a mixture learns for all that have the same `learn`, because `load` depends on it."""
    _lenient = False
    _division: dict[str, Any] | None = None
    """What decides the division of one set of examples into splits; None: there is none, or not yet."""

    def learn(self) -> dict[str, Any]:
        """Return what is learnt from the training examples, such as a mean, or the labels that there are.

        It may have numbers, texts, tensors, and lists and dicts of them. It is called before training, on each device,
        and must return the same on all. `learnt` has it, and the checkpoint.
        """
        return {}

    @property
    @final
    def learnt(self) -> dict[str, Any]:
        """What training has learnt from its examples: from the checkpoint if there is one, else from `learn`.

        So `test` and `predict` use what was learnt, and do not need the training examples.
        """
        if self.__saved is not None:
            return self.__saved.learnt
        if self.__own is None:
            self.__own = self.__learn()
        return self.__own

    def __learn(self) -> dict[str, Any]:
        return {key: plain(value, f"{type(self).__name__}.learn()[{key!r}]") for key, value in self.learn().items()}

    @property
    @final
    def recalled(self) -> bool:
        """Whether `learnt` is from a checkpoint."""
        return self.__saved is not None

    @final
    def recall(self, state: Mapping[str, Any] | None, lenient: bool | None = None) -> None:
        """Use what an earlier training has learnt. The trainer and the command line call this before `setup`.

        Args:
            state: of this data module in a checkpoint; None: learn anew.
            lenient: `setup` is to use it even if the training examples now give something else; None: as before.

        Raises:
            Mistake: it is of another data module, and this one is the engine's.
        """
        self._lenient = self._lenient if lenient is None else lenient
        before = self.__own if self.__saved is None else self.__saved.learnt
        if state is None or "learnt" not in state:
            self.__saved = None
            if state is not None and type(self).learn is not Learning.learn:
                warnings.warn(
                    "the checkpoint is of an older version, without what training has learnt from its examples, which "
                    "is learnt anew",
                    stacklevel=2,
                )
        else:
            learnt = Learnt(plain(state["learnt"], "learnt"))
            self.__check_learner(learnt, state.get("learner"))
            self.__saved = Saved(learnt, state.get("class_names"), state.get("division"))
        now = self.__own if self.__saved is None else self.__saved.learnt
        if before is not None and not same(before, now):
            self._forget()  # examples that were loaded by what was known before
        self._pass_on(state)

    def _pass_on(self, state: Mapping[str, Any] | None) -> None:
        """Call `recall` of each data module within this one, with its part of `state`. Here there are none."""

    @final
    def check_recalled(self, training: bool) -> None:
        """Compare what an earlier training has learnt with the examples that are there now.

        Args:
            training: the training examples are there too.

        Raises:
            ValueError: they differ.
        """
        if self.__saved is None:
            return
        learnt, names, _ = self.__saved
        if training:
            now = self.__learn()
            for key in [*learnt, *(key for key in now if key not in learnt)]:
                if not same(learnt.get(key), now.get(key)):
                    where, old, new = _apart(key, learnt.get(key), now.get(key))
                    raise ValueError(
                        f"the checkpoint was trained on other data: it has learnt {where} {shown(old)}, and the "
                        f"training examples now give {shown(new)}: use the same data, start afresh, or go on with what "
                        "was learnt (force)"
                    )
        if names != self.class_names:
            raise ValueError(
                f"the checkpoint was trained with the classes {shown(names)}, and {type(self).__name__} now has "
                f"{shown(self.class_names)}: use the same classes in the same order"
            )

    @final
    def check_division(self, split: str) -> None:
        """Warn if the division into splits is not that of training: `split` may then have examples of training."""
        before, now = None if self.__saved is None else self.__saved.division, self._division
        if not before or not now or before == now or not max(one[f"data.{split}_fraction"] for one in (before, now)):
            return
        changes = ", ".join(
            f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if value != before.get(key)
        )
        line = (
            f"the {split} split may have examples that were trained on, because all are now divided otherwise "
            f"({changes}): use the same data and settings, or keep the split of each example with the data"
        )
        if line != self.__told:  # a command calls it twice: to check, and to run
            self.__told = line
            warnings.warn(line, stacklevel=2)

    def __check_learner(self, learnt: Learnt, learner: str | None) -> None:
        own = self.__learner()
        # A class of the user's may just have another name by now, or be made for what another has learnt.
        ours = own.startswith("batchwise.") and type(self).learn is not Learning.learn
        if learnt and learner and learner != own and ours:
            trained = learner.split(".")[-2]
            raise Mistake(
                f"the checkpoint was trained with the data module {trained}, and {type(self).__name__} reads or scales "
                f"its examples in another way: use {trained}"
            )

    def __learner(self) -> str:
        return f"{type(self).learn.__module__}.{type(self).learn.__qualname__}"

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, the class that learnt it, the names of the classes, and the division into splits."""
        return {
            "learnt": dict(self.learnt),
            "class_names": None if self.class_names is None else list(self.class_names),
            "learner": self.__learner(),
            "division": self._division,
        }


def plain(value: Any, name: str) -> Any:
    """Return a copy in plain types and tensors, which a checkpoint may hold.

    Raises:
        ValueError: it has something else.
    """
    if isinstance(value, dict):
        return {key: plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}: write numbers, texts, tensors, or lists and dicts of them")


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal, but for the rounding of sums on another machine."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or not one.is_floating_point():
            return torch.equal(one, other)
        return torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-8, equal_nan=True)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-5, abs_tol=1e-8) or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other


def _apart(name: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """Return the first values in which two differ, with their place."""
    inner: list[tuple[str, Any, Any]] = []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        inner = [(f"{name}[{key!r}]", one[key], other[key]) for key in one]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other) < 100:
        inner = [(f"{name}[{number}]", *pair) for number, pair in enumerate(zip(one, other, strict=True))]
    return next((_apart(*each) for each in inner if not same(*each[1:])), (name, one, other))
