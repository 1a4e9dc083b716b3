"""The package under another name: it works, and another rename brings the old one back."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

OLD = "project"
NEW = f"my_{OLD}"
FAST = (
    *("tests/batching/test_plan.py", "tests/models/test_dropout.py"),
    "tests/system/test_main_job.py::test_last_without_a_run_starts_afresh",
)


def call(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd="copy", env=os.environ | environment, capture_output=True, text=True)


def git(*arguments: str) -> str:
    done = call("git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rename(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without installed packages (-S, -E), for whoever runs the tests has the old name installed."""
    return call(sys.executable, "-S", "-E", "scripts/rename.py", *arguments)


@pytest.fixture
def copy() -> Path:
    shutil.copytree(ROOT, "copy", ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "as it was")
    return Path("copy")


def test_there_and_back(copy: Path) -> None:
    done = rename(NEW)
    assert done.returncode == 0, done.stderr
    assert (copy / "src" / NEW).is_dir()
    assert not (copy / "src" / OLD).exists()
    left = call(
        "git", "grep", "-nE", rf"(from|import|-m) {OLD}|src/{OLD}|(^|[^._a-z]){OLD}\.[a-z]|\"{OLD}(\[|::|\")"
    ).stdout
    # What is left is the table of pyproject.toml.
    assert [line for line in left.splitlines() if '["project"]' not in line and "pyproject.toml" not in line] == []
    tests = call(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FAST, PYTHONPATH="src")
    assert tests.returncode == 0, tests.stdout + tests.stderr
    git("commit", "--quiet", "--all", "--message", "renamed")
    back = rename(OLD)
    assert back.returncode == 0, back.stderr
    git("commit", "--quiet", "--all", "--message", "and back")
    assert git("diff", "HEAD~2") == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Net", "is not a name for a package"),
        ("2nd", "is not a name for a package"),
        ("class", "is a word of Python"),
        ("match", "is a word of Python"),
        ("json", "is a module of Python's standard library"),
        ("digits", "is already used in "),
    ],
)
def test_a_bad_name_is_refused(copy: Path, name: str, words: str) -> None:
    done = rename(name)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name} {words}")
    assert line.endswith("write another name") or "write small letters" in line
    assert git("status", "--porcelain") == ""


def test_an_installed_package_is_refused(copy: Path) -> None:
    done = call(sys.executable, "scripts/rename.py", "torch")
    assert done.returncode == 2
    assert done.stderr == "error: torch is an installed package: write another name\n"


def test_a_tree_with_changes_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("mine")
    done = rename(NEW)
    assert done.returncode == 2
    assert done.stderr == "error: the tree has changes (M README.md): commit or undo them first\n"
