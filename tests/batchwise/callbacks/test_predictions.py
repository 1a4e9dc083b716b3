"""Predictions as CSV and Parquet: joined in order, a group of rows at a time."""

import csv
import json
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import small
import torch

from batchwise.callbacks.predictions import CsvFile, ParquetFile, Predictions, columns_of
from batchwise.errors import Mistake


def columns(start: int, stop: int) -> dict:
    return {"example": np.arange(start, stop), "path": [f"{n}.png" for n in range(start, stop)]}


def write(kind: type, path: Path, starts: list[int], header: bool) -> Path:
    file = kind(path, header=header)
    for start, stop in pairwise(starts):
        file.write(columns(start, stop))
    file.close()
    return path


def test_csv() -> None:
    parts = [write(CsvFile, Path(f"{n}"), starts, n == 0) for n, starts in enumerate(([0, 2, 3], [3, 4], [4, 6]))]
    CsvFile.join(parts[0], parts[1:])
    assert parts[0].read_text().split() == ["example,path", *(f"{n},{n}.png" for n in range(6))]
    assert [path.name for path in Path().iterdir()] == ["0"]


def test_parquet_is_written_in_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(ParquetFile, "ROWS", 4)
    first = write(ParquetFile, Path("first"), [0, 2, 4, 6, 7], True)
    assert [parquet.ParquetFile(first).metadata.row_group(n).num_rows for n in range(2)] == [4, 3]
    second = write(ParquetFile, Path("second"), [7, 8], False)
    ParquetFile.join(first, [second])
    assert parquet.read_table(first).to_pylist() == [{"example": n, "path": f"{n}.png"} for n in range(8)]
    assert [path.name for path in Path().iterdir()] == ["first"]


def test_other_kinds_of_file_are_refused() -> None:
    with pytest.raises(ValueError, match=r"predictions is rows.txt: write a file that ends in .csv or .parquet"):
        Predictions("rows.txt")


def test_another_command_that_writes_the_same_file_is_not_disturbed() -> None:
    Path(".rows.csv.0.part").write_text("another's")
    trainer = small.trainer(callbacks=[Predictions("./rows.csv")])
    trainer.predict(small.Classify(small.network()), datamodule=small.Points())
    assert len(Path("rows.csv").read_text().splitlines()) == 1 + len(small.Points().load("test")[0])
    assert Path(".rows.csv.0.part").read_text() == "another's"
    assert not [path for path in Path().glob(".rows.csv.*") if path.name != ".rows.csv.0.part"]


def test_nested_predictions_are_columns() -> None:
    pair = namedtuple("Pair", ["left", "right"])
    boxes = [torch.zeros(0, 4), torch.ones(2, 4)]
    found = columns_of({"a": {"b": torch.ones(2, 2)}, "c": (torch.ones(2),), "d": pair(boxes[1][:, 0], ["x", "y"])})
    assert list(found) == ["a_b_0", "a_b_1", "c_0", "d_left", "d_right"]
    found = {"example": np.arange(2), **columns_of({"boxes": boxes, "text": ["x", "y"]})}
    assert found["boxes"] == [[], [[1.0] * 4] * 2]
    file = CsvFile(Path("rows.csv"), header=True)
    file.write(found)
    file.close()
    with Path("rows.csv").open() as rows:
        assert list(csv.reader(rows))[1:] == [["0", "[]", "x"], ["1", json.dumps([[1.0] * 4] * 2), "y"]]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = ParquetFile(Path("rows.parquet"), header=True)
    table.write(found)
    table.close()
    assert parquet.read_table("rows.parquet").column("boxes").to_pylist() == found["boxes"]


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_predictions_are_as_precise_as_the_task_gives_them(kind: torch.dtype) -> None:
    given = torch.tensor([2**24 + 1 if kind == torch.float64 else 9, 1 / 3, 1e-8], dtype=kind)
    found = columns_of({"a": given, "b": [given]})
    assert found["a"].tolist() == found["b"][0] == given.tolist()


COLUMNS = {
    "a tensor": (lambda outputs: outputs, r"^Own\.predictions gave the shape \[8, 3\]: return a dict"),
    "a mean": (lambda outputs: {"a": outputs.mean()}, r"^Own\.predictions\['a'\] gave the shape \[\] for 8 examples"),
    "too few": (lambda outputs: {"a": outputs[:2]}, r"^Own\.predictions\['a'\] gave the shape \[2, 3\] for 8 examples"),
    "an array": (lambda outputs: {"a": outputs.numpy()}, r"^Own\.predictions\['a'\] gave a ndarray for 8 examples"),
    "too few within": (
        lambda outputs: {"a": {"b": [1, 2]}},
        r"^Own\.predictions\['a'\]\['b'\] gave a list for 8 examples: return a tensor with one row for each",
    ),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_what_is_no_column_is_one_line(kind: str) -> None:
    made, message = COLUMNS[kind]
    own = type("Own", (small.Classify,), {"predictions": lambda task, batch: made(task(batch.inputs))})
    task, data = own(small.network(), optimizer=small.adamw), small.Points(eval_batch_size=8)
    with pytest.raises(Mistake, match=message):
        small.trainer(callbacks=[Predictions("own.csv")]).predict(task, datamodule=data)
    assert not list(Path.cwd().rglob("*own.csv*"))
