"""The study of transfer runs, in a tiny form, and writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT


@pytest.mark.weekly
def test_study() -> None:
    command = [sys.executable, ROOT / "scripts" / "lab" / "study_transfer.py", "--seeds", "1", "--epochs", "1"]
    done = subprocess.run([*command, "--json", "figures.json"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "from scratch" in done.stdout
    found = json.loads(Path("figures.json").read_text())
    assert len(found) == 4
    assert all(0 < columns[0][0] < 100 for columns in found.values())
