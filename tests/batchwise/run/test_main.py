"""A command loads quickly, and leaves no trace of how."""

import re
import resource
import subprocess
import sys

import pytest
from helpers import CSV, DIGITS, run_here

from batchwise.run import main

CODE = """
import gc, sys
from batchwise.run.main import _load
run = _load()
assert run is sys.modules["batchwise.run.cli"].run
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert "scipy.signal" not in sys.modules, "what stood in for it is still there"
import scipy.signal
import torchmetrics
assert scipy.signal.convolve([1, 1], [1, 1]).tolist() == [1, 2, 1]
"""
LATER = """
import sys
from batchwise.run.main import _OnDemand
sys.modules["scipy.signal"] = _OnDemand("scipy.signal")
from scipy.signal import convolve  # what another version of torchmetrics might do
assert convolve([1, 1], [1, 1]).tolist() == [1, 2, 1]
assert type(sys.modules["scipy.signal"]).__name__ == "module"
"""


@pytest.mark.weekly
def test_loading_leaves_no_trace() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_stands_in_for_scipy_signal_gives_way_where_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_waits_for_no_import(argument: str) -> None:
    code = f"""
import sys
from batchwise.run.main import main
assert main("shop", ["{argument}"]) == 0
assert sys.modules.keys().isdisjoint(["torch", "lightning", "numpy", "jsonargparse", "yaml"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("python -m shop fit --config" in done.stdout) == (argument == "--help")


def test_help_takes_less_than_50_milliseconds_more_than_python() -> None:
    """Processor time, and the shortest of ten rounds, because other processes may run at the same time."""

    def seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rounds = [(seconds("-m", "batchwise", "--help"), seconds("-c", "pass")) for _ in range(10)]
    ours, bare = (min(times) for times in zip(*rounds, strict=True))
    assert ours - bare < 0.05


def test_the_flags_of_the_short_help_are_there() -> None:
    short, long = run_here("--help"), run_here("fit", "--help").out
    flags = set(re.findall(r"--([\w.]+)", short.out)) - {"KEY", "help", "config"}
    assert len(flags) > 8
    # Those of a class are listed where its class is known.
    assert {flag for flag in flags if f"--{flag}" not in long} <= {
        *("data.batch_size", "data.micro_batch_size", "model.optimizer.lr")
    }


def test_an_interrupt_while_the_project_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_load", interrupt)
    assert main.main("batchwise", ["fit"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.slow
def test_a_command_ends_where_nobody_reads_its_output_any_more() -> None:
    fit = map(str, ("-m", "batchwise", "fit", *DIGITS, *CSV, "--trainer.max_epochs", 1000))
    command = subprocess.Popen([sys.executable, *fit], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert command.stdout is not None
    assert command.stderr is not None
    while not command.stdout.readline().startswith("epoch 1 "):
        pass
    command.stdout.close()
    lines = [line for line in command.stderr if not line.startswith(("note:", "warning:"))]
    assert command.wait(60) == 141
    assert [line.partition(" from ")[0] for line in lines] == [
        "nobody reads the output: stopped; --ckpt_path last goes on"
    ]


def test_a_command_without_output_ends_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&-`
    assert main.main("batchwise", ["--version"]) == 0


def test_a_broken_connection_is_no_closed_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(main, "_main", broken)
    with pytest.raises(BrokenPipeError):
        main.main("batchwise", ["fit"])
