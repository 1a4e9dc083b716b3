"""The package under another name: it works, and another rename brings the old one back."""

import re
import shutil
import sys
from typing import Any

import pytest
from helpers import ROOT

NEW = "my_very_own_project"
ENGINE = r"src/batchwise/|tests/batchwise/|scripts/(lab/|\w+\.py)|CHANGELOG\.md"
HOUSE = "tests/batchwise/test_house.py::test_the_engine_imports_no_package_beside_it"


@pytest.mark.weekly
def test_there_and_back(copy: Any) -> None:
    old, before = copy.package, copy.contents()
    done = copy.script("rename", NEW)
    assert done.returncode == 0, done.stderr
    assert (copy.root / "src" / NEW / "__main__.py").exists()
    assert not any((copy.root / folder / old).exists() for folder in ("src", "tests"))
    copy.commit("renamed")
    names = rf"(from|import|-m) {old}\b|(src|tests)/{old}\b|(^|[^[._a-z/-]){old}(\.[a-z]|/|\[)|[\"'`]{old}[\"'`]"
    left = copy.call("git", "grep", "-nE", names).stdout.splitlines()
    assert [line for line in left if not re.match(ENGINE, line) and '["project"]' not in line] == []
    now = copy.contents()
    assert all(now[name] == content for name, content in before.items() if re.match(ENGINE, name))
    assert f"usage: python -m {NEW} " in copy.python("-m", NEW, "--help")
    copy.pytest("tests/batchwise/optim/test_groups.py", HOUSE)
    back = copy.script("rename", old)
    assert back.returncode == 0, back.stderr
    copy.commit("and back")
    assert copy.contents() == before


@pytest.mark.slow
def test_bad_names_are_refused(copy: Any) -> None:
    other = f"other_{copy.package}"
    (copy.root / "configs").mkdir(exist_ok=True)
    (copy.root / "configs" / "mine.yaml").write_text(f"data: {other}.data.Petals\n")
    (copy.root / "src" / "leaves").mkdir()
    (copy.root / "src" / "leaves" / "__init__.py").touch()
    copy.commit("a package besides")
    for name, words in {
        "My-Net": "is not a name for a package: write small letters, digits and _, a letter first",
        "2nd": "is not a name for a package: write small letters, digits and _, a letter first",
        "class": "is a word of Python: write another name",
        "match": "is a word of Python: write another name",
        "json": "is a module of Python's standard library: write another name",
        "batchwise": "is the engine: write another name",
        other: "is already used in configs/mine.yaml: write another name",
        "leaves": "is already used in src/leaves: write another name",
        "shapes": "is already used in tests/batchwise/shapes.py: write another name",
        "(": "is not a name for a package: write small letters, digits and _, a letter first",
    }.items():
        done = copy.script("rename", name)
        assert (done.returncode, done.stderr) == (2, f"error: {name} {words}\n")
        assert copy.git("status", "--porcelain") == ""


@pytest.mark.slow
def test_own_files_anywhere_and_line_ends_of_windows(copy: Any) -> None:
    old = copy.package
    for path in ("pyproject.toml", "configs/digits.yaml"):
        text = (copy.root / path).read_text()
        (copy.root / path).write_text(text, newline="\r\n")
    (copy.root / "notebooks").mkdir()
    (copy.root / "notebooks" / "look.ipynb").write_text(f'{{"source": ["from {old}.data import Digits"]}}')
    (copy.root / "scripts" / "mine.py").write_text(f"import {old}.task\n")
    (copy.root / "data.csv").write_text(f"`{old}`\n")
    (copy.root / "docs" / "link").symlink_to("../src")
    copy.commit("mine")
    done = copy.script("rename", NEW)
    assert done.returncode == 0, done.stderr
    after = copy.contents()
    assert b'\r\nname = "%s"\r\n' % NEW.encode() in after["pyproject.toml"]
    assert b"%s.task.DigitTask\r\n" % NEW.encode() in after["configs/digits.yaml"]
    assert after["notebooks/look.ipynb"] == b'{"source": ["from %s.data import Digits"]}' % NEW.encode()
    assert after["scripts/mine.py"] == b"import %s.task\n" % NEW.encode()
    assert after["data.csv"] == b"`%s`\n" % old.encode()


def test_a_project_in_no_git_repository_is_refused(copy: Any) -> None:
    shutil.rmtree(copy.root / ".git")
    for script, argument in {"rename": NEW, "upgrade": copy.root}.items():
        done = copy.script(script, argument)
        words = "error: this project is in no git repository: write `git init`, and commit all files first\n"
        assert (done.returncode, done.stderr) == (2, words)


def test_an_installed_package_is_refused(copy: Any) -> None:
    done = copy.call(sys.executable, "scripts/rename.py", "torch")
    assert (done.returncode, done.stderr) == (2, "error: torch is an installed package: write another name\n")


def test_a_tree_with_changes_is_refused(copy: Any) -> None:
    (copy.root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + "# mine\n")
    done = copy.script("rename", NEW)
    assert done.returncode == 2
    assert done.stderr == "error: the tree has changes (M pyproject.toml): commit or undo them first\n"
