"""`micro_batch_size: auto`, alone and with `speed: auto` (which test_speed.py runs)."""

import re
from pathlib import Path
from typing import Any

import pytest
import small
import torch
import yaml
from helpers import CSV, DIGITS, furthest, run_here

from batchwise.choosing import automatic, speed
from batchwise.choosing.speed import Stopwatch
from batchwise.run import auto
from batchwise.tasks.classification import Classification

AUTO = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 3)
AUTO = (*AUTO, "--trainer.precision", "64-true", "--data.micro_batch_size", "auto")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "_TURN", 0.0)
    monkeypatch.setattr(Stopwatch.__init__, "__defaults__", (1,))  # round
    yield
    torch.set_num_threads(1)


def test_what_fits_and_is_fast_is_taken_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run_here(*AUTO[:-2], "--data.micro_batch_size", "null", "--name", "plain")
    losses = Classification.losses

    def hungry(self: Classification, batch):
        if self.training and len(batch) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return losses(self, batch)

    monkeypatch.setattr(Classification, "losses", hungry)
    result = run_here(*AUTO)
    assert result.code == 0, result.err
    assert "data.micro_batch_size: auto" in result.out
    measured = re.findall(r"micro-batches of (\d+), 64-true, 1 thread\(s\)(  <- taken)?$", result.out, re.MULTILINE)
    assert [int(size) for size, _ in measured[:6]] == [1, 2, 4, 8, 16, 32]
    assert 36 <= int(measured[-1][0]) <= 40
    (taken,) = (int(size) for size, mark in measured if mark)
    assert (
        f"micro_batch_size  {taken}\n" in result.out or f"micro_batch_size  {-(-64 // -(-64 // taken))}\n" in result.out
    )
    assert "out of memory with micro-batches" not in result.out
    assert furthest(plain, result) < 1e-9
    chosen = yaml.safe_load((result.folder / "speed.yaml").read_text())
    assert chosen == {"speed": None, "trainer": {}, "data": {"micro_batch_size": taken}}
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert saved["data"]["init_args"]["micro_batch_size"] == taken  # so that it gives the same run


@pytest.mark.slow
def test_with_speed_auto_the_rest_is_chosen_too() -> None:
    result = run_here(*AUTO, "--speed", "auto")
    assert result.code == 0, result.err
    chosen = yaml.safe_load((result.folder / "speed.yaml").read_text())
    assert chosen["trainer"].keys() >= {"threads"}
    assert 1 <= chosen["data"]["micro_batch_size"] <= 64
    again = run_here(*AUTO, "--speed", "auto", "--config", result.folder / "speed.yaml")
    assert "64-true" in result.out
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("--trainer.accumulate_grad_batches", 4),
            "data.micro_batch_size is auto, but trainer.accumulate_grad_batches",
        ),
        (("--data.batch_size", "null"), "data.micro_batch_size is auto, but data.batch_size is not set"),
        (("--data.micro_batch_size", "many"), "micro_batch_size is many: write"),
    ],
)
def test_bad_input(arguments, line) -> None:
    result = run_here(*AUTO, *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_nothing_that_fits_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic.fits, "what_fits", lambda *_: iter(()))
    result = run_here(*AUTO)
    assert result.code == 2
    assert "not even a micro-batch of 1 fits" in result.err


def test_other_commands_leave_it_open() -> None:
    trained = run_here(*AUTO)
    tested = run_here("test", *DIGITS, *CSV, "--data.micro_batch_size", "auto", "--ckpt_path", "best")
    assert trained.code == tested.code == 0, tested.err


def test_it_is_measured_on_the_gpu_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is none, so what would be measured, and where, is noted. Examples are read with that GPU in use."""
    used, measured = [], []
    monkeypatch.setattr(auto, "_kind", lambda _: "cuda")
    monkeypatch.setattr(torch.cuda, "set_device", used.append)

    def measure(
        task: Any, data: Any, trainer: Any, path: Path, device: torch.device, processes: int, all_: bool
    ) -> None:
        measured.append((device, processes, list(used)))
        path.write_text("trainer: {}")

    monkeypatch.setattr(auto.automatic, "measure", measure)
    for devices in ([3, 1], 2, "3,"):  # the last one is a list, as Lightning reads it
        task, config = small.Classify(small.network(), optimizer=small.adamw), {"speed": "auto", "trainer": {}}
        auto.choose_settings(task, small.Points(), {"devices": devices}, config, Path(), everything=True)
    third = torch.device("cuda", 3)
    assert measured[0] == (third, 2, [third])
    assert measured[1] == (torch.device("cuda"), 2, [third])
    assert measured[2] == (third, 1, [third, third])
