"""The locked packages are those that pyproject.toml allows, each with its hashes, and no address."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_locked(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    locked: dict[str, list[str]] = {}
    for entry in entries:
        first, *hashes = entry.split(" \\\n    ")
        assert hashes, first
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first
        package, _, version = first.partition(";")[0].strip().partition("==")
        locked.setdefault(package, []).append(version)
    assert "://" not in text
    for line in PROJECT["dependencies"]:
        wanted = Requirement(line)
        versions = locked.get(wanted.name, [])
        assert versions or (name, wanted.name) == ("cpu", "torch"), wanted.name
        assert all(version in wanted.specifier for version in versions), (wanted, versions)
    assert [package for package in locked if package.startswith(("torch=", "nvidia", "triton"))] == [
        package for package in locked if name == "gpu" and package.startswith(("nvidia", "triton"))
    ]
