"""The commands that a training prints at its end work as they are pasted, however it was configured."""

import errno
import os
import shlex
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from helpers import CSV, DIGITS, TWO, run_here, run_process
from torch.nn import functional as F

from batchwise.batching.fetch import DataError
from batchwise.run.report import failure
from batchwise.tasks.measures import MetricError

FREEZES = """
from lightning.pytorch.callbacks import Callback

class Freeze(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        next(pl_module.network.parameters()).requires_grad_(trainer.current_epoch != 1)

class FreezeLast(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        next(pl_module.network.parameters()).requires_grad_(trainer.global_step < trainer.max_steps - 1)
"""

DIGITS_FILE, LOG = DIGITS[1], (*CSV[:2], "--config", "short.yaml")
WAYS: dict[str, tuple[object, ...]] = {
    "one file": (*DIGITS, *LOG),
    "flags over a file": (*DIGITS, *LOG, "--model.network.hidden_features", "[32]", "--data.batch_size", 32),
    "a name and a folder with spaces": (*DIGITS, *LOG, "--name", "my run", "--trainer.default_root_dir", "all runs"),
    "a file with spaces": ("--config", "my digits.yaml", *LOG),
    "= and -c": (f"--config={DIGITS_FILE}", *CSV[:2], "-c", "short.yaml"),
    "by steps": (*DIGITS, *LOG, "--trainer.max_epochs", -1, "--trainer.max_steps", 30),
    "other classes": (*DIGITS, *LOG, "--model.optimizer", "SGD", "--model.optimizer.lr", 0.1),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.weekly
def test_what_is_printed_can_be_pasted(way: str) -> None:
    Path("my digits.yaml").write_text(Path(DIGITS_FILE).read_text())
    Path("short.yaml").write_text(
        yaml.safe_dump({"trainer": {"max_epochs": 1}, "data": {"init_args": {"batch_size": 99}}})
    )
    first = run_here("fit", *WAYS[way])
    assert first.code == 0, first.err
    lines = dict(line.split(":", 1) for line in first.out.splitlines() if line.startswith(("test it:", "go on:")))
    assert lines.keys() == {"test it", "go on"}
    for line in lines.values():
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"]
        result = run_here(*words[3:])
        assert result.code == 0, f"{line}\n{result.err}"
        assert "test/accuracy" in result.out or "resuming after step" in result.out


@pytest.mark.slow
def test_of_several_machines_one_prints_the_plan() -> None:
    ways = ("--trainer.num_nodes", 2, "--trainer.strategy", "ddp", "--trainer.max_epochs", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}

    def machine(rank: int) -> str:
        done = run_process("fit", *DIGITS, *CSV, *ways, RANK=str(rank), NODE_RANK=str(rank), **meeting)
        assert done.code == 0, done.err
        return done.out

    with ThreadPoolExecutor() as machines:
        first, second = machines.map(machine, range(2))
    assert "total_steps" in first
    assert second == ""


@pytest.mark.weekly
def test_a_parameter_that_is_frozen_in_training_on_two_devices() -> None:
    Path("freezes.py").write_text(FREEZES)
    fit = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 3, "--trainer.callbacks", "freezes.Freeze", *TWO)
    path = f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"
    result = run_process(*fit, PYTHONPATH=path)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line and not line.startswith(("note:", "warning:"))]
    assert line.startswith("error: a parameter that had a gradient has none any more")
    assert line.endswith("write trainer.strategy ddp_find_unused_parameters_true")
    whole = run_process(*fit, "--trainer.strategy", "ddp_find_unused_parameters_true", PYTHONPATH=path)
    assert whole.code == 0, whole.err


@pytest.mark.slow
def test_no_step_is_made_where_gradients_of_two_devices_are_not_added_up() -> None:
    Path("freezes.py").write_text(FREEZES)
    fit = ("fit", *DIGITS, *CSV, "--trainer.max_steps", 3, "--trainer.callbacks", "freezes.FreezeLast", *TWO)
    result = run_process(*fit, PYTHONPATH=f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}")
    assert result.code == 1, result.out
    assert "error: a parameter that had a gradient has none any more" in result.err


@pytest.mark.parametrize(("label", "remedy"), [(7, "write num_classes 8"), (-1, "number the classes from 0")])
def test_a_label_that_is_no_class_and_is_read_in_training(
    label: int, remedy: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(IndexError) as raised:
        F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, label]))
    assert failure(raised.value) == 1
    line = f"error: label {label}, but the losses have other classes: {remedy}, or correct it\n"
    assert capsys.readouterr().err == line
    assert failure(IndexError("list index out of range")) is None


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("step 3: no room (x): the same command with --ckpt_path last goes on with 16", "step 3: no room (x)"),
        ("lower data.num_workers; --ckpt_path last goes on from the last checkpoint", "lower data.num_workers"),
        ("no shard (x): --ckpt_path last goes on once it can be; data.patience is", "no shard (x); data.patience is"),
    ],
)
def test_only_fit_goes_on_from_a_checkpoint(line: str, left: str, capsys: pytest.CaptureFixture) -> None:
    assert [failure(DataError(line), verb=verb) for verb in ("fit", "tune")] == [1, 1]
    assert capsys.readouterr().err == f"error: {line}\nerror: {left}\n"


def test_a_file_that_cannot_be_written_stops_training_only_in_fit(capsys: pytest.CaptureFixture) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x/predictions.csv")
    assert [failure(full, Path("runs/x"), verb) for verb in ("predict", "fit")] == [1, 1]
    line = "error: cannot write runs/x/predictions.csv (No space left on device)"
    assert capsys.readouterr().err == f"{line}\n{line}: training has stopped; no checkpoint is left\n"


def test_what_the_metrics_cannot_take_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert failure(MetricError("the metrics of make_metrics cannot take it")) == 1
    assert capsys.readouterr().err == "error: the metrics of make_metrics cannot take it\n"
