"""Every command takes data of every shape."""

import csv
import json
from pathlib import Path

import pytest
from helpers import Result, run_here

from batchwise.choosing import search, speed

SHAPES = {
    "Dicts": "Images", "Tuples": "Images", "Lists": "Images", "Collated": "Images",
    "Series": "Lengths", "Tokens": "Words",
}  # fmt: skip
COMMON = ("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false")


def run(command: str, data: str, *arguments: object) -> Result:
    model = ("--model", "shapes.Both", "--model.network", f"shapes.{SHAPES[data]}")
    sizes = ("--data", f"shapes.{data}", "--data.batch_size", 32, "--trainer.max_epochs", 1)
    result = run_here(command, *COMMON, *model, *sizes, *arguments)
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize(
    "data", [name if name in ("Dicts", "Lists") else pytest.param(name, marks=pytest.mark.weekly) for name in SHAPES]
)
@pytest.mark.slow
def test_training_and_predictions(data: str) -> None:
    result = run("fit", data, "--speed", "auto")
    assert "chosen: micro-batches of" in result.out
    result = run("predict", data, "--ckpt_path", result.folder / "checkpoints" / "last.ckpt")
    with Path(result.out.split("predictions: ")[1].strip()).open() as file:
        rows = list(csv.DictReader(file))
    outputs = [f"output_{name}_{number}" for name, count in (("class", 3), ("box", 4)) for number in range(count)]
    assert list(rows[0]) == ["example", *outputs, "found"]
    for number, row in enumerate(rows):
        box = [float(row[f"output_box_{place}"]) for place in range(4)]
        assert json.loads(row["found"]) == [pytest.approx(box)] * (number % 3)
    assert len(rows) == 96


@pytest.mark.parametrize("data", SHAPES)
@pytest.mark.slow
def test_inspect(data: str) -> None:
    result = run("inspect", data, "--seconds", 1)
    assert "96 of 96 val examples are in train too, such as 0, which is 0 there" in result.out
    assert " copies" not in result.out  # all examples differ
    assert (result.folder / "inspect.png").exists()
    kinds = {
        "Series": "a list, such as float32 [2, 6]", "Dicts": "float32 [3, 8, 8], float64 []",
        "Tokens": "tokens per sequence  2 to 6",
    }  # fmt: skip
    assert kinds.get(data, "") in result.out


@pytest.mark.weekly
def test_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_TURN", 0.01)  # seconds
    monkeypatch.setattr(search, "ROUNDS", 1)
    result = run("tune", "Lists")
    assert "what fits, what is fast" in result.out
    assert (result.folder / "tune.png").exists()
