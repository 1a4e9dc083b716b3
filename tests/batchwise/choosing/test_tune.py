"""`tune`: what fits, what is fast, what the gradient says, what follows."""

import math
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small
import torch
import yaml
from helpers import CSV, DIGITS, TWO, run_here, run_process

from batchwise.batching.noise import Estimate
from batchwise.batching.schedule import Milestones
from batchwise.choosing import branches, fits, search, short, speed
from batchwise.choosing.advice import leave, sentences, why_none
from batchwise.choosing.branches import Branch, Branches, Course
from batchwise.choosing.findings import Advice, Findings
from batchwise.choosing.fits import Size, what_fits
from batchwise.choosing.speed import Way
from batchwise.optim.schedule import Schedule
from batchwise.run import verbs


class Machine:
    """Takes `each` bytes per example over a million; says that more than `holds` do not fit; is fastest at `knee`."""

    device = torch.device("cpu")

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, each: int = 1000, holds: float = math.inf, knee: float = math.inf
    ) -> None:
        self.each, self.holds, self.knee, self.run, self.peak = each, holds, knee, [], 0
        monkeypatch.setattr(fits, "reset_peak_memory", lambda device: None)
        monkeypatch.setattr(fits, "peak_memory", lambda device: self.peak)

    def seconds(self, way: Way) -> float:
        self.run.append(way.size)
        self.peak = 10**6 + self.each * way.size
        return 1 / min(way.size, self.knee) if way.size <= self.holds else math.inf


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


def test_what_is_far_beyond_the_knee_is_not_run_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, knee=16)
    sizes = [size.examples for size in what_fits(machine, Way(1), 4096, math.inf, unit=1)]  # type: ignore[arg-type]
    assert max(machine.run) == max(sizes) == 16 * 16
    assert fits.knee([*what_fits(machine, Way(1), 4096, math.inf, unit=1)]).examples == 16  # type: ignore[arg-type]


def test_what_was_slow_by_chance_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, knee=64)
    sizes = list(what_fits(machine, Way(1), 4096, math.inf, unit=1))  # type: ignore[arg-type]
    disturbed = [size._replace(speed=1.0) if size.examples > 8 else size for size in reversed(sizes)]
    assert fits.knee(disturbed).examples == 8
    assert fits.again(machine, Way(1), disturbed) == sizes  # type: ignore[arg-type]
    assert fits.knee(sizes).examples == 64


def test_whole_units_and_no_more_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, holds=500)
    sizes = [size.examples for size in what_fits(machine, Way(1), 4096, math.inf, unit=24)]  # type: ignore[arg-type]
    assert all(size % 24 == 0 for size in sizes)
    assert max(sizes) >= 456
    machine = Machine(monkeypatch)
    assert max(what_fits(machine, Way(1), 300, math.inf, unit=1)).examples == 300  # type: ignore[arg-type]


def machine(**settings: Any) -> Findings:
    return Findings(
        **{
            "batch_size": 64,
            "largest": 512,
            "sizes": [Size(16, 0, 1000.0), Size(32, 0, 2000.0), Size(64, 0, 2050.0)],
            **settings,
        }
    )


def test_what_follows_from_the_noise_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = machine(noise=[(100, Estimate(16, 10, 20, False)), (200, Estimate(math.inf, 192, math.inf, True))])
    assert findings.knee() == findings.sizes[1]
    # Steps get 4 / 5 and 1 / 4 as far as without noise.
    assert findings.noise_scale() == pytest.approx((16 * 0.8 + 192 * 0.25) / 1.05)
    monkeypatch.setattr(Findings, "noise_scale", lambda self: 64.0)
    choices = {choice.batch_size: choice for choice in findings.by_noise()}
    assert choices[64].steps == 2  # at the noise scale, twice the least of steps and of examples
    assert choices[64].examples == 2
    ratio = choices[64].seconds / choices[256].seconds
    assert ratio == pytest.approx(2 * (64 / 2000) / (1.25 * (256 / 2000)))
    assert min(choice.seconds for choice in choices.values()) == 1
    assert choices[findings.first_guess()].seconds == 1
    findings.devices = 4  # each of which has a quarter
    choices = {choice.batch_size: choice for choice in findings.by_noise()}
    ratio = choices[64].seconds / choices[256].seconds
    assert ratio == pytest.approx(2 * (16 / 1000) / (1.25 * (64 / 2000)))


def test_a_step_takes_its_quickest_tenth_and_the_mean_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now, branch, batch = [0.0], Branch(64, 1.0, 0, 40), SimpleNamespace(step=1)
    monkeypatch.setattr(branches, "perf_counter", lambda: now[0])
    task, trainer = SimpleNamespace(_step=SimpleNamespace(sums=np.ones(1))), SimpleNamespace(global_step=1)
    for step in range(40):
        now[0] += 0.1 if step % 4 == 0 else 0.004 * (step % 4 == 1)  # an epoch of four steps; then a burst of batches
        branch.on_train_batch_start(trainer, task, batch, step % 4)  # type: ignore[arg-type]
        now[0] += 0.01 if step % 5 == 0 else 0.03  # most steps are disturbed
        branch.on_train_batch_end(trainer, task, None, batch, step)  # type: ignore[arg-type]
    branch.agree(float)
    assert branch.seconds == pytest.approx(0.01 + 0.004 / 3)


class World:
    """Trainings whose loss is known: it falls with steps / (1 + noise / B), best at one factor on the rate.

    Args:
        noise: the noise scale.
        best: the best factor.
        overhead: seconds of a step besides a millisecond per 100 examples.
        most: the largest factor that does not diverge.
        ripple: how far the loss of a batch is from that of all examples, as without validation.
    """

    def __init__(
        self,
        noise: float = 100.0,
        best: float = 4.0,
        overhead: float = 1e-3,
        most: float = math.inf,
        ripple: float = 0.0,
    ) -> None:
        self.noise, self.best, self.overhead, self.most, self.ripple = noise, best, overhead, most, ripple
        self.trained: list[tuple[int, float, int]] = []

    def train(self, branch: Branch) -> None:
        self.trained.append((branch.batch_size, branch.factor, branch.seed))
        branch.rate = 0.1 * branch.factor
        branch.seconds = self.overhead + branch.batch_size * 1e-5
        branch.diverged = branch.factor > self.most
        off = math.log2(branch.factor / self.best)
        trainer = SimpleNamespace(global_step=0, should_stop=False)
        steps = sorted({*np.unique(np.geomspace(1, branch.steps, 40).round().astype(int)).tolist(), branch.steps})
        for step in steps:
            trainer.global_step = step
            far = step / (1 + self.noise / branch.batch_size) * math.exp(-0.1 * off**2)
            branch._note(trainer, 1 / (1 + far) + self.ripple * math.cos(2.4 * (step - 5)))
            if trainer.should_stop:
                break

    def findings(self, *sizes: int, **settings: Any) -> Findings:
        findings = machine(**settings)
        for size in sizes:
            rates = Branches(size, max(2, round(30 * (1 + self.noise / size))), self.train, True)
            rates.search(1.0)
            findings.rates[size] = rates
        return findings

    def configure(self, findings: Findings) -> Advice:
        """Try the configured batch size and rate, and return what is recommended."""
        findings.configured = Branches(findings.batch_size, 2 * findings.rates[64].steps, self.train, True)
        findings.configured.run(1.0, 0)
        best = findings.best()
        assert best is not None
        return best


@pytest.mark.parametrize("best", [1 / 64, 0.3, 1.0, 1.5, 4.0, 100.0])
def test_the_best_rate_is_found_wherever_it_is(best: float) -> None:
    world = World(best=best)
    rates = world.findings(64).rates[64]
    assert rates.between() == pytest.approx(best, rel=0.1)
    assert abs(math.log2(rates.factor / best)) <= 0.5
    beside = {rates.factor / 2, rates.factor, rates.factor * 2}
    assert {factor for _, factor, seed in world.trained if seed == 1} == beside
    assert len(world.trained) == len(set(world.trained))


@pytest.mark.parametrize("best", [1 / 8, 1.0, 8.0])
def test_the_noise_of_batches_which_all_rates_share_decides_nothing(best: float) -> None:
    rates = World(best=best, ripple=0.3).findings(64).rates[64]
    assert abs(math.log2(rates.factor / best)) <= 1


@pytest.mark.parametrize("last", [math.nan, 1.0])
def test_where_no_rate_lowers_the_loss_none_is_recommended(last: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either validation has no finite loss, or the loss rises, and rises less at a lower rate."""

    def train(self: search.Search, branch: Branch, micro_batch: int, *callbacks: object) -> None:
        branch.rate = 0.1 * branch.factor
        trainer = SimpleNamespace(global_step=0, should_stop=False)
        for trainer.global_step in range(1, branch.steps + 1):
            branch._note(trainer, last + branch.factor * trainer.global_step)

    monkeypatch.setattr(search.Search, "_train", train)
    data = SimpleNamespace(split=lambda split: range(1_000), total_examples=lambda: 10_000)
    findings, task = machine(), small.Classify(small.network())
    search.Search(None, task, data, findings, 0.25, float, print).go()  # type: ignore[arg-type]
    assert findings.best() is None
    why = "not finite at any rate" if math.isnan(last) else "the lowest rate of all that were tried is the best"
    assert why in why_none(findings, task)


def test_a_rate_that_diverges_is_not_taken() -> None:
    rates = World(best=8.0, most=4.0).findings(64).rates[64]
    assert rates.factor == 4.0
    assert rates.between() <= 4.0


def test_a_branch_that_is_far_behind_ends_early() -> None:
    world = World(best=1.0)
    rates = Branches(64, 200, world.train, True)
    rates.search(1.0)
    ends = {factor: branch.points[-1][0] for (factor, _), branch in rates.branches.items()}
    assert ends[1.0] == 200
    rates.run(1 / 32, 0)
    assert rates.branches[1 / 32, 0].points[-1][0] <= 110
    assert rates.loss(1 / 32) > rates.loss(1.0)


@pytest.mark.parametrize("noise", [10.0, 100.0, 2000.0])
def test_the_batch_size_follows_from_the_branches(noise: float) -> None:
    world = World(noise)
    findings = world.findings(16, 64, 256)
    fitted = findings.fitted()
    assert fitted is not None
    assert fitted[1] / fitted[0] == pytest.approx(noise, rel=0.1)
    choices = {choice.batch_size: choice for choice in findings.choices()}
    assert sorted(choices) == [16, 32, 64, 128, 256]
    for size, choice in choices.items():
        expected = (1 + noise / size) * (1e-3 + size * 1e-5) / ((1 + noise / 64) * (1e-3 + 64 * 1e-5))
        assert choice.seconds / choices[64].seconds == pytest.approx(expected, rel=0.15)
    best = world.configure(findings)
    assert best.low <= best.batch_size <= best.high
    assert choices[best.batch_size].seconds <= 1.05
    assert best.factor == pytest.approx(4.0, rel=0.1)
    assert 1.3 < best.gain < 10  # the configured rate is a quarter of the best


def test_a_good_configuration_is_left_as_it_is() -> None:
    world = World(best=1.0)
    findings = world.findings(16, 64, 256)
    findings.batch_size = world.configure(findings).batch_size
    assert world.configure(findings).gain == pytest.approx(1.0, abs=0.05)


def test_where_the_gradient_disagrees_the_range_is_wider() -> None:
    def findings(noise: float) -> Findings:
        return World(100.0).findings(16, 64, 256, noise=[(100, Estimate(noise, noise / 2, 2 * noise, False))])

    agree, disagree = findings(120.0), findings(20000.0)
    assert not agree.disagree()
    assert disagree.disagree()
    one, other = agree.best(), disagree.best()
    assert one is not None
    assert other is not None
    assert other.batch_size == one.batch_size
    assert other.high > one.high
    assert any(line.startswith("these disagree") for line in sentences(disagree, other))
    assert not any(line.startswith("these disagree") for line in sentences(agree, one))


def test_where_others_had_the_cores_the_range_is_wider() -> None:
    alone, beside = (World(100.0).findings(16, 64, 256) for _ in range(2))
    for each in beside.rates.values():
        for share in (0.3, 1.0, 1.5):
            each.timed.append(Branch(each.batch_size, 1.0, 0, 1))
            each.timed[-1].seconds, each.timed[-1].hindered = alone.rates[each.batch_size].seconds(), share
    one, other = alone.best(), beside.best()
    assert one is not None
    assert other is not None
    assert other.batch_size == one.batch_size
    assert other.low < one.low
    assert all(choice.seconds > 2.05 for choice in beside.choices() if not other.low <= choice.batch_size <= other.high)
    line = "the machine was busy (threads waited for a core 1.00 times as long as the steps took), so the range is wide"
    assert sentences(beside, other)[1] == f"{line}: ask again when it is quiet"
    assert not any(said.startswith("the machine") for said in sentences(alone, one))


def test_two_shapes_are_compared_late_even_if_a_third_one_got_less_far() -> None:
    def train(branch: Branch) -> None:
        loss = {  # constant; soon far and then slow; hardly anywhere
            6400: lambda step: 2 - 0.018 * step,
            1600: lambda step: max(2 - 0.04 * step, 1.25 - 0.01 * step),
            400: lambda step: 2 - 0.008 * step,
        }[branch.course.falls or 0]
        branch.rate, branch.points = 0.1, [(step, loss(step)) for step in range(1, 101)]

    findings = machine(shapes=[Branches(64, 100, train, True, Course(held)) for held in (6400, 1600, 400)])
    for each in findings.shapes:
        each.run(1.0, 0)
    assert findings.shape() is findings.shapes[0]
    assert findings.shortened() == 1.0


class Falling(World):
    """Trainings that get further in the same steps with a rate that falls after some examples."""

    def __init__(self, pays: dict[int, float], **settings: Any) -> None:
        super().__init__(**settings)
        self.pays = pays

    def train(self, branch: Branch) -> None:
        noise = self.noise
        self.noise = noise / self.pays.get(branch.course.falls or 0, 1.0)
        super().train(branch)
        self.noise = noise


@pytest.mark.parametrize(
    ("pays", "hold"),
    [({}, 6400), ({1600: 1.02}, 6400), ({1600: 2.0}, 1600), ({400: 4.0, 1600: 2.0}, 400), ({400: 0.2}, 6400)],
)
@pytest.mark.slow
def test_the_shape_of_the_rate_with_the_fewest_steps(pays: dict[int, float], hold: int) -> None:
    """A gain under 5% does not count, and a rate that diverges is not taken."""
    world = Falling(pays, best=1.0)
    findings = world.findings(16, 64, 256)
    before = findings.best()
    assert before is not None
    assert before.course == Course()
    for held in (6400, 1600, 400):
        each = Branches(before.batch_size, 60, world.train, True, Course(held))
        each.run(1.0, 0)
        findings.shapes.append(each)
    findings.shapes.append(Branches(before.batch_size, 60, World(most=0.0).train, True, Course(100)))
    findings.shapes[-1].run(8.0, 0)
    best = findings.best()
    assert best is not None
    assert best.course == Course(hold)
    least = 1.0 if hold == 6400 else (1 + 100 / pays[hold] / best.batch_size) / (1 + 100 / best.batch_size)
    assert findings.shortened() == pytest.approx(least, rel=0.1)
    assert best.factor == 1.0 if hold != 6400 else best.factor == pytest.approx(1.0, rel=0.1)
    assert f"this rate is held for {hold:,} examples" in sentences(findings, best)[1]
    assert ("times the steps of one that is held longer" in sentences(findings, best)[1]) is (hold < 6400)


@pytest.mark.parametrize(("noise", "pays"), [(20000.0, True), (1.0, False)])
def test_twice_the_batch_later_pays_if_the_noise_has_grown(noise: float, pays: bool) -> None:
    """It is the noise scale after the first examples. The time of a step grows by half if the batch doubles."""
    world = World(best=1.0)
    findings = world.findings(16, 64, 256)
    before = findings.best()
    assert before is not None
    size, examples = before.batch_size, 40 * before.batch_size
    shape = Branches(size, 40, world.train, True, Course(falls=examples))
    shape.run(1.0, 0)
    findings.shapes = [shape]

    def train(branch: Branch) -> None:
        trainer, doubled = SimpleNamespace(global_step=0), branch.course.doubles is not None
        for step in range(1, branch.steps + 1):
            trainer.global_step = step
            slow = 1 + noise / size / (2 if doubled else 1)
            branch._note(trainer, 1 / (1 + min(step, 40) / (1 + 100 / size) + 10 * max(0, step - 40) / slow))

    for course, steps in ((Course(examples), 80), (Course(examples, examples), 60)):
        findings.later.append(Branches(size, steps, train, True, course))
        findings.later[-1].run(1.0, 0)
    best, ratio = findings.best(), findings.doubled()
    assert best is not None
    assert ratio is not None
    assert best.course == Course(examples, examples if pays else None)
    assert findings.pays_to_double() is pays
    assert (ratio < 0.95) is pays
    verb = "pays" if pays else "would not pay"
    assert f"twice the batch after {examples:,} examples {verb}: {ratio:.2f} times the time to later losses" in (
        sentences(findings, best)
    )


def test_a_larger_batch_that_diverges_says_nothing() -> None:
    world = World(best=1.0)
    findings = world.findings(16, 64, 256)
    for course in (Course(640), Course(640, 640)):
        findings.later.append(
            Branches(64, 20, (world if course.doubles is None else World(most=0.0)).train, True, course)
        )
        findings.later[-1].run(1.0, 0)
    assert findings.doubled() is None
    assert not findings.pays_to_double()


def test_rates_that_the_task_sets_are_left_alone() -> None:
    class Own(World):
        def train(self, branch: Branch) -> None:
            super().train(branch)
            branch.rate = None

    world = Own()
    findings = world.findings(16, 64, 256)
    assert {factor for _, factor, _ in world.trained} == {1.0}
    best = findings.best()
    assert best is not None
    assert best.factor == 1.0
    assert "as configure_optimizers of the task sets it" in sentences(findings, best)[0]


class Plateau(small.Classify):
    """Lowers the rate after an epoch in which validation was no better."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


@pytest.mark.parametrize("validate", [0, 1.0])
def test_short_trainings_have_no_plateau(validate: float) -> None:
    """They ended where they had not validated. There each epoch has seven steps."""
    branch, data = Branch(10, 1.0, 0, 30, validates=bool(validate)), short.resized(small.Points(), 10, None)
    task = Plateau(small.network())
    short.train(small.trainer(), task, data, 30, [branch], validate)
    assert len(branch.points) > 5
    assert task.optimizers().param_groups[0]["lr"] == 0.1  # type: ignore[union-attr]


@pytest.mark.slow
def test_batch_sizes_that_stay_in_the_configuration_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    world, task = World(), small.Classify(small.network())
    findings = world.findings(16, 64, 256)
    for schedule, count in ((None, 0), (Milestones([128], examples=[1000]), 1)):
        data = small.Points(batch_size_schedule=schedule) if schedule else small.Points()
        leave(tmp_path, findings, world.configure(findings), task, data, {"lr": 0.1})
        assert capsys.readouterr().out.count("data.batch_size_schedule stays as it is, and was not tried: ") == count
        assert "batch_size_schedule" not in yaml.safe_load((tmp_path / "tuned.yaml").read_text())["data"]


def test_what_never_trains_is_said() -> None:
    findings, world = machine(), World(most=0.0)
    rates = Branches(64, 20, world.train, True)
    rates.search(1.0)
    assert math.isinf(rates.loss(rates.factor))
    assert findings.best() is None
    assert why_none(findings, small.Classify(small.network())) == "the loss was not finite at any rate"


def test_two_batch_sizes_say_only_the_rate() -> None:
    world = World()
    findings = world.findings(16, 64)
    assert not findings.choices()
    best = world.configure(findings)
    assert (best.batch_size, best.low, best.high) == (64, 64, 64)
    assert best.factor == pytest.approx(4.0, rel=0.1)
    assert best.gain > 1.3
    said = sentences(findings, best)
    assert said[0].startswith("learning rate at batch_size 64: 0.4")
    assert said[1].startswith("tried: ")
    assert world.findings(16, 256).best() is None  # not even the configured one


def test_no_batch_size_is_tried_whose_branches_would_be_very_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds of a step grow with the batch alone, so that the smallest one is the best."""
    world, steps = World(noise=100.0, overhead=0.0), {}
    findings = machine(
        sizes=[Size(1, 0, 1000.0)], schedule=Schedule("cosine"), noise=[(0, Estimate(100.0, 80.0, 120.0, False))]
    )

    def train(self: search.Search, branch: Branch, micro_batch: int, *callbacks: object) -> None:
        steps[branch.batch_size] = max(branch.steps, steps.get(branch.batch_size, 0))
        world.train(branch)

    monkeypatch.setattr(search.Search, "_train", train)
    data = SimpleNamespace(split=lambda split: range(100_000), total_examples=lambda: 1_000_000)
    task = SimpleNamespace(_couples=False)
    search.Search(None, task, data, findings, 0.25, float, print).go()  # type: ignore[arg-type]
    assert min(findings.rates) < 64
    assert 4 * steps[64] < max(steps.values()) <= 8 * steps[64]
    best = findings.best()
    assert best is not None
    assert best.batch_size == min(findings.rates)


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


@pytest.mark.weekly
def test_an_order_that_repeats_examples_gets_batches_of_whole_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(search.Search, "_train", lambda self, branch, *_: world.train(branch))
    data = SimpleNamespace(split=lambda split: range(100_000), total_examples=lambda: 1_000_000)
    findings = machine(batch_size=60, copies=12, schedule=Schedule("cosine"))
    search.Search(None, SimpleNamespace(_couples=False), data, findings, 0.25, float, print).go()  # type: ignore[arg-type]
    assert len(findings.rates) >= 3
    assert not any(choice.batch_size % 12 for choice in findings.choices())


def test_digits_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    monkeypatch.setattr(speed, "_TURN", speed._TURN)  # which the module changes
    monkeypatch.setattr(verbs, "tune", verbs.tune)
    import_module("watched")
    monkeypatch.setattr(search, "SHORTEST", 30)
    monkeypatch.setattr(search, "ROUNDS", 2)
    result = run_here("tune", *DIGITS, *CSV, "--trainer.accelerator", "cpu", "--model.optimizer.init_args.lr", 1e-4)
    assert result.code == 0, result.err
    assert Path("same-0").read_text() == "True"  # nothing is changed
    assert "<- the knee" in result.out
    assert re.search(r"micro-batch that was run: (1,259 \(all of|[\d,]+ \(more would not be faster)", result.out)
    assert "gradient noise scale: by the short trainings" in result.out
    assert "<- recommended" in result.out
    assert re.search(r"tune took [\d.]+ s, [\d.]+( times as long as|% of the time of) the training", result.out)
    assert (result.folder / "tune.png").stat().st_size > 10_000
    overlay = result.folder / "tuned.yaml"
    chosen = yaml.safe_load(overlay.read_text())
    assert chosen["model"]["reference_batch_size"] == 64
    assert chosen["model"]["scaling_limit"] >= max(64, chosen["data"]["batch_size"])
    assert chosen["model"]["optimizer"]["init_args"]["lr"] > 5e-4  # it was far too low
    trained = run_here("fit", *DIGITS, *CSV, "--config", overlay, "--trainer.max_epochs", 1)
    assert trained.code == 0, trained.err
    assert f"batch_size  {chosen['data']['batch_size']}\n" in trained.out
    assert f"micro_batch_size  {chosen['data']['micro_batch_size']}\n" in trained.out


@pytest.mark.weekly
def test_two_devices_agree_and_nothing_is_changed(tmp_path: Path) -> None:
    """One of them runs out of memory."""
    (tmp_path / "watched.py").write_text(WATCHED)
    two = (*TWO, "--model", "watched.Small", "--model.network", MLP_16, "--data.eval_batch_size", 50)
    result = run_process("tune", *DIGITS, *CSV, *two, OMP_NUM_THREADS="1", PYTHONPATH=str(tmp_path), timeout=300)
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


@pytest.mark.slow
def test_an_interrupt_shows_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search.short, "train", interrupt)
    monkeypatch.setattr(speed, "_TURN", 0.01)  # seconds
    result = run_here("tune", *DIGITS, *CSV)
    assert result.code == 130, result.err
    assert "<- the knee" in result.out
    assert "no batch size is recommended (interrupted)" in result.out
    assert [path.name for path in Path("runs/digits").glob("*/tune*")] == ["tune.png"]


@pytest.mark.slow
def test_an_interrupt_among_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(*_: object) -> Iterator[Size]:
        yield Size(1, 0, 100.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(fits, "what_fits", first)
    result = run_here("tune", *DIGITS, *CSV)
    assert result.code == 130, result.err
    assert "largest micro-batch that was run: 1 (interrupted)" in result.out
    assert "no batch size is recommended (interrupted)" in result.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--budget", 0), "budget is 0: write a number above 0"),
        (("--memory_gib", 0), "memory_gib is 0: write a number above 0"),
        (("--data.batch_size", "null"), "data.batch_size is not set"),
        (("--config", "cut.yaml"), "trainer.strategy cuts it: write trainer.strategy ddp"),
    ],
)
def test_bad_input(arguments, line) -> None:
    cut = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, init_args: {tensor_parallel_size: 1}}"
    Path("cut.yaml").write_text(f"trainer: {{devices: 1, strategy: {cut}}}")
    result = run_here("tune", *DIGITS, *CSV, *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1
