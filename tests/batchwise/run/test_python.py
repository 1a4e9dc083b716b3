"""`batchwise.Trainer` in scripts and notebooks: what it trains is checked, reported and kept as on the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import batchwise
from batchwise import Task
from batchwise.batching.fetch import InMemory
from batchwise.callbacks.record import Record
from batchwise.errors import Mistake, TrainingStopped
from batchwise.optim.schedule import Schedule
from batchwise.run import checks, report
from batchwise.run.usual import usual_callbacks


def new() -> small.Classify:
    return small.Classify(small.network(), optimizer=small.adamw)


def trainer(**settings: Any) -> batchwise.Trainer:
    usual: dict[str, Any] = {"accelerator": "cpu", "precision": "64-true", "max_epochs": 3, "logger": False}
    return batchwise.Trainer(**usual | settings)


def saved(folder: Path | None) -> set[str]:
    assert folder is not None
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_a_training_is_reported_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    task, data, made = new(), small.Points(), trainer(name="points", logger=True)
    made.fit(task, data)
    assert made.folder is not None
    assert made.folder.parent == Path("runs/points")
    assert saved(made.folder) == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert (made.folder / "lightning_logs").is_dir()
    shown = capsys.readouterr().out
    for words in ("batch_size  10", "total_steps  21", "epoch 3  average loss", f"run folder: {made.folder}"):
        assert words in shown
    assert f"{made.folder}/checkpoints/best.ckpt" in shown.partition("best val/loss")[2]

    measured = {name: value.item() for name, value in made.callback_metrics.items() if name.startswith("val/")}
    assert made.validate(task, data, verbose=False) == [measured]
    score = made.checkpoint_callback.best_model_score  # type: ignore[union-attr]
    best = torch.load(made.folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for how in ({}, {"ckpt_path": "best"}, {"model": new(), "ckpt_path": "best"}):
        (found,) = made.validate(datamodule=data, verbose=False, **how)
        assert found["val/loss"] == pytest.approx(float(score))
        assert all(torch.equal(value, best[name]) for name, value in made.lightning_module.state_dict().items())  # type: ignore[union-attr]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.slow
def test_a_training_is_gone_on_with(other: bool, capsys: pytest.CaptureFixture[str]) -> None:
    reference = new()
    trainer(max_epochs=5, name="whole").fit(reference, small.Points())
    first = trainer()
    first.fit(new(), small.Points())
    task, again = new(), trainer(max_epochs=5)
    which = str(first.folder / "checkpoints" / "last.ckpt") if other else "last"  # type: ignore[operator]
    again.fit(task, datamodule=small.Points(micro_batch_size=4), ckpt_path=which)
    assert "resuming after step 21" in capsys.readouterr().out
    assert again.folder == first.folder
    assert small.furthest(task, reference) < 1e-14


def test_a_training_that_differs_is_not_gone_on_with() -> None:
    trainer().fit(new(), small.Points())
    again = trainer(max_epochs=4)
    with pytest.raises(Mistake, match=r"batch_size: 10 -> 16.*write the old values, or fit\(..., force=True\)"):
        again.fit(new(), small.Points(batch_size=16), ckpt_path="last")
    again.fit(new(), small.Points(batch_size=16), ckpt_path="last", force=True)
    assert again.current_epoch == 4


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "optimizer": ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.05)}, {}, "model.optimizer: 'AdamW' -> 'SGD'"),
    "rate": ({"optimizer": lambda p: torch.optim.AdamW(p, lr=0.5)}, {}, r"model.groups.0.lr: 0.05 -> 0.5"),
    "decay": ({"optimizer": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=1)}, {}, "weight_decay: 0.01 -> 1"),
    "schedule": ({"schedule": Schedule("cosine")}, {}, "model.schedule.shape: 'constant' -> 'cosine'"),
    "reference": ({"reference_batch_size": 20}, {}, "model.scaling.reference: None -> 20"),
    "clipping": ({}, {"gradient_clip_val": 0.1}, "trainer.gradient_clip_val: None -> 0.1"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.slow
def test_other_settings_are_not_gone_on_with(case: str) -> None:
    model, settings, message = OTHERS[case]

    def other() -> Task:
        return small.Classify(small.network(), **({"optimizer": small.adamw} | model))

    trainer().fit(new(), small.Points())
    with pytest.raises(Mistake, match=message):
        trainer(max_epochs=4, **settings).fit(other(), small.Points(), ckpt_path="last")
    forced = trainer(max_epochs=4, **settings)
    forced.fit(other(), small.Points(), ckpt_path="last", force=True)
    assert forced.current_epoch == 4
    again = trainer(max_epochs=5, **settings)
    again.fit(other(), small.Points(micro_batch_size=3), ckpt_path="last")
    assert again.current_epoch == 5


@pytest.mark.parametrize("change", [{"freeze": ["0"]}, {"lr_factors": {"0": 0.1}}, {"decay_matrices_only": True}])
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.slow
def test_other_groups_of_parameters_are_one_line(change: dict[str, Any], force: bool) -> None:
    trainer().fit(new(), small.Points())
    other = small.Classify(small.network(), optimizer=small.adamw, **change)
    how = "is of a training that differs" if not force and "freeze" not in change else "has an optimizer of other param"
    words = f"{how}.*(model.init_from|force)"
    with pytest.raises(Mistake, match=words):
        trainer(max_epochs=4).fit(other, small.Points(), ckpt_path="last", force=force)


def test_a_checkpoint_takes_the_place_of_initial_weights(capsys: pytest.CaptureFixture[str]) -> None:
    def task() -> Task:
        return small.Classify(small.network(), optimizer=small.adamw, init_from="first.pt")

    torch.save(small.network().state_dict(), "first.pt")
    trainer().fit(task(), small.Points())
    assert "first.pt" in capsys.readouterr().out
    Path("first.pt").unlink()
    for verb in ("fit", "validate"):
        getattr(trainer(max_epochs=4), verb)(task(), datamodule=small.Points(), ckpt_path="last")
        assert "first.pt" not in capsys.readouterr().out


def test_weights_alone_are_no_training() -> None:
    made = trainer()
    made.fit(new(), small.Points())
    weights = {"state_dict": made.lightning_module.state_dict()}  # type: ignore[union-attr]
    for content in (weights, {"state_dict": None}, weights | {"epoch": 3, "global_step": 21}):
        torch.save(content, "weights.ckpt")
        with pytest.raises(Exception, match=r"model\.init_from weights\.ckpt|not a checkpoint of this project"):
            trainer(max_epochs=4).fit(new(), small.Points(), ckpt_path="weights.ckpt")


class Unvalidated(small.Points):
    def load(self, split: str) -> Any:
        return None if split == "val" else super().load(split)


class Plateau(small.Classify):
    def __init__(self, **settings: Any) -> None:
        super().__init__(small.network())
        self.settings = settings

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **self.settings}}


@pytest.mark.parametrize("data", [Unvalidated, small.Points])
def test_what_monitors_a_validation_needs_one(data: Any) -> None:
    settings: dict[str, Any] = {} if data is Unvalidated else {"limit_val_batches": 0}
    line = "monitors 'val/loss', but nothing is validated: write one of train/loss_epoch"
    for callback in (EarlyStopping("val/loss"), ModelCheckpoint(monitor="val/loss")):
        with pytest.raises(Mistake, match=f"{type(callback).__name__} {line}"):
            trainer(callbacks=[callback], **settings).fit(new(), data())
    with pytest.raises(Mistake, match=f"ReduceLROnPlateau {line}"):
        trainer(**settings).fit(Plateau(monitor="val/loss"), data())
    made = trainer(callbacks=[EarlyStopping("train/loss_epoch", check_on_train_epoch_end=True)], **settings)
    made.fit(new(), data())
    assert "last.ckpt" in saved(made.folder)
    with pytest.raises((Mistake, ValueError), match=r"load\('val'\) gave nothing"):
        trainer().validate(new(), datamodule=Unvalidated(), ckpt_path="last")


@pytest.mark.slow
def test_a_plateau_is_looked_for_when_there_is_a_validation() -> None:
    early = (
        ({"check_val_every_n_epoch": 2}, {}, "write frequency: 2, for interval: epoch"),
        ({}, {"interval": "step"}, "write frequency: 7, for interval: step"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 10}, {}, "write frequency: 2, for interval: epoch"),
    )
    for settings, how, remedy in early:
        with pytest.raises(Mistake, match=f"looks for 'val/loss' after step \\d, but it is first measured.*{remedy}"):
            trainer(**settings).fit(Plateau(monitor="val/loss", **how), small.Points())
    for settings, how in (
        ({"check_val_every_n_epoch": 2}, {"monitor": "val/loss", "frequency": 2}),
        ({"check_val_every_n_epoch": 2}, {"monitor": "val/loss", "frequency": 3}),
        ({"check_val_every_n_epoch": 2}, {"monitor": "train/loss_epoch"}),
        ({"val_check_interval": 7}, {"monitor": "val/loss", "interval": "step", "frequency": 7}),
        ({"val_check_interval": 0.5}, {"monitor": "val/loss", "interval": "step", "frequency": 3}),
        (
            {"check_val_every_n_epoch": None, "val_check_interval": 5},
            {"monitor": "val/loss", "interval": "step", "frequency": 5},
        ),
    ):
        made = trainer(max_epochs=4, **settings)
        made.fit(Plateau(**how), small.Points())
        assert made.current_epoch == 4


def test_what_monitors_no_validation_needs_none() -> None:
    class Own(small.Classify):
        def on_train_epoch_end(self) -> None:
            self.log("val/own", float(self.current_epoch))

    task = Own(small.network(), optimizer=small.adamw)
    monitors = [
        EarlyStopping("val/loss", strict=False),
        ModelCheckpoint(monitor="step", mode="max"),
        EarlyStopping("val/own", mode="max", check_on_train_epoch_end=True),
    ]
    made = trainer(callbacks=monitors, limit_val_batches=0)
    made.fit(task, small.Points())
    assert made.current_epoch == 3


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("unfreeze", [1, 4])
@pytest.mark.slow
def test_a_training_that_thaws_is_gone_on_with(same: bool, unfreeze: int) -> None:
    class Thawing(small.Classify):
        @property
        def backbone(self) -> Any:
            return self.network[0]

    task = Thawing(small.network(), optimizer=small.adamw)
    trainer(max_epochs=2, callbacks=[BackboneFinetuning(unfreeze)]).fit(task, small.Points())
    if not same:
        task = Thawing(small.network(), optimizer=small.adamw)
    made = trainer(max_epochs=3, callbacks=[BackboneFinetuning(unfreeze)])
    made.fit(task, small.Points(), ckpt_path="last")
    assert made.current_epoch == 3


@pytest.mark.parametrize("precisions", [("64-true", "32-true"), ("32-true", "64-true"), ("32-true", "bf16-true")])
def test_another_precision_goes_on(precisions: tuple[str, str]) -> None:
    def task() -> Task:
        return small.Classify(torch.nn.Sequential(torch.nn.Linear(5, 3)), optimizer=small.adamw)

    trainer(precision=precisions[0]).fit(task(), small.Points())
    made, other = trainer(precision=precisions[1], max_epochs=4), task()
    made.fit(other, small.Points(), ckpt_path="last")
    assert made.current_epoch == 4
    types = {state["exp_avg"].dtype for state in made.optimizers[0].state.values()}
    assert types == {next(other.parameters()).dtype}


def test_each_trainer_has_a_folder_of_its_own() -> None:
    made = [trainer(), trainer()]
    for one in made:
        one.fit(new(), small.Points())
    assert made[0].folder != made[1].folder
    before = (made[0].folder, saved(made[0].folder))
    made[0].fit_loop.max_epochs = 4
    made[0].fit(new(), small.Points())
    assert (made[0].folder, saved(made[0].folder)) == before
    assert "BATCHWISE_RUN_FOLDER" not in os.environ


@pytest.mark.parametrize("settings", [{"enable_checkpointing": False}, {"fast_dev_run": True, "logger": None}])
def test_no_folder_where_nothing_is_kept(settings: dict[str, Any]) -> None:
    made = trainer(**settings)
    made.fit(new(), small.Points())
    assert made.folder is None
    assert list(Path.cwd().iterdir()) == []


def test_a_mistake_leaves_no_folder_and_can_be_mended() -> None:
    made = trainer(callbacks=[ModelCheckpoint(monitor="val/acuracy")])
    for _ in range(2):
        with pytest.raises(Mistake, match="monitors 'val/acuracy', which is not measured"):
            made.fit(new(), small.Points())
        assert not list(Path("runs").glob("*"))
    made.checkpoint_callback.monitor = "val/accuracy"  # type: ignore[union-attr]
    made.fit(new(), small.Points())
    assert "last.ckpt" in saved(made.folder)


def test_own_loggers_and_callbacks_stay_where_they_are() -> None:
    made = trainer(
        logger=[CSVLogger("mine", "log")],
        callbacks=[ModelCheckpoint("kept", filename="{step}", every_n_train_steps=7, save_top_k=-1)],
        default_root_dir="elsewhere",
    )
    made.fit(new(), small.Points())
    assert {path.name for path in Path("kept").iterdir()} == {"step=7.ckpt", "step=14.ckpt", "step=21.ckpt"}
    assert (Path("mine") / "log" / "version_0" / "metrics.csv").exists()
    assert made.folder is not None
    assert made.folder.parent == Path("elsewhere/run")
    assert saved(made.folder) == {"last.ckpt", "previous.ckpt"}


def test_a_test_is_another_part_of_the_same_run_of_wandb(capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(logger=None)
    made.fit(new(), small.Points())
    made.test(datamodule=small.Points(), verbose=False)
    assert made.folder is not None
    name = f"run-{made.folder.name}"
    parts = list((made.folder / "wandb").glob(f"offline-run-*-{name}*"))
    assert len([part for part in parts if (part / f"run-{name}.wandb").stat().st_size > 0]) == 2
    assert "wandb leet runs/wandb/run" in capsys.readouterr().out


def test_what_was_trained_here_predicts_here() -> None:
    task, data, made = new(), small.Points(), trainer()
    made.fit(task, data)
    assert made.folder is not None
    path = made.folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"has no configuration, .*: write batchwise\.load\(path, task=\.\.\., data="):
        batchwise.load(path)
    loaded = batchwise.load(path, task=new(), data=small.Points())
    assert small.furthest(loaded.task, task) == 0


def test_ctrl_c_saves() -> None:
    class Interrupted(small.Classify):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 9:
                os.kill(os.getpid(), 2)

    made = trainer()
    with pytest.raises(TrainingStopped, match="stopped by a signal after step 9; saved"):
        made.fit(Interrupted(small.network(), optimizer=small.adamw), small.Points())
    task, reference = new(), new()
    trainer().fit(task, small.Points(), ckpt_path="last")
    trainer(name="whole").fit(reference, small.Points())
    assert small.furthest(task, reference) == 0


@pytest.mark.slow
def test_a_notebook_on_two_devices(capfd: pytest.CaptureFixture[str]) -> None:
    one, two = new(), new()
    trainer(name="one").fit(one, small.Points())
    made = trainer(name="two", devices=2, strategy="ddp_notebook")
    made.fit(two, small.Points())
    assert small.furthest(one, two) < 1e-14
    assert saved(made.folder) == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    shown = capfd.readouterr().out
    assert shown.count("run folder: runs/two") == 1
    assert f"best val/loss: {made.folder}" in shown
    (found,) = made.validate(datamodule=small.Points(), ckpt_path="best", verbose=False)
    assert 0 < found["val/accuracy"] <= 1


class Forked(small.Classify):
    """Its network runs in the processes that the notebook starts."""

    notebook = os.getpid()

    def forward(self, inputs: Any) -> Any:
        assert os.getpid() != self.notebook
        return super().forward(inputs)


class ForkedPoints(small.Points):
    def to_device(self, *arguments: Any, **settings: Any) -> Any:
        assert os.getpid() != Forked.notebook
        return super().to_device(*arguments, **settings)


@pytest.mark.slow
def test_a_notebook_leaves_the_gpu_to_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fork, CUDA cannot be used if it was used before. Here a CPU stands in."""
    one = new()
    trainer(name="one").fit(one, small.Points())

    def on(self: InMemory, *_: Any) -> InMemory:
        assert os.getpid() != Forked.notebook
        return self

    monkeypatch.setattr(InMemory, "on", on)
    monkeypatch.setattr(checks, "FORKED", ("cpu",))
    two = Forked(small.network(), optimizer=small.adamw)
    settings: dict[str, Any] = {"name": "two", "devices": 2, "strategy": "ddp_notebook"}
    trainer(max_epochs=1, **settings).fit(two, ForkedPoints())
    trainer(**settings).fit(two, ForkedPoints(), ckpt_path="last")
    assert small.furthest(one, two) < 1e-14
    with pytest.raises(Mistake, match="batch_size"):
        trainer(**settings).fit(two, ForkedPoints(batch_size=9), ckpt_path="last")


SCRIPT = """
import small, test_python
for name in ("first", "second"):
    made = test_python.trainer(name=name, devices=2, strategy="ddp")
    made.fit(test_python.new(), small.Points())
    open(f"{name}-{made.global_rank}", "w").write(str(made.folder))
"""


@pytest.mark.weekly
@pytest.mark.parametrize(
    "launch", [[sys.executable], [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]]
)
def test_two_trainings_of_a_script_on_two_devices(launch: list[str]) -> None:
    Path("script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run(
        [*launch, "script.py"], env=os.environ | paths, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("first", "second"):
        folder = Path(Path(f"{name}-0").read_text())
        assert folder == Path(Path(f"{name}-1").read_text())
        assert list(Path("runs", name).glob("*-*")) == [folder]
        assert "last.ckpt" in saved(folder)
    assert list(Path("runs").glob("*/.*")) == []


def test_a_setup_that_ends_with_that_of_the_engine() -> None:
    class Own(small.Points):
        ends = False

        def setup(self, stage: str) -> None:
            self.rows = super().load("train")
            if self.ends:
                super().setup(stage)

        def load(self, split: str) -> Any:
            return self.rows

    with pytest.raises(Mistake, match=r"^Own.setup made no plan: write super\(\).setup\(stage\) at its end$"):
        trainer(enable_checkpointing=False).fit(new(), Own())
    Own.ends = True
    trainer(enable_checkpointing=False).fit(new(), Own())


class Stop(Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


STOPS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a callback": ({"callbacks": [Stop()]}, "a callback stopped it after 7 steps", ""),
    "no better": ({"callbacks": [EarlyStopping("val/loss", 10.0, 1)]}, "Monitored metric val/loss did not improve", ""),
    "time": (
        {"max_time": {"seconds": 0.2}, "max_epochs": 99999},
        "trainer.max_time is over",
        "--trainer.max_time null",
    ),
    "epochs": ({}, "", "--trainer.max_epochs 6"),
}


@pytest.mark.parametrize("case", STOPS)
def test_the_end_says_why_a_training_has_stopped(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings, reason, longer = STOPS[case]
    made = trainer(**settings)
    made.fit(new(), small.Points())
    assert f"stopped early: {reason}" in capsys.readouterr().out or not reason
    assert made.folder is not None
    report.next_commands(made, made.folder, ["fit"])
    shown = capsys.readouterr().out
    assert f"--ckpt_path last {longer}\n" in shown if longer else "go on:" not in shown


def early(patience: int = 1) -> EarlyStopping:
    return EarlyStopping("val/loss", min_delta=10.0, patience=patience)  # no value is so much better than the first


def goes_on(*callbacks: Callback, **settings: Any) -> int:
    """Resume a training of seven steps an epoch in a new process, as it were; return the steps."""
    made = trainer(callbacks=list(callbacks), **{"max_epochs": 9} | settings)
    made.fit(new(), small.Points(), ckpt_path="last")
    return made.global_step


def test_a_training_that_has_ended_early_stays_ended(capsys: pytest.CaptureFixture[str]) -> None:
    assert goes_on(early()) == 14
    assert "has ended this training" not in capsys.readouterr().out
    assert goes_on(early(), max_epochs=20) == 14
    shown = capsys.readouterr().out
    assert "EarlyStopping has ended this training: write another patience, or leave it out, to go on\n" in shown
    assert "stopped early: Monitored metric val/loss did not improve in the last 1 records" in shown
    assert goes_on(early(3)) == 28  # of the patience, two records are left
    assert goes_on(early(3)) == 28
    assert goes_on(early(3), min_epochs=6) == 42
    assert goes_on() == 63


def test_a_patience_that_changes_within_a_training_counts() -> None:
    assert goes_on(early(4), max_epochs=2) == 14
    assert goes_on(early(2)) == 21


def test_an_early_end_that_is_over_ends_nothing_later(capsys: pytest.CaptureFixture[str]) -> None:
    assert goes_on(early()) == 14
    assert goes_on(early(9), max_epochs=4) == 28
    assert goes_on(early(9), Stop()) == 35  # another callback has ended it
    capsys.readouterr()
    assert goes_on(early(9)) == 63
    assert "stopped early" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "lines"),
    [
        ("cosine", ["model.schedule is now that of 256 examples, and was that of 192: the rate changes here"]),
        ("constant", []),
    ],
)
def test_a_schedule_that_ends_later_is_named(shape: Any, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for epochs, said in ((3, []), (3, []), (4, lines)):
        task = small.Classify(small.network(), optimizer=small.adamw, schedule=Schedule(shape))
        trainer(max_epochs=epochs).fit(task, small.Points(), ckpt_path="last")
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("model.schedule")] == said


@pytest.mark.parametrize("monitor", [("val/loss", "lowest"), "val/loss"])
def test_a_monitor_needs_a_direction(monitor: Any) -> None:
    task = type("Own", (small.Classify,), {"monitor": monitor})(small.network(), optimizer=small.adamw)
    with pytest.raises(
        ValueError, match=rf"^Own\.monitor is {re.escape(repr(monitor))}: write a name, and 'min' or 'max'"
    ):
        usual_callbacks(task, [], True, Path("runs"))


def with_scheduler(optimizer: torch.optim.Optimizer, **settings: Any) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **settings}}


def of_another(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    other = torch.optim.SGD(optimizer.param_groups[0]["params"], 0.1)
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(other, 1)}


def plateau(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}


REMEDY = r": return an optimizer, or \{'optimizer': ..., 'lr_scheduler': \{'scheduler': ..., 'interval': 'step'\}\}$"
CONFIGURED: dict[str, tuple[Any, str]] = {
    "no monitor": (plateau, "^configure_optimizers: `configure_optimizers` must include a monitor"),
    "interval": (lambda one: with_scheduler(one, interval="steps"), '"step" or "epoch" but is "steps"$'),
    "frequency of 0": (lambda one: with_scheduler(one, frequency=0), "frequency is 0: write a whole number of at leas"),
    "frequency a word": (lambda one: with_scheduler(one, frequency="x"), "frequency is 'x': write a whole number of"),
    "misspelt": (lambda one: with_scheduler(one, intervall="step"), "unsupported keys .* {'intervall'}" + REMEDY),
    "misspelt outside": (
        lambda one: {"optimizer": one, "scheduler": None},
        "unsupported keys .* {'scheduler'}" + REMEDY,
    ),
    "a pair": (lambda one: (one, torch.optim.lr_scheduler.StepLR(one, 1)), "^configure_optimizers: Unknown configurat"),
    "of another": (of_another, "^configure_optimizers: Some schedulers are attached with an optimizer that wasn't ret"),
    "no optimizer": (
        lambda one: {"monitor": "x"},
        r"what it returns cannot be read \(KeyError: 'optimizer'\)" + REMEDY,
    ),
    "no scheduler": (
        lambda one: {"optimizer": one, "lr_scheduler": 3},
        r"cannot be read \(AttributeError" + ".*" + REMEDY,
    ),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_what_configure_optimizers_returns_is_one_line(case: str) -> None:
    make, line = CONFIGURED[case]

    def configure_optimizers(task: Any) -> Any:
        return make(small.adamw(task.parameters()))

    own = type("Own", (small.Classify,), {"configure_optimizers": configure_optimizers})
    made = batchwise.Trainer(max_epochs=2, accelerator="cpu", logger=False, precision="64-true")
    with pytest.raises(Mistake, match=line) as mistake:
        made.fit(own(small.network(), optimizer=small.adamw), small.Points())
    assert "\n" not in str(mistake.value)
    assert made.global_step == 0


def test_a_bug_in_configure_optimizers_keeps_its_traceback() -> None:
    def configure_optimizers(_: Any) -> Any:
        return {}["nothing"]

    own = type("Own", (small.Classify,), {"configure_optimizers": configure_optimizers})
    made = batchwise.Trainer(max_epochs=2, accelerator="cpu", logger=False, precision="64-true")
    with pytest.raises(KeyError, match="nothing"):
        made.fit(own(small.network(), optimizer=small.adamw), small.Points())


@pytest.mark.parametrize("monitor", ["val/f1", "val/loss"])
def test_a_schedule_that_waits_for_what_nobody_measures_is_one_line(monitor: str) -> None:
    def plateau(task: Any) -> dict[str, Any]:
        optimizer = small.adamw(task.parameters())
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}

    task = type("Own", (small.Classify,), {"configure_optimizers": plateau})(small.network(), optimizer=small.adamw)
    made = batchwise.Trainer(max_epochs=2, accelerator="cpu", logger=False, precision="64-true")
    if monitor == "val/loss":
        made.fit(task, small.Points())
        return
    with pytest.raises(
        Mistake, match=r"^ReduceLROnPlateau monitors 'val/f1', which is not measured: write one of val/l"
    ):
        made.fit(task, small.Points())
    assert made.global_step == 0


def test_a_trainer_that_is_done_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    task, data, made = new(), small.Points(), trainer(enable_checkpointing=False)
    made.fit(task, data)
    (record,) = (callback for callback in made.callbacks if isinstance(callback, Record))
    capsys.readouterr()
    made.fit(task, data)
    shown = capsys.readouterr().out
    assert "resuming after step 21 (a new trainer begins anew)" in shown
    assert "already trained for 21 of 21 steps" in shown
    made.fit_loop.max_epochs = 4
    made.fit(task, data)
    assert record.examples == 64  # over the seconds of this part
    assert record.began.seconds < made.phases.seconds["training"] < 1


@pytest.mark.parametrize("trained", [False, True])
def test_the_best_of_another_training_is_not_that_of_this_one(trained: bool) -> None:
    trainer(max_epochs=1).fit(new(), small.Points())
    task, data, made = new(), small.Points(), trainer(max_epochs=1, enable_checkpointing=False)
    if trained:
        made.fit(task, data)
    with pytest.raises(Mistake, match=r"this trainer has kept no best checkpoint: write test\(task, \.\.\.\)"):
        made.test(datamodule=data)
    assert made.test(task, data, verbose=False)


@pytest.mark.parametrize(
    "given", [{"val_dataloaders": small.Points()}, {"train_dataloaders": small.Points(), "datamodule": small.Points()}]
)
def test_loaders_beside_a_data_module_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(Mistake, match="fit got a DataModule and further loaders: leave them out"):
        trainer(enable_checkpointing=False).fit(new(), **{"train_dataloaders": small.Points()} | given)
