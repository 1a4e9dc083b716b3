"""The study that holds `tune` against sweeps, in a tiny form."""

import json
import sys
from pathlib import Path

import pytest
import study_tune
import torch

from batchwise.choosing import speed, sweep, tune

pytestmark = pytest.mark.weekly


def test_the_study_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (speed, sweep, tune):
        monkeypatch.setattr(module, "perf_counter", module.perf_counter)  # the study sets another clock
    monkeypatch.setattr(speed, "_TURN", 0.0)
    arguments = "study_tune.py --problems digits --sizes 64 --seeds 1 --rates 1 --steps 40 --json figures.json"
    monkeypatch.setattr(sys, "argv", arguments.split())
    study_tune.main()
    figures = json.loads(Path("figures.json").read_text())["digits"]
    rows = {int(size): row for size, row in figures["rows"].items()}
    assert rows.keys() == {64, figures["recommended"]}
    assert rows[64]["steps"] * rows[64]["step_ms"] / 1e3 == pytest.approx(rows[64]["seconds"])
    assert rows[64]["seconds_by_rule"] == rows[64]["seconds"]
    assert figures["ratio"] == rows[figures["recommended"]]["seconds"] / min(row["seconds"] for row in rows.values())
    assert capsys.readouterr().out.count("| **") == 1  # the recommended one


def test_characters() -> None:
    data = study_tune.Characters(batch_size=4)
    examples = data.transform(data.examples("train", 4), training=True)
    assert examples.inputs.shape == (4, 1024)
    assert torch.equal(examples.inputs.sum(1), torch.full((4,), 8.0))
    texts = ["".join(map(chr, data.load(split)[0].flatten().tolist())) for split in ("train", "val")]
    assert all(" the " in text for text in texts)
    assert len(texts[0]) > 8 * len(texts[1]) > 8_000
