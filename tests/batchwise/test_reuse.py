"""Tasks, data modules and trainers used again, as in a notebook: each training is that of new objects."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import WeightAveraging
from torch.utils.data import TensorDataset

from batchwise import DataModule, Task
from batchwise.batching.order import Sequential
from batchwise.callbacks.checkpoint import Last

Ready = tuple[Task, DataModule, Any]
"""A task and a data module, both used, and what they are to be like: the settings of new ones."""


def new() -> small.Classify:
    return small.Classify(small.network(), optimizer=small.adamw)


def after(**settings: Any) -> Callable[[], Ready]:
    def make() -> Ready:
        data = small.Points()
        small.fit(new(), data, **settings)
        return new(), data, {}

    return make


def with_other(**changes: Any) -> Callable[[], Ready]:
    def make() -> Ready:
        data = small.Points()
        small.fit(new(), data)
        for name, value in changes.items():
            setattr(data, name, value)
        return new(), data, changes

    return make


def after_a_resume() -> Ready:
    saving: dict[str, Any] = {"callbacks": [Last()], "enable_checkpointing": True}
    small.fit(new(), small.Points(), max_steps=12, **saving)
    data = small.Points()
    small.fit(new(), data, ckpt_path=str(Path("checkpoints/last.ckpt").absolute()), **saving)
    return new(), data, {}


def after_validation() -> Ready:
    data = small.Points()
    for verb in ("validate", "test", "predict"):
        getattr(small.trainer(), verb)(new(), datamodule=data)
    return new(), data, {}


def after_an_error() -> Ready:
    class Breaks(small.Classify):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise KeyError("mine")

    data = small.Points()
    with pytest.raises(KeyError):
        small.fit(Breaks(small.network(), optimizer=small.adamw), data)
    return new(), data, {}


def a_task_again() -> Ready:
    task = new()
    small.fit(task, small.Points())
    task.network.load_state_dict(small.network().state_dict())
    return task, small.Points(), {}


def both_again() -> Ready:
    task, data = new(), small.Points()
    small.fit(task, data, max_steps=5)
    task.network.load_state_dict(small.network().state_dict())
    return task, data, {}


def copies() -> Ready:
    task, data = new(), small.Points()
    small.fit(task, data, max_steps=5)
    task, data = copy.deepcopy(task), copy.deepcopy(data)
    task.network.load_state_dict(small.network().state_dict())
    return task, data, {}


def in_turns() -> Ready:
    data = small.Points()
    small.fit(new(), data, max_steps=9)
    small.fit(new(), data, max_steps=2)
    small.trainer().validate(new(), datamodule=data)
    return new(), data, {}


WAYS: dict[str, Callable[[], Ready]] = {
    "after a training": after(),
    "after fast_dev_run": after(fast_dev_run=True),
    "after fast_dev_run of 3": after(fast_dev_run=3),
    "after a limit": after(limit_train_batches=2),
    "after other lengths": after(max_steps=4),
    "after several devices": after(strategy="ddp_fork", devices=2),
    "after micro-batches": after(accumulate_grad_batches=3),
    "after a resume": after_a_resume,
    "after an evaluation": after_validation,
    "after an error": after_an_error,
    "in turns": in_turns,
    "another batch size": with_other(batch_size=20),
    "other micro-batches": with_other(micro_batch_size=3),
    "another seed": with_other(seed=5),
    "another order": with_other(order=Sequential()),
    "the task again": a_task_again,
    "both again": both_again,
    "copies": copies,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_training_is_that_of_new_objects(way: str) -> None:
    task, data, settings = WAYS[way]()
    _, trainer = small.fit(task, data)
    fresh_data = small.Points(**settings)
    fresh, fresh_trainer = small.fit(new(), fresh_data)
    assert data.plan is not None
    assert fresh_data.plan is not None
    assert trainer.global_step == fresh_trainer.global_step
    assert data.plan.batch_size == settings.get("batch_size", 10)
    assert data.plan.table(trainer.global_step) == fresh_data.plan.table(trainer.global_step)
    assert small.furthest(task, fresh) < 1e-14
    assert trainer.callback_metrics.keys() == fresh_trainer.callback_metrics.keys()
    for name, value in fresh_trainer.callback_metrics.items():
        assert torch.equal(trainer.callback_metrics[name], value), name


def test_the_same_trainer_with_another_task() -> None:
    first, trainer = small.fit(max_epochs=1)
    second = new()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, datamodule=small.Points())
    assert trainer.global_step == 14
    assert small.furthest(first, second) > 0


def test_a_task_in_evaluation_mode_is_not_trained() -> None:
    task = new().eval()
    with pytest.raises(ValueError, match=r"Classify is in evaluation mode, .*: write task\.train\(\)"):
        small.fit(task)
    small.fit(task.train())


class OneByOne(small.Points):
    def load(self, split: str) -> Any:
        return TensorDataset(self.x, self.y)


class Copies(Callback):
    """Copies in the middle of training, as for a teacher or an average, or to send to another process."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.made = make, list[Any]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            self.made = [
                self.make((pl_module, trainer.datamodule)),
                self.make(pl_module),
                self.make(trainer.datamodule),
            ]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_in_the_middle_of_training(make: Callable[[Any], Any], workers: int) -> None:
    copies = Copies(make)
    reference, _ = small.fit(data=OneByOne())
    task, _ = small.fit(data=OneByOne(num_workers=workers), callbacks=[copies])
    assert small.furthest(task, reference) == 0
    (both, data), alone, module = copies.made
    assert data.trainer is None
    assert module.trainer is None
    for one in (both, alone):
        assert 0 < small.furthest(one, task) < 1
        one.network.load_state_dict(small.network().state_dict())
        small.fit(one, data)
        assert small.furthest(one, reference) == 0
    assert len(pickle.dumps(alone)) < 50_000  # without the trainer and the examples


def test_a_task_that_was_trained_is_averaged() -> None:
    task, _ = small.fit(data=OneByOne(), max_epochs=1)
    small.fit(task, max_epochs=1, callbacks=[WeightAveraging()])
