"""The examples of any data module, written as shards."""

import sys
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from batchwise.batching.fetch import Fetch
from batchwise.batching.loader import read
from batchwise.batching.order import Shuffled
from batchwise.batching.structure import leaves
from batchwise.data.module import DataModule
from batchwise.errors import optional
from batchwise.sources.shard_files import as_column, save_table
from batchwise.sources.shard_index import Index, make_index
from batchwise.sources.store import Store

PART = ".part"
"""Ending of files that are not yet shards."""
LOOKED_AT = 64
"""Examples from which the size of the others is guessed."""


def write_shards(data: DataModule, folder: Path, mib: float) -> Index:
    """Write the training, validation and test examples as Arrow files, and their index.

    The examples of a split are shuffled, so that each file is a random part of it. They are as `load` gives them,
    before `transform`: columns `inputs` and `targets`, or `inputs.key` where they are nested. Where the method `stored`
    of the data module returns columns, as for a folder of images, it is these. Class numbers become names if there are
    any. The files become shards once all are complete: else an index could be made of a part of the data.

    Args:
        data: has been set up.
        folder: is made, or is empty.
        mib: size of a file.

    Raises:
        ValueError: the folder has files, or the examples are no arrays of one shape.
    """
    optional("pyarrow", "shards")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"path {folder} has files: write another folder, because nothing is replaced")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        fetch = data.split(split)
        if fetch is not None and len(fetch):
            _write_split(data, split, fetch, folder, mib * 2**20)
    for unfinished in folder.glob(f"*{PART}"):
        unfinished.replace(unfinished.with_suffix(".arrow"))
    return make_index(Store(str(folder)))


def _columns(data: DataModule, split: str, fetch: Fetch, index: Tensor) -> dict[str, Any]:
    """Return the columns of some examples by name, as Arrow has them. `index` are their numbers, int64 [N]."""
    own, names = data.stored(split, index), data.class_names
    if own is not None:
        return {name: as_column(values) for name, values in own.items()}
    if getattr(fetch, "lengths", None) is not None:
        raise ValueError(
            f"the {split} split has sequences of unequal length, which no column holds: for texts write data.packing"
        )
    batch, found = read(fetch, index), {}
    for place, leaf in [*leaves(batch.inputs, "inputs"), *leaves(batch.targets, "targets")]:
        name = place.replace("['", ".").replace("']", "")
        if leaf is None:  # there are no targets
            continue
        if isinstance(leaf, Tensor) and leaf.ndim == 1 and name == "targets" and names is not None:
            found[name] = as_column([names[number] for number in leaf.tolist()])
        elif isinstance(leaf, Tensor):
            found[name] = as_column(leaf.numpy())
        else:
            raise ValueError(
                f"{name} of the {split} split has values of several shapes, which no column holds: pad them in collate"
            )
    return found


def _write_split(data: DataModule, split: str, fetch: Fetch, folder: Path, size: float) -> None:
    import pyarrow as pa

    count = len(fetch)
    order, some = Shuffled().prepare(count, 1, seed=0), min(LOOKED_AT, count)

    def table(start: int, stop: int) -> pa.Table:
        return pa.table(_columns(data, split, fetch, order.indices(0, start, stop)))

    each = max(1, round(size * some / table(0, some).nbytes))
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), disable=not sys.stdout.isatty())
    with bar:
        for number, first in enumerate(bar.track(range(0, count, each), description=f"writing {split}")):
            path = folder / f"{split}-{number:05}{PART}"
            save_table(table(first, min(first + each, count)), path)
