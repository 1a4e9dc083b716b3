"""Where the images of a data set are: in folders by class, in folders by split and class, or in a list."""

import csv
import os
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from batchwise.data.labels import check_alike, shown
from batchwise.data.split import ALIASES
from batchwise.sources.reading import as_text, from_json, refuse_double

PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABELS = ("label", "class", "class_name", "target", "category")
"""The names that the columns of a list may have. The first ones are ours."""
NO_DATA = ("__MACOSX", "@eaDir")
"""Folders that systems put beside data."""


class Listing(NamedTuple):
    """Image files by their names in `root`, their labels, and their splits if the data has splits."""

    root: Path
    names: list[str]
    labels: list[str]
    splits: list[str]


def find_images(path: Path, train: bool = True) -> Listing:
    """Return the images of a folder or a list.

    Args:
        path: a folder or a file, as `Folder` takes it.
        train: folders of splits must have one for training.

    Raises:
        ValueError: there is no image, or it is not clear which folder is a class.
    """
    if path.is_file():
        listing = listed(path)
    elif path.is_dir():
        listing = _in_folders(path, train)
    else:
        raise ValueError(f"data.path {path} does not exist: write a folder, or a .csv, .tsv or .jsonl file")
    if not listing.names:
        raise ValueError(f"data.path {path} has no images: write a folder that has one sub-folder per class")
    check_alike(listing.labels, f"data.path {path}")
    return listing


# Folders


def _in_folders(path: Path, train: bool) -> Listing:
    folders = subfolders(path)
    splits = [name for name in folders if name.lower() in ALIASES and _has_classes(path / name)]
    if splits and (not train or any(ALIASES[name.lower()] == "train" for name in splits)):
        others = [name for name in folders if name not in splits and image_files(path / name)]
        if others:
            raise ValueError(
                f"data.path {path} has the folders {shown(folders)}: {shown(splits)} look like splits, and "
                f"{shown(others)} like classes or other images: move {'these' if others[1:] else 'this'} elsewhere"
            )
        taken = [ALIASES[name.lower()] for name in splits]
        if len(set(taken)) < len(taken):
            raise ValueError(f"data.path {path} has the folders {shown(splits)}, of which two are the same split")
        tops = list(zip(splits, taken, strict=True))
    else:
        if len(folders) == 1 and _has_classes(path / folders[0]):
            inner = path / folders[0]
            raise ValueError(f"data.path {path} has one folder, and that has {shown(subfolders(inner))}: write {inner}")
        tops = [("", "")]
    listing, empty = Listing(path, [], [], []), list[str]()
    for top, split in tops:
        for label in subfolders(path / top):
            found = image_files(path / top / label)
            if not found:
                _refuse_unknown_kinds(path / top / label)
                empty.append(os.path.join(top, label))
            listing.names.extend(os.path.join(top, label, name) for name in found)
            listing.labels.extend([label] * len(found))
            listing.splits.extend([split] * len(found) if split else [])
    if empty and listing.names:
        warnings.warn(
            f"data.path {path} has {len(empty)} folder(s) without images, such as {empty[0]}: fill or remove them",
            stacklevel=2,
        )
    return listing


def _has_classes(folder: Path) -> bool:
    """Return whether a folder has sub-folders of images, and no images of its own."""
    direct = any(_is_image(entry.name) for entry in os.scandir(folder) if entry.is_file())
    return not direct and any(next(_walk(folder / name), None) is not None for name in subfolders(folder))


def _refuse_unknown_kinds(folder: Path) -> None:
    ends = {os.path.splitext(name)[1].lower() for _, _, names in os.walk(folder) for name in names if name[0] != "."}
    if ends:
        raise ValueError(
            f"the class {folder} has no image that can be read, but files that end in {', '.join(sorted(ends))}: "
            "convert them, or move the folder elsewhere"
        )


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, without hidden ones."""
    names = (entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return sorted(name for name in names if name not in NO_DATA)


def image_files(folder: Path) -> list[str]:
    """Return the names of the images in a folder, at any depth, sorted, without hidden ones."""
    return sorted(_walk(folder))


def _walk(folder: Path) -> Iterator[str]:
    """Yield the images in a folder, and in folders that links lead to."""
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NO_DATA]
        for name in files:
            if _is_image(name):
                yield os.path.relpath(os.path.join(parent, name), folder)


def _is_image(name: str) -> bool:
    kind = Image.registered_extensions().get(os.path.splitext(name)[1].lower())
    return kind in Image.OPEN and not name.startswith(".")


# Lists


def listed(path: Path) -> Listing:
    """Return the images that a CSV, TSV or JSON-lines file lists. Their paths are relative to the file.

    Raises:
        ValueError: it is no such file, or a row lacks path or label, or has an unknown split.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in (".csv", ".tsv"):
            head = text.partition("\n")[0]
            delimiter = max("\t,;", key=head.count)
            reader = csv.DictReader(StringIO(text), delimiter=delimiter, skipinitialspace=True)
            refuse_double(path.name, filter(None, reader.fieldnames or ()))
            rows: list[Any] = list(reader)
        else:
            rows = [from_json(line) for line in StringIO(text) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path {path} is not UTF-8 (byte {error.start:,}): convert it") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"data.path {path} cannot be read as CSV, TSV or JSON-lines: {error}") from error
    columns = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    by_name = {str(name).strip().lower(): name for name in reversed(columns)}
    of_path, of_label = (next((by_name[one] for one in names if one in by_name), names[0]) for names in (PATHS, LABELS))
    of_split = by_name.get("split", "split")
    names, labels, splits = [], [], []
    for number, row in enumerate(rows, 1):
        for column, key in ((of_path, PATHS[0]), (of_label, LABELS[0])):
            value = row.get(column) if isinstance(row, dict) else None
            if value in (None, "") or value != value:  # as what is not a number
                raise ValueError(f"row {number} of {path} has no {key}: write `path` and `label` in each")
        if any(row.get(None) or ()):
            raise ValueError(
                f"row {number} of {path} has more fields than the first line: put names with commas in quotes"
            )
        if not isinstance(row[of_path], str):
            raise ValueError(f"row {number} of {path} has the path {row[of_path]}: write a text")
        split = str(row.get(of_split, "train")).strip()
        if split.lower() not in ALIASES:
            raise ValueError(f"row {number} of {path} has the split '{split}': write train, val or test")
        names.append(_native(row[of_path].strip(), path.parent))
        labels.append(as_text(row[of_label], f"the label in row {number} of {path}"))
        splits.extend([ALIASES[split.lower()]] if of_split in row else [])
    if len(splits) not in (0, len(rows)):
        raise ValueError(f"{len(rows) - len(splits):,} rows of {path} have no split: write it in all or in none")
    return Listing(path.parent, names, labels, splits)


def _native(name: str, root: Path) -> str:
    """Return a path as this system writes it. One with backslashes may be from Windows."""
    if "\\" in name and os.sep == "/" and not (root / name).exists():
        return str(PurePosixPath(name.replace("\\", "/")))
    return name
