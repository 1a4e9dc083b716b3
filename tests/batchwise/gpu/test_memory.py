"""A GPU that runs out of memory for real: its memory is capped, so that a whole batch does not fit."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import parts
import pytest
import small
import torch
import yaml
from torch import nn

from batchwise.choosing import automatic, fits, speed
from batchwise.choosing.speed import Stopwatch, Way

pytestmark = pytest.mark.gpu

EXAMPLES = 4096
WIDTH = 8192
"""An activation of all examples takes 256 MiB in float64, and a pass holds two at least."""
CAP = 300 * 2**20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_TURN", 0.01)


@contextmanager
def capped(device: torch.device, limit: int | None = None) -> Iterator[int]:
    """Let PyTorch have only `limit` bytes, by default `CAP` more than it has now; yield the limit."""
    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(device).total_memory
    limit = torch.cuda.memory_reserved(device) + CAP if limit is None else limit
    torch.cuda.set_per_process_memory_fraction(limit / whole, device)
    try:
        yield limit
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()


class Many(small.Points):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": EXAMPLES} | kwargs)
        self.x, self.y = self.x.repeat(EXAMPLES // 64, 1), self.y.repeat(EXAMPLES // 64)


def wide() -> parts.WithoutMetrics:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
    return parts.WithoutMetrics(network, optimizer=partial(torch.optim.SGD, lr=0.01))


SETTINGS: dict[str, Any] = {"max_epochs": 3, "limit_val_batches": 0}


def test_a_batch_that_does_not_fit_is_halved(
    cuda: torch.device, on: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    free, _ = small.fit(wide(), Many(), **SETTINGS, **on)
    assert "out of memory" not in capsys.readouterr().out
    data = Many()
    with capped(cuda):
        task, trainer = small.fit(wide(), data, **SETTINGS, **on)
    assert trainer.global_step == 3
    assert data.micro_batch_limit in [EXAMPLES // 2**halvings for halvings in range(1, 7)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert lines[0].startswith(
        f"step 0: out of memory with micro-batches of {EXAMPLES} examples: the batch is run again in micro-batches of "
        f"{EXAMPLES // 2}"
    )
    assert lines[-1].startswith("step 0:")  # the limit is kept for the steps after
    assert parts.moved(free, wide().network) > 1e-3
    assert small.furthest(task, free) < 1e-10


def test_the_finder_finds_what_fits(cuda: torch.device, on: dict[str, Any]) -> None:
    task, data = tried(on)
    way = Way(64, precision="64-true", threads=torch.get_num_threads())
    with capped(cuda) as limit:
        found = list(fits.what_fits(Stopwatch(task, data, 64, cuda), way, EXAMPLES, float("inf"), 1))
    largest = max(found)
    assert 64 <= largest.examples < EXAMPLES
    assert CAP / 2 < largest.memory <= limit  # the bisection comes near the cap


def test_a_size_that_was_measured_trains_without_running_out(
    cuda: torch.device, on: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, data = tried(on, micro_batch_size="auto")
    path, settings = tmp_path / automatic.FILE, {"precision": "64-true", "max_epochs": 3, "max_steps": -1}
    with capped(cuda) as limit:
        automatic.measure(task, data, settings, path, cuda, 1, False)
        size = yaml.safe_load(path.read_text())["data"]["micro_batch_size"]
    assert 1 <= size < EXAMPLES
    with capped(cuda, limit + CAP // 10):  # what was measured is itself rounded to blocks of the allocator
        _, trainer = small.fit(wide(), Many(micro_batch_size=size), **SETTINGS, **on)
    assert trainer.global_step == 3
    out = capsys.readouterr().out
    assert "data.micro_batch_size: auto, forward and backward pass:" in out
    assert "out of memory" not in out


def tried(on: dict[str, Any], **kwargs: Any) -> tuple[parts.WithoutMetrics, Many]:
    """A task that was tried, as before measuring, and its data."""
    task, data = wide(), Many(**kwargs)
    data.attach(small.trainer(**SETTINGS, **on))
    data.setup("fit")
    task.prepare(data, "train")
    return task, data
