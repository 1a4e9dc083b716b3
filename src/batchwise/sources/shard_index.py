"""The index of a folder of shards: how many examples each file has, what is in the columns, and a hash of each."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import MofNCompleteColumn, Progress

from batchwise.data.split import ALIASES
from batchwise.sources.columns import is_list
from batchwise.sources.shard_files import ENDINGS, read_shard
from batchwise.sources.store import Store, said

if TYPE_CHECKING:
    from pyarrow import Table

FORMAT = 1
"""Version of the file."""
FILE = "shards.json"
PART = "shards.json.part"
MOST_VALUES = 10_000
"""The most different values of a column of which the index has a list."""
AT_ONCE = 4
"""Shards that are read side by side."""
WAITS = (0.5, 1.0, 2.0, 0.0)
"""Seconds to wait after each try to read from a store."""
HEAD = 1024
"""Bytes of an Arrow file besides its columns, about."""
SAVED = 5.0
"""Seconds between two writes of what is known so far."""


class Shard(NamedTuple):
    """A file of examples."""

    name: str
    """Within the folder."""
    split: str
    examples: int
    bytes: int
    """Of the file."""
    size: int
    """Bytes of its columns in an Arrow file, about."""
    sha256: str


@dataclass
class Column:
    """What is known of a column, over all shards."""

    type: str
    values: list[Any] | None = None
    """The different whole numbers or texts; None: there are too many, or it has something else."""
    alike: float = 0.0
    """The share of the variance of these values that is between training shards. 1: each shard has one value."""
    largest: int | None = None
    """The largest value in the training shards, if it has arrays of bytes, which may be images."""
    wrong: str = ""
    """The first shard with values that are missing or not finite, and how many rows; empty: there is none."""
    uneven: str = ""
    """The first shard whose arrays differ in length, from one another or from those before, and the lengths."""


@dataclass
class Index:
    """The shards of a folder."""

    shards: list[Shard] = field(default_factory=list)
    columns: dict[str, Column] = field(default_factory=dict)

    def of(self, split: str) -> list[Shard]:
        """Return the shards of a split, in the order of their names."""
        return [shard for shard in self.shards if shard.split == split]


def read_index(store: Store) -> Index:
    """Return the index of a folder.

    Raises:
        ValueError: there is none, it cannot be read, or it is of another version.
    """
    command = f"the command `shards {store.address}`"
    try:
        data = _patient(lambda: store.read(FILE), f"data.path {store.address}")
    except FileNotFoundError as error:
        raise ValueError(f"data.path {store.address} has no {FILE}: {command} makes it") from error
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ValueError(
            f"{FILE} in data.path {store.address} is damaged ({error}): {command} makes it anew"
        ) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        version = found.get("format") if isinstance(found, dict) else None
        raise ValueError(
            f"{FILE} in data.path {store.address} is of version {version}, and this reads {FORMAT}: "
            f"{command} makes it anew"
        )
    columns = {name: Column(**column) for name, column in found["columns"].items()}
    return Index([Shard(*shard) for shard in found["shards"]], columns)


def split_of(name: str) -> str:
    """Return the split of a shard by its folder or by the first word of its name; "train" if they say nothing.

    Digits after a word do not count, as in val0001.tar.
    """
    folder, _, file = name.rpartition("/")
    words = [*folder.split("/"), file.replace("_", "-").replace(".", "-").split("-")[0]]
    plain = [word.lower().rstrip("0123456789") for word in words]
    return next((ALIASES[word] for word in plain if word in ALIASES), "train")


def make_index(store: Store) -> Index:
    """Read all shards of a folder, and write the index. What an interrupted call has read is not read again.

    Raises:
        ValueError: there are no shards, one cannot be read, or their columns differ.
    """
    names = [name for name in store.names() if name.endswith(ENDINGS)]
    if not names:
        raise ValueError(f"{store.address} has no shards: write a folder of files that end in {', '.join(ENDINGS)}")
    sizes = {name: store.size(name) for name in names}
    so_far = [(Shard(*entry["shard"]), entry) for entry in _so_far(store)]
    known = {shard.name: entry for shard, entry in so_far if sizes.get(shard.name) == shard.bytes}
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty())
    task, saved = bar.add_task("reading shards", total=len(names), completed=len(known)), perf_counter()
    with bar, TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as threads:
        due = [name for name in names if name not in known]
        try:
            for name, entry in zip(due, threads.map(lambda name: _look(store, name, Path(folder)), due), strict=True):
                known[name] = entry
                bar.advance(task)
                if perf_counter() - saved > SAVED:
                    store.write(PART, json.dumps(list(known.values())).encode())
                    saved = perf_counter()
                    if bar.disable:
                        print(f"{len(known):,} of {len(names):,} shards read", flush=True)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            with suppress(ValueError):
                store.write(PART, json.dumps(list(known.values())).encode())
            raise
    index = _joined([known[name] for name in names])
    store.write(FILE, json.dumps({"format": FORMAT, **asdict(index)}, indent=0).encode())
    store.remove(PART)
    return index


def _so_far(store: Store) -> list[dict[str, Any]]:
    try:
        return json.loads(store.read(PART))
    except (FileNotFoundError, ValueError):
        return []


def sha256(path: Path) -> str:
    """Return the hash of a file, as the index has it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _look(store: Store, name: str, folder: Path) -> dict[str, Any]:
    """Read a shard, and return what the index needs of it."""
    path = store.local / name if store.local else folder / name.replace("/", "_")
    if store.local is None:
        _patient(lambda: store.get(name, path, lambda count: None), f"shard {name}")
    table = read_shard(path, name)
    entry = Shard(name, split_of(name), len(table), path.stat().st_size, table.nbytes + HEAD, sha256(path))
    columns = {column: _described(table, column) for column in table.column_names}
    del table
    if store.local is None:
        path.unlink()
    return {"shard": list(entry), "columns": columns}


def _patient(read: Callable[[], Any], what: str) -> Any:
    """Return what is read. A store that does not answer is asked again a few times."""
    for wait in WAITS:
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception as error:  # each store raises its own
            if wait == WAITS[-1]:
                raise ValueError(f"{what} cannot be read: {said(error)}") from error
            sleep(wait)
    return None


def _described(table: "Table", name: str) -> dict[str, Any]:
    from pyarrow import compute, types

    column = table.column(name)
    kind, values = column.type, column
    found: dict[str, Any] = {"type": str(kind), "wrong": 0, "values": None, "largest": None}
    missing, lengths = 0, []  # whole arrays that are missing, and the least and the most values of one, at each depth
    while is_list(values):
        missing += values.null_count
        lengths.append(list(compute.min_max(compute.list_value_length(values)).as_py().values()))  # type: ignore[attr-defined]
        values = compute.list_flatten(values)  # type: ignore[attr-defined]
    found["lengths"] = [] if [None, None] in lengths else lengths
    wrong = compute.is_null(values, nan_is_null=True)  # type: ignore[attr-defined]
    if types.is_floating(values.type):
        infinite = compute.fill_null(compute.is_inf(values), False)  # type: ignore[attr-defined]
        wrong = compute.or_(wrong, infinite)  # type: ignore[attr-defined]
    found["wrong"] = missing + (compute.sum(wrong).as_py() or 0)  # type: ignore[attr-defined]
    if types.is_uint8(values.type) and values is not column:
        found["largest"] = compute.max(values).as_py()  # type: ignore[attr-defined]
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind):
        counts = compute.value_counts(column.cast(kind))  # type: ignore[attr-defined]
        if len(counts) <= MOST_VALUES:
            found["values"] = list(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True))
    return found


def _joined(entries: list[dict[str, Any]]) -> Index:
    index = Index([Shard(*entry["shard"]) for entry in entries])
    types = [{name: own["type"] for name, own in entry["columns"].items()} for entry in entries]
    for shard, own in zip(index.shards, types, strict=True):
        for name in {**types[0], **own}:
            one, other = types[0].get(name, "none"), own.get(name, "none")
            if one != other:
                raise ValueError(
                    f"shards {index.shards[0].name} and {shard.name} have other columns, such as '{name}' "
                    f"({one} and {other}): write them alike"
                )
    for name, kind in types[0].items():
        column, spans = Column(kind), list[list[int]]()
        described = [entry["columns"][name] for entry in entries]
        for shard, own in zip(index.shards, described, strict=True):
            if own["wrong"] and not column.wrong:
                column.wrong = f"{shard.name} ({own['wrong']:,} values)"
            if own["lengths"] and not column.uneven:
                both = zip(spans or own["lengths"], own["lengths"], strict=True)
                spans = [[min(one[0], other[0]), max(one[1], other[1])] for one, other in both]
                uneven = next((f"{least} to {most}" for least, most in spans if least != most or not most), "")
                column.uneven = uneven and f"first in shard {shard.name}, holds arrays of {uneven} values"
        train = [own for shard, own in zip(index.shards, described, strict=True) if shard.split == "train"]
        column.largest = max((own["largest"] for own in train if own["largest"] is not None), default=None)
        if all(own["values"] is not None for own in described):
            values = {value for own in described for value, _ in own["values"] if value is not None}
            if len(values) <= MOST_VALUES:
                column.values, column.alike = sorted(values), alike(dict(own["values"]) for own in train)
        index.columns[name] = column
    return index


def alike(counts: Iterable[dict[Any, int]]) -> float:
    """Return the share of the variance of a label that is between shards (tau of Goodman and Kruskal 1954).

    Args:
        counts: the number of examples of each label, for each shard.
    """
    each = [shard for shard in counts if shard]
    total = Counter[Any]()
    for shard in each:
        total.update(shard)
    examples = total.total()
    if not examples:
        return 0.0
    whole = sum((count / examples) ** 2 for count in total.values())
    within = sum(sum(count**2 for count in shard.values()) / sum(shard.values()) for shard in each) / examples
    return 0.0 if whole == 1 else (within - whole) / (1 - whole)
