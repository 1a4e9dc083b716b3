"""Each benchmark runs, in a tiny form, and writes its figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

EPOCH = {"plain PyTorch loop, data in one tensor", "ours, speed: auto in float32", "Lightning as documented"}
ALTERNATIVES = {
    "bench_feed.py": {"bare index_select loop", "ours, in memory", "ours, memory map", "memory copy", "DataLoader"},
    "bench_step.py": {"plain PyTorch loop", "ours"},
    "bench_epoch.py": EPOCH,
    "bench_first_result.py": {"plain PyTorch script", "ours, CSV log", "ours, W&B offline (the default)"},
    "bench_cifar.py": {"plain loop, in the style of airbench", "ours"},
    "bench_scale.py": set(),
    "bench_long.py": set(),
    "bench_shards.py": {"ours", "memory map", "plain read"},
    "bench_sequences.py": {"random", "sorted within the batch", "batches and micro-batches in tokens", "packed"},
}
"""Alternatives that each table of a benchmark has, among others."""


def test_all_benchmarks_are_here() -> None:
    found = {path.name for path in (ROOT / "scripts" / "lab").glob("bench_*.py")}
    assert found == ALTERNATIVES.keys() | {"bench_gpu.py"}


@pytest.mark.weekly
@pytest.mark.parametrize("name", ALTERNATIVES)
def test_benchmark(name: str) -> None:
    command = [
        sys.executable,
        ROOT / "scripts" / "lab" / name,
        "--pairs",
        "0",
        "--scale",
        "0.01",
        "--json",
        "figures.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(Path("figures.json").read_text())
    assert figures.pop("machine")["cores"] > 0
    assert figures
    for table in figures.values():
        assert table.keys() >= ALTERNATIVES[name]
        assert len(table) > 1
        assert all(row["median"] > 0 and row["ratio"] > 0 for row in table.values())


@pytest.mark.weekly
def test_the_gpu_benchmark_on_a_cpu() -> None:
    command = [sys.executable, ROOT / "scripts" / "lab" / "bench_gpu.py", "--device", "cpu", "--tiny"]
    done = subprocess.run([*command, "--json", "figures.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    written = json.loads(Path("figures.json").read_text())
    assert written["machine"]["device"] == "CPU"
    sections = written["sections"]
    assert list(sections) == ["feed", "idle", "step", "memory", "target", "compiled"]
    assert all(section["figures"] and "error" not in section for section in sections.values()), done.stdout
    for title in ("step", "feed"):
        for table in sections[title]["figures"].values():
            rows = {name: row for name, row in table.items() if "captured" not in name}
            assert len(rows) > 1
            assert all(row["median"] > 0 and row["ratio"] > 0 for row in rows.values()), done.stdout
    for row in sections["idle"]["figures"]["MLP 784-256-10, batch 8, 32-true"].values():
        assert "error" in row or row["microseconds per step"] > 0
    assert sections["memory"]["figures"]["largest"]["found"]["examples"] == 32
    assert sections["target"]["figures"]["rows"]["ours, float32"]["steps"] == 8


@pytest.mark.weekly
def test_the_gpu_benchmark_keeps_what_it_had_no_time_for() -> None:
    command = [sys.executable, ROOT / "scripts" / "lab" / "bench_gpu.py", "--device", "cpu", "--tiny", "--seconds", "0"]
    done = subprocess.run([*command, "--json", "figures.json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    sections = json.loads(Path("figures.json").read_text())["sections"]
    assert len(sections) == 6
    assert all(section == {"skipped": "no time left"} for section in sections.values())
