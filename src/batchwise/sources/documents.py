"""Documents from files (plain text, CSV, JSON lines), and their splits."""

import csv
import os
from collections.abc import Iterator
from glob import glob
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from batchwise.batching.random import mix
from batchwise.data.labels import normal
from batchwise.errors import optional
from batchwise.sources.reading import as_text, from_json, refuse_double

STDLIB = "stdlib"
"""Name for the source of Python's own standard library: text that is on every machine (PSF licence)."""
_MARK = "\ufeff"  # of the byte order, with which some programs begin a file
CSV, JSON_LINES, PARQUET = (".csv", ".tsv"), (".jsonl", ".ndjson"), (".parquet", ".pq")


class Document(NamedTuple):
    """A text, and its label if there are labels."""

    text: str
    label: str | None = None


def find_files(key: str, patterns: str | list[str]) -> list[Path]:
    """Return the files that paths and patterns name, in order.

    Args:
        key: the setting that has the patterns, for the message of an error.
        patterns: `**` reaches into folders; `stdlib` is the standard library, without its tests.

    Raises:
        ValueError: a pattern names no file.
    """
    files: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern == STDLIB:
            found = list(_stdlib(Path(os.__file__).parent))
        else:
            found = [Path(name) for name in glob(os.path.expanduser(pattern), recursive=True)]
        found = sorted(path for path in found if path.is_file())
        if not found:
            raise ValueError(
                f"{key} {pattern}: no such file; write a path, a pattern such as texts/**/*.txt, or {STDLIB}"
            )
        files += found
    return files


def _stdlib(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ("site-packages", "dist-packages", "test", "tests"):
            yield from _stdlib(path)
        elif path.suffix == ".py":
            yield path


def read(
    path: Path, text_column: str, label_column: str | None, delimiter: str | None, keep_empty: bool = False
) -> Iterator[Document]:
    """Yield the documents of a file, without empty ones that have no label.

    Args:
        path: each row of a CSV, TSV, JSON-lines or Parquet file is a document; any other file is plain text.
        text_column: the column of the text.
        label_column: the column of the label; None: there are no labels.
        delimiter: what separates two documents of a plain text; None: the whole file is one.
        keep_empty: rows without a label may be empty, too.

    Raises:
        ValueError: the file cannot be read in this way; the message says where.
    """
    try:
        if path.suffix.lower() in CSV + JSON_LINES + PARQUET:
            for place, row in _rows(path):
                for column in filter(None, (text_column, label_column)):
                    if column not in row:
                        raise ValueError(f"{place} has no {column!r}, but {', '.join(map(repr, row))}: write "
                                         "data.text_column and data.label_column as they are there")  # fmt: skip
                    value = row[column]  # what is not a number is unequal to itself
                    if value is None or value != value or (column == label_column and not str(value).strip()):
                        raise ValueError(f"{place} has an empty {column!r}: fill it in, or leave the row out")
                text = as_text(row[text_column], f"{place} {text_column!r}")
                label = label_column and normal(as_text(row[label_column], f"{place} {label_column!r}"))
                if text or label is not None or keep_empty:
                    yield Document(text, label)
        elif label_column is not None:
            raise ValueError(f"{path} is plain text, which has no labels: write a .csv or .jsonl file")
        else:
            whole = path.read_bytes().decode().removeprefix(_MARK)
            of_windows = (delimiter or "").replace("\n", "\r\n")
            between = of_windows if of_windows in whole else delimiter
            yield from (Document(text) for text in (whole.split(between) if between else [whole]) if text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start:,}): convert it, or leave it out") from error


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    kind = path.suffix.lower()
    if kind in PARQUET:
        optional("pyarrow", "table")
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
        yield from ((f"{path}, row {number},", row) for number, row in enumerate(rows, 1))
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        if kind in CSV:
            csv.field_size_limit(2**31 - 1)  # by default a text of more than 131,072 characters is refused
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",")
            refuse_double(path, filter(None, reader.fieldnames or ()))
            for row in reader:
                if any(row.get(None) or ()):
                    raise ValueError(f"{path}, line {reader.line_num}, has more fields than the first line: put texts "
                                     "that have commas or tabs into quotes")  # fmt: skip
                yield f"{path}, line {reader.line_num},", row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = from_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}, is of the type {type(row).__name__}: write an object into "
                                 "each line, which has the names of columns")  # fmt: skip
            yield f"{path}, line {number},", row


def key_of(text: str, seed: int) -> int:
    """Return a random number that is always the same for the same text."""
    return mix(seed, int.from_bytes(blake2b(text.encode(), digest_size=8).digest()))


def split_keys(keys: set[int], fractions: dict[str, float]) -> dict[str, int]:
    """Return a border for each split, in rising order. A key is in the first split whose border is above it.

    Keys above all borders are for training. So copies of a document are in the same split, and a new document moves few
    others. No split is empty.

    Args:
        keys: the keys of all documents.
        fractions: share of the documents in each split.

    Raises:
        ValueError: there are too few documents.
    """
    counts = {split: max(1, round(fraction * len(keys))) for split, fraction in fractions.items() if fraction > 0}
    if sum(counts.values()) >= len(keys):
        raise ValueError(
            f"data.files have {len(keys)} different documents, too few for train, {' and '.join(counts)}: write "
            "data.val_files and data.test_files, a fraction of 0, or a data.delimiter that makes several of a file"
        )
    return dict(zip(counts, [sorted(keys)[count] for count in accumulate(counts.values())], strict=True))
