"""What a column of data must not hold. One judgement for tables and for data sets of Hugging Face."""

import warnings
from typing import Any, Literal

from batchwise.sources.columns import is_list, is_text

LARGEST = 2**24
"""From here on, float32 has not all whole numbers."""


def check_column(column: Any, where: str, role: Literal["input", "target", "label"]) -> None:
    """Check that one can train on a column.

    Args:
        column: of Arrow: numbers, dates, or lists of them; texts if they are labels.
        where: its name, for the message.
        role: what it is for. -1 is no label, but may be a target.

    Raises:
        ValueError: values are missing or not finite, or -1 stands for a missing label; arrays differ in length; or
            inputs are texts, dicts or bytes.
    """
    from pyarrow import compute, types

    values, width, rows = plain_column(column), 1, len(column)
    while is_list(values):
        _refuse(compute.is_null(values), where, "is missing", width, rows)  # type: ignore[attr-defined]
        lengths = compute.min_max(compute.list_value_length(values)).as_py()  # type: ignore[attr-defined]
        if lengths["min"] != lengths["max"]:
            raise ValueError(
                f"{where} holds arrays of {lengths['min']} to {lengths['max']} values: make them equally long, or "
                "return batchwise.batching.ragged.Ragged from a data module of your own"
            )
        if not lengths["min"]:
            raise ValueError(f"{where} holds arrays without values: leave it out")
        values, width = plain_column(compute.list_flatten(values)), width * lengths["min"]  # type: ignore[attr-defined]
    kind = values.type
    _refuse(compute.is_null(values, nan_is_null=True), where, "is missing", width, rows)  # type: ignore[attr-defined]
    if types.is_floating(kind):
        _refuse(compute.is_inf(values), where, "is infinite", width, rows)  # type: ignore[attr-defined]
    if role == "input" and is_text(values):
        raise ValueError(
            f"{where} holds texts: save them as a file for batchwise.sources.text.Text or batchwise.sources.table."
            "Table, or make tokens of them in a data module of your own"
        )
    if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        what = "bytes" if not types.is_nested(kind) else "dicts"
        raise ValueError(f"{where} holds {what}: make numbers of them in a data module of your own")
    if types.is_integer(kind):
        least, most = compute.min_max(values).as_py().values()  # type: ignore[attr-defined]
        if role == "label" and least == -1:
            wrong = compute.equal(values, -1)  # type: ignore[attr-defined]
            remedy = "filter these rows out, or number the labels from 0"
            _refuse(wrong, where, "is -1, which says that there is no label,", width, rows, remedy)
        if role == "input" and max(-least, most) > LARGEST:
            warnings.warn(
                f"{where} holds numbers to {max(-least, most):,}, of which float32 has only some: subtract a constant, "
                "and divide",
                stacklevel=2,
            )


def check_images(column: Any, where: str) -> None:
    """Check that there is an image in each row of a column, without decoding them.

    Args:
        column: of Arrow: dicts with `bytes` or `path`.
        where: its name, for the message.

    Raises:
        ValueError: an image is missing.
    """
    from pyarrow import compute

    values = plain_column(column)
    data, path = (compute.struct_field(values, name) for name in ("bytes", "path"))  # type: ignore[attr-defined]
    empty = compute.fill_null(compute.equal(compute.binary_length(data), 0), False)  # type: ignore[attr-defined]
    neither = compute.and_(compute.is_null(data), compute.is_null(path))  # type: ignore[attr-defined]
    _refuse(compute.or_(empty, neither), where, "has no image", 1, len(column))  # type: ignore[attr-defined]


def plain_column(column: Any) -> Any:
    """Return a column in one piece, without the types of a library."""
    column = column.combine_chunks() if hasattr(column, "combine_chunks") else column
    return getattr(column, "storage", column)


def _refuse(
    wrong: Any, where: str, problem: str, width: int, rows: int, remedy: str = "fill it in, or filter these rows out"
) -> None:
    """Raise ValueError with the number and the first row of wrong values."""
    places = wrong.to_numpy(zero_copy_only=False).reshape(-1, width).any(1).nonzero()[0]
    if len(places):
        raise ValueError(
            f"{where} {problem} in {len(places):,} of {rows:,} rows, such as row {places[0] + 1}: {remedy}"
        )
