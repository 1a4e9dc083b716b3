"""One folder for all processes of a training, whoever starts them."""

import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import CSV, DIGITS, ROOT, Result, Started, absolute, furthest, run_here
from lightning.pytorch.callbacks import ModelCheckpoint

from batchwise.data.module import LIMIT_FILE
from batchwise.run.folders import check_name, choose_folder
from batchwise.run.lock import alone
from batchwise.run.record import RunRecord
from batchwise.run.usual import usual_callbacks

FIT = (
    *("fit", *DIGITS, *CSV, "--trainer.precision", "64-true", "--data.batch_size", 100),
    *("--model.schedule", "{shape: constant, warmup_examples: 600}"),
)
LAST = "[{class_path: batchwise.callbacks.checkpoint.Last, init_args: {every_n_steps: 4}}]"


def under_slurm(step: int, *arguments: object, **environment: str) -> list[Started]:
    """Two tasks of a step of a job, as `srun` starts them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    job = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": str(step), "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    settings = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.callbacks", LAST)
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (1, 0)]
    return [Started(*FIT, *settings, *arguments, **(job | rank | environment)) for rank in ranks]


@pytest.mark.slow
def test_another_process_does_not_outlive_a_mistake_that_the_first_one_finds() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    settings = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--model.network.in_features", 5)
    command = [*launch, "-m", "batchwise", *absolute((*FIT, *settings))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.count("error: ") == 1
    assert "closing signal SIGTERM" in done.stderr
    assert "SIGKILL" not in done.stderr  # which torchrun sends to those that are still there after 30 seconds


TASKS = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "4", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
TASKS |= {"SLURM_LOCALID": "0", "SLURM_STEP_ID": "0", "SLURM_NODELIST": "localhost"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
TORCHRUN |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (TORCHRUN, "4 processes, 2 on each machine: write --trainer.devices 2 --trainer.num_nodes 2"),
        (
            TASKS | {"SLURM_NTASKS_PER_NODE": "4"},
            ", 4 on each machine: write --trainer.devices 4 --trainer.num_nodes 1",
        ),
        (TASKS, "trainer: You set `--ntasks=4` .* Use `--ntasks-per-node=4` instead"),
    ],
)
def test_another_number_of_processes_than_of_devices(
    variables: dict, words: str, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run_here(*FIT, "--trainer.devices", devices)
    assert result.code == 2
    assert re.fullmatch(f"error: .*{words}.*\n", result.err)
    assert not list(Path("runs").iterdir())


@pytest.mark.slow
def test_the_script_for_torchrun_ends_with_one_line_about_a_wrong_value() -> None:
    script = [ROOT / "scripts" / "torchrun.sh", *absolute(DIGITS), "--data.batch_size", "abc"]
    done = subprocess.run(
        ["bash", *script], capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: data.batch_size is abc: write a whole number of at least 1\n"


@pytest.mark.slow
def test_slurm_stops_requeues_and_goes_on_in_one_folder(tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    path = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    tasks = under_slurm(0, "--ckpt_path", "last", "--trainer.max_epochs", 2000, **path)
    deadline = time.monotonic() + 90
    while not list(Path("runs").glob("digits/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for task in tasks:
        os.kill(task.process.pid, signal.SIGUSR1)
    ends = [task.end(60) for task in tasks]
    assert [end.code for end in ends] == [143, 143], ends[0].err + ends[1].err
    said = "".join(end.err for end in ends)
    assert said.count("stopped by a signal after step") == 1  # by one for all
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    (folder,) = Path("runs/digits").iterdir()  # and no note beside it
    first = Result(0, f"run folder: {folder}", "")
    done = first.checkpoint()["global_step"]
    ends = [task.end(90) for task in under_slurm(1, "--ckpt_path", "last", "--trainer.max_steps", done + 5)]
    assert [end.code for end in ends] == [0, 0], ends[0].err + ends[1].err
    assert list(Path("runs/digits").iterdir()) == [folder]
    whole = run_here(*FIT, "--trainer.max_steps", done + 5, "--name", "whole")
    assert first.checkpoint()["global_step"] == done + 5
    assert furthest(first, whole) < 1e-12


def test_a_task_whose_first_task_makes_no_folder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchwise.run import folders as runs

    monkeypatch.setattr(runs, "PATIENCE", 0.1)
    monkeypatch.setattr(runs.rank_zero_only, "rank", 1)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(
        ValueError, match=r"process 0 has made no folder in .*write a trainer.default_root_dir that all"
    ):
        runs.wait_for_folder(Path("runs/digits"))


@pytest.mark.slow
def test_a_trial_keeps_nothing() -> None:
    first = run_here("fit", *DIGITS, *CSV, "--trainer.max_steps", 3)
    predicted = run_here("predict", *DIGITS, *CSV, "--ckpt_path", "last")
    assert predicted.code == 0, predicted.err
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert first.folder / "predictions.csv" in {path.absolute() for path in before}
    trial = run_here("fit", *DIGITS, "--trainer.fast_dev_run", "true")
    assert trial.code == 0, trial.err
    assert "trainer.fast_dev_run: a trial, of which nothing is kept" in trial.out
    assert "go on:" not in trial.out
    assert "run folder:" not in trial.out
    for file in ("predictions.csv", first.folder / "predictions.csv"):
        more = ("--ckpt_path", "last", "--trainer.fast_dev_run", 1, "--predictions", file)
        assert run_here("predict", *DIGITS, *CSV, *more).code == 0
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before
    assert len(list(Path("runs/digits").iterdir())) == 1
    assert run_here("fit", *DIGITS, *CSV, "--trainer.max_steps", 4, "--ckpt_path", "last").code == 0


@pytest.mark.slow
def test_a_run_is_trained_by_one_at_a_time() -> None:
    """After `kill -9` the lock is free at once, though the workers that read the data live on for a while."""
    fit = ("fit", *DIGITS, *CSV, "--data.num_workers", 1)
    first = run_here(*fit, "--trainer.max_steps", 3)
    process = Started(*fit, "--ckpt_path", "last", "--trainer.max_epochs", 100_000)
    try:
        process.until("epoch 2 ")
        config = (first.folder / "config.yaml").stat().st_mtime_ns
        second = run_here(*fit, "--ckpt_path", "last", "--trainer.max_epochs", 3)
        assert second.code == 2, second.out + second.err
        (line,) = second.err.splitlines()
        assert f"{first.folder.name}, where process {process.process.pid} on " in line
        assert "leave ckpt_path out to begin a new run" in line
        assert (first.folder / "config.yaml").stat().st_mtime_ns == config
        assert run_here("test", *DIGITS, *CSV, "--ckpt_path", "last").code == 0
        os.kill(process.process.pid, signal.SIGKILL)
        process.process.wait(10)
        third = run_here(*fit, "--ckpt_path", "last", "--trainer.max_epochs", 100, "--trainer.max_steps", 30)
        assert third.code == 0, third.err
        assert third.folder == first.folder
        assert not list(third.folder.glob("checkpoints/.lock"))
    finally:
        process.kill()


def test_where_there_are_no_locks_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    Path("run/checkpoints").mkdir(parents=True)
    with alone(Path("run")), alone(Path("run")):
        pass


@pytest.mark.parametrize(
    "arguments", [(), ("--trainer.enable_checkpointing", "false")], ids=["", "without checkpoints"]
)
def test_sigterm_before_training_ends_with_143(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(RunRecord, "setup", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    result = run_here(*FIT, *arguments, "--trainer.logger", "false")
    assert (result.code, result.err.splitlines()) == (143, ["error: interrupted"])
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(Path("runs").glob("*"))  # nothing was begun


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_on_two_devices(tmp_path: Path) -> None:
    """Lightning's handlers wait for each other, and end with 0 where there is one process."""
    (tmp_path / "slow_val.py").write_text(
        "import time\nfrom lightning.pytorch.callbacks import Callback\n"
        "class Slow(Callback):\n    def on_validation_batch_start(self, *_):\n"
        "        print('asleep', flush=True)\n        time.sleep(2)\n"
    )
    assert run_here(*FIT, "--trainer.max_steps", 2).code == 0
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    two = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--trainer.callbacks+", "slow_val.Slow")
    for devices in (two[4:], two):
        process = Started("validate", *FIT[1:], *devices, "--ckpt_path", "last", PYTHONPATH=path, OMP_NUM_THREADS="1")
        try:
            process.until("asleep")
            os.killpg(process.process.pid, signal.SIGTERM)
            result = process.end(timeout=30)
        finally:
            if process.process.poll() is None:
                process.kill()
        assert result.code == 143, result.err
        assert "Traceback" not in result.err


def test_what_is_refused_or_tried_leaves_no_folder() -> None:
    assert run_here(*FIT, "--trainer.fast_dev_run", "true").code == 0
    assert not list(Path("runs").glob("*"))
    assert run_here(*FIT, "--data.batch_size", "0").code == 2
    assert run_here("sweep", *FIT[1:], "--batch_sizes", "8", "--target", "x").code == 2
    assert not list(Path("runs").glob("*"))


def test_the_folder_of_a_limit_stays_whole() -> None:
    """A restart that is refused must not take away what the next one needs."""
    folder = Path("runs/digits/2026-01-01_00-00-00")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    (folder / LIMIT_FILE).write_text("50")
    assert run_here(*FIT, "--ckpt_path", "last", "--data.batch_size", 10**9, "--data.drop_last", "true").code == 2
    result = run_here(*FIT, "--ckpt_path", "last", "--trainer.max_steps", 1)
    assert (result.code, result.folder) == (0, folder.absolute()), result.err


@pytest.mark.parametrize("name", ["a\nb", "nul\0", "../up", "/root", ""])
def test_names_that_are_no_folder(name: str) -> None:
    result = run_here(*FIT, f"--name={name}")
    assert (result.code, len(result.err.splitlines())) == (2, 1)
    assert "write the name of a folder" in result.err


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = run_here(*FIT, "--trainer.max_steps", 1, "--trainer.default_root_dir", "~/all")
    assert result.code == 0, result.err
    (last,) = (tmp_path / "all" / "digits").glob("*/checkpoints/last.ckpt")
    on = run_here(*FIT, "--ckpt_path", f"~/{last.relative_to(tmp_path)}", "--trainer.max_steps", 2)
    assert (on.code, on.folder.absolute()) == (0, last.parent.parent), on.err


def test_a_run_that_was_moved_knows_its_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning forgot the score, and the next checkpoint took the place of the best."""
    result = run_here(*FIT, "--trainer.max_epochs", 2)
    moved = Path("elsewhere").absolute() / result.folder.name
    moved.parent.mkdir()
    result.folder.rename(moved)
    best = torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)
    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", never_better)
    on = run_here(*FIT, "--trainer.max_epochs", 3, "--ckpt_path", moved / "checkpoints" / "last.ckpt")
    assert on.code == 0, on.err
    assert f"{moved}/checkpoints/best.ckpt" in on.out
    assert f"note: training goes on in {moved}, where its checkpoint is, and not in " in on.out
    assert torch.load(moved / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == best["global_step"]


def test_a_run_without_its_best_keeps_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was deleted, or only `last.ckpt` was copied."""
    result = run_here(*FIT, "--trainer.max_epochs", 2)
    best = result.folder / "checkpoints" / "best.ckpt"
    best.unlink()
    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", never_better)
    on = run_here(*FIT, "--trainer.max_epochs", 3, "--ckpt_path", "last")
    assert on.code == 0, on.err
    assert on.checkpoint("best")["global_step"] == on.checkpoint()["global_step"]


@pytest.mark.parametrize("lost", [0, 1])
def test_of_several_best_ones_those_that_are_there_are_known(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as another was deleted, the one of the next epoch takes its place."""
    keep = "[{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val/loss, save_top_k: 2}}]"
    fit = (*FIT, "--trainer.callbacks", keep, "--trainer.max_epochs")
    result = run_here(*fit, 2)
    kept = sorted((result.folder / "checkpoints").glob("epoch=*.ckpt"))
    kept[lost].unlink()
    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", never_better)
    on = run_here(*fit, 3, "--ckpt_path", "last")
    assert on.code == 0, on.err
    (state,) = (one for key, one in on.checkpoint()["callbacks"].items() if "val/loss" in key)
    known = sorted(Path(path).name for path in state["best_k_models"])
    assert known == sorted(path.name for path in kept[0].parent.glob("epoch=*.ckpt"))
    assert [name[:7] for name in known] == [f"epoch={1 - lost}", "epoch=2"]


def never_better(self: ModelCheckpoint, _: object, current: torch.Tensor | None = None) -> bool:
    """Stands in for `check_monitor_top_k`: values are worse than those that are known."""
    return current is not None and len(self.best_k_models) < self.save_top_k


@pytest.mark.parametrize("mode", ["min", "max"])
def test_only_a_finite_value_is_the_best(mode: str) -> None:
    best = ModelCheckpoint(monitor="x", mode=mode)
    usual_callbacks(None, [best], False, Path())  # type: ignore[arg-type]
    for value in (math.nan, math.inf, -math.inf):
        assert not best.check_monitor_top_k(None, torch.tensor(value))  # type: ignore[arg-type]
    assert best.check_monitor_top_k(None, torch.tensor(0.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [".", "", "a/../b", "/tmp/a", "a\nb"])
def test_a_name_that_is_no_folder_in_the_root(name: str) -> None:
    with pytest.raises(ValueError, match="write the name of a folder that is to lie in runs"):
        check_name(name, Path("runs"))


def test_a_name_that_is_too_long() -> None:
    with pytest.raises(ValueError, match=r"File name too long.*: write another name or trainer.default_root_dir"):
        choose_folder(Path("runs"), "x" * 300, None, restart=False)
