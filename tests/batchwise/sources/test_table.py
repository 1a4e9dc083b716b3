"""Tables: each kind of column, what is missing, statistics of the training split alone; what is wrong, in one line."""

from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from helpers import run_here

from batchwise.sources.table import Table

pa = pytest.importorskip("pyarrow")

PEOPLE = """split,age,town,height,one,income,label
train,20,Bern,1.5,7,10.5,no
train,40,Ulm,,7,20.5,yes
train,60,,1.7,7,30.5,no
train,40,Bern,1.6,7,40.5,yes
val,80,Rome,,8,50.5,no
val,,Ulm,2.0,7,60.5,yes
test,40,Bern,1.5,7,70.5,no
"""


def file(text: str = PEOPLE, name: str = "people.csv") -> str:
    Path(name).write_text(text)
    return name


def people(text: str = PEOPLE, **settings: object) -> Table:
    standard: dict = {"target": "label", "columns": {"income": "ignore"}, "split_column": "split", "batch_size": 2}
    return Table(file(text), **standard | settings)


def fields(data: Table, split: str) -> list[list]:
    found = data.load(split)
    assert found is not None
    return [field.tolist() for field in found]


def test_each_kind_of_column() -> None:
    with pytest.warns(UserWarning, match="the same in all training rows of people.csv, and so of no use: 'one'"):
        inputs, targets = fields(people(), "train")
    d = np.std([20, 40, 60, 40])  # age; town: missing, Bern, Ulm; height, and whether it is missing; one
    h = np.std([1.5, 1.7, 1.6])
    expected = [
        [-20 / d, 0, 1, 0, -0.1 / h, 0, 0],
        [0, 0, 0, 1, 0, 1, 0],
        [20 / d, 1, 0, 0, 0.1 / h, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(inputs, expected, atol=1e-6)
    assert targets == [0, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:the same in all")
def test_other_splits_use_the_statistics_of_training() -> None:
    data = people()
    d, h = np.std([20, 40, 60, 40]), np.std([1.5, 1.7, 1.6])
    inputs, targets = fields(data, "val")
    np.testing.assert_allclose(inputs, [[40 / d, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0.4 / h, 0, 0]], atol=1e-5)
    assert targets == [0, 1]
    assert data.class_names == ["no", "yes"]
    other = people(PEOPLE.replace("val,80", "val,8000").replace("test,40", "test,-1e9"))
    assert fields(other, "train") == fields(data, "train")


@pytest.mark.filterwarnings("ignore:the same in all")
def test_rows_to_predict_need_no_target() -> None:
    new = file("height,town,age,one,extra\n1.5,Bern,20,7,x\n,Paris,,9,y\n", "new.csv")
    data = people(predict_path=new)
    d, h = np.std([20, 40, 60, 40]), np.std([1.5, 1.7, 1.6])
    fetch = data.split("predict")
    assert fetch is not None
    np.testing.assert_allclose(
        fetch.fields[0],
        [[-20 / d, 0, 1, 0, -0.1 / h, 0, 0], [0, 0, 0, 0, 0, 1, 0]],
        atol=1e-6,  # type: ignore[attr-defined]
    )
    assert len(fetch.fields) == 1  # type: ignore[attr-defined]
    assert data.describe(torch.tensor([1])) == {"row": [2]}
    assert people().describe(torch.tensor([0])) == {"row": [7]}


@pytest.mark.filterwarnings("ignore:the same in all")
def test_numbers_to_predict() -> None:
    inputs, targets = fields(people(target="income", columns={"label": "ignore"}), "train")
    assert targets == [10.5, 20.5, 30.5, 40.5]
    assert len(inputs[0]) == 7
    several = people(target=["income", "one"], columns={"label": "ignore", "age": "category"})
    inputs, targets = fields(several, "train")
    assert targets == [[10.5, 7], [20.5, 7], [30.5, 7], [40.5, 7]]
    assert [row[:3] for row in inputs] == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0]]  # ages 20, 40, 60
    whole = people(target="one", target_kind="class", columns={"label": "ignore"})
    assert fields(whole, "val")[1] == [1, 0]
    assert whole.class_names == ["7", "8"]


def test_targets_have_all_digits_of_the_file() -> None:
    """In single precision, 1,700,000,001 is 1,700,000,000."""
    text = PEOPLE.replace("10.5", "1700000001.25")
    data = people(text, target="income", columns={"label": "ignore"})
    with pytest.warns(UserWarning, match="the same in all training rows"):
        assert fields(data, "train")[1] == [1700000001.25, 20.5, 30.5, 40.5]


def test_a_parquet_file_is_the_same_table() -> None:
    from pyarrow import csv, parquet

    table = csv.read_csv(file(), convert_options=csv.ConvertOptions(strings_can_be_null=True))
    table = table.set_column(2, "town", table["town"].dictionary_encode())
    parquet.write_table(table, "people.parquet")
    settings: dict = {
        "target": "label",
        "columns": {"income": "ignore", "one": "ignore"},
        "split_column": "split",
        "batch_size": 2,
    }
    for split in ("train", "val", "test"):
        assert fields(Table("people.parquet", **settings), split) == fields(Table("people.csv", **settings), split)


def test_fractions_are_stratified_and_keyed() -> None:
    rows = "\n".join(f"{number},{'ab'[number % 10 == 0]}" for number in range(200))
    file(f"x,y\n{rows}\n", "rows.csv")

    def index(**settings: object) -> dict[str, list]:
        return {split: part.tolist() for split, part in Table("rows.csv", "y", batch_size=2, **settings)._index.items()}

    first = index()
    assert sorted(chain(*first.values())) == list(range(200))
    assert {split: len(part) for split, part in first.items()} == {"train": 140, "val": 30, "test": 30}
    assert {split: sum(n % 10 == 0 for n in part) for split, part in first.items()} == {
        "train": 14,
        "val": 3,
        "test": 3,
    }
    assert index(seed=8) == first
    assert index(split_seed=1) != first
    assert index(test_fraction=0).keys() == {"train", "val"}
    with pytest.raises(ValueError, match=r"data.val_fraction 0.5 and data.test_fraction 0.5 leave no training"):
        index(val_fraction=0.5, test_fraction=0.5)


def test_without_a_test_split_predict_says_what_it_needs() -> None:
    file("x,y\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(40)), "rows.csv")
    data = Table("rows.csv", "y", batch_size=2, test_fraction=0)
    line = r"Table.load\('test'\) gave nothing: this command needs that split \(write data.test_fraction above 0\)"
    with pytest.raises(ValueError, match=f"^{line}, or data.predict_path with what is to be predicted$"):
        data.setup("predict")
    with pytest.raises(ValueError, match=f"^{line}$"):
        data.setup("test")


def test_a_split_that_the_column_does_not_have() -> None:
    file("x,y,part\n" + "".join(f"{number},{'ab'[number % 2]},{'train' if number else 'val'}\n" for number in range(9)))
    for settings in ({}, {"test_fraction": 0}):
        data = Table("people.csv", "y", split_column="part", batch_size=2, **settings)
        with pytest.raises(ValueError, match=r"needs that split \(write test for some rows in the column 'part'"):
            data.setup("test")


NAMES = "n,label\n" + "".join(f"name {number},{'ab'[number % 2]}\n" for number in range(100))
WRONG = {
    "no file": ({"path": "nosuch.csv"}, "nosuch.csv cannot be read: .*nosuch.csv"),
    "no table": (
        {"text": "a,b\n1,2\n1,2,3\n"},
        "people.csv cannot be read: CSV parse error: Expected 2 columns, got 3",
    ),
    "empty": ({"text": ""}, "people.csv cannot be read: Empty CSV file"),
    "unknown target": ({"target": "wage"}, "data.target: people.csv has no column 'wage': write one of split, age"),
    "unknown ignored": ({"columns": {"wage": "ignore"}}, "data.columns: people.csv has no column 'wage'"),
    "missing target": (
        {"text": PEOPLE.replace("20.5,yes", "20.5,")},
        "target 'label' .* is missing in 1 of 7 rows, such as row 2",
    ),
    "NaN target": (
        {"text": PEOPLE.replace("30.5", "nan"), "target": "income"},
        "target 'income' of people.csv is missing in 1 of 7 rows, such as row 3: fill it in, or filter these rows out",
    ),
    "whole numbers as target": ({"target": "one"}, "'one' of people.csv holds whole numbers: write data.target_kind"),
    "dates as target": (
        {"target": "one", "text": PEOPLE.replace(",7,", ",2024-01-07,").replace(",8,", ",2024-01-08,")},
        "'one' of people.csv holds dates or times: write data.target_kind class or number",
    ),
    "text as number": (
        {"target": "town", "target_kind": "number", "text": PEOPLE.replace("60,,", "60,Ulm,")},
        "'town' of people.csv holds 'Bern' in row 1, and should hold number",
    ),
    "unknown split": ({"text": PEOPLE.replace("val", "vel")}, "data.split_column 'split' of people.csv holds 'vel'"),
    "nothing to train on": ({"text": PEOPLE.replace("train", "val")}, "no row of people.csv is for training"),
    "infinite": ({"text": PEOPLE.replace("2.0", "inf")}, "column 'height' of people.csv is infinite in row 6"),
    "classes of several": ({"target": ["one", "town"], "target_kind": "class"}, "write data.target_kind number"),
    "identifiers": (
        {"text": NAMES, "columns": {}, "split_column": None},
        "'n' of people.csv has 68 different values in 68 training rows: leave it out with data.columns",
    ),
    "rows to predict": ({"predict_path": "short.csv"}, "short.csv has no column 'town', which training had"),
}


@pytest.mark.parametrize("kind", ["class", "number", None])
def test_lists_are_no_target(kind: Literal["class", "number"] | None) -> None:
    from pyarrow import parquet

    parquet.write_table(pa.table({"x": range(9), "y": [[1.0, 2.0]] * 9}), "lists.parquet")
    with pytest.raises(ValueError, match=r"data\.target: 'y' of lists\.parquet holds lists: .* a column of its own"):
        Table("lists.parquet", "y", kind).load("train")


def test_decimals_are_numbers_as_floats_are() -> None:
    from pyarrow import parquet

    table = pa.table({"x": range(9), "y": [Decimal("1.5")] * 8 + [Decimal(2)]})
    parquet.write_table(table, "decimals.parquet")
    assert set(fields(Table("decimals.parquet", "y", val_fraction=0), "train")[1]) <= {1.5, 2.0}


@pytest.mark.filterwarnings("ignore:the same in all")
@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(settings: dict, words: str) -> None:
    file("age\n1\n", "short.csv")
    path = settings.pop("path", None)
    splits = ("train", "predict") if "predict_path" in settings else ("train",)

    def load() -> None:
        data = people(**settings)
        data.path = path or data.path
        for split in splits:
            data.load(split)

    with pytest.raises(ValueError, match=words):
        load()


NETWORK = "{class_path: batchwise.models.mlp.MLP, init_args: {in_features: 2, num_classes: 3}}"


def fit(**settings: object) -> tuple[object, ...]:
    flags = [item for key, value in settings.items() for item in (f"--data.{key}", value)]
    return (
        *(
            "fit",
            "--data",
            "batchwise.sources.table.Table",
            *flags,
            "--data.split_column",
            "split",
            "--data.batch_size",
            8,
        ),
        *("--model", "batchwise.tasks.classification.Classification", "--model.network", NETWORK),
        *("--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", "--trainer.logger", "false"),
    )


def test_classes_that_one_split_lacks_are_warned_of() -> None:
    rows = "".join(f"train,{number},{number % 2},{'ab'[number % 2]}\n" for number in range(20))
    file(f"split,x,z,y\n{rows}" + "val,1,1,c\n" * 3, "one.csv")
    with (
        pytest.warns(UserWarning, match="all 3 val examples have the label 2"),
        pytest.warns(UserWarning, match="labels of the val split that no training example has: c"),
    ):
        result = run_here(*fit(path="one.csv", target="y"))
    assert result.code == 0, result.err
    assert "one.csv: 23 rows, 2 columns, 2 inputs, 3 classes: a, b, c" in result.out


def test_a_mistake_is_one_line_on_the_command_line() -> None:
    result = run_here(*fit(path=file(), target="wage"))
    assert result.code == 2
    assert result.err.strip() == (
        "error: data.target: people.csv has no column 'wage': write one of split, age, town, height, one, income, label"
    )
