"""What a column must not hold: one line that names row and column."""

import math
from datetime import date
from decimal import Decimal
from typing import Any

import pyarrow
import pytest

from batchwise.sources.checking import check_column, check_images

FILL = "fill it in, or filter these rows out"
CASES: dict[str, tuple[Any, str, str | None]] = {
    # Values, what they are for, and the line: None if there is nothing to say.
    "numbers": ([1.0, 2.0], "input", None),
    "whole numbers": ([1, -2], "input", None),
    "true and false": ([True, False], "input", None),
    "dates": ([date(2024, 1, 1)], "input", None),
    "arrays": ([[1.0, 2.0]] * 3, "input", None),
    "arrays of arrays": ([[[1, 2], [3, 4]]] * 3, "input", None),
    "labels": ([0, 1, 5], "label", None),
    "texts as labels": (["a", "b"], "label", None),
    "negative targets": ([-1, 0, 1], "target", None),
    "negative numbers to predict": ([-3, -1, 4], "label", None),
    "several labels": ([[0, 1]] * 3, "label", None),
    "missing": ([1.0, None, None], "input", f"is missing in 2 of 3 rows, such as row 2: {FILL}"),
    "missing, whole": ([1, 2, None], "input", f"is missing in 1 of 3 rows, such as row 3: {FILL}"),
    "no number": ([1.0, math.nan], "input", "is missing in 1 of 2 rows, such as row 2"),
    "infinite": ([1.0, 2.0, -math.inf], "input", "is infinite in 1 of 3 rows, such as row 3"),
    "infinite and missing": ([None, math.inf], "input", "is missing in 1 of 2 rows, such as row 1"),
    "infinite target": ([math.inf, 1.0], "target", "is infinite in 1 of 2 rows, such as row 1"),
    "a missing text": (["a", None], "label", "is missing in 1 of 2 rows, such as row 2"),
    "a missing target": ([0.5, None], "target", "is missing in 1 of 2 rows, such as row 2"),
    "no label": ([0, -1, 1, -1], "label", "is -1, which says that there is no label, in 2 of 4 rows, such as row 2"),
    "texts": (["a", "b"], "input", "holds texts: save them as a file for batchwise.sources.text.Text"),
    "numbers and texts": (["1", "a"], "input", "holds texts"),
    "bytes": ([b"a"], "input", "holds bytes: make numbers of them"),
    "dicts": ([{"a": 1}], "input", "holds dicts: make numbers of them"),
    "dicts as labels": ([{"a": 1}], "label", "holds dicts"),
    "decimals": ([Decimal("1.5")], "input", None),
    "unequal arrays": ([[1.0], [1.0, 2.0]], "input", "holds arrays of 1 to 2 values: make them equally long"),
    "an empty array": ([[1.0], []], "input", "holds arrays of 0 to 1 values"),
    "empty arrays": ([[], []], "input", "holds arrays without values: leave it out"),
    "unequal inner arrays": ([[[1], [1, 2]]] * 2, "input", "holds arrays of 1 to 2 values"),
    "a missing array": ([[1.0], None, [1.0]], "input", "is missing in 1 of 3 rows, such as row 2"),
    "missing in an array": ([[1.0, 2.0], [1.0, None]], "input", "is missing in 1 of 2 rows, such as row 2"),
    "no number in an array": ([[1.0, math.nan], [math.nan] * 2], "input", "is missing in 2 of 2 rows, such as row 1"),
    "infinite in an inner array": (
        [[[1.0, 2.0]] * 2, [[1.0, 2.0], [math.inf, 1.0]]],
        "input",
        "infinite in 1 of 2 rows",
    ),
    "texts in arrays": ([["a"]], "input", "holds texts"),
    "no label in an array": ([[0, 1], [0, -1]], "label", "no label, in 1 of 2 rows, such as row 2"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_columns(case: str, chunks: int) -> None:
    values, role, words = CASES[case]
    kind = pyarrow.array(values).type
    cut = len(values) // 2 if chunks == 2 else 0
    column = pyarrow.chunked_array([values[:cut], values[cut:]], kind)
    if words is None:
        return check_column(column, "column 'x'", role)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^column 'x' ") as error:
        check_column(column, "column 'x'", role)  # type: ignore[arg-type]
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("error")
def test_numbers_that_float32_does_not_have_are_named() -> None:
    check_column(pyarrow.chunked_array([[2**24]]), "column 'x'", "input")
    with pytest.warns(UserWarning, match="column 'x' holds numbers to 1,700,000,000, of which float32 has only some"):
        check_column(pyarrow.chunked_array([[1_700_000_000, 3]]), "column 'x'", "input")


KIND = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
IMAGES = {
    "bytes": ([{"bytes": b"a", "path": None}] * 2, None),
    "paths": ([{"bytes": None, "path": "a.png"}] * 2, None),
    "no row": ([{"bytes": b"a", "path": None}, None], "has no image in 1 of 2 rows, such as row 2"),
    "neither": ([{"bytes": None, "path": None}, {"bytes": b"a", "path": None}], "in 1 of 2 rows, such as row 1"),
    "an empty file": ([{"bytes": b"a", "path": "a"}, {"bytes": b"", "path": "b"}], "in 1 of 2 rows, such as row 2"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(case: str) -> None:
    values, words = IMAGES[case]
    column = pyarrow.chunked_array([values], KIND)
    if words is None:
        return check_images(column, "column 'x'")
    with pytest.raises(ValueError, match=words):
        check_images(column, "column 'x'")
