"""Captured steps. On a CPU there are no graphs, so here Python repeats what a graph would: with the same fixed tensors.

The graphs themselves are tested on a GPU, in `tests/batchwise/gpu`.
"""

from typing import Any

import pytest
import small
import torch
from capturing import RIGHT, UNFIT, Planted, make
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.callbacks.ema import EMA
from batchwise.errors import TrainingStopped
from batchwise.tasks import captured


def train(monkeypatch: pytest.MonkeyPatch, name: str, on: str, **more: Any) -> Any:
    monkeypatch.setattr(captured, "DEVICES", (on,))
    task, data, trainer = RIGHT[name]()
    settings = {"capture": "auto", "max_epochs": 6, "log_every_n_steps": 10} | trainer | more
    return small.fit(make(**task), small.Points(**data), **settings)[0]


@pytest.mark.parametrize("name", RIGHT)
def test_captured_steps_are_the_ordinary_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary, replayed = train(monkeypatch, name, "cuda"), train(monkeypatch, name, "cpu")
    assert ordinary._step.captured.replays == 0
    assert replayed._step.captured.replays >= 14
    assert small.furthest(ordinary, replayed) < 1e-13
    assert replayed._measures.epoch_loss == pytest.approx(ordinary._measures.epoch_loss, abs=1e-13)


def test_a_step_that_is_not_finite_is_skipped_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    said, tasks = [], []
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        tasks.append(small.fit(make(), Planted(), capture="auto", max_epochs=6, log_every_n_steps=10)[0])
        said.append([line for line in capsys.readouterr().out.splitlines() if "skipped" in line])
    assert tasks[1]._step.captured.replays > 15
    assert len(said[0]) == 6
    assert said[0] == said[1]
    assert small.furthest(*tasks) < 1e-13


def test_an_average_does_not_count_a_step_that_the_device_has_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        settings: dict[str, Any] = {"capture": "auto", "max_epochs": 6, "log_every_n_steps": 10, "callbacks": [EMA(30)]}
        tasks.append(small.fit(make(), Planted(), **settings)[0])
    assert tasks[1]._step.captured.replays > 15
    assert small.furthest(*tasks) < 1e-13


def test_training_stops_after_too_many_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(small.Classify):
        def losses(self, batch: MicroBatch) -> Tensor:
            return super().losses(batch) * self.network.factor  # pyright: ignore[reportReturnType]

    class Break(Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 3:
                pl_module.network.factor.fill_(float("nan"))

    def network() -> nn.Module:
        made = small.network()
        made.register_buffer("factor", torch.ones((), dtype=torch.float64))
        return made

    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    task = make(Breaks, network=network, max_skipped_steps=5)
    with pytest.raises(TrainingStopped, match="5 steps in a row, up to step 32"):
        small.fit(task, capture="auto", max_epochs=20, log_every_n_steps=1000, callbacks=[Break()])


@pytest.mark.parametrize("reason", UNFIT)
@pytest.mark.slow
def test_what_cannot_be_captured_is_ordinary_and_said_once(
    reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    task, trainer = UNFIT[reason]
    made = []
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        made.append(small.fit(make(**task), capture="auto", log_every_n_steps=10, **trainer)[0])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trainer.capture")]
    assert len(lines) == 2
    assert reason in lines[1]
    assert made[1]._step.captured.replays == 0
    assert small.furthest(*made) == 0


def test_a_cpu_runs_ordinary_steps(capsys: pytest.CaptureFixture) -> None:
    small.fit(make(), capture="auto")
    assert "steps are not captured, because cpu is no CUDA device" in capsys.readouterr().out
