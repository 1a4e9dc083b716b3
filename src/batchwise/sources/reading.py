"""Files of tables: CSV as people write it, and Parquet."""

import json
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchwise.errors import optional

if TYPE_CHECKING:
    from pyarrow import Field
    from pyarrow import Table as ArrowTable

DELIMITERS = ",;\t|"
INDEX = re.compile(r"__index_level_\d+__")
"""Names that pandas gives to an index without a name, in Parquet."""
_START = 2**20  # bytes in which the first line is looked for
_BLOCK = 2**24  # bytes of a file that are read at once, and the most in a row


def read_table(
    path: str, delimiter: str | None = None, as_written: Collection[str] = ()
) -> tuple["ArrowTable", list[str]]:
    """Return a table, and what was found out about the file, in a few words each.

    The delimiter is the commonest of comma, semicolon, tab and bar in the first line. Names of columns have no blanks
    around them. The index that pandas writes is left out: in CSV, it is a first column without a name that numbers the
    rows, in any order.
    What is neither UTF-8 nor marked as UTF-16 is read as Latin-1, with the further characters that Windows has in it. A
    first line `sep=;`, which Excel writes, says the delimiter.

    Args:
        path: a .csv, .tsv or .parquet file, or a folder of Parquet files; `~` is the home folder.
        delimiter: the character between the fields of a CSV file; None: it is found out.
        as_written: columns of a CSV file that stay texts: 01234 is no number, 1.234 may be, and True is no truth value.

    Raises:
        ValueError: it cannot be read, has no rows, two columns have one name, or files of a folder have other columns.
    """
    optional("pyarrow", "table")
    from pyarrow import ArrowException, parquet, types

    file, found = Path(path).expanduser(), list[str]()
    if not file.exists():
        raise ValueError(f"{path} cannot be read: there is no {file.absolute()}")
    try:
        if file.is_dir() or file.suffix.lower() in (".parquet", ".pq"):
            _refuse_other_columns(file)
            table = parquet.read_table(file)
        else:
            table = _read_csv(file, delimiter, as_written, found)
    except (OSError, ArrowException) as error:
        needed = "is a folder, which must hold Parquet files alone, of the same columns" if file.is_dir() else ""
        raise ValueError(f"{path} {needed or 'cannot be read'}: {str(error).partition(chr(10))[0][:200]}") from error
    table = table.rename_columns([name.strip() for name in table.column_names])
    if indices := [field.name for field in table.schema if _is_index(field)]:
        found.append("the index of pandas is left out")
        table = table.drop_columns(indices)
    if table.num_columns and table.column_names[0] in ("", "Unnamed: 0"):
        if _counts(table):
            found.append("the first column is an index and is left out")
            table = table.remove_column(0)
        elif types.is_integer(table.column(0).type):
            found.append(
                f"the first column may be an index: data.columns {{'{table.column_names[0]}': ignore}} leaves it out"
            )
    refuse_double(path, table.column_names)
    if not len(table):
        raise ValueError(f"{path} has no rows: it has the columns {', '.join(table.column_names[:10])}")
    for number, column in enumerate(table.columns):
        if types.is_dictionary(column.type) or types.is_string_view(column.type):
            plain = column.cast(getattr(column.type, "value_type", "string"))
            table = table.set_column(number, table.column_names[number], plain)
    return table, found


def _read_csv(file: Path, delimiter: str | None, as_written: Collection[str], found: list[str]) -> "ArrowTable":
    from pyarrow import csv, input_stream, types

    with input_stream(str(file)) as stream:  # which decompresses
        start = stream.read(_START)
    encoding = "utf-16" if start[:2] in (BOM_UTF16_LE, BOM_UTF16_BE) else "utf8"
    if encoding == "utf8" and b"\0" in start:
        raise OSError("it is no text: save the table as CSV or Parquet")
    text = start.decode("utf-8-sig" if encoding == "utf8" else encoding, errors="ignore")
    said = re.match(rf'"?sep=([{DELIMITERS}])"?\r?\n', text)
    if delimiter is None and said:
        delimiter = said[1]
    elif delimiter is None:
        head = re.sub('"[^"]*"', "", text.lstrip("\r\n")).partition("\n")[0]
        delimiter = "\t" if file.suffix.lower() == ".tsv" and "\t" in head else max(DELIMITERS, key=head.count)
        if delimiter != "," and file.suffix.lower() != ".tsv":
            found.append(f"fields are separated by {'tabs' if delimiter == chr(9) else repr(delimiter)}")

    def read(encoding: str, texts: Iterable[str] = ()) -> "ArrowTable":
        return csv.read_csv(
            file,
            read_options=csv.ReadOptions(encoding=encoding, block_size=_BLOCK, skip_rows=1 if said else 0),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(strings_can_be_null=True, column_types=dict.fromkeys(texts, "string")),
        )

    try:
        table = read(encoding)
        is_text = bool(table.column_names) and not any(types.is_binary(kind) for kind in table.schema.types)
    except UnicodeDecodeError:  # in the name of a column
        is_text = False
    if not is_text:
        try:
            table = read(encoding := "cp1252")
        except UnicodeDecodeError:  # it has no meaning for five of the bytes
            table = read(encoding := "latin-1")
        found.append("it is not UTF-8, and is read as Latin-1")
    parsed = [
        field.name for field in table.schema if field.name.strip() in as_written and not types.is_string(field.type)
    ]
    return read(encoding, parsed) if parsed else table


def _refuse_other_columns(folder: Path) -> None:
    """Raise ValueError if files of a folder have other columns than the first: those would be left out, or missing."""
    from pyarrow import parquet

    files = parquet.ParquetDataset(folder).fragments
    columns = [{field.name for field in file.physical_schema if not _is_index(field)} for file in files]
    for file, own in zip(files, columns, strict=True):
        if apart := columns[0] ^ own:
            names = ", ".join(repr(name) for name in sorted(apart)[:5])
            raise ValueError(
                f"{files[0].path} and {file.path} differ in the columns {names}: give both the same columns"
            )


def _is_index(field: "Field") -> bool:
    """Return whether a column is an index of pandas, which numbers the rows."""
    from pyarrow import types

    return bool(INDEX.fullmatch(field.name)) and types.is_integer(field.type)


def refuse_double(path: object, names: Iterable[str]) -> None:
    """Raise ValueError if two columns of a file have one name."""
    double = [name for name, count in Counter(names).items() if count > 1]
    if double:
        raise ValueError(f"{path} has {len(double)} column name(s) twice, such as '{double[0]}': rename one of them")


def from_json(line: str) -> Any:
    """Return the value in a line of JSON.

    Raises:
        ValueError: it is no JSON, or has half a character, such as \\ud800, which no other file can have.
    """
    value = json.loads(line)
    if "\\u" in line:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def as_text(value: Any, what: str) -> str:
    """Return a text or a number of a row as text.

    Args:
        value: of JSON or Parquet.
        what: its place, for the message.

    Raises:
        ValueError: it is a list, a dict or bytes, which would be written as Python writes them.
    """
    if isinstance(value, list | dict | bytes):
        raise ValueError(f"{what} is of the type {type(value).__name__}: write one text, or a number")
    return str(value)


def _counts(table: "ArrowTable") -> bool:
    """Return whether the first column numbers the rows, from 0 or 1. They may have been shuffled since."""
    from pyarrow import types

    column = table.column(0)
    if not types.is_integer(column.type) or column.null_count:
        return False
    values = np.sort(column.to_numpy())
    return bool(len(values)) and values[0] in (0, 1) and bool((values[1:] - values[:-1] == 1).all())
