"""How fast examples come from shards: ours, other libraries, a memory map, and a plain read of the same bytes.

Each turn is one epoch from an empty cache, with shuffling, in batches of 256, nothing else done with the batch: blocks
of 2,048 tokens of four bytes, and JPEG files of 64 KB that are decoded to 224 x 224 by two processes. Shards have 16
MiB. `--s3` reads from a server on this machine that answers each request 20 ms late. The libraries mosaicml-streaming,
litdata and webdataset are measured if they are installed; the server needs moto and s3fs.

    python scripts/lab/bench_shards.py
    python scripts/lab/bench_shards.py --s3
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import bench
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchwise.batching.shards import BlockShuffled
from batchwise.sources.images import ImageFormat
from batchwise.sources.shard_files import as_column, save_table
from batchwise.sources.shard_index import make_index
from batchwise.sources.shards import Shards
from batchwise.sources.store import Store

BATCH_SIZE, SHARD, TOKENS, LATENCY = 256, 2**24, 2048, 0.02
FORMAT = ImageFormat.of(224, 3, "crop")
KEYS = {
    "AWS_ALLOW_HTTP": "true",
    "AWS_ACCESS_KEY_ID": "x",
    "AWS_SECRET_ACCESS_KEY": "x",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def decoded(image: bytes) -> Tensor:
    """Return an image as all alternatives decode it, uint8 [3, 224, 224]."""
    return torch.from_numpy(FORMAT.decode(io.BytesIO(image)))


class Data:
    """The same examples in the format of each library.

    Args:
        folder: for the files.
        images: JPEG files and not tokens.
        mib: of all examples.
    """

    def __init__(self, folder: Path, images: bool, mib: float) -> None:
        self.folder, self.images = folder, images
        rng, size = np.random.default_rng(0), int(mib * 2**20)
        if images:
            self.examples: list[Any] = [jpeg(rng) for _ in range(min(64, size // 2**16))]  # others are copies of these
            self.examples = [self.examples[number % len(self.examples)] for number in range(size // 2**16)]
        else:
            self.examples = list(rng.integers(0, 50_000, (size // 4 // TOKENS, TOKENS), np.int32))
        self.each = max(1, SHARD // (2**16 if images else 4 * TOKENS))
        self.write_arrow(folder / "ours")
        self.write_raw(folder / "raw")
        for name, write in (
            ("streaming", self.write_mds),
            ("litdata", self.write_litdata),
            ("webdataset", self.write_tar),
        ):
            if find_spec(name):
                write(folder / name)

    def shards(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the examples of each shard."""
        for number, first in enumerate(range(0, len(self.examples), self.each)):
            yield number, self.examples[first : first + self.each]

    def write_arrow(self, folder: Path) -> None:
        """Write Arrow files and their index."""
        import pyarrow as pa

        folder.mkdir()
        for number, examples in self.shards():
            save_table(pa.table({"x": as_column(examples)}), folder / f"{number:05}.arrow")
        make_index(Store(str(folder)))

    def write_raw(self, folder: Path) -> None:
        """Write one file of all bytes."""
        folder.mkdir()
        with (folder / "all").open("wb") as file:
            for example in self.examples:
                file.write(example if self.images else example.tobytes())

    def write_mds(self, folder: Path) -> None:
        """Write what mosaicml-streaming reads."""
        streaming = import_module("streaming")
        columns = {"x": "jpeg_bytes" if self.images else f"ndarray:int32:{TOKENS}"}
        columns = {"x": "bytes"} if self.images else columns
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=SHARD, progress_bar=False) as out:
            for example in self.examples:
                out.write({"x": example})

    def write_litdata(self, folder: Path) -> None:
        """Write what litdata reads."""
        folder.mkdir()
        writer = import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes=SHARD)
        for number, example in enumerate(self.examples):
            writer[number] = {"x": example if self.images else torch.from_numpy(example)}
        writer.done()
        writer.merge()

    def write_tar(self, folder: Path) -> None:
        """Write what WebDataset reads."""
        folder.mkdir()
        for number, examples in self.shards():
            with tarfile.open(folder / f"{number:05}.tar", "w") as archive:
                for place, example in enumerate(examples):
                    data = example if self.images else example.tobytes()
                    member = tarfile.TarInfo(f"{number:05}{place:06}.x")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))


def jpeg(rng: np.random.Generator) -> bytes:
    """Return a JPEG file of about 64 KB."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).resize((400, 400), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-20, 21, (400, 400, 3), np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=85)
    return file.getvalue()


def turn(make: Callable[[str], Iterable[Any]], data: Data, cache: Path) -> Callable[[], float]:
    """Return a run of one epoch from an empty cache, in examples per second."""
    number = count()

    def run() -> float:
        shutil.rmtree(cache, ignore_errors=True)
        seen, started = 0, time.perf_counter()
        for batch in make(str(cache / str(next(number)))):
            seen += batch
        assert seen == len(data.examples), (seen, len(data.examples))
        return seen / (time.perf_counter() - started)

    return run


class Decoding(Shards):
    """Images of 224 x 224, or blocks of tokens."""


def ours(data: Data, address: str, cache: str, options: dict[str, Any], workers: int) -> Iterator[int]:
    """Yield the size of each batch of ours."""
    made = Decoding(
        address, "x", None, size=224, cache=cache, batch_size=BATCH_SIZE, order=BlockShuffled(8), seed=0,
        num_workers=workers, storage_options=options,
    )  # fmt: skip
    made.setup("fit")
    yield from (len(batch) for batch in made.train_dataloader())


def mds(data: Data, address: str, cache: str, workers: int) -> Iterator[int]:
    """Yield the size of each batch of mosaicml-streaming."""

    class Own(import_module("streaming").StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            value = super().__getitem__(at)["x"]
            return decoded(value) if data.images else torch.from_numpy(value.copy())

    where = {"remote": address, "local": cache} if "://" in address else {"local": address}
    for name in os.listdir("/dev/shm"):  # a dead reader's memory stops the next one
        if name.endswith(("_barrier_filelock", "_locals")) or name[:6].isdigit():
            with contextlib.suppress(OSError):
                os.unlink(f"/dev/shm/{name}")
    dataset = Own(**where, shuffle=True, batch_size=BATCH_SIZE)
    yield from (len(batch) for batch in DataLoader(dataset, BATCH_SIZE, num_workers=workers))


def litdata(data: Data, address: str, cache: str, workers: int) -> Iterator[int]:
    """Yield the size of each batch of litdata."""
    library = import_module("litdata")

    class Own(library.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            value = super().__getitem__(index)["x"]
            return decoded(value) if data.images else value

    options = {"storage_options": {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}} if "://" in address else {}
    where = {"input_dir": address, "cache_dir": cache} if "://" in address else {"input_dir": address}
    dataset = Own(**where, shuffle=True, drop_last=False, **options)
    yield from (
        len(batch) for batch in library.StreamingDataLoader(dataset, batch_size=BATCH_SIZE, num_workers=workers)
    )


def webdataset(data: Data, address: str, cache: str, workers: int) -> Iterator[int]:
    """Yield the size of each batch of WebDataset."""
    wds = import_module("webdataset")
    names = [f"{number:05}.tar" for number, _ in data.shards()]
    url = address.replace("s3://", os.environ.get("AWS_ENDPOINT_URL", "") + "/")
    urls = [f"pipe:curl -s {url}/{name}" if "://" in address else f"{address}/{name}" for name in names]
    made = wds.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(1000)
    read = decoded if data.images else (lambda value: torch.from_numpy(np.frombuffer(value, np.int32).copy()))
    dataset = made.map(lambda row: (read(row["x"]),)).batched(BATCH_SIZE)
    yield from (len(batch) for (batch,) in wds.WebLoader(dataset, batch_size=None, num_workers=workers))


class Mapped(Dataset):
    """The examples in one memory-mapped file, read one by one."""

    def __init__(self, data: Data) -> None:
        self.data, self.path = data, data.folder / "raw" / "all"
        self.ends = np.cumsum([len(example) for example in data.examples]) if data.images else np.zeros(0)

    def __len__(self) -> int:
        return len(self.data.examples)

    def __getitem__(self, number: int) -> Tensor:
        """Return an example."""
        if not self.data.images:
            return torch.from_numpy(np.memmap(self.path, np.int32, "r").reshape(-1, TOKENS)[number].copy())
        end = int(self.ends[number])
        file = np.memmap(self.path, np.uint8, "r")
        return decoded(file[end - len(self.data.examples[number]) : end].tobytes())


def mapped(data: Data, workers: int) -> Iterator[int]:
    """Yield the size of each batch from a memory map: gathered at once, or decoded by a DataLoader."""
    if not data.images:
        file = torch.from_numpy(np.memmap(data.folder / "raw" / "all", np.int32, "r+").reshape(-1, TOKENS))
        yield from (len(file.index_select(0, index)) for index in torch.randperm(len(file)).split(BATCH_SIZE))
        return
    yield from (len(batch) for batch in DataLoader(Mapped(data), BATCH_SIZE, shuffle=True, num_workers=workers))


def plain_read(data: Data) -> Iterator[int]:
    """Read the bytes of the shards in order, and call a share of them an example."""
    size = BATCH_SIZE * (data.folder / "raw" / "all").stat().st_size // len(data.examples)
    buffer, left = bytearray(size), len(data.examples)
    with (data.folder / "raw" / "all").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            yield min(BATCH_SIZE, left)
            left -= min(BATCH_SIZE, left)
    yield left


def alternatives(data: Data, where: str, options: dict[str, Any], workers: int) -> dict[str, Callable[[], float]]:
    """Return a run of each alternative that is installed."""
    cache = data.folder / "cache"
    found = {"ours": turn(lambda own: ours(data, f"{where}/ours", own, options, workers), data, cache)}
    for name, module, make in (
        ("mosaicml-streaming", "streaming", mds),
        ("litdata", "litdata", litdata),
        ("WebDataset", "webdataset", webdataset),
    ):
        if find_spec(module):
            found[name] = turn(
                lambda own, make=make, module=module: make(data, f"{where}/{module}", own, max(1, workers)), data, cache
            )
    if "://" not in where:
        found["memory map"] = turn(lambda _: mapped(data, workers), data, cache)
        found["plain read"] = turn(lambda _: plain_read(data), data, cache)
    return found


# The server


class Late(threading.Thread):
    """Forwards connections to another port; the first byte of each answer comes late."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.behind, self.seconds = port, seconds
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def run(self) -> None:
        """Accept connections."""
        while True:
            client, _ = self.socket.accept()
            server = socket.create_connection(("127.0.0.1", self.behind))
            asked = threading.Event()
            threading.Thread(target=self._pump, args=(client, server, asked, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, asked, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, asked: threading.Event, late: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**18):
                if late and asked.is_set():
                    time.sleep(self.seconds)
                    asked.clear()
                elif not late:
                    asked.set()
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the address of the folder on a server, and the options for it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        proxy = Late(port, LATENCY)
        proxy.start()
        os.environ.update(KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"})
        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        client = import_module("boto3").client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        for _ in range(100):
            with contextlib.suppress(Exception):
                client.create_bucket(Bucket="data", ACL="public-read-write")
                break
            time.sleep(0.2)
        for path in folder.rglob("*"):
            if path.is_file() and "raw" not in path.parts:
                client.upload_file(str(path), "data", str(path.relative_to(folder)), ExtraArgs={"ACL": "public-read"})
        yield "s3://data", {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    finally:
        process.kill()


def main() -> None:
    """Measure, and print a table for each kind of data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="rounds after the warm-up; 0: the warm-up counts")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the bytes: 512 MiB of tokens, 256 of images")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch threads")
    parser.add_argument("--kinds", nargs="+", default=["tokens", "images"], choices=["tokens", "images"])
    parser.add_argument("--s3", action="store_true", help="from a server that answers late")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given, figures = bench.prepare(parser), {}
    for kind, images, mib, workers in (("tokens", False, 512, 0), ("images", True, 256, 2)):
        if kind not in given.kinds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            data = Data(Path(folder), images, max(1, mib * given.scale))
            with s3(Path(folder)) if given.s3 else contextlib.nullcontext((folder, {})) as (where, options):
                measured = bench.interleave(alternatives(data, where, options, workers), given.pairs)
            title = f"{len(data.examples):,} {kind}{', from a server' if given.s3 else ''}"
            figures[title] = bench.report(title, "examples/s", measured, "ours")
    bench.save(given.json, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
