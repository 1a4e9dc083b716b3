"""What a data module keeps for itself, and what a subclass may take."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.data import RandomSampler

from batchwise.batching.fetch import InMemory, make_fetch
from batchwise.batching.loader import TrainLoader
from batchwise.batching.order import Repeated, Sequential
from batchwise.batching.ragged import Ragged
from batchwise.batching.schedule import Milestones
from batchwise.choosing.short import resized
from batchwise.data.module import DataModule
from batchwise.data.planning import LimitedLoader, eval_loader
from batchwise.models.mlp import MLP
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_checkpointing": False}
ORDINARY = (
    *("unit", "share", "frozen", "sums", "limit", "loader", "rank", "size", "splits", "batch", "data"),
    *("steps", "epoch", "loss", "device", "index", "network", "_plan", "_unit", "_loader", "_splits"),
    *("_loaded", "_fed", "_trainer", "_limit", "_batching", "_finds_micro_batch"),
)
"""Names that a user may well take."""


class Points(DataModule):
    def load(self, split: str) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(len(split))
        return torch.randn(100, 4, generator=draw), torch.arange(100) % 3


class Taken(Points):
    """Sets ordinary names, and has methods of others that are private to the base class."""

    def __init__(self, when: str, **kwargs: Any) -> None:
        if when == "before":
            self.take()
        super().__init__(**kwargs)
        if when == "after":
            self.take()

    def take(self) -> None:
        for name in ORDINARY:
            setattr(self, name, "mine")

    def _make_plan(self) -> None:
        raise AssertionError("not yours")

    _eval_loader = _read_limit = _make_plan


def fit(data: DataModule, **trainer: Any) -> tuple[Trainer, dict[str, Tensor]]:
    torch.manual_seed(0)
    task = Classification(MLP(4, 3, [8], dropout=0.2))
    trained = Trainer(**QUIET, **{"max_epochs": 2, "accumulate_grad_batches": 2} | trainer)  # type: ignore[arg-type]
    trained.fit(task, datamodule=data)
    trained.test(task, datamodule=data, verbose=False)
    return trained, task.state_dict()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_subclass_may_take_ordinary_names(when: str) -> None:
    _, expected = fit(Points(batch_size=32))
    data = Taken(when, batch_size=32)
    _, found = fit(data)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {getattr(data, name) for name in ORDINARY} == {"mine"}
    assert resized(data, 16, None).unit == "mine"  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["labels", "examples", "split", "plan", "position", "feed", "waited", "transform"])
def test_an_attribute_in_the_place_of_a_method_is_refused(name: str) -> None:
    class Early(Points):
        def __init__(self) -> None:
            setattr(self, name, 1)
            super().__init__(batch_size=32)

    class Late(Points):
        def __init__(self) -> None:
            super().__init__(batch_size=32)
            setattr(self, name, 1)

    for kind in (Early, Late):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} sets self.{name}, which its base class uses: choose another name"
        ):
            kind()


def test_a_method_that_training_calls_is_not_overridden() -> None:
    for name, value in (("split", lambda self: 1), ("plan", None), ("examples", property(lambda self: 1))):
        with pytest.raises(TypeError, match=f"Mine.{name} replaces what its base class uses"):
            type("Mine", (Points,), {name: value})
    with pytest.raises(TypeError, match=r"Mine\.val_dataloader replaces what .*: return the examples in load"):
        type("Mine", (Points,), {"val_dataloader": lambda self: []})
    changed = type("Mine", (Points,), {"labels": lambda self: None, "transform": lambda self, batch, training: batch})
    fit(changed(batch_size=32))


@pytest.mark.parametrize("order", [RandomSampler(range(3)), Sequential])
def test_a_sampler_is_no_order(order: Any) -> None:
    with pytest.raises(TypeError, match=r"^order is .*(RandomSampler|Sequential).*: write a batchwise\.Order, such as"):
        Points(order=order)


@pytest.mark.parametrize(
    ("order", "drop_last", "half"),
    [(Sequential(), False, 2), (Sequential(), True, 1), (Repeated(4), False, 6)],
    ids=["all", "drop_last", "repeated"],
)
def test_half_of_the_epoch_is_half_of_its_steps(order: Any, drop_last: bool, half: int) -> None:
    """100 examples are 3 batches of 32 and one of 4; four times as many are 12 batches and one of 16."""
    data = Points(batch_size=32, order=order, drop_last=drop_last)
    trainer = Trainer(**QUIET, max_epochs=3, limit_train_batches=0.5)
    trainer.fit(Classification(MLP(4, 3)), datamodule=data)
    assert data.plan is not None
    assert (data.plan.steps_per_epoch, trainer.num_training_batches, trainer.global_step) == (half, half, 3 * half)
    assert trainer.current_epoch == 3
    assert trainer.limit_train_batches == 0.5  # as it was


def test_a_share_of_epochs_of_unequal_length() -> None:
    """The second epoch has half as many batches, of 64."""
    schedule = Milestones(sizes=[64], examples=[64])
    data = Points(batch_size=16, batch_size_schedule=schedule)
    trainer, _ = fit(data, limit_train_batches=0.7)  # 4 batches of 16 of the 7 are 64 examples
    assert data.plan is not None
    assert [data.plan.steps_in(epoch) for epoch in range(2)] == [4, 1]
    assert (trainer.global_step, trainer.current_epoch) == (5, 2)


def test_dropping_the_short_batch_drops_no_batch_of_a_later_size() -> None:
    """100 examples are 3 batches of 32; with batches of 50, the second epoch is two of them."""
    schedule = Milestones(sizes=[50], examples=[96])
    data = Points(batch_size=32, batch_size_schedule=schedule, drop_last=True)
    trainer, _ = fit(data, accumulate_grad_batches=None)
    assert data.plan is not None
    assert [data.plan.examples_at(step) for step in (3, 4, 5)] == [96, 146, 196]
    assert (trainer.global_step, trainer.current_epoch) == (5, 2)


def test_any_share_of_any_length_is_that_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = LimitedLoader.__new__(LimitedLoader)
    for steps, loader.limit in product([1, 2, 3, 7, 29, 57, 58, 1000, 10**6 + 1], [1e-6, 0.01, 0.1, 0.3, 0.58, 0.9999]):
        monkeypatch.setattr(TrainLoader, "__len__", lambda self, steps=steps: steps)
        assert int(len(loader) * loader.limit) == steps


def test_a_new_trainer_begins_anew() -> None:
    """Its limits count, and not those of the trainer before; the examples are loaded once."""
    data, fresh = Points(batch_size=32), Points(batch_size=32)
    fit(data, limit_train_batches=2)
    first = data.split("train")
    trainer, found = fit(data, max_epochs=3)
    _, expected = fit(fresh, max_epochs=3)
    assert trainer.global_step == 3 * 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert data.split("train") is first


def test_limits_known_before_training() -> None:
    data = Points(batch_size=32)
    for limits, steps, examples in (
        ({"max_epochs": 2}, 8, 200),
        ({"max_epochs": 2, "max_steps": 3}, 3, 96),
        ({"max_epochs": -1}, float("inf"), float("inf")),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 4, 128),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 192),
    ):
        data.attach(Trainer(**QUIET, **limits))  # type: ignore[arg-type]
        data.setup("fit")
        assert (data.total_steps(), data.total_examples()) == (steps, examples)


@pytest.mark.parametrize("limit", [None, 1.0, 0.37, 1, 3, 1000])
@pytest.mark.parametrize("size", [None, 7])
def test_a_limit_of_an_evaluation_takes_the_same_examples_on_any_devices(limit: Any, size: int | None) -> None:
    fetch = make_fetch((torch.arange(1000),))
    wanted = limit * (size or 256) if isinstance(limit, int) else int(1000 * (limit or 1))
    for devices in (1, 2, 3, 7):
        seen = []
        for rank in range(devices):
            loader = eval_loader("val", fetch, size or 256, size, (devices, rank), limit)
            batches = [batch.inputs.tolist() for batch in loader]
            lightning = _parse_num_batches(RunningStage.VALIDATING, len(loader), 1.0 if limit is None else limit)
            assert lightning >= len(batches)  # else Lightning would leave some out
            assert max(map(len, batches)) <= (size or 256)
            seen += [number for batch in batches for number in batch]
        assert seen == list(range(min(wanted, 1000)))


class Sentences(DataModule):
    """Ten sequences of four tokens."""

    def load(self, split: str) -> Ragged:
        return Ragged(torch.arange(40) % 3, torch.arange(11) * 4, torch.arange(10) % 2)


@pytest.mark.parametrize("tokens", [8, 12])
def test_copies_cannot_stay_together_in_batches_of_tokens(tokens: int) -> None:
    """By chance, the mean number of examples may be a multiple of the copies."""
    message = (
        "data.order keeps 2 copies of an example in one batch, but data.batch_tokens is cut by tokens: write data.b"
    )
    with pytest.raises(ValueError, match=message):
        Sentences(batch_tokens=tokens, order=Repeated(2), seed=0).setup("fit")
    Sentences(batch_size=4, micro_batch_tokens=8, order=Repeated(2), seed=0).setup("fit")


class Own(InMemory):
    """Reads in its own way, such as with weights."""


def test_a_source_of_ones_own_is_read_for_a_gpu_as_it_is() -> None:
    class Points(DataModule):
        def load(self, split: str) -> Own:
            return Own((torch.zeros(10, 2), torch.zeros(10)))

    data: Any = Points(batch_size=4)
    data.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    assert data.feed("train") is data.split("train")
