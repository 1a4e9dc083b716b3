"""What the texts in a column of a table stand for: numbers, dates, or names. One judgement for all tables."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

MISSING = frozenset(("", "-", "--", "?", ".", "na", "n/a", "#n/a", "nan", "none", "null", "missing"))
"""Texts, in lower case, that stand for a missing value where the others are numbers or dates."""
SHOWN = 20
"""Number of columns of a kind whose names are printed."""
_DAY = 86_400  # seconds
_A_DAY = {"day": 1, "s": _DAY, "ms": _DAY * 10**3, "us": _DAY * 10**6, "ns": _DAY * 10**9}


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


def _match(pattern: str, text: str) -> re.Match[str]:
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(text)
    return found


Kind = Literal["number", "thousands", "decimal_comma", "date", "day_first", "month_first", "category", "ignore"]
"""What a column holds: 1234.5; 1,234.5; 1.234,5; 2024-12-31; 31/12/2024; 12/31/2024; names; nothing of use."""
FORMS: dict[Kind, Callable[[str], float]] = {
    "number": _plain,
    "thousands": _thousands,
    "decimal_comma": _comma,
    "date": _iso,
    "day_first": partial(_date, day=1, month=3),
    "month_first": partial(_date, day=3, month=1),
}
"""How a text becomes a number. Dates become days since 1970."""
DATES, NO_NUMBERS = ("date", "day_first", "month_first"), ("category", "ignore")


def is_missing(text: str) -> bool:
    """Return whether a text stands for a missing value, among numbers or dates."""
    return text.strip().lower() in MISSING


def form_of(values: Sequence[str]) -> Kind | None:
    """Return the form in which all values are numbers or dates; None: they are texts.

    Args:
        values: different texts; those that stand for missing values do not count.

    Raises:
        ValueError: they are dates whose day and month may be either.
    """
    known = [value.strip() for value in values if not is_missing(value)]
    if not known:
        return None
    fitting: list[Kind] = [name for name, parse in FORMS.items() if all(parses(value, parse) for value in known)]
    if len(fitting) == 2 and fitting[0] == "day_first" and not all("." in value for value in known):
        raise ValueError(f"dates such as {known[0]}, whose day and month may be either")
    return fitting[0] if fitting else None


def parses(value: str, parse: Callable[[str], float]) -> bool:
    """Return whether a text has a form."""
    try:
        parse(value)
    except ValueError:
        return False
    return True


def to_number(value: str, form: Kind) -> float:
    """Return the number that a text stands for; NaN if it is missing.

    Raises:
        ValueError: it has another form.
    """
    return float("nan") if is_missing(value) else FORMS[form](value.strip())


def stray(values: Sequence[str]) -> str | None:
    """Return the text that keeps a column from being numbers; None: it is no such column."""
    known = [value for value in values if not is_missing(value)]
    for name in ("number", "date"):
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
        form: of the texts that stand for the numbers, of `FORMS`; "date" also for the dates of a file.
    """

    name: str
    mean: float = 0.0
    std: float = 0.0
    missing: bool = False
    categories: list[str] | None = None
    form: Kind = "number"

    def places(self, different: Sequence[str]) -> np.ndarray:
        """Return the places of some texts among the categories, int64 [N]; -1: it is none of them."""
        known = {category: place for place, category in enumerate(self.categories or ())}
        return np.array([known.get(text, -1) for text in different], np.int64)

    def inputs(self, values: np.ndarray) -> np.ndarray:
        """Return the inputs [N, 1 or more] for numbers [N], standardised and 0 if missing; or one-hot for categories.

        Args:
            values: numbers, or the place of each row's category in `categories` (-1: it is none of them).
        """
        if self.categories is not None:
            return np.arange(len(self.categories)) == values[:, None]
        there = ~np.isnan(values)
        known = np.where(there, (values - self.mean) / self.std if self.std else 0.0, 0.0)
        return np.column_stack([known, ~there]) if self.missing else known[:, None]


def kind_of(column: "ChunkedArray", given: Kind | None) -> Kind:
    """Return the kind of a column: the given one, or the one that its values have.

    Args:
        column: of a table.
        given: the kind in the configuration; None: it is found out.

    Raises:
        ValueError: it cannot hold that; or it is to be found out, and holds lists, or dates that may be either.
    """
    from pyarrow import types

    if given in NO_NUMBERS:
        return given
    if types.is_nested(column.type):
        raise ValueError("lists: write ignore")
    if not is_text(column):
        found: Kind = "date" if is_date(column) else "number"
        if given not in (None, found):
            raise ValueError(f"{found}s already: write {found}, category or ignore")
        return found
    if given is not None:
        return given
    try:
        return form_of([value for value in column.unique().to_pylist() if value is not None]) or "category"
    except ValueError as error:
        raise ValueError(f"{error}: write day_first or month_first") from None


def described(columns: Sequence[Column], ignored: Sequence[str]) -> list[str]:
    """Return one line for each kind of column, with the names of its columns."""
    kinds: dict[str, list[str]] = {}
    for column in columns:
        if column.categories is not None:
            kind, note = "category", f" ({len(column.categories)} values)"
        else:
            kind, note = column.form, " (constant)" if not column.std else " (some missing)" if column.missing else ""
        kinds.setdefault(kind, []).append(column.name + note)
    kinds |= {"ignore": list(ignored)} if ignored else {}
    return [f"  {kind:<13} {some(names)}" for kind, names in kinds.items()]


def some(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def is_text(column: "ChunkedArray") -> bool:
    """Return whether a column holds texts."""
    from pyarrow import types

    return types.is_string(column.type) or types.is_large_string(column.type)


def is_list(column: Any) -> bool:
    """Return whether a column, or an array, holds lists, of equal or unequal lengths."""
    from pyarrow import types

    kind = column.type
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def is_date(column: "ChunkedArray") -> bool:
    """Return whether a column holds dates, moments, times of day or durations."""
    from pyarrow import types

    return types.is_temporal(column.type) and not types.is_interval(column.type)


def texts(column: "ChunkedArray") -> tuple[list[str], np.ndarray]:
    """Return the different texts of a column, and the number of that of each row, int32 [N].

    A missing value is empty. What Unicode writes in two ways is one text. An array of all texts would take for each the
    memory of the longest.
    """
    from pyarrow import compute

    plain = column.cast("string").fill_null("")
    found = compute.utf8_normalize(plain, "NFC").dictionary_encode().combine_chunks()  # type: ignore[attr-defined]
    return found.dictionary.to_pylist(), found.indices.to_numpy()


def numbers(column: "ChunkedArray", name: str, path: str, form: Kind = "number") -> np.ndarray:
    """Return a column as float64 [N]: dates as days since 1970, times as days, and a missing value as NaN.

    Raises:
        ValueError: it holds another form, such as plain numbers where training had dates.
    """
    from pyarrow import types

    if not (is_text(column) or types.is_null(column.type)) and is_date(column) != (form in DATES):
        held = "dates or times" if is_date(column) else "numbers"
        raise ValueError(f"column '{name}' of {path} holds {held}, and should hold {form}: correct it")
    if is_text(column):
        different = column.dictionary_encode().combine_chunks()
        known = [_to_number(one, form, column, name, path) for one in different.dictionary.to_pylist()]
        values = np.array([*known, np.nan])[different.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    elif is_date(column):
        ticks = column.cast(f"int{column.type.bit_width}").cast("float64", safe=False).to_numpy()
        # Dates have no unit: those of 32 bits count days, and those of 64 bits milliseconds.
        unit = getattr(column.type, "unit", "ms" if column.type.bit_width == 64 else "day")
        values = ticks.astype(np.float64) / _A_DAY[unit]
    else:
        try:
            # Of a whole number above 2^53, the nearest is taken.
            values = column.cast("float64", safe=False).to_numpy().astype(np.float64)
        except (ValueError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"column '{name}' of {path} does not hold numbers ({reason}): write data.columns {{{name}: ignore}}"
            ) from error
    if np.isinf(values).any():
        raise ValueError(f"column '{name}' of {path} is infinite in row {np.isinf(values).argmax() + 1}: correct it")
    return values


def _to_number(value: str, form: Kind, column: "ChunkedArray", name: str, path: str) -> float:
    from pyarrow import compute

    try:
        return to_number(value, form)
    except ValueError:
        row = compute.index(column, value).as_py() + 1  # type: ignore[attr-defined]
        raise ValueError(
            f"column '{name}' of {path} holds '{value}' in row {row}, and should hold {form}: correct it"
        ) from None


def values_of(column: "ChunkedArray") -> list:
    """Return the targets in a column, where they are classes: numbers, truth values or texts."""
    from pyarrow import types

    simple = types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)
    return (column if simple else column.cast("string")).to_pylist()
