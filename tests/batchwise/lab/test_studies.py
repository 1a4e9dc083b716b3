"""Each study runs, in a tiny form, and leaves its tables and its picture."""

import json
import logging
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT

LAB = ROOT / "scripts" / "lab"
OTHERS = ("study_peak.py", "study_transfer.py", "study_regret.py")
"""Have a command line and a test of their own."""
STUDIES = sorted(path.name for path in LAB.glob("study_*.py") if path.name not in OTHERS)
pytestmark = pytest.mark.weekly


@pytest.fixture(autouse=True)
def loud_lightning() -> Iterator[None]:
    """Undo what a study does to Lightning's loggers."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.parametrize("name", STUDIES)
def test_study(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [name, "--scale", "0.01", "--json", "tables.json", "--png", "picture.png"]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(LAB / name), run_name="__main__")
    tables = json.loads(Path("tables.json").read_text())
    assert tables.pop("machine")["cores"] > 0
    assert tables.pop("seeds") == 2
    assert tables
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == sum(2 + len(table) for table in tables.values())
    assert all(re.search(r"\d", " ".join(row.values())) for table in tables.values() for row in table.values())
    assert Path("picture.png").exists() == ("--png" in (LAB / name).read_text().split('"""')[1])


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 6
