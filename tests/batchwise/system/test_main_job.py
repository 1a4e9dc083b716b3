"""Whole runs on the digits: train, test, predict, resume, log."""

import csv
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import BF16, CSV, DIGITS, Result, furthest, run_here, wandb_records

from batchwise.sources.digits import Digits


def root(trained: Result) -> Path:
    return trained.folder.parents[1]


def test_training_reaches_its_accuracy(trained: Result) -> None:
    callbacks = trained.checkpoint("best")["callbacks"]
    (state,) = [state for name, state in callbacks.items() if name.startswith("ModelCheckpoint")]
    assert state["best_model_score"] >= 0.97
    assert f"best val/accuracy {state['best_model_score']:.4f}" in trained.out


@pytest.mark.slow
def test_test_of_the_best_checkpoint(trained: Result) -> None:
    result = run_here("test", *DIGITS, "--trainer.default_root_dir", root(trained), "--ckpt_path", "best")
    assert result.code == 0, result.err
    best = trained.folder / "checkpoints" / "best.ckpt"
    assert f"after step {trained.checkpoint('best')['global_step']:,}: {best}" in result.out
    measured = dict(line.split() for line in result.out.splitlines() if line.startswith("test/"))
    assert float(measured["test/accuracy"]) >= 0.96
    assert float(measured["test/f1"]) >= 0.96
    assert (trained.folder / "test.yaml").exists()


def test_the_end_says_how_to_go_on(trained: Result) -> None:
    (command,) = [
        line.split("python -m batchwise ")[1] for line in trained.out.splitlines() if line.startswith("go on:")
    ]
    assert command.endswith(" --ckpt_path last --trainer.max_epochs 40")
    result = run_here(*command.split()[:-2], "--print_config")
    assert result.code == 0, result.err
    assert yaml.safe_load(result.out)["trainer"]["default_root_dir"] == str(root(trained))


@pytest.mark.slow
def test_the_log_can_be_looked_at_without_an_account(trained: Result) -> None:
    (command,) = [line.split(": ")[1] for line in trained.out.splitlines() if line.startswith("look at it:")]
    program, verb, folder = command.split()
    assert folder.endswith("wandb/digits")
    (path,) = Path(root(trained), "wandb", "digits").iterdir()  # the printed path begins where the run was started
    assert path.resolve().parent == trained.folder / "wandb"
    viewer = [str(Path(sys.executable).with_name(program)), verb, "inspect", "--summary", str(path)]
    said = subprocess.run(viewer, capture_output=True, text=True, check=True, timeout=60).stdout
    assert f"digits-{trained.folder.name}" in said
    assert "/accuracy" in said


@pytest.mark.weekly
def test_all_runs_of_an_experiment_can_be_compared() -> None:
    """The viewer itself, in a terminal of its own; and a run whose folder is gone is not in its list."""
    runs = [run_here("fit", *DIGITS, "--trainer.max_epochs", 1).folder for _ in range(3)]
    shutil.rmtree(runs[0])
    last = run_here("fit", *DIGITS, "--trainer.max_epochs", 1)
    (command,) = [line.split(": ")[1].split() for line in last.out.splitlines() if line.startswith("look at it:")]
    process, terminal = pty.fork()
    if process == 0:
        os.execve(Path(sys.executable).with_name(command[0]), command, os.environ | {"TERM": "xterm-256color"})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    shown, end = b"", time.monotonic() + 30
    while not re.search(rb"Runs.*\[3 items\]", shown) and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            shown += os.read(terminal, 65536)
            os.write(terminal, b"\x1b]11;rgb:0000/0000/0000\x1b\\\x1b[1;1R")  # it asks for a colour and the cursor
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert re.search(rb"Runs.*\[3 items\]", shown), shown


def test_validate_measures_what_training_measured(trained: Result) -> None:
    result = run_here("validate", *DIGITS, "--trainer.default_root_dir", root(trained), "--ckpt_path", "last")
    assert result.code == 0, result.err
    last_epoch = next(line for line in trained.out.splitlines() if line.startswith("epoch 20 "))
    where, *figures = result.out.splitlines()
    assert where == f"after step 400: {trained.folder}/checkpoints/last.ckpt"
    assert figures
    for line in figures:
        assert line in last_epoch  # such as: val/accuracy 0.9888


@pytest.mark.slow
def test_predict_writes_one_row_per_example_in_order(trained: Result) -> None:
    result = run_here("predict", *DIGITS, "--trainer.default_root_dir", root(trained), "--ckpt_path", "best")
    assert result.code == 0, result.err
    with (trained.folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    _, digits = Digits().load("test")  # type: ignore[misc]
    assert [int(row["example"]) for row in rows] == list(range(len(digits)))
    right = sum(int(row["predicted"]) == digit for row, digit in zip(rows, digits.tolist(), strict=True))
    assert right / len(digits) >= 0.96
    assert sum(float(rows[0][f"probability_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-6)


def test_the_plan_is_printed(trained: Result) -> None:
    figures = dict(line.split() for line in trained.out.splitlines() if line.startswith("  "))
    assert figures["examples"] == "1,259"
    assert figures["steps_per_epoch"] == "20"
    assert figures["last_batch"] == str(1259 % 64)
    assert figures["total_steps"] == "400"


def test_a_finished_training_goes_on_with_more_epochs() -> None:
    # A schedule that does not depend on the length of training, so that two epochs and one are three.
    run = ("fit", *DIGITS, *CSV, "--model.schedule", "{shape: constant, warmup_examples: 600}")
    first = run_here(*run, "--trainer.max_epochs", 2)
    assert first.code == 0, first.err
    again = run_here(*run, "--trainer.max_epochs", 2, "--ckpt_path", "last")
    assert "already trained for 40 of 40 steps" in again.out
    on = run_here(*run, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert on.code == 0, on.err
    assert on.folder == first.folder
    assert "resuming after step 40" in on.out
    assert "epoch 3 " in on.out
    assert "epoch 2 " not in on.out
    whole = run_here(*run, "--trainer.max_epochs", 3, "--name", "whole")
    assert on.checkpoint()["global_step"] == whole.checkpoint()["global_step"] == 60
    assert furthest(on, whole) == 0


def test_last_without_a_run_starts_afresh() -> None:
    result = run_here("fit", *DIGITS, *CSV, "--ckpt_path", "last", "--trainer.max_steps", 2)
    assert result.code == 0, result.err
    assert "training starts afresh" in result.out


@pytest.mark.slow
def test_two_runs_in_a_row_have_folders_of_their_own() -> None:
    runs = [run_here("fit", *DIGITS, "--trainer.max_steps", 3) for _ in range(2)]
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    assert runs[0].folder != runs[1].folder
    for run in runs:
        saved = yaml.safe_load((run.folder / "config.yaml").read_text())
        assert saved["data"]["init_args"]["batch_size"] == 64
        assert saved["trainer"]["max_steps"] == 3
        assert len(list(run.folder.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_the_saved_configuration_gives_the_same_run() -> None:
    first = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 2)
    second = run_here("fit", "--config", first.folder / "config.yaml")
    assert second.code == 0, second.err
    assert second.folder != first.folder
    assert furthest(first, second) == 0


@pytest.mark.parametrize("command", [("test", "--ckpt_path", "best"), ("export", "--ckpt_path", "best"), ("inspect",)])
def test_each_command_takes_the_saved_configuration(trained: Result, command: tuple) -> None:
    done = run_here(*command, "--config", trained.folder / "config.yaml")
    assert done.code == 0, done.err


def test_the_offline_wandb_file_holds_everything(trained: Result) -> None:
    path = sorted(trained.folder.glob("wandb/offline-run-*/*.wandb"))[0]
    config, history = {}, []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "config":
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.config.update}
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert config["plan"]["batch_size"] == 64
    assert config["plan"]["total_steps"] == 400
    assert config["config"]["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.003
    rows = [row for row in history if "train/loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(10, 401, 10))
    assert rows[-1]["train/loss"] < 0.7 < rows[0]["train/loss"]
    assert rows[-1]["examples"] == 20 * 1259
    for name in ("gradient_norm", "examples_per_second", "peak_memory_mib", "learning_rate"):
        assert all(row[name] > 0 for row in rows), name
    assert len([row for row in history if "val/accuracy" in row]) == 20
    (picture,) = [row for row in history if "val/predictions/filenames" in row]
    drawn = path.parent / "files" / picture["val/predictions/filenames"][0]
    assert drawn.read_bytes()[:4] == b"\x89PNG"
    assert f"{path.parent.relative_to(root(trained))}" in trained.out.split("wandb sync")[1]


def test_checkpoints_hold_plain_types(trained: Result) -> None:
    for name in ("best", "last", "previous"):
        checkpoint = trained.checkpoint(name)  # read with weights_only=True
        assert checkpoint["config"]["model"]["class_path"] == "batchwise.tasks.classification.Classification"
        assert all(isinstance(value, torch.Tensor) for value in checkpoint["state_dict"].values())


@pytest.mark.slow
def test_bf16_trains_on_a_cpu() -> None:
    result = run_here("fit", *DIGITS, *CSV, *BF16, "--trainer.max_epochs", 5)
    assert result.code == 0, result.err
    accuracy = result.rows("val/accuracy")
    assert accuracy[max(accuracy)] > 0.93


ORDERS = {
    "order.Sequential": "",
    "sampling.Stratified": "",
    "sampling.Balanced": "",
    "sampling.Weighted": ", init_args: {weights: [1, 1, 1, 1, 1, 2, 2, 2, 2, 2]}",
    "order.Repeated": ", init_args: {k: 2}",
}


@pytest.mark.parametrize(("name", "settings"), ORDERS.items(), ids=ORDERS.keys())
@pytest.mark.slow
def test_every_order_trains(name: str, settings: str) -> None:
    order = f"{{class_path: batchwise.batching.{name}{settings}}}"
    result = run_here("fit", *DIGITS, *CSV, "--data.order", order, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert f"examples  {2 * 1259 if name == 'order.Repeated' else 1259:,}" in result.out
    accuracy = result.rows("val/accuracy")
    assert accuracy[max(accuracy)] > 0.85
