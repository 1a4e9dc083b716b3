"""What the texts in a column of a table stand for: numbers, dates, or names. One judgement for all tables."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

MISSING = frozenset(("", "-", "--", "?", ".", "na", "n/a", "#n/a", "nan", "none", "null", "missing"))
"""Texts, in lower case, that stand for a missing value where the others are numbers or dates."""
_DAY = 86_400  # seconds


def _plain(text: str) -> float:
    return float(_match(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)[0])


def _thousands(text: str) -> float:
    return float(_match(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", text)[0].replace(",", ""))


def _comma(text: str) -> float:
    return float(_match(r"[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?", text)[0].replace(".", "").replace(",", "."))


def _iso(text: str) -> float:
    _match(r"\d{4}-\d{1,2}-\d{1,2}.*", text)
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() / _DAY


def _date(text: str, day: int, month: int) -> float:
    parts = _match(r"(\d{1,2})([./-])(\d{1,2})\2(\d{4})(?:[ T](\d{1,2}):(\d{2})(?::(\d{2}))?)?", text)
    numbers = [int(parts[place] or 0) for place in (4, month, day, 5, 6, 7)]
    return datetime(*numbers, tzinfo=UTC).timestamp() / _DAY  # type: ignore[misc,arg-type]


def _day_first(text: str) -> float:
    return _date(text, 1, 3)


def _month_first(text: str) -> float:
    return _date(text, 3, 1)


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(text)
    return found


FORMS: dict[str, Callable[[str], float]] = {
    "numbers": _plain,
    "numbers with commas between thousands": _thousands,
    "numbers with a decimal comma": _comma,
    "dates": _iso,
    "dates, day first": _day_first,
    "dates, month first": _month_first,
}
"""How a text becomes a number. Dates become days since 1970."""


def is_missing(text: str) -> bool:
    """Return whether a text stands for a missing value, among numbers or dates."""
    return text.strip().lower() in MISSING


def form_of(values: Sequence[str]) -> str | None:
    """Return the form in which all values are numbers or dates; None: they are texts.

    Args:
        values: different texts; those that stand for missing values do not count.

    Raises:
        ValueError: they are dates whose day and month may be either.
    """
    known = [value.strip() for value in values if not is_missing(value)]
    if not known:
        return None
    fitting = [name for name, parse in FORMS.items() if all(parses(value, parse) for value in known)]
    if len(fitting) == 2 and fitting[0] == "dates, day first" and not all("." in value for value in known):
        raise ValueError(f"dates such as {known[0]}, whose day and month may be either")
    return fitting[0] if fitting else None


def parses(value: str, parse: Callable[[str], float]) -> bool:
    """Return whether a text has a form."""
    try:
        parse(value)
    except ValueError:
        return False
    return True


def to_number(value: str, form: str) -> float:
    """Return the number that a text stands for; NaN if it is missing.

    Raises:
        ValueError: it has another form.
    """
    return float("nan") if is_missing(value) else FORMS[form](value.strip())


def stray(values: Sequence[str]) -> str | None:
    """Return the text that keeps a column from being numbers; None: it is no such column."""
    known = [value for value in values if not is_missing(value)]
    for name in ("numbers", "dates"):
        wrong = [value for value in known if not parses(value.strip(), FORMS[name])]
        if len(known) > 20 and 0 < len(wrong) <= len(known) // 10:
            return wrong[0]
    return None


# Columns


class Column(NamedTuple):
    """How a column becomes inputs, by its values in the training split.

    Args:
        name: name of the column.
        mean: mean of the numbers, without missing ones.
        std: standard deviation of the numbers, without missing ones; 0 if all are the same.
        missing: whether some numbers are missing.
        categories: the values of a column of categories, in order; None for a column of numbers.
        form: the form of the texts that stand for the numbers, of `columns.FORMS`; None: they are numbers in the file.
    """

    name: str
    mean: float = 0.0
    std: float = 0.0
    missing: bool = False
    categories: list[str] | None = None
    form: str | None = None

    def inputs(self, values: np.ndarray) -> np.ndarray:
        """Return the inputs [N, 1 or more] for the values [N]: one-hot, or standardised, with 0 if missing."""
        if self.categories is not None:
            return np.array(self.categories) == values[:, None]
        there = ~np.isnan(values)
        known = np.where(there, (values - self.mean) / self.std if self.std else 0.0, 0.0)
        return np.column_stack([known, ~there]) if self.missing else known[:, None]


def is_text(column: "ChunkedArray") -> bool:
    """Return whether a column holds texts."""
    from pyarrow import types

    return types.is_string(column.type) or types.is_large_string(column.type)


def texts(column: "ChunkedArray") -> np.ndarray:
    """Return a column as text [N]. A missing value is empty."""
    return column.cast("string").fill_null("").to_numpy().astype(str)


def numbers(column: "ChunkedArray", name: str, path: str, form: str | None = None) -> np.ndarray:
    """Return a column as float64 [N]: dates as days since 1970, and a missing value as NaN."""
    from pyarrow import timestamp, types

    try:
        if is_text(column):
            different = column.dictionary_encode().combine_chunks()
            known = np.array([*(to_number(one, form or "numbers") for one in different.dictionary.to_pylist()), np.nan])
            values = known[different.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
        elif types.is_date(column.type) or types.is_timestamp(column.type):
            moments = column.cast(timestamp("us")).cast("int64").cast("float64").to_numpy()
            values = moments.astype(np.float64) / 86.4e9
        else:
            values = column.cast("float64").to_numpy().astype(np.float64)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"column '{name}' of {path} does not hold numbers ({reason}): data.ignore leaves it out"
        ) from error
    if np.isinf(values).any():
        raise ValueError(f"column '{name}' of {path} is infinite in row {np.isinf(values).argmax() + 1}: correct it")
    return values
