"""What the tests of your project share. They use nothing of the engine's tests, which you may leave out."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from batchwise.host import set_threads
from batchwise.run.main import main

ROOT = Path(__file__).parents[2]
PROJECT = next(path.parent.name for path in ROOT.glob("src/*/__main__.py") if path.parent.name != "batchwise")
"""The name of your package."""
os.environ["WANDB_MODE"] = "offline"
# Sums in one order, so that numbers can be compared. And threads of several processes would wait for each other.
set_threads(1)


class Result(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str


def run_command(*arguments: object, process: bool = False) -> Result:
    """Run `python -m <your package> ARGUMENTS` here, which spares the imports, or in a process of its own."""
    words = [str(argument) for argument in arguments]
    if process:
        done = subprocess.run([sys.executable, "-m", PROJECT, *words], capture_output=True, text=True, timeout=300)
        return Result(done.returncode, done.stdout, done.stderr)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(PROJECT, words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def in_a_fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in a folder with nothing but configs/, so that its runs/ is its own."""
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """The function `run_command`."""
    return run_command


@pytest.fixture(scope="session")
def project() -> str:
    """The name of your package."""
    return PROJECT


@pytest.fixture(scope="session")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder in which README's first command has trained, and what it printed."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(folder):
        result = run_command("fit", "--config", "configs/digits.yaml")
    assert result.code == 0, result.err
    return folder, result
