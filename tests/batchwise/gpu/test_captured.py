"""Steps that are replayed as CUDA graphs give what ordinary steps give."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import capturing
import parts
import pytest
import small
import torch
import torch.nn.functional as F
from capturing import RIGHT, UNFIT, make
from torch import Tensor

from batchwise import MicroBatch
from batchwise.tasks import captured

pytestmark = pytest.mark.gpu


@pytest.fixture
def ordinary(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that says whether the steps from now on are ordinary ones."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(captured, "DEVICES", () if on else ("cuda", "cpu"))

    switch(False)
    return switch


def both(ordinary: Any, train: Any) -> tuple[Any, Any]:
    """Train in ordinary steps, then in captured ones."""
    ordinary(True)
    first = train()
    ordinary(False)
    second = train()
    assert first._step.captured.replays == 0
    return first, second


@pytest.mark.parametrize("name", RIGHT)
def test_replayed_steps_are_the_ordinary_ones(name: str, ordinary: Any, on: dict[str, Any]) -> None:
    def train() -> Any:
        task, data, trainer = RIGHT[name]()
        settings = {"capture": "auto", "max_epochs": 6, "log_every_n_steps": 10, **on} | trainer
        return small.fit(make(**task), small.Points(**data), **settings)[0]

    first, second = both(ordinary, train)
    assert second._step.captured.replays >= 14
    assert small.furthest(first, make(**RIGHT[name]()[0])) > 0.01
    assert small.furthest(first, second) < 1e-12
    assert second._measures.epoch_loss == pytest.approx(first._measures.epoch_loss, abs=1e-12)


@pytest.mark.parametrize("optimizer", [capturing.adamw, capturing.sgd])
def test_a_step_that_is_not_finite_is_skipped_in_the_graph(
    optimizer: Any, ordinary: Any, on: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> Any:
        data = parts.Points(infinite=[parts.PLANTED])
        settings = {"capture": "auto", "max_epochs": 6, "log_every_n_steps": 10, "limit_val_batches": 0, **on}
        return small.fit(make(optimizer=optimizer), data, **settings)[0]

    first, second = both(ordinary, train)
    said = [line for line in capsys.readouterr().out.splitlines() if "not finite; skipped" in line]
    assert second._step.captured.replays >= 14
    assert len(said) == 12
    assert said[:6] == said[6:]
    assert small.furthest(first, second) < 1e-12


def test_it_goes_on_from_a_checkpoint_of_ordinary_steps(ordinary: Any, on: dict[str, Any], tmp_path: Path) -> None:
    settings = {"log_every_n_steps": 10, "limit_val_batches": 0, "capture": "auto", **on}

    def train() -> Any:
        return small.fit(make(), max_epochs=6, **settings)[0]

    ordinary(True)
    _, trainer = small.fit(make(), max_epochs=2, **settings)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    first, _ = both(ordinary, train)
    second, _ = small.fit(make(), max_epochs=6, ckpt_path=str(tmp_path / "one.ckpt"), **settings)
    assert second._step.captured.replays >= 14
    assert small.furthest(first, second) < 1e-12


def test_bf16_in_a_graph(ordinary: Any, on: dict[str, Any]) -> None:
    def train() -> Any:
        task = make(network=lambda: parts.mlp().float())
        settings = {"precision": "bf16-mixed", "capture": "auto", "max_epochs": 6, "log_every_n_steps": 10, **on}
        return small.fit(task, parts.Points(torch.float32), **settings)[0]

    first, second = both(ordinary, train)
    assert second._step.captured.replays >= 14
    assert small.furthest(first, second) < 1e-6


def test_a_compiled_network_in_a_graph(ordinary: Any, cuda: torch.device, on: dict[str, Any]) -> None:
    def train() -> Any:
        task = make(network=lambda: parts.mlp().float())
        data = parts.Points(torch.float32, drop_last=True)
        settings = {"precision": "32-true", "max_epochs": 6, "log_every_n_steps": 10, **on}
        return small.fit(task, data, compile=True, capture="auto", **settings)[0]

    first, second = both(ordinary, train)
    assert second._step.captured.replays >= 14
    assert small.furthest(first, second) < 1e-6


class Waits(small.Classify):
    def losses(self, batch: MicroBatch) -> Tensor:
        losses = F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")
        return losses / losses.detach().max().item()


class ReadsTheHost(small.Classify):
    """It moves a table to the device at each step, without waiting. A graph would keep the address."""

    def losses(self, batch: MicroBatch) -> Tensor:
        losses = F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")
        return losses * torch.linspace(1, 2, len(batch), dtype=torch.float64).to(losses.device, non_blocking=True)


class ReadsTheIndex(small.Classify):
    """Examples have weights of their own, on the device."""

    def losses(self, batch: MicroBatch) -> Tensor:
        losses = F.cross_entropy(self(batch.inputs), batch.targets, reduction="none")
        return losses * torch.linspace(1, 2, 64, dtype=torch.float64, device=losses.device)[batch.index]


class DrawsOnTheHost(small.Classify):
    """PyTorch gives the numbers to Python without an operation. The generator is seeded for each micro-batch."""

    def losses(self, batch: MicroBatch) -> Tensor:
        first = torch.randperm(5).tolist()[0]
        return F.cross_entropy(self(batch.inputs), batch.targets, reduction="none") * (1 + first)


@pytest.mark.parametrize("task", [Waits, ReadsTheHost, DrawsOnTheHost])
def test_what_a_graph_cannot_hold_runs_in_ordinary_steps(
    task: Any, ordinary: Any, cuda: torch.device, on: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = both(ordinary, lambda: small.fit(make(task), capture="auto", **on)[0])
    assert "cannot be recorded" in capsys.readouterr().out
    assert second._step.captured.replays == 0
    assert small.furthest(first, second) == 0


SYNCHRONIZES = """
import small, torch
from capturing import make

class Synchronizes(small.Classify):
    def losses(self, batch):
        torch.cuda.synchronize()
        return super().losses(batch)

small.fit(make(Synchronizes), capture="auto", accelerator="cuda", devices=1)
"""


def test_what_cuda_does_not_record_is_told(cuda: torch.device, tmp_path: Path) -> None:
    """In a process of its own, because PyTorch is not as before afterwards."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", SYNCHRONIZES]
    ended = subprocess.run(command, env=env, cwd=tmp_path, text=True, capture_output=True, timeout=100)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert "TrainingStopped: trainer.capture: CUDA does not record this step" in last
    assert "--trainer.capture null goes on" in last


def test_the_numbers_of_examples_are_on_the_device(ordinary: Any, cuda: torch.device, on: dict[str, Any]) -> None:
    first, second = both(ordinary, lambda: small.fit(make(ReadsTheIndex), capture="auto", max_epochs=6, **on)[0])
    assert second._step.captured.replays >= 14
    assert small.furthest(first, second) < 1e-12


@pytest.mark.parametrize("reason", UNFIT)
def test_other_reasons(reason: str, ordinary: Any, on: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    task, trainer = UNFIT[reason]
    first, second = both(ordinary, lambda: small.fit(make(**task), capture="auto", **trainer, **on)[0])
    assert reason in capsys.readouterr().out
    assert second._step.captured.replays == 0
    assert small.furthest(first, second) < 1e-12
