"""`sweep`: what is run, what is kept, what is said; and the sweep for W&B."""

import csv
import math
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small
import torch
from helpers import CSV, DIGITS, run_here, wandb_records
from jsonargparse import Namespace

from batchwise.choosing import short, sweep, trials
from batchwise.choosing.branches import Branch
from batchwise.choosing.figure import draw_sweep
from batchwise.choosing.sweep import Race, Target
from batchwise.choosing.trials import Run, due, fit, results
from batchwise.errors import Mistake
from batchwise.run.verbs import recipe

SMALL = ("sweep", *DIGITS, *CSV, "--trainer.max_epochs", 3, "--model.network.hidden_features", "[64]")
TARGET = ("--target", "val/accuracy>=0.9")


def run(size: int, factor: float, steps: int | None, seed: int = 0, seconds: float = 1.0) -> Run:
    reached = steps is not None
    return Run("", size, seed, factor, 0.1 * factor, reached, steps or 99, (steps or 99) * size, seconds)


def test_the_grid_first_for_each_seed() -> None:
    wanted = list(due([run(16, 2, 30)], [16, 64], [0, 1], [1, 2]))
    assert wanted == [(0, 16, 1), (0, 64, 1), (0, 64, 2), (1, 16, 1), (1, 16, 2), (1, 64, 1), (1, 64, 2)]


@pytest.mark.parametrize(
    ("steps", "added"),
    [
        ({0.5: 30, 1: 20, 2: 30}, []),  # the best is inside
        ({0.5: 30, 1: 25, 2: 20}, [4]),
        ({0.5: 20, 1: 25, 2: 30}, [0.25]),
        ({0.5: 30, 1: 25, 2: 20, 4: 10}, [8]),
        ({0.5: 30, 1: 25, 2: 20, 4: 10, 8: 5}, []),  # enough
        ({0.5: None, 1: None, 2: None}, [0.25, 4]),
        ({1: 20}, []),  # one rate is no grid
    ],
)
def test_the_grid_grows_while_the_best_is_at_its_end(steps: dict[float, int | None], added: list[float]) -> None:
    runs = [run(16, factor, count, seed) for factor, count in steps.items() for seed in (0, 1)]
    factors = [factor for factor in steps if factor <= 2]
    assert list(due(runs, [16], [0, 1], factors)) == [(seed, 16, factor) for factor in added for seed in (0, 1)]


def test_medians_at_the_best_rate() -> None:
    runs = [run(16, 1, steps, seed) for seed, steps in enumerate((50, 60, None))]
    runs += [run(16, 2, steps, seed) for seed, steps in enumerate((10, None, None))]  # a lucky one
    runs += [run(64, 1, None, seed) for seed in range(3)]
    first, second = results(runs)
    assert (first.steps, first.examples, first.runs[0].factor) == (60, 960, 1)
    assert (second.steps, second.examples, second.seconds) == (math.inf,) * 3
    assert len(second.runs) == 3


def test_the_curve_is_found() -> None:
    found = results([run(size, 1, 100 + 6400 // size) for size in (16, 64, 256)])
    assert fit(found) == pytest.approx((100, 6400))
    assert fit(found[:2]) is None


@pytest.mark.parametrize(
    ("text", "value", "reached"),
    [
        ("val/loss<=0.5", 0.5, True),
        ("val/loss <= 1e-3", 0.5, False),
        ("val/loss>=0.5", math.nan, False),
        ("val/loss>=0.5", math.inf, False),
    ],
)
def test_target(text: str, value: float, reached: bool) -> None:
    assert Target.parse(text, ["val/loss"]).reached(value) == reached


def test_the_watch_stands_still_in_validation_and_validation_comes_at_even_shares(monkeypatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sweep, "perf_counter", lambda: clock.now)
    race = Race(Target("val/loss", "<=", 0.5), factor=1.0, share=0.25, steps=30)
    trainer = SimpleNamespace(callback_metrics={"val/loss": 1.0}, should_stop=False)
    module, validated = SimpleNamespace(device=torch.device("cpu")), []
    for step in range(1, 31):
        clock.now += 100.0 if step == 1 else 2.0  # the first one is slow
        trainer.global_step = step
        race.on_train_batch_end(trainer, module, None, None, 0)
        if trainer.val_check_batch == 1:
            clock.now += 50.0
            validated.append(step)
            trainer.callback_metrics["val/loss"] -= 0.05
            race.on_validation_end(trainer, module)  # type: ignore[arg-type]
        if trainer.should_stop:
            break
    assert validated == [1, 2, 3, 4, 5, 7, 9, 12, 15, 19]
    assert (race.reached, race.steps, race.seconds) == (True, 19, 38.0)


@pytest.mark.slow
def test_a_sweep_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """One size cannot reach the target in so few steps; what is known is not run again."""
    common = (*SMALL, *TARGET, "--batch_sizes", "64,1259", "--seeds", 2, "--rates", "1,2")
    trained, weights, train = [], [], short.train

    def note(trainer, task, data, steps, callbacks, **more) -> None:
        trained.append((data.batch_size, data.seed, callbacks[0].factor))
        weights.append(task.network.state_dict()["layers.1.weight"].clone())
        assert steps == 3 * -(-1259 // data.batch_size)
        if len(trained) == 3:
            raise KeyboardInterrupt
        train(trainer, task, data, steps, callbacks, **more)

    monkeypatch.setattr(sweep.short, "train", note)
    stopped = run_here(*common)
    assert stopped.code == 130, stopped.err
    assert "interrupted" in stopped.out
    assert len(trials.read(Path("runs/digits/sweep.csv"))) == 2
    result = run_here(*common)
    assert result.code == 0, result.err
    assert "sweep.csv (of these, 2 were there)" in result.out
    assert trained[:3] == [(64, 0, 1), (64, 0, 2), (1259, 0, 1)]
    assert trained[2] == trained[3]  # goes on with the one that was interrupted
    first = {seed: weight for (_, seed, _), weight in zip(trained, weights, strict=True)}
    assert all(weight.equal(first[seed]) for (_, seed, _), weight in zip(trained, weights, strict=True))
    assert not first[0].equal(first[1])
    runs = trials.read(Path("runs/digits/sweep.csv"))
    assert len(runs) == len(set(runs)) >= 8 + 2 * 4  # the grid of the large one grew at both ends
    rates = {(run.batch_size, round(run.learning_rate / run.factor, 6)) for run in runs}
    assert rates == {(64, 0.003), (1259, 0.013306)}  # by the square root
    assert all(run.reached for run in runs if run.batch_size == 64)
    assert not any(run.reached for run in runs if run.batch_size == 1259)
    assert {run.examples for run in runs if not run.reached} == {3 * 1259}
    row = next(line for line in result.out.splitlines() if line.startswith(" 1,259"))
    assert row.split() == ["1,259", "none", "0/12", "-", "-", ">3,777", "-", "never"]
    assert result.out.count("fastest") == 1
    assert (result.folder / "sweep.png").stat().st_size > 10_000
    assert not (result.folder / "checkpoints").exists()
    logged = list(csv.DictReader((result.folder / "log/version_0/metrics.csv").open()))
    assert sum(bool(line["sweep/examples"]) for line in logged) == len(runs)
    count = len(trained)
    for one in runs:  # as another sweep at the same time has done them
        trials.append(Path("runs/digits/sweep.csv"), one)
    again = run_here(*common)
    assert len(trained) == count
    assert again.out.splitlines()[:5] == result.out.splitlines()[:5]  # the same table
    more = run_here(*common, "--model.network.hidden_features", "[32]", "--batch_sizes", "64", "--seeds", 1)
    assert more.code == 0, more.err
    assert trained[count] == (64, 0, 1)  # another training is not the same


class Own(small.Classify):
    """Makes the optimizer by itself."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Scheduled(small.Classify):
    """Gives a scheduler to the engine's optimizer."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


@pytest.mark.parametrize("kind", [Own, Scheduled])
def test_no_rate_is_said_to_be_tried_where_configure_optimizers_sets_it(kind: type[small.Classify]) -> None:
    branch = Branch(10, 2.0, 0, 3)
    short.train(small.trainer(), kind(small.network()), small.Points(), 3, [branch])
    assert branch.points
    assert branch.rate is None
    race = Race(Target("val/loss", "<=", 0.1), 2.0, 0.05, 3)
    with pytest.raises(Mistake, match=r"^sweep tries learning rates, but configure_optimizers of the task"):
        short.train(small.trainer(), kind(small.network()), small.Points(), 3, [race])


@pytest.mark.parametrize("optimizer", ["sgd", None, {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}])
def test_the_argument_optimizer_of_a_task_may_be_anything(optimizer: object) -> None:
    data = small.Points()
    config = {"model": {"init_args": {"optimizer": optimizer}}, "data": {}, "trainer": {}}
    made = recipe(lambda _: {}, Namespace(), small.Classify(small.network()), data, config)
    assert made.rates == ({"lr": 0.1} if isinstance(optimizer, dict) else {})


def test_results_with_other_clipping_are_of_another_training() -> None:
    task, data = small.Classify(small.network()), small.Points()
    digests = {
        recipe(lambda _: {}, Namespace(), task, data, {"model": {}, "data": {}, "trainer": clipping}).digest
        for clipping in (
            {},
            {"gradient_clip_val": 1.0},
            {"gradient_clip_val": 0.1},
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
        )
    }
    assert len(digests) == 4


@pytest.mark.slow
def test_the_target_is_that_of_the_examples_that_training_validates_on() -> None:
    """On a few of them it is reached at another step, and these runs are not taken for the others."""
    few = ("--trainer.limit_val_batches", 0.05)
    sweep = ("sweep", *DIGITS, "--trainer.logger", "false", "--target", "val/loss<=0.68", "--batch_sizes", 64)
    for limit in ((), few):
        result = run_here(*sweep, *limit, "--seeds", 1, "--rates", 1)
        assert result.code == 0, result.err
    all_, some = trials.read(Path("runs/digits/sweep.csv"))
    assert some.steps < all_.steps
    constant = ("--model.schedule", "{shape: constant, warmup: 0}", "--trainer.max_steps", some.steps)
    fit = run_here("fit", *DIGITS, *CSV, *few, *constant, "--trainer.val_check_interval", some.steps)
    assert fit.code == 0, fit.err
    assert fit.rows("val/loss")[some.steps] <= 0.68


@pytest.mark.slow
def test_the_log_of_wandb() -> None:
    grid = ("--batch_sizes", 256, "--seeds", 1, "--rates", 1)
    result = run_here("sweep", *DIGITS, "--target", "val/accuracy>=0.97", *grid)
    assert result.code == 0, result.err
    assert "upload it:  wandb sync" in result.out
    (only,) = trials.read(Path("runs/digits/sweep.csv"))
    (log,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    logged: dict[str, str] = {}
    for _ in range(100):  # wandb's own process writes it
        items = [(item.nested_key or [item.key], item.value_json) for record in wandb_records(log)
                 for item in record.history.item]  # fmt: skip
        logged = {key[0]: value for key, value in items}
        if "sweep/picture" in logged:
            break
        time.sleep(0.1)
    assert float(logged["sweep/examples"]) == only.examples
    assert "sweep/picture" in logged


@pytest.mark.slow
def test_picture(tmp_path: Path) -> None:
    found = results([run(size, 1, 100 + 6400 // size) for size in (16, 64, 256)] + [run(1024, 1, None)])
    draw_sweep(tmp_path / "sweep.png", found, fit(found), "val/accuracy>=0.9")
    draw_sweep(tmp_path / "none.png", found[3:], None, "val/accuracy>=0.9")
    assert (tmp_path / "sweep.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--batch_sizes", "16,many"), "batch_sizes is '16,many': write numbers above 0"),
        (("--batch_sizes", "0"), "batch_sizes is '0'"),
        (("--target", "accuracy>=0.9"), "target is 'accuracy>=0.9': write val/loss or val/accuracy"),
        (("--seeds", 0), "seeds is 0"),
        (("--val_share", 0), "val_share is 0"),
        (
            ("--trainer.max_epochs", -1, "--model.schedule.shape", "constant", "--model.schedule.warmup", 0),
            "max_epochs",
        ),
        (("--trainer.limit_val_batches", 0), "trainer.limit_val_batches is 0: write at least 1"),
        (("--trainer.devices", 2), "sweep trains on one device"),
        (("--batch_sizes", "16,2000", "--data.drop_last", "true"), "batch_size is 2000 with drop_last"),
        (("--results", "no/where.csv"), "results no/where.csv cannot be written (No such file or directory): write"),
    ],
)
@pytest.mark.slow
def test_bad_input(arguments: tuple[object, ...], line: str) -> None:
    result = run_here(*SMALL, *TARGET, "--batch_sizes", "16", *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((*DIGITS, "--target", "val/accuracy>=0.9"), "batch_sizes is not set: write --batch_sizes"),
        (DIGITS, "batch_sizes and target are not set: write --batch_sizes and --target"),
        ((), "batch_sizes and target and data and model are not set: write --config FILE and --batch_sizes"),
    ],
)
def test_what_is_missing_is_named_as_it_is_written(arguments: tuple[object, ...], line: str) -> None:
    result = run_here("sweep", *arguments)
    assert result.code == 2
    assert line in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_full_disk_leaves_whole_runs_and_is_named() -> None:
    path, run, limits = Path("sweep.csv"), trials.Run("a target", 16), resource.getrlimit(resource.RLIMIT_FSIZE)
    path.touch()
    trials.append(path, run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: 'sweep\.csv'"):
            trials.append(path, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trials.append(path, run)
    assert trials.read(path) == [run, run]


def test_what_the_code_of_the_user_raises_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("a bug of mine")

    monkeypatch.setattr(sweep.short, "train", fail)
    with pytest.raises(ValueError, match="a bug of mine") as raised:
        run_here(*SMALL, *TARGET, "--batch_sizes", "16")
    assert not isinstance(raised.value, Mistake)


def test_a_row_that_a_power_cut_has_torn_is_none() -> None:
    """Also where the tear is within its last number, which would be another one; the next row takes its place."""
    path = Path("sweep.csv")
    path.touch()
    first, last, new = run(64, 1, 30), run(64, 2, 30, 1, seconds=3.9), run(64, 4, 20)
    sizes = []
    for one in (first, last):
        trials.append(path, one)
        sizes.append(path.stat().st_size)
    content = path.read_bytes()
    for size in (7, *range(sizes[0], sizes[1])):  # in the header, and anywhere in the last row
        path.write_bytes(content[:size])
        kept = [first] if size >= sizes[0] else []
        assert trials.read(path) == kept
        trials.append(path, new)
        assert trials.read(path) == [*kept, new]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "a,b\n1,2", "a note"])
def test_a_file_of_something_else(content: str) -> None:
    Path("table.csv").write_text(content)
    result = run_here(*SMALL, *TARGET, "--batch_sizes", "16", "--results", "table.csv")
    assert result.code == 2
    assert "table.csv is not the file of a sweep" in result.err
    assert Path("table.csv").read_text() == content
