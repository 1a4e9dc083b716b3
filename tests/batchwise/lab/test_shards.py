"""The other measurements of shards run, in a tiny form."""

import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.weekly


def lab(name: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "lab" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_memory_and_disk_stay_flat() -> None:
    out = lab("long_shards.py", "--shards", "12", "--cache_gib", "0.8")
    cache = float(out.rpartition("cache ")[2].partition(" MB")[0].replace(",", ""))
    assert 0 < cache <= 0.8 * 1.074e3
    assert "0.8 GB in" in out


def test_the_start_of_a_large_data_set() -> None:
    (line,) = [line for line in lab("start_shards.py", "--shards", "50").splitlines() if line.startswith("| ours")]
    assert line.count(" s |") == 2
