"""`tune`: what fits, what is fast, what the gradient says, what follows."""

import math
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CSV, DIGITS, TWO, run_here, run_process

from batchwise.batching.noise import Estimate
from batchwise.choosing import fits, speed
from batchwise.choosing import tune as tuning
from batchwise.choosing.findings import Choice, Findings
from batchwise.choosing.fits import Size, what_fits
from batchwise.choosing.speed import Way
from batchwise.run import verbs


class Machine:
    """Takes `each` bytes per example over a million; dies over `memory` bytes; says so over `holds` examples."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: int = 1000, holds: float = math.inf) -> None:
        self.each, self.holds, self.run, self.peak = each, holds, [], 0
        monkeypatch.setattr(fits, "reset_peak_memory", lambda device: None)
        monkeypatch.setattr(fits, "peak_memory", lambda device: self.peak)

    def seconds(self, way: Way) -> float:
        self.run.append(way.size)
        self.peak = 10**6 + self.each * way.size
        return 1e-3 if way.size <= self.holds else math.inf


@pytest.mark.parametrize("holds", [1, 5, 64, 100, 1000])
def test_the_largest_that_fits_was_run_and_the_next_was_not_far(monkeypatch: pytest.MonkeyPatch, holds: int) -> None:
    machine = Machine(monkeypatch, holds=holds)
    sizes = [size.examples for size in what_fits(machine, Way(1), 4096, math.inf, unit=1)]  # type: ignore[arg-type]
    assert set(sizes) <= set(machine.run)
    assert holds * 15 // 16 <= max(sizes) <= holds


def test_what_would_not_fit_is_not_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    budget = 10**6 + 1000 * 700
    sizes = [size.examples for size in what_fits(machine, Way(1), 4096, budget, unit=1)]  # type: ignore[arg-type]
    assert max(machine.run) <= 700
    assert max(sizes) >= 650


def test_whole_units_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, holds=500)
    sizes = [size.examples for size in what_fits(machine, Way(1), 4096, math.inf, unit=24)]  # type: ignore[arg-type]
    assert all(size % 24 == 0 for size in sizes)
    assert max(sizes) >= 456
    machine = Machine(monkeypatch)
    assert max(what_fits(machine, Way(1), 300, math.inf, unit=1)).examples == 300  # type: ignore[arg-type]


def test_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [Size(16, 0, 1000.0), Size(32, 0, 2000.0), Size(64, 0, 2050.0)]
    findings = Findings(
        batch_size=64,
        largest=512,
        sizes=sizes,
        noise=[(100, Estimate(16, 10, 20, False)), (200, Estimate(math.inf, 192, math.inf, True))],
        overhead=0.01,
    )
    assert findings.knee() == sizes[1]
    # Steps get 4 / 5 and 1 / 4 as far as without noise.
    assert findings.noise_scale() == pytest.approx((16 * 0.8 + 192 * 0.25) / 1.05)
    monkeypatch.setattr(Findings, "noise_scale", lambda self: 64.0)
    choices = {choice.batch_size: choice for choice in findings.choices()}
    assert choices[64].steps == 2  # at the noise scale, twice the least of steps and of examples
    assert choices[64].examples == 2
    ratio = choices[64].seconds / choices[256].seconds
    assert ratio == pytest.approx(2 * (0.01 + 64 / 2000) / (1.25 * (0.01 + 256 / 2000)))
    assert min(choice.seconds for choice in choices.values()) == 1
    findings.devices = 4  # each of which has a quarter
    choices = {choice.batch_size: choice for choice in findings.choices()}
    ratio = choices[64].seconds / choices[256].seconds
    assert ratio == pytest.approx(2 * (0.01 + 16 / 1000) / (1.25 * (0.01 + 64 / 2000)))
    near = [Choice(32, 3, 1.5, 1.04), Choice(64, 2, 2, 1.0), Choice(16, 5, 1.25, 1.2)]
    monkeypatch.setattr(Findings, "choices", lambda self: near)
    assert findings.best() == near[0]


MLP_16 = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: 64, num_classes: 10, hidden_features: [16]}}"
WATCHED = """
import hashlib, os, pathlib, random
import numpy, torch
from batchwise.run import verbs
from batchwise.choosing import speed
from batchwise.tasks.classification import Classification

speed._TURN = 0.01
tune, rank = verbs.tune, os.environ.get("LOCAL_RANK", "0")

def digest(task):
    if not hasattr(task, "optimizer"):  # one that has state
        task.optimizer = task._new_optimizer()
        for parameter in task.parameters():
            parameter.grad = torch.ones_like(parameter)
        task.optimizer.step()
        task.optimizer.zero_grad()
    values = [*task.state_dict().values(), torch.get_rng_state()]
    values += [value for state in task.optimizer.state.values() for value in state.values()]
    digest = hashlib.sha256(str((random.getstate(), numpy.random.get_state()[1].tolist())).encode())
    for value in values:
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()

def watched(trainer, task, data, *arguments):
    torch.manual_seed(5)
    before, plan = digest(task), data.plan
    tune(trainer, task, data, *arguments)
    same = digest(task) == before and all(p.grad is None for p in task.parameters())
    pathlib.Path(f"same-{rank}").write_text(str(same and data.trainer is trainer and plan in (None, data.plan)))

verbs.tune = watched

class Small(Classification):
    def losses(self, batch):
        with open(f"sizes-{rank}", "a") as file:
            file.write(f"{len(batch)} " * (self._own_data is None))
        if rank == "1" and len(batch) > 100:
            raise torch.OutOfMemoryError("out of memory")
        return super().losses(batch)
"""


def test_digits_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    monkeypatch.setattr(speed, "_TURN", speed._TURN)  # which the module changes
    monkeypatch.setattr(verbs, "tune", verbs.tune)
    import_module("watched")
    result = run_here("tune", *DIGITS, *CSV, "--steps", 120, "--trainer.accelerator", "cpu")
    assert result.code == 0, result.err
    assert Path("same-0").read_text() == "True"  # nothing is changed
    assert "<- the knee" in result.out
    assert "largest micro-batch that was run: 1,259" in result.out
    assert "the gradient noise scale is about" in result.out
    assert "learning rate at batch_size" in result.out
    assert (result.folder / "tune.png").stat().st_size > 10_000
    overlay = result.folder / "tuned.yaml"
    chosen = yaml.safe_load(overlay.read_text())
    assert chosen["model"]["reference_batch_size"] == 64
    trained = run_here("fit", *DIGITS, *CSV, "--config", overlay, "--trainer.max_epochs", 1)
    assert trained.code == 0, trained.err
    assert f"batch_size  {chosen['data']['batch_size']}\n" in trained.out
    assert f"micro_batch_size  {chosen['data']['micro_batch_size']}\n" in trained.out


@pytest.mark.weekly
def test_two_devices_agree_and_nothing_is_changed(tmp_path: Path) -> None:
    """One of them runs out of memory."""
    (tmp_path / "watched.py").write_text(WATCHED)
    two = (*TWO, "--model", "watched.Small", "--model.network", MLP_16)
    result = run_process(
        "tune", *DIGITS, *CSV, *two, "--steps", 80, OMP_NUM_THREADS="1", PYTHONPATH=str(tmp_path), timeout=100
    )
    assert result.code == 0, result.err
    assert [Path(f"same-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    tried = [list(dict.fromkeys(Path(f"sizes-{rank}").read_text().split())) for rank in (0, 1)]
    largest = re.search(r"largest micro-batch that was run: (\d+) \(more would not fit\)", result.out)
    assert largest is not None
    assert 92 <= int(largest[1]) <= 100
    assert tried[0][:8] == tried[1][:8] == [str(2**power) for power in range(8)]
    assert tried[0][:10] == tried[1][:10]
    chosen = yaml.safe_load((result.folder / "tuned.yaml").read_text())["data"]
    assert chosen["micro_batch_size"] <= -(-chosen["batch_size"] // 2)
    assert result.out.count("<- the knee") == 1  # one process says it for all


def test_an_interrupt_shows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.short, "train", interrupt)
    monkeypatch.setattr(speed, "_TURN", 0.01)  # seconds
    result = run_here("tune", *DIGITS, *CSV)
    assert result.code == 0, result.err
    assert "<- the knee" in result.out
    assert "no noise scale (interrupted)" in result.out
    assert not (result.folder / "tuned.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--steps", 39), "steps is 39: the noise scale needs at least 40"),
        (("--memory_gib", 0), "memory_gib is 0: write a number above 0"),
        (("--data.batch_size", "null"), "data.batch_size is not set"),
    ],
)
def test_bad_input(arguments, line) -> None:
    result = run_here("tune", *DIGITS, *CSV, *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1
