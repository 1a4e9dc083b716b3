"""The order of the house: who may import whom, and how large a room may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

import batchwise

ROOMS = (
    *("run", "choosing", "trainer", "loop", "callbacks", "tasks", "sources", "data", "models", "optim", "batching"),
    *("checkpoints", "host", "arguments", "errors", "ranges"),
)
"""Each room of the engine imports only rooms after it."""
FILES = sorted((ROOT / "src").rglob("*.py"))
ENGINE = [path for path in FILES if "batchwise" in path.relative_to(ROOT).parts]


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of the modules, or of the names in them, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "batchwise").with_suffix("").parts[0]


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    if room(path) in ("__init__", "__main__"):
        return
    for name in imports(path):
        package, _, rest = name.partition(".")
        assert package != "project", f"the engine imports {name}"
        if package == "batchwise" and rest.partition(".")[0] in ROOMS:
            assert ROOMS.index(rest.partition(".")[0]) >= ROOMS.index(room(path)), f"{path.name} imports {name}"


def test_the_engine_imports_no_package_beside_it() -> None:
    beside = {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")} - {"batchwise"}
    assert {name.partition(".")[0] for path in ENGINE for name in imports(path)} & beside == set()


def test_batching_knows_no_lightning() -> None:
    for path in (ROOT / "src" / "batchwise" / "batching").glob("*.py"):
        assert not any(name.startswith("lightning") for name in imports(path)), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_has_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


def test_public_names() -> None:
    for name in batchwise.__all__:
        assert getattr(batchwise, name).__module__.startswith("batchwise.")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = batchwise.nothing


@pytest.mark.slow
def test_public_names_come_when_they_are_asked_for() -> None:
    code = "import sys, batchwise; assert 'torch' not in sys.modules; batchwise.Order; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
