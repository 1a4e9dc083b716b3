"""Checkpoints are never torn, and training resumes from them as if it had not stopped."""

import contextlib
import csv
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import small
import torch
from helpers import CSV, DIGITS, TWO, Result, Started, absolute, furthest, run_here
from lightning.pytorch.callbacks import ModelCheckpoint

import batchwise
from batchwise.batching.schedule import Milestones
from batchwise.callbacks.checkpoint import SIGNALS, Last
from batchwise.checkpoints import DurableIO
from batchwise.errors import TrainingStopped

# 20 steps per epoch. The rate does not depend on the length of training, so that parts of one can be run.
FIT = (
    *("fit", *DIGITS, *CSV, "--model.network.hidden_features", "[32]"),
    *("--model.schedule", "{shape: constant, warmup_examples: 600}"),
)
RESUME = ("--ckpt_path", "last")


def errors(result: Result) -> list[str]:
    return [line for line in result.err.splitlines() if not line.startswith(("note:", "warning:"))]


def wait_for_epochs(process: Started) -> None:
    """Wait until two are trained."""
    deadline = time.monotonic() + 60
    while not re.search(r"^epoch 2 ", process.out, re.MULTILINE):
        trains = process.process.poll() is None and time.monotonic() < deadline
        assert trains, process.out + process.err
        time.sleep(0.01)


# Writing


def half_written(checkpoint: Any, file: Any) -> None:
    file.write(b"PK\3\4 half of it")
    raise OSError(28, "No space left on device")


def half_written_by_torch(checkpoint: Any, file: Any) -> None:
    """As torch's own writer fails: its error is raised while that of the file is handled."""
    try:
        half_written(checkpoint, file)
    finally:
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 384 vs 278\nframe #0: ...")


@pytest.mark.parametrize("fail", [half_written, half_written_by_torch])
def test_a_failed_write_keeps_the_file_before(monkeypatch: pytest.MonkeyPatch, fail: Callable) -> None:
    path = Path("checkpoints/last.ckpt").absolute()
    DurableIO().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainingStopped) as stopped:
        DurableIO().save_checkpoint({"step": 2}, path)
    assert str(stopped.value) == (
        f"cannot write the checkpoint {path}: [Errno 28] No space left on device; the one before it is whole: {path}"
    )
    assert stopped.value.code == 1
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    other = path.with_name("other.ckpt")
    with pytest.raises(TrainingStopped) as stopped:
        DurableIO().save_checkpoint({"step": 2}, other)
    assert str(stopped.value) == f"cannot write the checkpoint {other}: [Errno 28] No space left on device"


def test_a_write_replaces_the_file_and_makes_the_folder() -> None:
    path = Path("new/folder/last.ckpt")
    for step in (1, 2):
        DurableIO().save_checkpoint({"step": step}, path)
        assert torch.load(path, weights_only=True) == {"step": step}
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_a_file_in_the_place_of_the_folder() -> None:
    Path("checkpoints").write_text("")
    with pytest.raises(TrainingStopped, match=r"cannot write the checkpoint checkpoints/last.ckpt: .*File exists"):
        DurableIO().save_checkpoint({}, Path("checkpoints/last.ckpt"))


@pytest.mark.slow
def test_a_full_disk() -> None:
    """A limit on the size of a file stands for it."""
    first = run_here(*FIT, "--trainer.max_epochs", 1)
    assert first.code == 0, first.err
    folder = first.folder / "checkpoints"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    size = len(before["last.ckpt"]) // 2
    process = Started(*FIT, *RESUME, "--trainer.max_epochs", 4)
    resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (size, size))
    result = process.end(timeout=60)
    assert result.code == 1, result.out + result.err
    (line,) = errors(result)
    assert line.startswith(f"error: cannot write the checkpoint {folder.relative_to(Path.cwd())}")
    assert "File too large" in line
    assert "is whole: " in line
    for name in ("last.ckpt", "best.ckpt"):
        assert (folder / name).read_bytes() == before[name]
    assert not list(folder.glob(".*.part"))
    on = run_here(*FIT, *RESUME, "--trainer.max_epochs", 2)
    assert on.code == 0, on.err
    assert on.checkpoint()["global_step"] == 40


@pytest.mark.parametrize("what", ["the log is deleted", "the run is deleted", "no room for the log"])
@pytest.mark.slow
def test_a_log_that_cannot_be_written_is_one_line(what: str) -> None:
    process = Started(*FIT, "--trainer.log_every_n_steps", 1, "--trainer.max_epochs", 100_000)
    if what == "no room for the log":
        resource.prlimit(process.process.pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    else:
        wait_for_epochs(process)
        (folder,) = Path("runs/digits").iterdir()
        shutil.rmtree(folder / "log" if "log" in what else folder, ignore_errors=True)
    result = process.end(timeout=60)
    assert result.code == 1, result.err
    (line,) = errors(result)
    full = r"the log of runs/digits/[^/]* \(File too large\)"
    deleted = r"\S*/log/version_0/metrics.csv \(No such file or directory\)"
    assert re.match(f"error: cannot write {full if 'room' in what else deleted}: training has stopped; ", line)
    if "run" not in what:
        (last,) = Path("runs/digits").glob("*/checkpoints/last.ckpt")
        assert line.endswith(f"the same command with --ckpt_path last goes on from {last}")
        on = run_here(*FIT, *RESUME, "--trainer.max_epochs", 100_000, "--trainer.max_steps", step_of(last))
        assert on.code == 0, on.err


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"] + 1


# Reading


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def invert(path: Path) -> None:
    """Invert 64 bytes in the middle."""
    content = bytearray(path.read_bytes())
    half = slice(len(content) // 2, len(content) // 2 + 64)
    content[half] = bytes(byte ^ 255 for byte in content[half])
    path.write_bytes(content)


@pytest.mark.parametrize(("lost", "taken"), [(["last"], "previous"), (["last", "previous"], "best")], ids=str)
@pytest.mark.slow
def test_what_cannot_be_read_is_passed_over(lost: list[str], taken: str) -> None:
    first = run_here(*FIT, "--trainer.max_epochs", 2)
    steps = {name: first.checkpoint(name)["global_step"] for name in ("last", "previous", "best")}
    assert steps == {"last": 40, "previous": 20, "best": 40}
    folder = first.folder / "checkpoints"
    for name in lost:
        truncate(folder / f"{name}.ckpt")
    result = run_here(*FIT, *RESUME, "--trainer.max_epochs", 3)
    assert result.code == 0, result.err
    relative = folder.relative_to(Path.cwd())
    said = [line for line in result.out.splitlines() if "cannot be read" in line]
    assert len(said) == len(lost)
    for line, name in zip(said, lost, strict=True):
        assert line.startswith(f"{relative / name}.ckpt cannot be read (")
        assert line.endswith("): trying the one before it")
    assert f"resuming after step {steps[taken]} from {relative / taken}.ckpt" in result.out
    assert result.folder == first.folder
    assert list(epochs(result)) == list(range(steps[taken] // 20 + 1, 4))
    whole = run_here(*FIT, "--trainer.max_epochs", 3, "--name", "whole")
    assert result.checkpoint()["global_step"] == 60
    assert furthest(result, whole) == 0


@pytest.mark.slow
def test_an_unreadable_last_does_not_take_the_place_of_a_readable_previous(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the next write fail too, nothing would be left."""
    first = run_here(*FIT, "--trainer.max_epochs", 2)
    folder = first.folder / "checkpoints"
    truncate(folder / "last.ckpt")
    (folder / "best.ckpt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        result = run_here(*FIT, *RESUME, "--trainer.max_steps", 23, "--trainer.limit_val_batches", 0)
    assert result.code == 1
    assert "cannot write the checkpoint" in errors(result)[0]
    on = run_here(*FIT, *RESUME, "--trainer.max_epochs", 2)
    assert "resuming after step 20 " in on.out


@pytest.mark.slow
def test_a_damaged_checkpoint_is_not_loaded() -> None:
    """PyTorch loads it, with wrong weights."""
    first = run_here(*FIT, "--trainer.max_epochs", 2)
    last = first.folder / "checkpoints" / "last.ckpt"
    invert(last)
    assert torch.load(last, weights_only=True)["global_step"] == 40
    for command in ("fit", "test"):
        named = run_here(command, *FIT[1:], "--ckpt_path", last)
        assert named.code == 2
        (line,) = errors(named)
        assert line.startswith(f"error: ckpt_path {last} is damaged: the checksum of ")
        assert line.endswith(": write last, best or another file")
    with pytest.raises(ValueError, match="the checksum of"):
        batchwise.load(last)
    result = run_here(*FIT, *RESUME, "--trainer.max_epochs", 2)
    assert result.code == 0, result.err
    assert "last.ckpt cannot be read (the checksum of archive/data" in result.out
    assert "resuming after step 20 from" in result.out
    assert first.checkpoint("previous")["global_step"] == 20  # the damaged one has not taken its place


@pytest.mark.slow
def test_a_run_without_a_readable_checkpoint_is_passed_over() -> None:
    first = run_here(*FIT, "--trainer.max_steps", 3)
    second = run_here(*FIT, "--trainer.max_steps", 5)
    for path in (second.folder / "checkpoints").iterdir():
        path.write_bytes(b"")
    result = run_here(*FIT, *RESUME, "--trainer.max_steps", 6)
    assert result.code == 0, result.err
    assert result.folder == first.folder
    assert "resuming after step 3 " in result.out


# Signals


def signalled(process: Started, number: int, whom: Callable[[], int]) -> Result:
    """Wait until it trains, send the signal, wait for its end."""
    try:
        wait_for_epochs(process)
        time.sleep(0.05)  # into an epoch
        os.kill(whom(), number)
        return process.end(timeout=30)
    finally:
        if process.process.poll() is None:
            process.kill()


def child(pid: int) -> int:
    """Return the other rank: the one child process that runs the project."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    (rank,) = [int(one) for one in children if b"batchwise" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return rank


@pytest.mark.parametrize(
    ("number", "devices"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.weekly),
        (signal.SIGINT, 1),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.weekly),
    ],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C", "SIGTERM to the second of two processes"],
)
@pytest.mark.slow
def test_a_signal_saves_and_stops(number: int, devices: int) -> None:
    double = ("--trainer.precision", "64-true")
    arguments = (*FIT, *double, "--trainer.max_epochs", 100000, *(TWO if devices == 2 else ()))
    process = Started(*arguments, fresh=devices == 2, OMP_NUM_THREADS="1")
    leader = process.process.pid
    result = signalled(process, number, lambda: child(leader) if devices == 2 else leader)
    assert result.code == (130 if number == signal.SIGINT else 143), result.err
    lines = errors(result)
    if number == signal.SIGINT:
        lines = [line for line in lines if line]
        assert lines.pop(0) == "stopping after this step, to save; Ctrl-C again stops at once, without saving"
    found = re.fullmatch(
        r"error: stopped by a signal after step ([\d,]+); saved, and the same command with --ckpt_path last goes on",
        lines[0],
    )
    assert found, result.err
    step = int(found[1].replace(",", ""))
    (folder,) = Path("runs/digits").iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
    end = step + 25
    on = run_here(*FIT, *double, *RESUME, "--trainer.max_steps", end)
    assert on.code == 0, on.err
    assert f"resuming after step {step} " in on.out.replace(",", "")
    whole = run_here(*FIT, *double, "--trainer.max_steps", end, "--name", "whole")
    # Two processes sum in another order than one.
    assert furthest(on, whole) == 0 if devices == 1 else furthest(on, whole) < 1e-9
    assert len(lines) == 1, result.err


IN_A_TERMINAL = """
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("batchwise", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "until", "code"),
    [(FIT, b"epoch 2 ", 129), (("tune", *FIT[1:], "--budget", 9), b"fits, what is fast", 129), (FIT, b"epoch 2 ", 0)],
    ids=["fit", "tune", "fit under nohup"],
)
def test_a_closed_terminal(command: tuple, until: bytes, code: int) -> None:
    """A line that is written there afterwards is an error, which must not end training before it has saved."""
    ours, theirs = pty.openpty()
    nohup = code == 0
    start = ("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" if nohup else "") + IN_A_TERMINAL
    arguments = (*command, "--trainer.max_epochs", 50 if nohup else 100_000)
    with open("log", "wb") as log:
        output = log if nohup else theirs
        process = subprocess.Popen(
            [sys.executable, "-c", start, *absolute(arguments)],
            stdin=theirs,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 90
    while until not in seen and time.monotonic() < deadline:
        seen = Path("log").read_bytes() if nohup else seen + os.read(ours, 2**12)
    os.close(ours)
    try:
        assert process.wait(60) == code, seen.decode()
    finally:
        process.kill()
    if command == FIT:
        (folder,) = Path("runs/digits").iterdir()
        step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
        assert step == 1_000 if nohup else step >= 20
        assert not (folder / "checkpoints" / ".lock").exists()
    else:
        assert not list(Path().glob("runs/digits/*"))


@pytest.mark.weekly
def test_processes_end_with_the_one_that_started_them() -> None:
    """The second process is killed with the first, wherever it is: here, while it imports."""
    process = Started(*FIT, *TWO, "--trainer.max_epochs", 100000, fresh=True, OMP_NUM_THREADS="1")
    leader, deadline = process.process.pid, time.monotonic() + 60
    while True:
        with contextlib.suppress(ValueError):  # there is none yet
            rank = child(leader)
            break
        assert time.monotonic() < deadline, process.out + process.err
        time.sleep(0.01)
    process.process.kill()
    process.process.wait()
    begun = time.monotonic()
    while Path(f"/proc/{rank}").exists() and "zombie" not in Path(f"/proc/{rank}/status").read_text():
        assert time.monotonic() - begun < 5
        time.sleep(0.01)


# Resume


def table(result: Result, column: str) -> list[tuple[int, float]]:
    """All values of a column, in the order in which they were written, also where a step has two."""
    values = []
    for path in sorted(result.folder.glob("log/version_*/metrics.csv")):
        with path.open() as file:
            values += [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    return values


def best(result: Result) -> dict[str, Any]:
    callbacks = result.checkpoint()["callbacks"]
    (state,) = [state for name, state in callbacks.items() if name.startswith("ModelCheckpoint")]
    return {"score": float(state["best_model_score"]), "path": Path(state["best_model_path"]).name}


def epochs(result: Result) -> dict[int, str]:
    return {int(number): line for line, number in re.findall(r"^(epoch (\d+) .*)$", result.out, re.MULTILINE)}


@pytest.fixture(scope="module", params=[1.0, 0.5], ids=["validation at epochs' ends", "validation twice an epoch"])
def uninterrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple, Result]:
    settings = ("--trainer.val_check_interval", request.param)
    root = tmp_path_factory.mktemp("uninterrupted")
    result = run_here(*FIT, *settings, "--trainer.max_steps", 47, "--trainer.default_root_dir", root)
    assert result.code == 0, result.err
    assert [step for step, _ in table(result, "val/loss")] == ([20, 40] if request.param == 1 else [10, 20, 30, 40])
    assert [step for step, _ in table(result, "train/loss")] == list(range(1, 48))
    return settings, result


MORE_STOPS = [pytest.param(stops, marks=pytest.mark.weekly) for stops in ((7,), (10,), (21,), (20, 40, 41))]


@pytest.mark.parametrize("stops", [(19,), (20,), (5, 10, 33), *MORE_STOPS], ids=str)
@pytest.mark.slow
def test_stopping_changes_nothing(uninterrupted: tuple[tuple, Result], stops: tuple[int, ...]) -> None:
    settings, whole = uninterrupted
    parts = []
    for stop in (*stops, 47):
        result = run_here(*FIT, *settings, "--trainer.max_steps", stop, *(RESUME if parts else ()))
        assert result.code == 0, result.err
        assert result.checkpoint()["global_step"] == stop
        parts.append(result)
    split = parts[-1]
    assert split.folder == parts[0].folder
    assert furthest(split, whole) == 0
    state, other = split.checkpoint()["optimizer_states"][0], whole.checkpoint()["optimizer_states"][0]
    assert all(
        torch.equal(state["state"][i][name], other["state"][i][name])
        for i in other["state"]
        for name in other["state"][i]
    )
    for column in ("train/loss", "learning_rate", "gradient_norm", "val/loss", "val/accuracy", "examples", "epoch"):
        assert table(split, column) == table(whole, column), column
    # Where a part ends within an epoch, the mean so far is given too.
    means = [row for row in table(split, "train/loss_epoch") if row[0] not in stops or row[0] % 20 == 0]
    assert [step for step, _ in means] == [20, 40, 47]
    assert [mean for _, mean in means] == pytest.approx(
        [mean for _, mean in table(whole, "train/loss_epoch")], abs=1e-12
    )
    assert best(split) == best(whole)
    expected = epochs(whole)
    before = 0
    for stop, part in zip((*stops, 47), parts, strict=True):
        assert list(epochs(part)) == list(range(before // 20 + 1, (stop - 1) // 20 + 2))
        for number, line in epochs(part).items():
            if stop >= number * 20:
                assert line == expected[number]
        before = stop


def test_stopping_by_epochs(uninterrupted: tuple[tuple, Result]) -> None:
    settings, whole = uninterrupted
    first = run_here(*FIT, *settings, "--trainer.max_epochs", 1)
    second = run_here(*FIT, *settings, *RESUME, "--trainer.max_epochs", 2)
    third = run_here(*FIT, *settings, *RESUME, "--trainer.max_epochs", 3, "--trainer.max_steps", 47)
    assert [part.code for part in (first, second, third)] == [0, 0, 0]
    assert furthest(third, whole) == 0
    for column in ("train/loss", "val/loss", "train/loss_epoch"):
        assert table(third, column) == table(whole, column)
    assert [list(epochs(part)) for part in (first, second, third)] == [[1], [2], [3]]
    assert epochs(second)[2] == epochs(whole)[2]
    assert best(third) == best(whole)


class Crash(pl.Callback):
    """Ends the training within a step, as a crash does."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 9:
            raise InterruptedError


class Shrink(pl.Callback):
    """Changes weights before each step."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.network[0].weight.mul_(0.9)


def crashed(task: Callable[[], Any], every: int | None, *callbacks: Callable[[], pl.Callback]) -> tuple[Any, ...]:
    """Train 14 steps at once, and with a crash; return both tasks, and the rows of both logs."""
    tasks, logs = [], []
    for stops in (False, True):
        logger = small.Memory()
        for ckpt_path in (None, "part/checkpoints/last.ckpt") if stops else (None,):
            settings: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True}
            settings |= {"default_root_dir": "part" if stops else "whole", "max_epochs": 2}
            own = [Last(every), *(make() for make in callbacks), *([Crash()] if stops and not ckpt_path else [])]
            with contextlib.suppress(InterruptedError):
                made, _ = small.fit(task(), ckpt_path=ckpt_path, callbacks=own, **settings)
        tasks.append(made)
        logs.append(logger)
    return *tasks, *logs


@pytest.mark.parametrize("every", [None, 2])
def test_what_a_callback_changes_before_a_step_is_changed_once(every: int | None) -> None:
    whole, parts, *_ = crashed(lambda: small.Classify(small.network(), optimizer=small.adamw), every, Shrink)
    assert small.furthest(whole, parts) == 0


class Logging(small.Classify):
    def losses(self, batch: Any) -> torch.Tensor:
        losses = super().losses(batch)
        self.log("each", losses, on_step=True, on_epoch=True)
        return losses


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("listener", [None, Shrink])
@pytest.mark.slow
def test_values_of_steps_are_logged_after_a_resume(every: int | None, listener: Any) -> None:
    def task() -> Logging:
        return Logging(small.network(), optimizer=small.adamw)

    _, _, whole, parts = crashed(task, every, *([listener] if listener else []))
    for name in ("each_step", "each_epoch", "train/loss"):
        assert parts.found(name) == whole.found(name), name
    assert list(whole.found("each_step")) == list(range(1, 15))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [3, 7, 10])
def test_what_is_saved_by_hand_after_training_goes_on_where_it_was(steps: int) -> None:
    """When training ends, Lightning counts the epoch of 7 steps as done."""
    whole, _ = small.fit()
    small.fit(max_steps=steps)[1].save_checkpoint("by_hand.ckpt")
    task, trainer = small.fit(ckpt_path="by_hand.ckpt")
    assert (trainer.global_step, trainer.current_epoch) == (21, 3)
    assert small.furthest(task, whole) < 1e-12


def test_a_checkpoint_of_a_step_that_ends_the_epoch_has_no_sums_of_it() -> None:
    saves = ModelCheckpoint("saved", "{step}", every_n_train_steps=7, save_top_k=-1)
    losses, resumed = small.Memory(), small.Memory()
    small.fit(enable_checkpointing=True, callbacks=[saves], logger=losses)
    small.fit(ckpt_path="saved/step=7.ckpt", logger=resumed)
    first, *others = sorted(losses.found("train/loss_epoch").items())
    assert first[0] == 7
    assert sorted(resumed.found("train/loss_epoch").items()) == others


@pytest.mark.parametrize("at_epoch_end", [False, True])
@pytest.mark.parametrize("end", [{}, {"max_epochs": -1, "max_steps": 12}])
def test_an_epoch_that_was_saved_at_its_end_does_not_end_again(end: dict[str, Any], at_epoch_end: bool) -> None:
    """Batches grow, so that the next epoch has fewer steps than the one before it."""

    def train(log: small.Memory, *callbacks: ModelCheckpoint, ckpt_path: str | None = None) -> pl.Trainer:
        data = small.Points(batch_size_schedule=Milestones([20], examples=[70]))
        return small.fit(
            data=data, ckpt_path=ckpt_path, logger=log, enable_checkpointing=True, callbacks=[*callbacks], **end
        )[1]

    whole = small.Memory()
    saves = ModelCheckpoint("saved", "{step}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    trainer = train(whole, saves)
    for step in (7, 11):
        again = train(resumed := small.Memory(), ckpt_path=f"saved/step={step}.ckpt")
        assert (again.global_step, again.current_epoch) == (trainer.global_step, trainer.current_epoch)
        for name in ("train/loss_epoch", "val/loss"):
            assert resumed.found(name) == {at: value for at, value in whole.found(name).items() if at and at > step}


@pytest.mark.slow
def test_resuming_in_double_precision() -> None:
    double = ("--trainer.precision", "64-true")
    whole = run_here(*FIT, *double, "--trainer.max_steps", 9)
    run_here(*FIT, *double, "--trainer.max_steps", 7, "--name", "split")
    split = run_here(*FIT, *double, "--trainer.max_steps", 9, *RESUME, "--name", "split")
    assert split.code == 0, split.err
    assert furthest(split, whole) == 0


@pytest.mark.parametrize("limits", [(20,), (20, 40)], ids=str)
@pytest.mark.slow
def test_steps_added_to_whole_epochs_are_trained(limits: tuple[int, ...]) -> None:
    """Where both limits are given, Lightning takes a finished epoch for an unfinished one."""
    for limit in limits:
        run_here(*FIT, "--trainer.max_steps", limit, *(RESUME if limit > 20 else ()))
    on = run_here(*FIT, *RESUME, "--trainer.max_epochs", 3, "--trainer.max_steps", 60)
    assert on.checkpoint()["global_step"] == 60
    assert list(epochs(on)) == list(range(limits[-1] // 20 + 1, 4))


@pytest.mark.slow
def test_the_best_so_far_is_known_after_a_stop_where_it_was_measured() -> None:
    """The only validation is at step 10, where the first part ends."""
    half = ("--trainer.val_check_interval", 0.5)
    whole = run_here(*FIT, *half, "--trainer.max_steps", 13)
    run_here(*FIT, *half, "--trainer.max_steps", 10, "--name", "split")
    split = run_here(*FIT, *half, "--trainer.max_steps", 13, *RESUME, "--name", "split")
    assert split.code == 0, split.err
    assert [step for step, _ in table(split, "val/loss")] == [10]
    assert best(split) == best(whole)


@pytest.mark.slow
def test_resuming_within_an_epoch_says_nothing_that_is_not_so() -> None:
    """Lightning warns that a loader without a state cannot be resumed; ours is a function of the step."""
    run_here(*FIT, "--trainer.max_steps", 7)
    with pytest.MonkeyPatch.context() as patch:
        import warnings

        said = []
        patch.setattr(warnings, "showwarning", lambda message, *_: said.append(str(message)))
        run_here(*FIT, *RESUME, "--trainer.max_steps", 9)
    assert not [message for message in said if "resum" in message]


@pytest.mark.parametrize("every", [1, 6])
@pytest.mark.slow
def test_saving_every_so_many_steps(every: int) -> None:
    last = f"{{class_path: batchwise.callbacks.checkpoint.Last, init_args: {{every_n_steps: {every}}}}}"
    result = run_here(*FIT, "--trainer.callbacks", f"[{last}]", "--trainer.max_steps", 14)
    assert result.code == 0, result.err
    assert result.checkpoint()["global_step"] == 14
    assert result.checkpoint("previous")["global_step"] == {1: 13, 6: 12}[every]


def test_wrong_interval() -> None:
    last = "{class_path: batchwise.callbacks.checkpoint.Last, init_args: {every_n_steps: 0}}"
    result = run_here(*FIT, "--trainer.callbacks", f"[{last}]")
    assert result.code == 2
    (line,) = errors(result)
    assert "every_n_steps is 0: write a whole number of at least 1" in line


def test_signals_are_as_before_after_training() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    run_here(*FIT, "--trainer.max_steps", 2)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_first_interrupt_of_each_training_saves() -> None:
    last = Last()

    class Interrupts(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):
        with pytest.raises(TrainingStopped, match="stopped by a signal after step 3; saved"):
            small.fit(callbacks=[last, Interrupts()], enable_checkpointing=True)


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom lightning.pytorch.callbacks import Callback\n"
        "class Slow(Callback):\n    def on_train_batch_end(self, trainer, *_):\n"
        "        if trainer.global_step == 30:\n            print('asleep', flush=True)\n            time.sleep(60)\n"
    )
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    process = Started(*FIT, "--trainer.callbacks+", "slow.Slow", "--trainer.max_epochs", 100, PYTHONPATH=path)
    try:
        process.until("asleep")
        for _ in range(2):
            os.kill(process.process.pid, signal.SIGINT)
            time.sleep(0.5)
        begun = time.monotonic()
        result = process.end(timeout=30)
        assert time.monotonic() - begun < 20
    finally:
        if process.process.poll() is None:
            process.kill()
    assert result.code == 130, result.err
    assert errors(result)[-1] == "error: interrupted"
    assert "Traceback" not in result.err
    (folder,) = Path("runs/digits").iterdir()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] < 30
