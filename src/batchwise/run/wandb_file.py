"""Which steps are in the files that W&B left, so that a resumed run does not log them again."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7  # bytes


def last_step(folder: Path, id: str) -> int:
    """Return the largest step in the files of the run of that id, or -1."""
    steps = [-1]
    for path in folder.glob(f"*run-*-{id}/run-{id}.wandb"):
        rows = (record.history.step.num for record in records(path, backwards=True) if record.HasField("history"))
        steps.append(next(rows, -1))
    return max(steps)


def records(path: Path, backwards: bool = False) -> Iterator[Any]:
    """Yield W&B's records from a file, which has LevelDB's log format (W&B 0.31 has no reader of its own).

    What a crash has cut off at the end is passed over.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    whole = list(_messages(path.read_bytes()))
    yield from (Record.FromString(message) for message in (reversed(whole) if backwards else whole))


def _messages(data: bytes) -> Iterator[bytes]:
    position, message = _HEADER, b""  # the file has a header too
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:  # a block ends in padding where no header fits
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + _HEADER, position + _HEADER + length
        message += data[start:position]
        if kind in (1, 4) and position <= len(data):  # a full record, or the last part of one
            yield message
            message = b""
