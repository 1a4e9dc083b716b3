"""Predictions as CSV and Parquet: joined in order, a group of rows at a time."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from batchwise.callbacks.predictions import CsvFile, ParquetFile, Predictions


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
