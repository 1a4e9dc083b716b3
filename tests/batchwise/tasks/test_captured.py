"""Captured steps. On a CPU there are no graphs, so here Python repeats what a graph would: with the same fixed tensors.

The graphs themselves are tested on a GPU, in `tests/batchwise/gpu`.
"""

from functools import partial
from typing import Any

import capturing
import pytest
import small
import standin
import torch
import torch.nn.functional as F
from capturing import RIGHT, UNFIT, Planted, make
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchwise import MicroBatch
from batchwise.batching import device
from batchwise.callbacks.ema import EMA
from batchwise.data import examples as reading
from batchwise.errors import TrainingStopped
from batchwise.tasks import captured, fixed, step, trying


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


class Cycled(small.Classify):
    """The scheduler changes the momentum, too. It would be recorded anew at each step."""

    def configure_optimizers(self) -> Any:
        optimizer = capturing.adamw(self.parameters())
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=60)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_momentum_that_changes_at_each_step_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made = []
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        made.append(small.fit(make(Cycled), capture="auto", max_epochs=6, log_every_n_steps=10)[0])
    assert "a scheduler changes more of the optimizer than the rate" in capsys.readouterr().out
    assert 1 <= made[1]._step.captured.replays <= 6  # one, to see it, in each epoch
    assert small.furthest(*made) < 1e-7  # the rate is rounded where a step is captured


class Sparse(small.Classify):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("graph", torch.eye(3, dtype=torch.float64).to_sparse(), persistent=False)

    def losses(self, batch: MicroBatch) -> Tensor:
        outputs = torch.sparse.mm(self.graph, self(batch.inputs).T).T
        return F.cross_entropy(outputs, batch.targets, reduction="none")


def test_a_sparse_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        made.append(small.fit(make(Sparse), capture="auto", max_epochs=6, log_every_n_steps=10)[0])
    assert made[1]._step.captured.replays > 15
    assert small.furthest(*made) < 1e-13


class DrawsOnTheHost(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        return super().losses(batch) * (1 + torch.randperm(5).tolist()[0])


def test_draws_on_the_host_are_not_captured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On a device with a generator of its own."""
    monkeypatch.setattr(captured, "DEVICES", ("mps",))
    with standin.mps(float64=True):
        for module in (device, reading, trying):
            monkeypatch.setattr(module, "has_float64", lambda _: True)
        for module in (device, step):
            monkeypatch.setattr(module, "GO_ON" if module is device else "DEVICES", ("mps",))
        settings: dict[str, Any] = {"accelerator": "auto", "devices": 1, "capture": "auto", "log_every_n_steps": 10}
        task, _ = small.fit(make(DrawsOnTheHost), max_epochs=2, **settings)
    assert "it draws from PyTorch's generator of the host" in capsys.readouterr().out
    assert task._step.captured.replays == 0


class Breaks(small.Points):
    """A micro-batch in the middle of a batch cannot be read, once."""

    calls = 0

    def transform(self, batch: MicroBatch, training: bool) -> MicroBatch:
        self.calls += training and self.trainer.global_step == 24  # type: ignore[union-attr]
        if self.calls == 3:
            self.calls += 1
            raise OSError("gone")
        return batch


def test_a_step_that_broke_off_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    settings: dict[str, Any] = {"capture": "auto", "max_epochs": 6, "log_every_n_steps": 1000, "limit_val_batches": 0}
    for on in ("cuda", "cpu"):
        monkeypatch.setattr(captured, "DEVICES", (on,))
        # An optimizer without a state is in the same place again, so nothing else tells the trainings apart.
        task, data = make(optimizer=partial(torch.optim.SGD, lr=0.1, fused=True)), Breaks(micro_batch_size=3)
        with pytest.raises(OSError, match="gone"):
            small.fit(task, data, **settings)
        made.append(small.fit(task, data, **settings)[0])
    assert made[1]._step.captured.replays > 30
    assert small.furthest(*made) < 1e-13


def test_a_cpu_runs_ordinary_steps(capsys: pytest.CaptureFixture) -> None:
    small.fit(make(), capture="auto")
    assert "steps are not captured, because cpu is no CUDA device" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch has CUDA, which records: see tests/batchwise/gpu")
def test_a_recording_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setattr(fixed.Fixed, "_pool", property(lambda _: (0, 1), lambda *_: None), raising=False)
    with pytest.raises(TrainingStopped, match=r"does not record this step \(.+\): .*--trainer.capture null goes on"):
        small.fit(make(), small.Points(), capture="auto")
