"""Files of tables: CSV as people write it, and Parquet."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from batchwise.errors import optional

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable

DELIMITERS = ",;\t|"


def read_table(path: str, delimiter: str | None = None) -> tuple["ArrowTable", list[str]]:
    """Return a table, and what was found out about the file, in a few words each.

    The delimiter is the commonest of comma, semicolon, tab and bar in the first line. Names of columns have no blanks
    around them. A first column without a name that counts the rows is the index that pandas writes, and is left out.
    What is not UTF-8 is read as Latin-1.

    Args:
        path: a .csv, .tsv or .parquet file, or a folder of Parquet files; `~` is the home folder.
        delimiter: the character between the fields of a CSV file; None: it is found out.

    Raises:
        ValueError: it cannot be read, has no rows, or two columns have one name.
    """
    optional("pyarrow", "table")
    from pyarrow import ArrowException, parquet, types

    file, found = Path(path).expanduser(), list[str]()
    try:
        if file.is_dir() or file.suffix.lower() in (".parquet", ".pq"):
            table = parquet.read_table(file)
        else:
            table = _read_csv(file, delimiter, found)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    table = table.rename_columns([name.strip() for name in table.column_names])
    if table.num_columns and table.column_names[0] in ("", "Unnamed: 0", "__index_level_0__") and _counts(table):
        found.append("the first column is an index and is left out")
        table = table.remove_column(0)
    double = [name for name, count in Counter(table.column_names).items() if count > 1]
    if double:
        raise ValueError(f"{path} has {len(double)} column name(s) twice, such as '{double[0]}': rename one of them")
    if not len(table):
        raise ValueError(f"{path} has no rows: it has the columns {', '.join(table.column_names[:10])}")
    for number, column in enumerate(table.columns):
        if types.is_dictionary(column.type):
            table = table.set_column(number, table.column_names[number], column.cast(column.type.value_type))
    return table, found


def _read_csv(file: Path, delimiter: str | None, found: list[str]) -> "ArrowTable":
    from pyarrow import csv, types

    if delimiter is None:
        with file.open(encoding="latin-1") as lines:
            head = lines.readline()
        delimiter = "\t" if file.suffix.lower() == ".tsv" and "\t" in head else max(DELIMITERS, key=head.count)
        if delimiter != "," and file.suffix.lower() != ".tsv":
            found.append(f"fields are separated by {'tabs' if delimiter == chr(9) else repr(delimiter)}")

    def read(encoding: str) -> "ArrowTable":
        return csv.read_csv(
            file,
            read_options=csv.ReadOptions(encoding=encoding),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(strings_can_be_null=True),
        )

    table = read("utf8")
    if any(types.is_binary(column.type) for column in table.columns):
        table = read("latin-1")
        found.append("it is not UTF-8, and is read as Latin-1")
    return table


def _counts(table: "ArrowTable") -> bool:
    """Return whether the first column counts the rows, from 0 or 1."""
    from pyarrow import types

    column = table.column(0)
    if not types.is_integer(column.type) or column.null_count:
        return False
    values = column.to_numpy()
    return bool(len(values)) and values[0] in (0, 1) and bool((values[1:] - values[:-1] == 1).all())
