"""Each benchmark runs, in a tiny form, and writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

ALTERNATIVES = {
    "bench_feed.py": {"bare index_select loop", "ours, in memory", "ours, memory map", "memory copy", "DataLoader"},
    "bench_step.py": {"plain PyTorch loop", "ours", "Lightning as documented"},
}


def test_all_benchmarks_are_here() -> None:
    assert {path.name for path in (ROOT / "scripts").glob("bench_*.py")} == ALTERNATIVES.keys()


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_benchmark(name: str) -> None:
    command = [sys.executable, ROOT / "scripts" / name, "--pairs", "1", "--scale", "0.02", "--json", "figures.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    figures = json.loads(Path("figures.json").read_text())
    assert figures.pop("machine")["cores"] > 0
    assert len(figures) == 2
    for table in figures.values():
        assert table.keys() == ALTERNATIVES[name]
        assert all(row["median"] > 0 and row["ratio"] > 0 for row in table.values())
