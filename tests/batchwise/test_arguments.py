"""An argument of a wrong type, or out of its range, is one line in Python, too. What works otherwise is taken."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from small import Classify, Points, fit, network
from torch import nn
from torch.optim import AdamW, Optimizer

import batchwise.trainer
from batchwise import DataModule, Order, Ragged, Schedule, Task
from batchwise.batching import mixture
from batchwise.batching.order import Repeated, Sequential
from batchwise.batching.sampling import Weighted
from batchwise.batching.schedule import BatchSizes, Milestones
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.ema import EMA
from batchwise.data.augment import Affine, Flip
from batchwise.data.augmentation import Augmentation
from batchwise.data.mixing import MixUp
from batchwise.data.mixture import Mixture
from batchwise.data.views import Views
from batchwise.errors import Mistake, WrongArgument
from batchwise.models.dropout import Dropout
from batchwise.models.mlp import MLP
from batchwise.sources.digits import Digits
from batchwise.sources.table import Table
from batchwise.tasks.adversarial import Adversarial
from batchwise.tasks.classification import Classification
from batchwise.tasks.coupled import InfoNCE

MADE: dict[type, Callable[..., Any]] = {
    DataModule: Points,
    Task: lambda **given: Classify(**{"network": network()} | given),
    Classification: lambda **given: Classification(network(), **given),
    Adversarial: lambda **given: type("Own", (Adversarial,), {"losses": None})(nn.ModuleDict(), **given),
}
WRONG: list[tuple[type, str, Any, str]] = [
    (DataModule, "batch_size", "64", "'64': write a whole number of at least 1"),
    (DataModule, "batch_size", 0, "0: write a whole number of at least 1"),
    (DataModule, "batch_size", True, "True: write a whole number of at least 1"),
    (DataModule, "batch_size", torch.tensor(8), "tensor(8): write a whole number of at least 1"),
    (DataModule, "micro_batch_size", 8.0, "8.0: write a whole number of at least 1 or 'auto'"),
    (DataModule, "augment", Flip(), "Flip(...): write a list, such as [Flip(...)]"),
    (DataModule, "augment", [3], "[3]: write a batchwise.Augmentation or a torch.nn.Module for each"),
    (DataModule, "order", Sequential, f"{Sequential}: write a batchwise.Order, such as Sequential(...)"),
    (DataModule, "drop_last", "false", "'false': write True or False"),
    (DataModule, "batch_size_schedule", {10: 20}, "{10: 20}: write a batchwise.batching.schedule.BatchSizes"),
    (DataModule, "resident_share", 2.0, "2.0: write a number from 0 to 1"),
    (Digits, "classes", 3, "3: write a list, such as [3]"),
    (Table, "columns", ["a"], "['a']: write a dict"),
    (
        Table,
        "columns",
        {"a": "dat"},
        "{'a': 'dat'}: write 'number', 'thousands', 'decimal_comma', 'date', 'day_first', "
        "'month_first', 'category' or 'ignore' for each",
    ),
    (Mixture, "proportions", {"a": "x"}, "{'a': 'x'}: write a number for each"),
    (Task, "network", nn.Linear, f"{nn.Linear}: write a torch.nn.Module, such as Linear(...)"),
    (Task, "network", len, "<built-in function len>: write a torch.nn.Module"),
    (Task, "schedule", lambda: None, "<lambda>: write a batchwise.Schedule, such as Schedule(shape='cosine')"),
    (Task, "freeze", "layers.1", "'layers.1': write a list, such as ['layers.1']"),
    (Task, "lr_factors", [("0", 0.1)], "[('0', 0.1)]: write a dict"),
    (Task, "lr_factors", {"0": "0.1"}, "{'0': '0.1'}: write a number for each"),
    (Task, "init_from", 3, "3: write a text"),
    (Task, "max_skipped_steps", "3", "'3': write a whole number"),
    (Classification, "label_smoothing", "0.1", "'0.1': write a number from 0 to 1"),
    (Adversarial, "optimizer", AdamW, f"{AdamW}: write a dict"),
    (batchwise.Trainer, "name", 3, "3: write a text"),
    (batchwise.Trainer, "max_epochs", "3", "'3': write a whole number"),
    (batchwise.Trainer, "max_time", 5, "5: write a text, a datetime.timedelta or a dict"),
    (batchwise.Trainer, "capture", True, "True: write 'auto'"),
    (batchwise.Trainer, "callbacks", "EMA", "'EMA': write a list or a lightning.Callback"),
    (batchwise.Trainer, "matmul_precision", "x", "'x': write 'highest', 'high' or 'medium'"),
    (batchwise.Trainer, "default_root_dir", 3, "3: write a text or a path"),
    (Repeated, "k", "3", "'3': write a whole number of at least 1"),
    (Weighted, "weights", {3: 0.5}, "{3: 0.5}: write a list"),
    (mixture.Mixture, "proportions", [0.5], "[0.5]: write a dict"),
    (Milestones, "sizes", 64, "64: write a list, such as [64]"),
    (Flip, "p", None, "None: write a number"),
    (Affine, "scale", [0.8, 1, 1.2], "[0.8, 1, 1.2]: write a list of 2"),
    (Affine, "scale", torch.tensor(0.8), "tensor(0.8000): write a list"),
    (MixUp, "num_classes", torch.tensor(3), "tensor(3): write a whole number of at least 1"),
    (Views, "steps", Flip(), "Flip(...): write a list, such as [Flip(...)]"),
    (MLP, "in_features", "3", "'3': write a whole number of at least 1"),
    (MLP, "num_classes", -1, "-1: write a whole number of at least 1"),
    (MLP, "hidden_features", [8, 0], "[8, 0]: write a whole number of at least 1 for each"),
    (Dropout, "p", "0.1", "'0.1': write a number"),
    (Last, "every_n_steps", 0, "0: write a whole number of at least 1"),
    (EMA, "half_life_examples", 0, "0: write a number above 0"),
    (InfoNCE, "temperature", "0.1", "'0.1': write a number above 0"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0].__name__} {case[1]}")
def test_what_is_wrong_is_one_line(case: tuple[type, str, Any, str]) -> None:
    kind, name, value, line = case
    with pytest.raises(WrongArgument) as error:
        MADE.get(kind, kind)(**{name: value})
    assert str(error.value) == f"{name} is {line}"


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"betas": 0.9}, "betas is 0.9: write a list"),
        ({"lr": "0.1"}, "lr is '0.1': write a number or a torch.Tensor"),
        ({"weight_decay": None}, "weight_decay is None: write a number"),
    ],
)
def test_an_argument_that_an_optimizer_cannot_take(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(Mistake) as error:
        fit(Classify(network(), optimizer=partial(AdamW, **settings)))
    assert str(error.value) == f"model.optimizer.{line}"


def test_a_wrong_schedule() -> None:
    wrong: Any = "0.1"
    with pytest.raises(WrongArgument, match=r"^schedule\.warmup is '0\.1': write a number$"):
        Schedule("cosine", warmup=wrong)


def test_numbers_of_numpy_are_ordinary_ones() -> None:
    data = Points(batch_size=np.int64(16), resident_share=np.float32(0.5), drop_last=np.bool_(True))
    values = data.batch_size, data.resident_share, data.drop_last
    assert values == (16, 0.5, True)
    assert [type(value) for value in values] == [int, float, bool]
    task = Classify(network(), lr_factors={"0": np.float32(0.5)}, reference_batch_size=np.int64(10))  # type: ignore[arg-type]
    fit(task, data, max_epochs=np.int64(1), gradient_clip_val=np.float32(1.0))


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple])
def test_arrays_and_tuples_are_lists(make: Any) -> None:
    weights = Classification(network(), class_weights=make([0.5, 1.0, 2.0])).class_weights
    assert weights == [0.5, 1.0, 2.0]
    assert Affine(scale=make([0.5, 1.0])).scale in ([0.5, 1.0], (0.5, 1.0))
    linear = [layer for layer in MLP(hidden_features=make([3, 4])).layers if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [3, 4, 10]
    with pytest.raises(ValueError, match=r"class_weights is \[-1\.0, 1\.0, 1\.0\]: write a number of at least 0"):
        Classification(network(), class_weights=make([-1.0, 1.0, 1.0]))


def test_what_works_is_taken() -> None:
    torch.save(network().state_dict(), "first.pt")
    given: dict[str, Any] = {"freeze": ("0",), "init_from": Path("first.pt"), "decay_matrices_only": 1}
    given["lr_factors"] = {0: 0.5}  # as YAML reads the name of a layer
    data: dict[str, Any] = {"augment": nn.Sequential(nn.Identity()), "drop_last": 0}
    fit(Classify(network(), **given), Points(**data), max_epochs=1, max_time={"hours": 0.5})


def test_a_class_of_the_user_is_not_looked_into() -> None:
    class Own(Points):
        def __init__(self, *args: Any, width: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.width = width

    wide: Any = 2.5
    assert Own(width=wide).width == 2.5
    with pytest.raises(WrongArgument, match="batch_size is '3'"):
        Own(width=3, batch_size="3")


def test_all_arguments_of_the_engine_are_looked_at() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    rooms = ("batching", "callbacks", "data", "models", "optim", "sources", "tasks")
    for room in rooms:
        for module in pkgutil.iter_modules([str(Path(batchwise.__path__[0]) / room)], f"batchwise.{room}."):
            importlib.import_module(module.name)
    written = (Order, BatchSizes, Ragged, Augmentation, nn.Module, Optimizer, Callback, DataModule, pl.Trainer)
    for kind in set().union(*map(below, written)):
        place, _, inside = kind.__module__.partition(".")
        own = place == "batchwise" and inside.startswith((*rooms, "trainer", "run.python")) and kind.__name__[0] != "_"
        if (
            own
            and "__init__" in vars(kind)
            and set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
        ):
            assert inspect.unwrap(kind.__init__) is not kind.__init__, kind
