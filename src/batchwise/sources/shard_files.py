"""Files of examples (shards) as tables: Parquet, Arrow, tar as WebDataset writes it, and MDS of mosaicml-streaming."""

import json
import re
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from batchwise.batching.fetch import DataError
from batchwise.sources.columns import is_list

if TYPE_CHECKING:
    from pyarrow import Table

ENDINGS = (".arrow", ".parquet", ".mds", ".mds.zstd", ".tar", ".tar.gz", ".tgz")
"""Files that are read as shards."""


def read_shard(path: Path, name: str, columns: Sequence[str] | None = None) -> "Table":
    """Return the examples of a shard as an Arrow table. An Arrow file is mapped into memory, others are read.

    The columns of a tar are the endings of its files. Files that differ only in their endings are one example. `cls`
    are whole numbers, `txt` texts, `npy` arrays; the single values of `json` are columns `json.key`; others are bytes.

    Args:
        path: where it is.
        name: of the shard; its ending says what it is.
        columns: those to return; None: all.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged, or has no such column.
    """
    from pyarrow import ArrowException, parquet

    try:
        if name.endswith(".parquet"):
            have = parquet.read_schema(path).names
            table = parquet.read_table(path, columns=[each for each in columns or have if each in have])
        elif name.endswith(".arrow"):
            table = _arrow(path)
        else:
            table = _tar(path) if ".mds" not in name else _mds(path, name.endswith(".zstd"))
    except FileNotFoundError:
        raise
    except (ArrowException, OSError, tarfile.TarError, struct.error, KeyError, IndexError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"shard {name} cannot be read ({reason}): write it anew") from error
    missing = [each for each in columns or () if each not in table.column_names]
    if missing:
        raise ValueError(f"shard {name} has no column '{missing[0]}': it has {', '.join(table.column_names)}")
    return table if columns is None else table.select(list(columns))


def _arrow(path: Path) -> "Table":
    from pyarrow import ArrowInvalid, ipc, memory_map

    try:
        return ipc.open_file(memory_map(str(path))).read_all()
    except ArrowInvalid:  # the other format of Arrow, which `save_to_disk` of `datasets` writes
        return ipc.open_stream(memory_map(str(path))).read_all()


def _tar(path: Path) -> "Table":
    from pyarrow import Table

    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, file = member.name.rpartition("/")
            stem, _, ending = file.partition(".")
            if not member.isfile() or file.startswith("."):
                continue
            opened = archive.extractfile(member)
            assert opened is not None
            rows.setdefault(f"{folder}/{stem}", {}).update(_values(ending.lower(), opened.read()))
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        raise ValueError("it has no files")
    return Table.from_pydict({name: as_column([row.get(name) for row in rows.values()]) for name in names})


def _values(ending: str, data: bytes) -> dict[str, Any]:
    if ending == "cls":
        return {ending: int(data)}
    if ending == "txt":
        return {ending: data.decode()}
    if ending == "npy":
        from io import BytesIO

        return {ending: np.load(BytesIO(data))}
    if ending == "json":
        found = json.loads(data)
        found = found if isinstance(found, dict) else {}
        return {f"json.{key}": value for key, value in found.items() if isinstance(value, int | float | str)}
    return {ending: data}


def _mds(path: Path, compressed: bool) -> "Table":
    """Read a file of mosaicml-streaming: a count, offsets, a description of the columns, and the examples."""
    from pyarrow import Table, input_stream

    with input_stream(str(path), compression="zstd" if compressed else None) as file:
        data = memoryview(file.read())
    (count,) = struct.unpack_from("<I", data)
    offsets = np.frombuffer(data, "<u4", count + 1, 4)
    about = json.loads(bytes(data[4 * (count + 2) : offsets[0]]))
    names, encodings, sizes = (about[f"column_{what}"] for what in ("names", "encodings", "sizes"))
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for start in offsets[:-1].tolist():
        unknown = sizes.count(None)
        own = list(struct.unpack_from(f"<{unknown}I", data, start))
        start += 4 * unknown
        for name, encoding, size in zip(names, encodings, sizes, strict=True):
            size = own.pop(0) if size is None else size
            columns[name].append(_decoded(encoding, data[start : start + size], name))
            start += size
    return Table.from_pydict({name: as_column(values) for name, values in columns.items()})


def _decoded(encoding: str, data: memoryview, name: str) -> Any:
    kind, _, rest = encoding.partition(":")
    if kind == "int":
        return struct.unpack("<q", data)[0]
    if kind == "str":
        return bytes(data).decode()
    if kind in ("bytes", "jpeg", "png", "jpegarray"):
        return bytes(data)
    if kind == "ndarray" and rest.count(":") == 1:
        dtype, _, shape = rest.partition(":")
        return np.frombuffer(data, dtype).reshape([int(side) for side in shape.split(",")])
    if re.fullmatch(r"u?int(8|16|32|64)|float(16|32|64)", kind):
        return np.frombuffer(data, kind)[0]
    raise ValueError(f"column '{name}' is encoded as {encoding}, which is not read here")


def save_table(table: "Table", path: Path) -> None:
    """Write a table as an Arrow file, which can be mapped into memory."""
    from pyarrow import OSFile, ipc

    with OSFile(str(path), "wb") as file, ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


# Columns


def as_column(values: Any) -> Any:
    """Return numbers, texts, bytes, or arrays of one shape (or an array [N, ...]) as a column of Arrow."""
    import pyarrow as pa

    if isinstance(values, list):
        arrays = values and all(isinstance(value, np.ndarray) for value in values)
        if not arrays or len({value.shape for value in values}) > 1:
            plain = [value.tolist() if isinstance(value, np.ndarray) else value for value in values]
            kind = pa.large_binary() if any(isinstance(value, bytes) for value in values) else None
            return pa.array(plain, kind)
        values = np.stack(values)
    column = pa.array(np.ascontiguousarray(values).reshape(-1))
    for side in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, side)
    return column


def plain_table(table: "Table", name: str) -> "Table":
    """Return a table in one piece whose columns are numbers, arrays of one shape, bytes or texts.

    Args:
        table: the examples.
        name: of the shard, for the message.

    Raises:
        DataError: a column is something else.
    """
    from pyarrow import ArrowException

    columns = {}
    for each in table.column_names:
        where = f"column '{each}' of shard {name}"
        try:
            columns[each] = _plain(table.column(each), where)
        except ArrowException as error:
            raise DataError(f"{where} holds {table.column(each).type}, which is not read here: {error}") from error
    return type(table).from_pydict(columns)


def is_plain(table: "Table") -> bool:
    """Return whether a table can be used as it is, without a copy."""
    return all(column.num_chunks == 1 and _is_plain(column.type) for column in table.columns)


def _is_plain(kind: Any) -> bool:
    from pyarrow import types

    while types.is_fixed_size_list(kind):
        kind = kind.value_type
    return types.is_integer(kind) or types.is_floating(kind) or _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    tests = types.is_binary, types.is_large_binary, types.is_string, types.is_large_string
    return any(test(kind) for test in tests)


def _plain(column: Any, where: str) -> Any:
    import pyarrow as pa
    from pyarrow import compute, types

    if hasattr(column, "combine_chunks"):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of more than two gigabytes of bytes
        column = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in column.chunks])
    column = getattr(column, "storage", column)
    kind = column.type
    if types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type), where)
    if types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}:  # an image of `datasets`
        return _plain(compute.struct_field(column, "bytes"), where)  # type: ignore[attr-defined]
    if is_list(column):
        if column.null_count:  # which a flat array would not have, so that later values would move up
            raise DataError(f"{where} has arrays that are missing: write the shards without them")
        lengths = compute.min_max(compute.list_value_length(column)).as_py()  # type: ignore[attr-defined]
        if lengths["min"] != lengths["max"] or not lengths["min"]:
            raise DataError(
                f"{where} holds arrays of {lengths['min']} to {lengths['max']} values: cut or pad them to one length"
            )
        values = _plain(compute.list_flatten(column), where)  # type: ignore[attr-defined]
        return pa.FixedSizeListArray.from_arrays(values, lengths["min"])
    if types.is_boolean(kind):
        return column.cast(pa.uint8())
    if types.is_decimal(kind):
        return column.cast(pa.float64())
    if types.is_temporal(kind):  # days, as in other sources
        moments = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).cast(pa.float64())
        return compute.divide(moments, 86.4e9)  # type: ignore[attr-defined]
    if types.is_fixed_size_binary(kind):
        return column.cast(pa.large_binary())
    if not _is_plain(kind):
        raise DataError(f"{where} holds {kind}: numbers, arrays of one shape, images or labels are needed")
    return column


class Bytes:
    """A column of bytes or texts, which stay in the file until they are asked for."""

    def __init__(self, column: Any) -> None:
        _, offsets, data = column.buffers()
        width = np.int64 if "large" in str(column.type) else np.int32
        self._offsets = np.frombuffer(offsets, width)[column.offset : column.offset + len(column) + 1]
        self._data = memoryview(data) if data is not None else memoryview(b"")

    def __getitem__(self, rows: np.ndarray) -> list[memoryview]:
        """Return the values in some rows, int64 [N]."""
        starts, ends = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist()
        return [self._data[start:end] for start, end in zip(starts, ends, strict=True)]


def opened(table: "Table") -> dict[str, np.ndarray | Bytes]:
    """Return the columns of a plain table by name: arrays [N, ...], or `Bytes`. They share its memory."""
    from pyarrow import types

    found: dict[str, np.ndarray | Bytes] = {}
    for name in table.column_names:
        column, shape = table.column(name).chunk(0), [len(table)]
        if _is_bytes(column.type):
            found[name] = Bytes(column)
            continue
        while types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
            column = column.flatten()
        found[name] = column.to_numpy(zero_copy_only=False).reshape(shape)
    return found
