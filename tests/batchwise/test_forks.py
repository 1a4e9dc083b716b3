"""A forked process is what a new interpreter would be, and its failure is seen."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from helpers import DIGITS, Started, run_process

LOOK = """
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

found = {
    "arguments": sys.argv,
    "name": [__name__, __spec__.name, sys.modules["__main__"].__spec__.name],
    "folder": os.getcwd(),
    "path": sys.path[:2],
    "environment": dict(os.environ),
    "group": os.getpgrp() == os.getpid(),
    "terminal": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "descriptors": len(os.listdir("/proc/self/fd")),
    "threads": [torch.get_num_threads(), len(os.listdir("/proc/self/task"))],
    "random": [random.random(), numpy.random.rand(), torch.rand(()).item()],
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGCHLD)],
    "rank": rank_zero_only.rank,
}
Path(sys.argv[1]).write_text(json.dumps(found))
print("out")
print("err", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.weekly
def test_a_forked_process_finds_what_a_new_interpreter_finds(tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    variables = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LOCAL_RANK": "1"}
    found = []
    for popen in (subprocess.Popen, forks.Process, forks.Process):
        with open("out", "w") as out, open("err", "w") as err:
            command = [sys.executable, "-m", "look", "found.json", "an argument"]
            output = {"stdout": out.fileno(), "stderr": err.fileno()}
            process = popen(command, **output, env=os.environ | variables, cwd=folder, process_group=0)
            assert process.wait(60) == process.poll() == 3
        assert Path("out").read_text() == "out\n"
        assert Path("err").read_text() == "err\n"
        found.append(json.loads((folder / "found.json").read_text()))
    drawn = {number for one in found for number in one.pop("random")}
    assert len(drawn) == 9  # without a seed, each process draws its own
    new, forked = (one.pop("descriptors") for one in found[:2])
    assert forked == new + 1  # the way to the server
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_uncaught_exception_is_seen() -> None:
    result = run_process("fit", *DIGITS, "--name", "../x", BATCHWISE_TRACEBACK="1")
    assert result.code == 1
    assert result.err.startswith("Traceback (most recent call last):")
    assert "name is '../x'" in result.err


def test_a_module_that_does_not_exist_is_seen() -> None:
    assert forks.Process([sys.executable, "-m", "nosuch"], stderr=os.open(os.devnull, os.O_WRONLY)).wait(60) == 1


def test_a_kill_is_seen() -> None:
    process = Started("fit", *DIGITS)
    os.kill(process.process.pid, signal.SIGKILL)
    assert process.end(60).code == -signal.SIGKILL


def test_what_takes_too_long_is_killed() -> None:
    process = Started("fit", *DIGITS)
    with pytest.raises(TimeoutError, match=r"still running after 0\.1 seconds"):
        process.end(0.1)
    assert process.process.wait(60) == -signal.SIGKILL
