"""The short loop is Lightning's loop; and a training that is stopped within an epoch has as many steps in all."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import pytest
import small
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger

from batchwise import loop
from batchwise.callbacks.checkpoint import Last
from batchwise.callbacks.ema import EMA

STEPS = 42  # six epochs
SETTINGS: dict[str, Any] = {"max_epochs": 6, "enable_checkpointing": True}


class Listener(Callback):
    """Makes Lightning's own `advance` run."""

    def on_train_batch_end(self, *_: Any) -> None:
        pass


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A note of each step that takes the long way."""
    taken: list[str] = []
    parent = loop._TrainingEpochLoop.advance

    def long(self: Any, data_fetcher: Any) -> None:
        taken.append("long")
        parent(self, data_fetcher)

    monkeypatch.setattr(loop._TrainingEpochLoop, "advance", long)
    return taken


@pytest.mark.parametrize("way", ["listener", "version", "profiler"])
@pytest.mark.slow
def test_both_ways_are_equal_bit_for_bit(way: str, ways: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for name in ("short", way):
        ways.clear()
        usual = [Last(), EMA(100), ModelCheckpoint(Path(name), monitor="val/loss")]
        callbacks = [*usual, Listener()] if name == "listener" else usual
        if name == "version":
            monkeypatch.setattr(loop, "KNOWN", ())
        more = {"profiler": "simple"} if name == "profiler" else {}
        task, trainer = small.fit(
            data=small.Points(micro_batch_size=3), callbacks=callbacks, logger=CSVLogger(name, "log"),
            log_every_n_steps=5, val_check_interval=3, **SETTINGS, **more,
        )  # fmt: skip
        assert ways == (["long"] * STEPS if name != "short" else [])
        rows = (Path(name) / "log" / "version_0" / "metrics.csv").read_text().splitlines()
        timed = [number for number, column in enumerate(rows[0].split(",")) if not _is_clock(column)]
        rows = [[row.split(",")[number] for number in timed] for row in rows]
        best = sorted(path.name for path in Path(name).glob("*.ckpt"))
        found[name] = (task.state_dict(), dict(trainer.callback_metrics), rows, best, trainer.current_epoch)
    ours, theirs = found.values()
    assert all(torch.equal(value, theirs[0][key]) for key, value in ours[0].items())
    assert ours[1:] == theirs[1:]
    assert len(ours[2]) > 20


def _is_clock(column: str) -> bool:
    return column in ("examples_per_second", "data_wait", "peak_memory_mib", "model_flops_per_second", "mfu")


def test_this_lightning_is_known() -> None:
    """If not: hold `EpochLoop.advance` against that version's, and add it."""
    assert lightning.__version__ in loop.KNOWN


class LogsLater(small.Classify):
    """Begins to log in the middle of the training."""

    def losses(self, batch: Any) -> torch.Tensor:
        losses = super().losses(batch)
        if self.training and self.trainer.global_step >= 9:
            self.log("mine", losses.mean(), batch_size=len(batch))
        return losses


def test_who_begins_to_log_is_heard(ways: list[str]) -> None:
    task = LogsLater(small.network(), optimizer=small.adamw)
    small.fit(task, logger=CSVLogger(".", "log"), log_every_n_steps=1, max_epochs=3)
    assert len(ways) == 21 - 10  # after the first row, each step takes the long way
    import csv

    with Path("log/version_0/metrics.csv").open() as file:
        assert sum(bool(row["mine"]) for row in csv.DictReader(file)) == 12


# Stopped within an epoch


class Stop(Callback):
    """Asks for an end after some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step in self.steps


def last() -> str:
    return str(Path("checkpoints/last.ckpt").absolute())


def whole(**settings: Any) -> tuple[small.Task, Any]:
    return small.fit(callbacks=[Last()], **SETTINGS | {"default_root_dir": Path("whole")} | settings)


@pytest.mark.parametrize("val_check_interval", [1.0, 3])
@pytest.mark.slow
def test_stops_of_a_callback(val_check_interval: float) -> None:
    """Within epochs, at the end of one, and twice in the same."""
    settings = SETTINGS | {"val_check_interval": val_check_interval}
    reference, _ = whole(val_check_interval=val_check_interval)
    _, trainer = small.fit(callbacks=[Stop(3), Last()], **settings)
    assert trainer.global_step == 3
    for number, stops in enumerate([(5, 9), (9,), (14,), (30,)]):
        _, trainer = small.fit(callbacks=[Stop(*stops), Last()], ckpt_path=last(), **settings)
        assert trainer.global_step == (5, 9, 14, 30)[number]
    task, trainer = small.fit(callbacks=[Last()], ckpt_path=last(), **settings)
    assert trainer.global_step == STEPS
    assert trainer.current_epoch == 6
    assert small.furthest(task, reference) == 0
    assert task._measures.epoch_loss == pytest.approx(reference._measures.epoch_loss, abs=1e-15)


class Slow(Callback):
    """A step takes a while."""

    def on_train_batch_start(self, *_: Any) -> None:
        import time

        time.sleep(0.02)


def test_max_time_three_times_and_then_to_the_end() -> None:
    reference, _ = whole()
    path, steps = None, []
    for number in range(1, 4):
        # Lightning's timer goes on counting after a resume.
        limit = timedelta(seconds=0.25 * number)
        _, trainer = small.fit(callbacks=[Slow(), Timer(limit), Last()], ckpt_path=path, **SETTINGS)
        steps.append(trainer.global_step)
        path = last()
    assert 0 < steps[0] < steps[1] < steps[2] < STEPS
    task, trainer = small.fit(callbacks=[Last()], ckpt_path=path, **SETTINGS)
    assert trainer.global_step == STEPS
    assert small.furthest(task, reference) == 0


def test_early_stopping_within_an_epoch_and_gone_on_with() -> None:
    settings = SETTINGS | {"val_check_interval": 3}
    reference, _ = whole(val_check_interval=3)
    stopping = EarlyStopping("val/loss", stopping_threshold=1.0)
    _, trainer = small.fit(callbacks=[stopping, Last()], **settings)
    assert 0 < trainer.global_step < STEPS
    assert trainer.global_step % 7 not in (0, 6)
    task, trainer = small.fit(callbacks=[Last()], ckpt_path=last(), **settings)
    assert trainer.global_step == STEPS
    assert small.furthest(task, reference) == 0


def test_max_steps_within_an_epoch_and_gone_on_with() -> None:
    reference, _ = whole()
    for steps in (4, 7, 17):
        path = last() if steps > 4 else None
        _, trainer = small.fit(callbacks=[Last()], ckpt_path=path, **SETTINGS | {"max_steps": steps})
        assert trainer.global_step == steps
    task, trainer = small.fit(callbacks=[Last()], ckpt_path=last(), **SETTINGS)
    assert trainer.global_step == STEPS
    assert small.furthest(task, reference) == 0
