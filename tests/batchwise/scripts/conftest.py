"""A copy of this project in a git repository of its own, to rename, upgrade or cut down."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

LEFT_OUT = (".git", ".venv", "venv", "data", "runs", "wandb", "*_cache", ".hypothesis", "__pycache__", "*.ckpt")
PACKAGE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]


class Copy:
    """A project in a git repository.

    Args:
        root: its folder, which is made.
        source: the project to copy.
    """

    package = PACKAGE
    """The user's package: `project`, or the name that it was given."""

    def __init__(self, root: Path, source: Path = ROOT) -> None:
        self.root = root.absolute()
        # src/*/data is a room of the engine, and data/ at the top is not.
        shutil.copytree(source, root, ignore=lambda folder, names: self._left_out(source, folder, names))
        self.git("init", "--quiet")
        self.commit("as it was")

    @staticmethod
    def _left_out(source: Path, folder: str, names: list[str]) -> set[str]:
        ignored = shutil.ignore_patterns(*LEFT_OUT)(folder, names)
        return ignored if Path(folder) == source else ignored - {"data"}

    def call(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        environment = os.environ | {"PYTHONPATH": f"{self.root}/src"} | environment
        return subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True)

    def python(self, *arguments: object, **environment: str) -> str:
        """Run Python; return its output."""
        done = self.call(sys.executable, *arguments, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pytest(self, *arguments: object) -> str:
        return self.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", 0, *arguments)

    def script(self, name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a script without installed packages (-S, -E), of which this project may be one."""
        return self.call(sys.executable, "-S", "-E", f"scripts/{name}.py", *arguments)

    def git(self, *arguments: object) -> str:
        done = self.call("git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def commit(self, message: str) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)

    def contents(self) -> dict[str, bytes]:
        """Return the files that git keeps, by their paths."""
        names = self.git("ls-files", "-z").split("\0")[:-1]
        return {name: (self.root / name).read_bytes() for name in names if (self.root / name).is_file()}


@pytest.fixture
def copy() -> Copy:
    return Copy(Path("copy"))
