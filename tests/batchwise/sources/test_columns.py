"""Tables as people have them: what a file and a column are taken for, and what is refused, in one line."""

import gzip
import math
import time
import tracemalloc
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from batchwise.sources.columns import form_of, to_number
from batchwise.sources.reading import read_table
from batchwise.sources.table import Table

FORMS: dict[str, tuple[list[str], str | None, list[float]]] = {
    "whole": (["1", "-2", "+3"], "number", [1, -2, 3]),
    "decimals": (["1.5", ".5", "2."], "number", [1.5, 0.5, 2]),
    "exponents": (["1e3", "2.5E-1"], "number", [1000, 0.25]),
    "dashes": (["1", "-", "--"], "number", [1, math.nan, math.nan]),
    "question marks": (["?", "2"], "number", [math.nan, 2]),
    "None": (["None", "NA", "n/a", "null", "4"], "number", [math.nan] * 4 + [4]),
    "blanks around": ([" 1 ", "2"], "number", [1, 2]),
    "thousands": (["1,234", "12,345,678", "5"], "thousands", [1234, 12345678, 5]),
    "thousands and decimals": (["1,234.5"], "thousands", [1234.5]),
    "decimal comma": (["1,5", "2"], "decimal_comma", [1.5, 2]),
    "decimal comma and thousands": (["1.234,5", "0,25"], "decimal_comma", [1234.5, 0.25]),
    "ISO dates": (["1970-01-02", "1970-02-01"], "date", [1, 31]),
    "ISO moments": (["1970-01-02 12:00:00", "1970-01-01T06:00"], "date", [1.5, 0.25]),
    "days first": (["31.12.1970", "1.1.1970"], "day_first", [364, 0]),
    "days first, slashes": (["31/12/1970", "01/02/1970"], "day_first", [364, 31]),
    "days first, hyphens": (["13-01-1970"], "day_first", [12]),
    "days first, with time": (["02.01.1970 12:00"], "day_first", [1.5]),
    "months first": (["12/31/1970", "1/2/1970"], "month_first", [364, 1]),
    "points mean days first": (["01.02.1970"], "day_first", [31]),
    "dates with a dash": (["1970-01-02", "-"], "date", [1, math.nan]),
    "texts": (["a", "b"], None, []),
    "a text among numbers": (["1", "a"], None, []),
    "only dashes": (["-", "?"], None, []),
    "underscores": (["1_000"], None, []),
    "no date": (["2024-13-01"], None, []),
    "two years": (["1.1.24"], None, []),
    "versions": (["1.2.3"], None, []),
    "times": (["12:30"], None, []),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_form_of_a_column(case: str) -> None:
    values, form, right = FORMS[case]
    assert form_of(values) == form
    if form is not None:
        assert [to_number(value, form) for value in values] == pytest.approx(right, nan_ok=True)


@pytest.mark.parametrize("values", [["01/02/2024"], ["01/02/2024", "03/04/2024", "?"], ["01-02-2024"]])
def test_dates_that_may_be_either(values: list[str]) -> None:
    with pytest.raises(ValueError, match="whose day and month may be either"):
        form_of(values)


def made(text: str | bytes, **settings: Any) -> Table:
    """A table of 30 rows of a text, of which `{n}` is the number of the row and `{k}` a class."""
    Path("t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    usual = {"path": "t.csv", "target": "k", "batch_size": 4, "val_fraction": 0, "test_fraction": 0}
    return Table(**usual | settings)


def rows(head: str, row: Callable[[int], str]) -> str:
    return "\n".join([head, *(row(number) for number in range(30))]) + "\n"


def k(number: int) -> str:
    return "no" if number % 2 else "yes"


def n_k(delimiter: str) -> str:
    return rows(delimiter.join(("n", "k")), lambda i: f"{i}{delimiter}{k(i)}")


CAFES = ("Caf\u00e9", "Cafe\u0301")
"""The accent as a part of the letter, and as a character of its own."""
CASES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    # What is read, the settings, and the inputs: their number, or the values of the first one before they are scaled.
    "commas": (n_k(","), {}, range(30)),
    "semicolons": (n_k(";"), {}, range(30)),
    "tabs in .csv": (n_k("\t"), {}, range(30)),
    "bars": (n_k("|"), {}, range(30)),
    "a delimiter that is written": (n_k(";"), {"delimiter": ";"}, range(30)),
    "a mark of byte order": (b"\xef\xbb\xbf" + n_k(",").encode(), {}, range(30)),
    "Windows line ends": (n_k(",").replace("\n", "\r\n"), {}, range(30)),
    "blanks in the head": (rows("n, k", lambda i: f"{i},{k(i)}"), {}, range(30)),
    "an index of pandas": (rows(",n,k", lambda i: f"{i},{i},{k(i)}"), {}, 1),
    "an index from 1": (rows(",n,k", lambda i: f"{i + 1},{i},{k(i)}"), {}, 1),
    "Unnamed: 0": (rows("Unnamed: 0,n,k", lambda i: f"{i},{i},{k(i)}"), {}, 1),
    "an index of shuffled rows": (rows(",n,k", lambda i: f"{i * 7 % 30},{i},{k(i)}"), {}, range(30)),
    "an unnamed column that is no index": (rows(",k", lambda i: f"{i * i},{k(i)}"), {}, 1),
    "numbers with dashes": (rows("n,k", lambda i: f"{i if i % 7 else '-'},{k(i)}"), {}, 2),
    "numbers with question marks": (rows("n,k", lambda i: f"{i if i % 7 else '?'},{k(i)}"), {}, 2),
    "numbers with None": (rows("n,k", lambda i: f"{i if i % 7 else 'None'},{k(i)}"), {}, 2),
    "a decimal comma": (rows("n;k", lambda i: f"{i},5;{k(i)}"), {}, [i + 0.5 for i in range(30)]),
    "thousands": (rows("n,k", lambda i: f'"{i + 1},000",{k(i)}'), {}, [1000 * (i + 1) for i in range(30)]),
    "dates": (rows("n,k", lambda i: f"1970-01-{i + 1:02},{k(i)}"), {}, range(30)),
    "dates, day first": (rows("n,k", lambda i: f"{i + 1:02}.01.1970,{k(i)}"), {}, range(30)),
    "dates, month first": (rows("n,k", lambda i: f"1/{i + 1}/1970,{k(i)}"), {}, range(30)),
    "dates as categories": (
        rows("n,k", lambda i: f"0{1 + i % 3}.01.1970,{k(i)}"), {"columns": {"n": "category"}}, 3,
    ),
    "numbers as categories": (rows("n,k", lambda i: f"{i % 4},{k(i)}"), {"columns": {"n": "category"}}, 4),
    "unix seconds": (rows("n,k", lambda i: f"{1_700_000_000 + i},{k(i)}"), {}, range(30)),
    "large whole numbers": (rows("n,k", lambda i: f"{10**15 + i},{k(i)}"), {}, range(30)),
    "classes that are fractions": (
        rows("n,k", lambda i: f"{i},{i % 2}.0"), {"target_kind": "class"}, range(30),
    ),
    "numbers to predict": (rows("n,k", lambda i: f"{i},{i}.5"), {}, range(30)),
    "numbers to predict, decimal comma": (rows("n;k", lambda i: f"{i};{i},5"), {}, range(30)),
    "true and false": (rows("n,k", lambda i: f"{i},{'true' if i % 2 else 'false'}"), {}, range(30)),
    "a date of either kind": (
        rows("n,k", lambda i: f"01/0{1 + i % 3}/1970,{k(i)}"), {"columns": {"n": "day_first"}},
        [(0, 31, 59)[i % 3] for i in range(30)],
    ),
    "another date of either kind": (
        rows("n,k", lambda i: f"01/0{1 + i % 3}/1970,{k(i)}"), {"columns": {"n": "month_first"}},
        [i % 3 for i in range(30)],
    ),
    "numbers that look like thousands": (
        rows("n,k", lambda i: f'"{i + 1},{i + 100}",{k(i)}'), {"columns": {"n": "decimal_comma"}},
        [i + 1 + (i + 100) / 1000 for i in range(30)],
    ),
    "a word among numbers that are said to be": (
        rows("n,k", lambda i: f"{i if i != 7 else 'seven'},{k(i)}"), {"columns": {"n": "number"}},
        "column 'n' of t.csv holds 'seven' in row 8, and should hold number: correct it",
    ),
    "a form for numbers": (
        n_k(","), {"columns": {"n": "day_first"}}, "'n' of t.csv holds numbers already: write number, category or ign",
    ),
    "a column that is not there": (
        n_k(","), {"columns": {"z": "ignore"}}, "data.columns: t.csv has no column 'z': write one of n, k",
    ),
    "a column that is ignored": (
        rows("n,t,k", lambda i: f"{i},text {i},{k(i)}"), {"columns": {"t": "ignore"}}, range(30),
    ),
    "a quoted line break": (rows("n,t,k", lambda i: f'{i},"a\nb",{k(i)}'), {}, 2),
    "UTF-16, as Excel writes it": (n_k("\t").encode("utf-16"), {}, range(30)),
    "an empty first line": ("\n" + n_k(";"), {}, range(30)),
    "commas in a quoted name": (rows('n;"t,u,v";k', lambda i: f"{i};{i};{k(i)}"), {}, range(30)),
    "a name in Latin-1": (rows("größe,k", lambda i: f"{i},{k(i)}").encode("latin-1"), {}, range(30)),
    "whole numbers above 2^53": (rows("n,k", lambda i: f"{2**60 + 1024 * i},{k(i)}"), {}, range(30)),
    "the delimiter in a first line, as Excel writes it": ("sep=;\r\n" + n_k(";"), {}, range(30)),
    "the same after a mark of byte order": ("\ufeffsep=|\n" + n_k("|"), {}, range(30)),
    "a row of 3 MB": (rows("n,t,k", lambda i: f'{i},"{"z" * (3_000_000 * (i == 7))}",{k(i)}'), {}, 3),
    "nanoseconds": (
        rows("n,k", lambda i: f"1970-01-{i + 1:02} 12:00:00.123456789,{k(i)}"), {}, range(30),
    ),
    "times of day": (rows("n,k", lambda i: f"12:{i:02}:30,{k(i)}"), {}, range(30)),
    "times of day to predict": (
        rows("n,k", lambda i: f"{i},12:{i:02}:30"), {"target_kind": "number"}, range(30),
    ),
    "dates that are classes": (
        rows("n,k", lambda i: f"{i},2024-01-0{1 + i % 2}"), {"target_kind": "class"}, range(30),
    ),
    "an accent in two ways": (
        rows("n,t,k", lambda i: f"{i},{CAFES[i % 2]},{k(i)}"), {}, 2,
    ),
    "no column but the target": (rows("k", k), {}, "t.csv has no column to predict from, beside 'k'"),
    "a dash for a number to predict": (
        rows("n,k", lambda i: f"{i},{i / 4 if i != 7 else '-'}"), {}, "'k' of t.csv is missing in 1 of 30",
    ),
    "a file of Excel": (b"PK\x03\x04\x14\0\x06\0", {}, "cannot be read: it is no text: save the table as CSV or Parq"),
    "a quote that is not closed": (n_k(",").replace("\n7,", '\n"7,'), {}, "t.csv cannot be read: CSV parse error"),
    "no rows": ("n,k\n", {}, "t.csv has no rows: it has the columns n, k"),
    "an empty file": ("", {}, "t.csv cannot be read"),
    "a name twice": (rows("n,n,k", lambda i: f"{i},{i},{k(i)}"), {}, "1 column name.s. twice, such as 'n': rename one"),
    "names that differ by a blank": (rows("n, n,k", lambda i: f"{i},{i},{k(i)}"), {}, "twice, such as 'n'"),
    "Yes and yes": (rows("n,k", lambda i: f"{i},{('Yes', 'yes', 'no')[i % 3]}"), {}, "labels 'Yes' and 'yes', which"),
    "yes with a blank": (rows("n,k", lambda i: f"{i},{('yes', 'yes ', 'no')[i % 3]}"), {}, "labels 'yes' and 'yes '"),
    "whole numbers to predict": (rows("n,k", lambda i: f"{i},{i % 2}"), {}, "holds whole numbers: write data"),
    "whole fractions to predict": (rows("n,k", lambda i: f"{i},{i % 2}.0"), {}, "holds whole numbers: write data.targ"),
    "dates that may be either": (
        rows("n,k", lambda i: f"01/0{1 + i % 3}/2024,{k(i)}"), {}, "whose day and month may be either: write day_first",
    ),
    "a word among numbers": (
        rows("n,k", lambda i: f"{i if i != 7 else 'seven'},{k(i)}"), {}, "correct 'seven', which is no number or date",
    ),
    "a folder that is not there": (n_k(","), {"path": "~/nosuch/t.csv"}, "nosuch/t.csv cannot be read"),
    "a file of Parquet that is not there": (n_k(","), {"path": "no.parquet"}, "no.parquet cannot be read: there is no"),
    "a folder of other files": (n_k(","), {"path": "."}, r"is a folder, which must hold Parquet .*t\.csv"),
    "no such target": (n_k(","), {"target": "z"}, "has no column 'z': write one of n, k"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_tables(case: str) -> None:
    text, settings, expected = CASES[case]
    data = made(text, **settings)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected) as error:
            data.load("train")
        assert "\n" not in str(error.value)
        return
    inputs, targets = data.load("train")  # type: ignore[misc]
    assert len(inputs) == len(targets) == 30
    if isinstance(expected, int):
        assert inputs.shape[1] == expected
        return
    right = torch.tensor(list(expected), dtype=torch.float64)
    right = ((right - right.mean()) / right.std(correction=0)).float()
    torch.testing.assert_close(inputs[:, 0], right, rtol=0, atol=1e-5)


def test_a_compressed_file_is_read_as_the_file() -> None:
    Path("t.csv.gz").write_bytes(gzip.compress(n_k(";").encode()))
    inputs, _ = made("", path="t.csv.gz").load("train")  # type: ignore[misc]
    assert torch.equal(inputs, made(n_k(";")).load("train")[0])  # type: ignore[index]


def test_latin_1_is_read_as_such(capsys: pytest.CaptureFixture) -> None:
    data = made(rows("n,k", lambda i: f"{i},{'café' if i % 2 else 'thé'}").encode("latin-1"))
    data.load("train")
    assert data.class_names == ["café", "thé"]
    assert "t.csv: it is not UTF-8, and is read as Latin-1" in capsys.readouterr().out


@pytest.mark.parametrize(("one", "coding"), [("5 €", "cp1252"), ("“five”", "cp1252"), ("\x81", "latin-1")])
def test_what_windows_has_in_latin_1_is_read_as_such(one: str, coding: str) -> None:
    data = made(rows("n,k", lambda i: f"{i},{one if i % 2 else 'thé'}").encode(coding))
    data.load("train")
    assert data.class_names == sorted([one, "thé"])


def test_guesses_are_printed(capsys: pytest.CaptureFixture) -> None:
    made(rows(";n;d;k", lambda i: f"{i};{i},5;{i + 1:02}.01.2024;{k(i)}")).load("train")
    said = capsys.readouterr().out
    for line in (
        "fields are separated by ';'",
        "the first column is an index and is left out",
    ):
        assert f"t.csv: {line}" in said
    assert said.endswith("\n  decimal_comma n\n  day_first     d\n")


PARQUET: dict[str, tuple[Any, Any]] = {
    "categories": (pyarrow.array(["a", "b", "c"] * 10).dictionary_encode(), 3),
    "decimals": (pyarrow.array([Decimal(i) / 4 for i in range(30)]), [i / 4 for i in range(30)]),
    "dates": (pyarrow.array([date(1970, 1, i + 1) for i in range(30)]), range(30)),
    "moments": (pyarrow.array([datetime(1970, 1, i + 1) for i in range(30)]), range(30)),
    "large texts": (pyarrow.array(["a", "b"] * 15, pyarrow.large_string()), 2),
    "half precision": (pyarrow.array(np.arange(30, dtype=np.float16)), range(30)),
    "true and false": (pyarrow.array([True, False] * 15), [1, 0] * 15),
    "missing numbers": (pyarrow.array([None if i == 3 else i for i in range(30)]), 2),
    "missing dates": (pyarrow.array([None if i == 3 else date(1970, 1, i + 1) for i in range(30)]), 2),
    "nanoseconds": (pyarrow.array([i * 864 * 10**11 + 1 for i in range(30)], pyarrow.timestamp("ns")), range(30)),
    "moments in a time zone": (pyarrow.array(range(30), pyarrow.timestamp("s", "Europe/Berlin")), range(30)),
    "dates of 64 bits": (pyarrow.array([i * 86_400_000 for i in range(30)], pyarrow.date64()), range(30)),
    "times of day": (pyarrow.array(range(30), pyarrow.time64("ns")), range(30)),
    "durations": (pyarrow.array(range(30), pyarrow.duration("ms")), range(30)),
    "views of texts": (pyarrow.array(["a", "b"] * 15, pyarrow.string_view()), 2),
    "lists": (pyarrow.array([[1, 2]] * 30), "data.columns: 'n' of t.parquet holds lists: write ignore"),
    "bytes": (pyarrow.array([b"a"] * 30), "column 'n' of t.parquet does not hold numbers"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_parquet(case: str) -> None:
    column, expected = PARQUET[case]
    table = pyarrow.table({"n": column, "k": pyarrow.array([k(i) for i in range(30)])})
    parquet.write_table(table, "t.parquet", row_group_size=7)
    data = made(b"", path="t.parquet")
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            data.load("train")
        return
    inputs, _ = data.load("train")  # type: ignore[misc]
    if isinstance(expected, int):
        assert inputs.shape[1] == expected
        return
    right = torch.tensor(list(expected), dtype=torch.float64)
    right = ((right - right.mean()) / right.std(correction=0)).float()
    torch.testing.assert_close(inputs[:, 0], right, rtol=0, atol=1e-4)


def test_the_index_of_pandas_is_no_number_to_predict_from(capsys: pytest.CaptureFixture) -> None:
    labels = pyarrow.array([k(i) for i in range(30)])
    index = [3 * i % 31 for i in range(30)]  # of some rows, in another order
    parquet.write_table(pyarrow.table({"n": range(30), "k": labels, "__index_level_0__": index}), "t.parquet")
    inputs, _ = made(b"", path="t.parquet").load("train")  # type: ignore[misc]
    assert inputs.shape[1] == 1
    assert "t.parquet: the index of pandas is left out" in capsys.readouterr().out
    made(rows(",n,k", lambda i: f"{index[i]},{i},{k(i)}")).load("train")
    assert "the first column may be an index: data.columns {'': ignore} leaves it out" in capsys.readouterr().out
    inputs, _ = made(rows(",n,k", lambda i: f"{index[i]},{i},{k(i)}"), columns={"": "ignore"}).load("train")  # type: ignore[misc]
    assert inputs.shape[1] == 1


NEW = {
    "reordered": "k,t,n\nyes,a,3\n",
    "without the target": "n,t\n3,a\n",
    "more columns": "x,n,t,y\n1,3,a,2\n",
    "a new category": "n,t\n3,zzz\n",
    "a missing number": "n,t\n,a\n",
    "a dash": "n,t\n-,a\n",
    "semicolons": "n;t\n3;a\n",
}


@pytest.mark.parametrize("case", NEW)
def test_rows_to_predict(case: str) -> None:
    Path("new.csv").write_text(NEW[case])
    data = made(rows("n,t,k", lambda i: f"{i if i else '-'},{'ab'[i % 2]},{k(i)}"), predict_path="new.csv")
    train, _ = data.load("train")  # type: ignore[misc]
    (found,) = data.load("predict")  # type: ignore[misc]
    right = train[3].clone()
    right[2:] = torch.tensor([0.0, 0.0] if case == "a new category" else [1.0, 0.0])
    if case in ("a missing number", "a dash"):
        right[:2] = torch.tensor([0.0, 1.0])
    assert torch.equal(found[0], right)


def test_names_that_look_like_numbers_in_the_file_to_predict_stay_names() -> None:
    """Types are found out file by file. In training, the columns have a text that is no number and no truth value."""
    names = [("01234", "True"), ("02345", "False"), ("A0001", "unknown")]
    text = rows("zip,flag,k", lambda i: f"{names[i % 3][0]},{names[i % 3][1]},{k(i)}")
    Path("new.csv").write_text(" zip ,flag\n" + "".join(f"{code},{flag}\n" for code, flag in names[:2]))
    for columns in ({}, {"zip": "category"}):
        data = made(text, predict_path="new.csv", columns=columns)
        assert torch.equal(data.load("predict")[0], data.load("train")[0][:2])  # type: ignore[index]
    Path("new.csv").write_text("zip,flag\n1234,True\n2345,False\n")
    with pytest.warns(
        UserWarning, match="column 'zip' of new.csv has in 2 of 2 rows a value that training has not seen, such"
    ):
        data.load("predict")


def test_labels_that_look_like_numbers_in_another_file_stay_labels() -> None:
    data = made(rows("n,k", lambda i: f"{i},{'12x'[i % 3]}"))
    data.load("train")
    made(rows("n,k", lambda i: f"{i},{1 + i % 2}"))
    other = Table("t.csv", "k", batch_size=4, test_fraction=1 / 3)
    other.recall(data.state_dict())
    _, targets = other.load("test")  # type: ignore[misc]
    assert set(targets.tolist()) == {0, 1}


def test_a_number_that_is_no_known_label_is_one_line() -> None:
    data = made(rows("n,k", lambda i: f"{i},{i % 2}"), target_kind="class")
    state = data.state_dict()
    other = made(rows("n,k", lambda i: f"{i},{i % 3}"), target_kind="class")
    other.recall(state)
    with pytest.raises(ValueError, match=r"has the labels 2, which training has not seen: it knows \[0, 1\]"):
        other.load("test")


def test_the_time_for_many_columns_grows_with_their_number() -> None:
    row = ",".join(map(str, range(8000)))
    text = rows(",".join(f"c{i}" for i in range(8000)) + ",k", lambda i: f"{row},{k(i)}")
    start = time.perf_counter()
    with pytest.warns(UserWarning, match=r"and so of no use: 'c0', .*'c19' and 7980 more$"):
        made(text).load("train")
    assert time.perf_counter() - start < 15  # with the square of it, more than half a minute


def test_rows_to_predict_that_do_not_fit() -> None:
    text = rows("n,t,k", lambda i: f"{i},{'ab'[i % 2]},{k(i)}")
    for new, words in (
        ("n\n3\n", "new.csv has no column 't', which training had"),
        ("n,t\nthree,a\n", "column 'n' of new.csv holds 'three' in row 1, and should hold number"),
        ("n,t\n2024-12-31,a\n", "column 'n' of new.csv holds dates or times, and should hold number"),
    ):
        Path("new.csv").write_text(new)
        with pytest.raises(ValueError, match=words):
            made(text, predict_path="new.csv").load("predict")


def test_a_tab_after_the_empty_name_of_an_index_is_the_delimiter() -> None:
    Path("t.csv").write_text("\tn\n0\t1.5\n1\t2.5\n")
    assert read_table("t.csv")[0].to_pydict() == {"n": [1.5, 2.5]}


def test_whole_numbers_in_place_of_dates_to_predict() -> None:
    Path("new.csv").write_text("n\n20241231\n")
    text = rows("n,k", lambda i: f"2024-12-{i + 1:02},{k(i)}")
    with pytest.raises(ValueError, match=r"column 'n' of new.csv holds numbers, and should hold date: correct it"):
        made(text, predict_path="new.csv").load("predict")


def test_thousands_with_points_are_no_fractions_where_training_had_decimal_commas() -> None:
    text = rows("n;k", lambda i: f"{i + 1}.000,5;{k(i)}")
    Path("new.csv").write_text("n\n1.000\n30.000\n")  # of fewer rows, none of which has a comma
    data = made(text, predict_path="new.csv")
    (train, _), (new,) = data.load("train"), data.load("predict")  # type: ignore[misc]
    assert torch.allclose(new, train[[0, 29]], atol=1e-3)


def test_thousands_with_points_are_what_the_columns_say() -> None:
    data = made(rows("n;k", lambda i: f"{i + 1}.000;{k(i)}"), target="n", columns={"n": "decimal_comma"})
    assert data.load("train")[1].tolist() == [1000.0 * (i + 1) for i in range(30)]  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (lambda i: f"2024-01-{i + 1:02}", "dates or times"),
        (lambda i: f"{i + 1:02}.01.2024", "dates or times"),
        (lambda i: str(i % 3), "whole numbers"),
        (lambda i: f"{i % 3}.0", "whole numbers"),
    ],
)
def test_texts_that_may_be_classes_or_numbers_are_asked_about(value: Callable[[int], str], held: str) -> None:
    from pyarrow import parquet, table

    texts = [value(number) for number in range(30)]
    parquet.write_table(table({"n": range(30), "k": texts}), "t.parquet")
    for file in ("t.parquet", "t.csv"):
        Path("t.csv").write_text(rows("n,k", lambda i: f"{i},{texts[i]}"))
        with pytest.raises(ValueError, match=f"the target 'k' of {file} holds {held}: write data.target_kind class or"):
            Table(file, "k", batch_size=4).load("train")


def test_one_long_text_takes_no_memory_for_each_row() -> None:
    """An array of texts has the length of the longest in each row: 4 GB of a file of 1 MB."""
    data = made(rows("n,k,t", lambda i: f"{i},{k(i)},{'w' * 1_000_000 if i == 7 else 'uv'[i % 2]}"))
    tracemalloc.start()
    inputs, _ = data.load("train")  # type: ignore[misc]
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2e7
    assert inputs[:, 1:].sum(0).tolist() == [15, 14, 1]


def test_files_of_a_folder_that_have_other_columns() -> None:
    """Columns that the first file does not have were left out, and others became missing values."""
    Path("parts").mkdir()
    columns = {"n": range(30), "k": ["a", "b"] * 15}
    parquet.write_table(pyarrow.table(columns), "parts/0.parquet")
    parquet.write_table(pyarrow.table(dict(reversed(columns.items()))), "parts/1.parquet")
    assert len(read_table("parts")[0]) == 60
    parquet.write_table(pyarrow.table(columns | {"__index_level_0__": range(30)}), "parts/1.parquet")
    assert read_table("parts")[0].column_names == ["n", "k"]  # pandas writes an index that is not 0 to N
    parquet.write_table(pyarrow.table(columns | {"more": range(30)}), "parts/1.parquet")
    with pytest.raises(ValueError, match=r"^parts/0\.parquet and parts/1\.parquet differ in the columns 'more': give"):
        read_table("parts")
    Path("parts/1.parquet").write_bytes(Path("parts/0.parquet").read_bytes()[:-5])
    with pytest.raises(
        ValueError, match=r"^parts is a folder, which must hold Parquet files alone.*'parts/1\.parquet'"
    ):
        read_table("parts")
