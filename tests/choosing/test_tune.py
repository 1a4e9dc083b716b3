"""`tune`: what fits, what is fast, what the gradient says, what follows."""

import math

import pytest
import torch
import yaml
from helpers import CSV, DIGITS, run_here

from project.choosing import tune as tuning
from project.choosing.noise import Estimate
from project.choosing.speed import Way
from project.choosing.tune import Choice, Findings, Size, recommended, what_fits
from project.data.digits import Digits
from project.models.mlp import MLP
from project.tasks.classification import Classification
from project.trainer import Trainer


class Machine:
    """Takes `each` bytes per example over a million; dies over `memory` bytes; says so over `holds` examples."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, each: int = 1000, holds: float = math.inf) -> None:
        self.each, self.holds, self.run, self.peak = each, holds, [], 0
        monkeypatch.setattr(tuning, "reset_peak_memory", lambda device: None)
        monkeypatch.setattr(tuning, "peak_memory", lambda device: self.peak)

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


def test_what_follows() -> None:
    sizes = [Size(16, 0, 1000.0), Size(32, 0, 2000.0), Size(64, 0, 2050.0)]
    findings = Findings(
        sizes, noise=[(100, Estimate(50, 40, 60, False)), (200, Estimate(math.inf, 64, math.inf, True))]
    )
    assert findings.knee() == sizes[1]
    assert findings.noise_scale() == 64
    findings.overhead = 0.01
    choices = {choice.batch_size: choice for choice in findings.choices(512)}
    assert choices[64].steps == 2  # at the noise scale, twice the least of steps and of examples
    assert choices[64].examples == 2
    ratio = choices[64].seconds / choices[256].seconds
    assert ratio == pytest.approx(2 * (0.01 + 64 / 2000) / (1.25 * (0.01 + 256 / 2000)))
    assert min(choice.seconds for choice in choices.values()) == 1
    near = [Choice(32, 3, 1.5, 1.04), Choice(64, 2, 2, 1.0), Choice(16, 5, 1.25, 1.2)]
    assert recommended(near) == near[0]


def test_digits_from_the_command_line() -> None:
    result = run_here("tune", *DIGITS, *CSV, "--steps", 120, "--trainer.accelerator", "cpu")
    assert result.code == 0, result.err
    assert "<- the knee" in result.out
    assert "largest micro-batch that was run: 1,259" in result.out
    assert "the gradient noise scale is about" in result.out
    assert (result.folder / "tune.png").stat().st_size > 10_000
    overlay = result.folder / "tuned.yaml"
    chosen = yaml.safe_load(overlay.read_text())
    assert chosen["model"]["reference_batch_size"] == 64
    trained = run_here("fit", *DIGITS, *CSV, "--config", overlay, "--trainer.max_epochs", 1)
    assert trained.code == 0, trained.err
    assert f"batch_size  {chosen['data']['batch_size']}\n" in trained.out
    assert f"micro_batch_size  {chosen['data']['micro_batch_size']}\n" in trained.out


def test_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    torch.manual_seed(5)
    task, data = Classification(MLP(64, 10, [16], dropout=0.5)), Digits(batch_size=64)
    trainer = Trainer(accelerator="cpu", max_epochs=10, logger=False, default_root_dir=tmp_path)
    data.trainer = trainer
    data.setup("fit")
    plan, state = data.plan, {name: value.clone() for name, value in task.state_dict().items()}
    generator = torch.get_rng_state()
    tuning.tune(trainer, task, data, 60, None)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert data.plan is plan
    assert data.trainer is trainer


def test_an_interrupt_shows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "_train", interrupt)
    result = run_here("tune", *DIGITS, *CSV)
    assert result.code == 0, result.err
    assert "<- the knee" in result.out
    assert "no noise scale (interrupted)" in result.out
    assert not (result.folder / "tuned.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--steps", 39), "steps is 39: the noise scale needs at least 40"),
        (("--memory_gib", 0), "memory_gib is 0.0: write a number above 0"),
        (("--data.batch_size", "null"), "data.batch_size is not set"),
    ],
)
def test_bad_input(arguments, line) -> None:
    result = run_here("tune", *DIGITS, *CSV, *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1
