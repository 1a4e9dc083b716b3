"""The study that holds `tune` against grids of batch sizes and rates, in a tiny form."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import grid
import problems
import pytest
import study_peak
import study_regret
import torch

from batchwise.choosing import branches, search, speed

pytestmark = pytest.mark.weekly


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (branches, speed):
        monkeypatch.setattr(module, "perf_counter", module.perf_counter)  # the study sets another clock
    monkeypatch.setattr(speed, "_TURN", 0.0)
    monkeypatch.setattr(search, "SHORTEST", 20)


@pytest.mark.parametrize("hard", [0.9, 1.1])
def test_the_study_runs_and_goes_on(
    hard: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(problems.PROBLEMS["digits"], sizes=(64, 256), targets=(0.5, hard), epochs=3)
    monkeypatch.setitem(problems.PROBLEMS, "digits", small)
    monkeypatch.setattr(
        sys, "argv", ["study_regret.py", "--problems", "digits", "--optimizers", "SGD", "--seeds", "2", "--folder", "s"]
    )
    study_regret.main()
    runs = list(grid.read(Path("s/runs.jsonl")))
    assert {run.size for run in runs} >= {64, 256}
    keys = [(run.size, run.factor, run.course, run.seed) for run in runs]
    assert len(keys) == len(set(keys))
    said = json.loads(Path("s/digits, SGD.json").read_text())
    out = capsys.readouterr().out
    assert out.count("| digits | SGD |") == 2
    falls, doubles = said["course"]
    assert (said["size"], said["factor"], (falls, doubles)) in {(run.size, run.factor, run.course) for run in runs}
    assert falls > 0
    assert "developed on, tune: geometric mean" in out
    assert ("none has got there in" in out) is (hard > 1)
    if hard > 1:  # an accuracy that no rate reaches: the next command would try more of them
        return
    study_regret.main()
    assert len(list(grid.read(Path("s/runs.jsonl")))) == len(runs)  # nothing is trained again
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if "|" in line] == [line for line in out.splitlines() if "|" in line]


def test_the_study_of_the_highest_rate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(study_peak, "FACTORS", (1 / 64, 1))
    monkeypatch.setattr(study_peak, "LENGTHS", (1,))
    monkeypatch.setitem(problems.PROBLEMS, "digits", replace(problems.PROBLEMS["digits"], epochs=3))
    monkeypatch.setattr(
        sys, "argv", ["study_peak.py", "--problems", "digits", "--optimizers", "SGD", "--seeds", "2", "--folder", "s"]
    )
    study_peak.main()
    out = capsys.readouterr().out
    low, own = re.findall(r"length 1, \S+: over the best ([\d.]+), worst", out)
    assert float(low) > 1.2 > float(own) == 1.0  # a sixty-fourth of the rate gets less far
    kept = Path("s/losses.jsonl").read_text()
    study_peak.main()
    assert Path("s/losses.jsonl").read_text() == kept  # nothing is trained again
    assert capsys.readouterr().out == out
    assert "falls from" not in Path("s/digits, SGD/said.txt").read_text()


def test_characters() -> None:
    data = problems.Characters(batch_size=4)
    examples = data.transform(data.examples("train", 4), training=True)
    assert examples.inputs.shape == (4, 1024)
    assert torch.equal(examples.inputs.sum(1), torch.full((4,), 8.0))
    texts = ["".join(map(chr, data.load(split)[0].flatten().tolist())) for split in ("train", "val")]
    assert all(" the " in text for text in texts)
    assert len(texts[0]) > 8 * len(texts[1]) > 8_000


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_each_problem_trains(name: str, tmp_path: Path) -> None:
    own = grid.Grid(name, "AdamW", tmp_path / "runs.jsonl")
    own.examples = 256
    run = own.train(64, 1.0, 0)
    assert run.step_seconds > 0
    assert list(grid.read(tmp_path / "runs.jsonl")) == [run]
