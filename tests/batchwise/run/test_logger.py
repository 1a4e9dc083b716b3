"""W&B never stops training, and a resumed training is one run in W&B."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from helpers import DIGITS, Started, run_here, wandb_records

import batchwise.run.wandb
from batchwise.checkpoints import read_checkpoint

ONLINE = (*DIGITS, "--trainer.logger.offline", "false", "--trainer.max_epochs", 1)


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


def goes_offline(*words: str) -> None:
    result = run_here("fit", *ONLINE)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("W&B: ")]
    assert "logging offline" in line
    assert all(word in line for word in words)
    assert "epoch 1 " in result.out
    assert len(list(result.folder.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.slow
def test_without_a_key() -> None:
    goes_offline("API key")


@pytest.mark.slow
def test_with_a_key_and_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr(batchwise.run.wandb, "INIT_TIMEOUT", 2)
        goes_offline()


def test_a_failure_in_training_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("wandb.sdk.wandb_run.Run.log", fail)
    result = run_here("fit", *DIGITS, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert result.out.count("W&B failed (No space left on device): training goes on") == 1
    assert "epoch 2 " in result.out


# Which logger, and which project

SHORT = ("fit", *DIGITS, "--trainer.max_steps", 2, "--trainer.log_every_n_steps", 1)
MAIN = """
import sys
from batchwise.run.main import main

if __name__ == "__main__":
    sys.exit(main(__package__))
"""


def project(folder: Path) -> str:
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    (name,) = {record.run.project for record in wandb_records(path) if record.HasField("run")}
    return name


def logs(folder: Path) -> list[str]:
    """The folders of loggers in a run's folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "checkpoints")


@pytest.mark.weekly
def test_the_project_is_the_package_that_is_started() -> None:
    Path("shop").mkdir()
    Path("shop/__init__.py").touch()
    Path("shop/__main__.py").write_text(MAIN)
    command = [sys.executable, "-m", "shop", *map(str, SHORT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path.cwd())])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (folder,) = Path("runs/digits").iterdir()
    assert project(folder) == "shop"
    assert "go on:      python -m shop fit --config " in done.stdout


def test_the_project_may_be_named() -> None:
    result = run_here(*SHORT, "--trainer.logger.project", "flowers")
    assert result.code == 0, result.err
    wandb.teardown()
    assert project(result.folder) == "flowers"


@pytest.mark.parametrize("text", ["", "trainer: {logger: {class_path: batchwise.run.wandb.WandbLogger}}"])
@pytest.mark.slow
def test_the_default_logger(text: str) -> None:
    """It is the default, and also what a configuration without `init_args` names."""
    Path("logger.yaml").write_text(text or "name: digits")
    result = run_here(*SHORT, "--config", "logger.yaml")
    assert result.code == 0, result.err
    wandb.teardown()
    assert logs(result.folder) == ["wandb"]
    assert project(result.folder) == "batchwise"
    _, (rows,), _ = history(result.folder)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    saved = yaml.safe_load((result.folder / "config.yaml").read_text())["trainer"]["logger"]
    assert saved["class_path"] == "batchwise.run.wandb.WandbLogger"
    assert (saved["init_args"]["project"], saved["init_args"]["save_dir"]) == (None, ".")


def test_no_logger() -> None:
    result = run_here(*SHORT, "--trainer.logger", "false")
    assert result.code == 0, result.err
    assert logs(result.folder) == []
    assert "upload it" not in result.out


def test_wandb_disabled_by_its_own_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    result = run_here(*SHORT)
    assert result.code == 0, result.err
    assert logs(result.folder) == []
    assert not any(words in result.out for words in ("W&B", "look at it", "upload it"))


def test_its_own_variable_keeps_it_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network, where `wandb sync` uploads later: nothing is asked of a server."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    result = run_here(*SHORT, "--trainer.logger.offline", "false")
    assert result.code == 0, result.err
    assert "W&B" not in result.out
    assert "upload it:  wandb sync " in result.out


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("project", "team/digits", "'team/digits', and W&B takes no / in it: write letters and digits"),
        ("id", "a:b, c", "'a:b, c', and W&B takes no , : in it: write letters and digits"),
    ],
)
def test_what_wandb_refuses_is_refused_before_training(flag: str, value: str, said: str) -> None:
    """The log was lost."""
    result = run_here(*SHORT, f"--trainer.logger.{flag}", value)
    assert result.code == 2
    assert result.err.splitlines()[-1] == f"error: trainer.logger.{flag} is {said}"


def test_a_misspelt_mode_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    result = run_here(*SHORT)
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: WANDB_MODE is 'ofline': write online, offline or disabled"


@pytest.mark.parametrize("mode", ["online", "disabled"])
def test_training_goes_on_where_wandb_cannot_be_imported(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = run_here(*SHORT)
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("W&B: ")]
    assert [line.endswith("; training goes on, without it") for line in lines] == ([True] if mode == "online" else [])


def test_another_logger() -> None:
    settings = ("--trainer.logger.save_dir", ".", "--trainer.logger.name", "log")
    result = run_here(*SHORT, "--trainer.logger", "lightning.pytorch.loggers.CSVLogger", *settings)
    assert result.code == 0, result.err
    assert logs(result.folder) == ["log"]
    assert list(result.rows("train/loss")) == [1, 2]


def test_another_logger_without_what_it_needs() -> None:
    Path("logger.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger}}")
    result = run_here(*SHORT, "--config", "logger.yaml")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if not line.startswith("note:")]
    assert line == "error: trainer.logger.save_dir is not set: write it"


# One run, however often it is interrupted

FIT = (
    *("fit", *DIGITS, "--trainer.max_epochs", 6, "--trainer.val_check_interval", 8, "--trainer.log_every_n_steps", 3),
    *("--model.schedule", "{shape: constant, warmup_examples: 600}"),
)
RESUME = ("--ckpt_path", "last")
LAST = "{class_path: batchwise.callbacks.checkpoint.Last, init_args: {every_n_steps: 12}}"
FAILING = """
from lightning.pytorch.callbacks import Callback

class FailsAfter51(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 51:
            raise RuntimeError("the cat has pulled the plug")
"""
CHART = ("train/loss", "val/loss", "learning_rate", "train/loss_epoch", "examples")


def history(folder: Path) -> tuple[set[str], list[list[dict[str, Any]]], dict[str, Any]]:
    """The ids, the rows of each file in the order in which `wandb sync` takes them, and the summary."""
    wandb.teardown()  # as at the end of a process: only then is the file whole
    ids, files, summary = set(), [], {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        files.append([])
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                files[-1].append(row | {"step": record.history.step.num})
            if record.HasField("summary"):
                summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return ids, files, summary


def curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The points of each curve. A step that stands twice has the same values twice, or this fails."""
    points = {name: sorted({(row["step"], row[name]) for row in rows if name in row}) for name in CHART}
    for name, curve in points.items():
        assert len(curve) == len({step for step, _ in curve}), f"{name} has two values at one step"
    return points


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float]]]:
    result = run_here(*FIT, "--trainer.default_root_dir", tmp_path_factory.mktemp("whole"))
    assert result.code == 0, result.err
    _, (rows,), summary = history(result.folder)
    assert summary.get("summary/examples_per_second", 0) > 0, result.out
    whole = curves(rows)
    assert [step for step, _ in whole["train/loss"]] == list(range(3, 121, 3))
    assert [step for step, _ in whole["val/loss"]] == [20 * epoch + step for epoch in range(6) for step in (8, 16)]
    return whole


def check(folder: Path, uninterrupted: dict[str, list]) -> int:
    """Check that two files are one run, with the values of an uninterrupted one. Return how many steps stand twice."""
    ids, files, _ = history(folder)
    assert len(files) == 2
    assert ids == {f"digits-{folder.name}"}
    for rows in files:
        steps = [row["step"] for row in rows]
        assert all(a < b for a, b in pairwise(steps))
        assert [row["trainer/global_step"] for row in rows] == steps
    ours = curves([row for rows in files for row in rows])
    ours["train/loss_epoch"] = [row for row in ours["train/loss_epoch"] if row[0] % 20 == 0]  # not where a part ends
    assert ours == uninterrupted
    before, after = ({row["step"] for row in rows} for rows in files)
    return len(before & after)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        pytest.param("1000", False, id="nothing written", marks=pytest.mark.weekly),
        pytest.param("0.05", True, id="written"),
    ],
)
@pytest.mark.slow
def test_a_killed_and_resumed_run_has_every_row(seconds: str, written: bool, uninterrupted: dict[str, list]) -> None:
    """Rows that W&B had not written when it was killed are in the checkpoint; those that it had stand twice."""
    killed = Started(*FIT, OMP_NUM_THREADS="1", WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL=seconds)
    deadline = time.monotonic() + 60
    while "epoch 3 " not in killed.out and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    killed.end(60)
    (folder,) = Path("runs/digits").iterdir()
    assert 40 <= read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] < 120
    _, (before,), _ = history(folder)
    assert bool(before) == written
    resumed = run_here(*FIT, *RESUME)
    assert resumed.code == 0, resumed.err
    assert bool(check(folder, uninterrupted)) == written
    assert f"upload it:  wandb sync {folder}/wandb/*run-*-digits-{folder.name}" in resumed.out


@pytest.mark.slow
def test_a_killed_run_has_written_every_row_before_its_checkpoint_to_another_logger() -> None:
    """Lightning's CSV logger writes at the end of an epoch, and every 100 steps."""
    seldom = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ., name: log}}"
    every = "[{class_path: batchwise.callbacks.checkpoint.Last, init_args: {every_n_steps: 50}}]"
    settings = ("--data.batch_size", 1, "--trainer.max_epochs", 3, "--trainer.log_every_n_steps", 1)
    killed = Started("fit", *DIGITS, *settings, "--trainer.logger", seldom, "--trainer.callbacks", every)
    deadline = time.monotonic() + 60
    while not (found := list(Path("runs/digits").glob("*/checkpoints/last.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.001)
    killed.kill()
    killed.end(60)
    with (found[0].parents[1] / "log/version_0/metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps[:50] == list(range(1, 51))


@pytest.mark.slow
def test_after_a_run_that_ended_no_step_stands_twice(uninterrupted: dict[str, list]) -> None:
    """Even where training goes on from a checkpoint before its end."""
    first = run_here(*FIT, "--trainer.max_steps", 51)
    checkpoints = first.folder / "checkpoints"
    (checkpoints / "previous.ckpt").replace(checkpoints / "last.ckpt")  # as a crash between two checkpoints leaves it
    wandb.teardown()
    resumed = run_here(*FIT, *RESUME)
    assert resumed.code == 0, resumed.err
    assert "resuming after step 40" in resumed.out
    assert check(first.folder, uninterrupted) == 0


def test_a_power_cut_that_empties_the_note_of_the_last_step_does_not_end_the_log() -> None:
    first = run_here(*SHORT)
    (note,) = first.folder.glob("wandb/*.last-step")
    note.write_text("")
    wandb.teardown()
    resumed = run_here(*SHORT, *RESUME, "--trainer.max_steps", 4)
    assert resumed.code == 0, resumed.err
    assert "W&B" not in resumed.out
    assert [[row["step"] for row in rows if "train/loss" in row] for rows in history(first.folder)[1]][1][-2:] == [3, 4]


@pytest.mark.slow
def test_after_an_error_no_step_stands_twice(uninterrupted: dict[str, list]) -> None:
    Path("failing.py").write_text(FAILING)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path.cwd()))
        with pytest.raises(RuntimeError, match="the cat has pulled the plug"):
            run_here(*FIT, "--trainer.callbacks", f"[failing.FailsAfter51, {LAST}]")
    wandb.teardown()
    resumed = run_here(*FIT, *RESUME)
    assert resumed.code == 0, resumed.err
    (folder,) = Path("runs/digits").iterdir()
    assert "resuming after step 48" in resumed.out
    assert check(folder, uninterrupted) == 0


@pytest.mark.slow
def test_checkpoints_and_pictures_at_the_end() -> None:
    result = run_here("fit", *DIGITS, "--trainer.max_epochs", 2, "--trainer.logger.log_model", "true")
    assert result.code == 0, result.err
    wandb.teardown()
    (path,) = result.folder.glob("wandb/offline-run-*/*.wandb")
    artifacts = [record.request.log_artifact.artifact for record in wandb_records(path) if record.HasField("request")]
    artifacts += [record.artifact for record in wandb_records(path) if record.HasField("artifact")]
    models = {alias: artifact for artifact in artifacts if artifact.type == "model" for alias in artifact.aliases}
    assert models.keys() == {"last", "best", "latest"}
    for alias in ("last", "best"):
        artifact = models[alias]
        (entry,) = artifact.manifest.contents
        assert (entry.path, entry.size) == ("model.ckpt", (result.folder / f"checkpoints/{alias}.ckpt").stat().st_size)
    _, (rows,), _ = history(result.folder)
    (row,) = [row for row in rows if "val/confusion/filenames" in row]
    assert row["step"] == 40
    assert (path.parent / "files" / row["val/confusion/filenames"][0]).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which takes root")
@pytest.mark.slow
def test_a_full_disk() -> None:
    Path("small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "small"], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        settings = ("--trainer.max_epochs", 3, "--trainer.log_every_n_steps", 1, "--trainer.logger.save_dir", "small")
        result = run_here("fit", *DIGITS, *settings[:-1], Path("small").absolute())
        wandb.teardown()
    finally:
        subprocess.run(["umount", "--lazy", "small"], check=True)
    assert result.code == 0, result.err
    assert result.out.count("No space left on device") == 1
    assert "epoch 3 " in result.out
