"""The time to the first batch, and to the first one after a resume, of a data set of a billion examples in shards.

A hundred thousand shards of 10,000 examples each; on the disk all of them are one file. Each measurement is a process
of its own, from after its imports to the batch: at the start, and at step 1,000,000 with batches of 256. The libraries
mosaicml-streaming and litdata are measured if they are installed.

    python scripts/lab/start_shards.py
    python scripts/lab/start_shards.py --shards 1000
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

EACH, TOKENS, BATCH_SIZE = 10_000, 4, 256
EXAMPLES = np.arange(EACH * TOKENS, dtype=np.int32).reshape(EACH, TOKENS)


def write_ours(folder: Path, shards: int) -> None:
    """Write a shard, links to it, and the index."""
    import pyarrow as pa

    from batchwise.sources.shard_files import as_column, save_table
    from batchwise.sources.shard_index import FILE, FORMAT, make_index
    from batchwise.sources.store import Store

    save_table(pa.table({"x": as_column(EXAMPLES)}), folder / "00000.arrow")
    index = make_index(Store(str(folder)))
    names = [f"{number:05}.arrow" for number in range(shards)]
    link(folder / "00000.arrow", names[1:])
    index.shards = [index.shards[0]._replace(name=name) for name in names]
    (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(index)}))


def write_mds(folder: Path, shards: int) -> None:
    """Write the same for mosaicml-streaming."""
    with import_module("streaming").MDSWriter(
        out=str(folder / "all"), columns={"x": f"ndarray:int32:{TOKENS}"}, size_limit=2**30, progress_bar=False
    ) as out:
        for example in EXAMPLES:
            out.write({"x": example})
    (folder / "all" / "shard.00000.mds").rename(folder / "shard.00000.mds")
    index = json.loads((folder / "all" / "index.json").read_text())
    names = [f"shard.{number:05}.mds" for number in range(shards)]
    link(folder / names[0], names[1:])
    (one,) = index["shards"]
    index["shards"] = [one | {"raw_data": one["raw_data"] | {"basename": name}} for name in names]
    (folder / "index.json").write_text(json.dumps(index))


def write_litdata(folder: Path, shards: int) -> None:
    """Write the same for litdata."""
    writer = import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes=2**30)
    for number, example in enumerate(EXAMPLES):
        writer[number] = {"x": import_module("torch").from_numpy(example)}
    writer.done()
    writer.merge()
    index = json.loads((folder / "index.json").read_text())
    (one,) = index["chunks"]
    names = [f"chunk-0-{number}.bin" for number in range(shards)]
    link(folder / one["filename"], [name for name in names if name != one["filename"]])
    index["chunks"] = [one | {"filename": name} for name in names]
    (folder / "index.json").write_text(json.dumps(index))


def link(path: Path, names: list[str]) -> None:
    """Give a file more names."""
    for name in names:
        (path.parent / name).symlink_to(path)


def read_ours(folder: Path, step: int) -> Any:
    """Return the batch of a step."""
    from batchwise.sources.shards import Shards

    data = Shards(str(folder), "x", None, cache=str(folder / "cache"), batch_size=BATCH_SIZE, seed=0)
    data.setup("fit")
    data.load_state_dict(data.state_dict() | {"step": step})
    return next(iter(data.train_dataloader()))


def read_mds(folder: Path, step: int) -> Any:
    """Return the batch of a step."""
    streaming = import_module("streaming")
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH_SIZE)
    loader = streaming.StreamingDataLoader(dataset, batch_size=BATCH_SIZE)
    if step:
        seen = step * BATCH_SIZE
        state = {"epoch": 0, "sample_in_epoch": seen, "num_canonical_nodes": 64, "shuffle_seed": 9176}
        loader.load_state_dict(state | {"initial_physical_nodes": 1})
    return next(iter(loader))


def read_litdata(folder: Path, step: int) -> Any:
    """Return the first batch. A resume needs a state that only training so far can give."""
    library = import_module("litdata")
    dataset = library.StreamingDataset(str(folder), shuffle=True, drop_last=False)
    return next(iter(library.StreamingDataLoader(dataset, batch_size=BATCH_SIZE)))


LIBRARIES: dict[str, tuple[str, Callable, Callable, bool]] = {
    "ours": ("batchwise", write_ours, read_ours, True),
    "mosaicml-streaming": ("streaming", write_mds, read_mds, True),
    "litdata": ("litdata", write_litdata, read_litdata, False),
}


def measure(name: str, folder: Path, step: int, pipe: Any) -> None:
    """Send the seconds to the batch of a step, and the most memory in MB."""
    import_module(LIBRARIES[name][0])
    if name == "ours":
        import_module("batchwise.sources.shards")
    started = time.perf_counter()
    LIBRARIES[name][2](folder, step)
    pipe.send((time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--patience", type=float, default=300, help="the most seconds of a measurement")
    given = parser.parse_args()
    step = given.shards * EACH * 256 // 1000 // BATCH_SIZE
    print(f"{given.shards * EACH:,} examples\n")
    print(f"| | first batch | memory | at step {step:,} | memory |\n|---|--:|--:|--:|--:|")
    start = multiprocessing.get_context("spawn")
    for name, (module, write, _, resumes) in LIBRARIES.items():
        if not find_spec(module):
            continue
        folder, cells = Path(tempfile.mkdtemp()), []
        write(folder, given.shards)
        for at in (0, step) if resumes else (0,):
            ours, theirs = start.Pipe()
            process = start.Process(target=measure, args=(name, folder, at, theirs))
            process.start()
            theirs.close()
            try:
                seconds, memory = ours.recv() if ours.poll(given.patience) else (None, 0.0)
            except EOFError:
                seconds, memory = None, 0.0
            process.kill()
            cells += ["-", "-"] if seconds is None else [f"{seconds:.2f} s", f"{memory:,.0f} MB"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
