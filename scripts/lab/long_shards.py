"""Memory and disk while 20 GB of shards come through a cache of 1 GB, under a memory limit of 1 GB.

A server on this machine makes shards of 64 MiB when they are asked for: blocks of 2,048 tokens, others in each shard.
The reader takes every example once, in batches of 256, shuffled in windows of six shards, and checks that each block is
the right one. It is in a control group of its own with the limit, if this process may make one (as root on Linux).

    python scripts/lab/long_shards.py
    python scripts/lab/long_shards.py --shards 30
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

TOKENS, BLOCKS = 2048, 8192
GROUPS = (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup"))
LIMITS = ("memory.limit_in_bytes", "memory.max")


@cache
def template() -> tuple[bytes, int]:
    """Return a shard, and the place of its first token. Its tokens are the number of the block and then zeros."""
    import pyarrow as pa

    from batchwise.sources.shard_files import as_column

    blocks = np.zeros((BLOCKS, TOKENS), np.int32)
    blocks[:, 0], blocks[:, 1] = np.arange(BLOCKS), 2**30 + 1
    table, sink = pa.table({"tokens": as_column(blocks)}), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    data = sink.getvalue().to_pybytes()
    return data, data.index(np.array([0, 2**30 + 1], np.int32).tobytes())


def shard(number: int) -> bytearray:
    """Return a shard: the second token of each block is its number."""
    data, first = template()
    made = bytearray(data)
    tokens = np.frombuffer(made, np.int32, BLOCKS * TOKENS, first).reshape(BLOCKS, TOKENS)
    tokens[:, 1] = number
    return made


class Handler(BaseHTTPRequestHandler):
    """Serves the index, and shards by their numbers."""

    index = b""

    def do_HEAD(self) -> None:
        """Say the length."""
        self._answer(b"")

    def do_GET(self) -> None:
        """Send a file."""
        name = self.path.rpartition("/")[2]
        self._answer(self.index if name == "shards.json" else bytes(shard(int(name.partition(".")[0]))))

    def _answer(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serve(shards: int, pipe: Any) -> None:
    """Make the index, send the port, and serve."""
    from batchwise.sources.shard_index import FORMAT, Column, Index, Shard

    index = Index(columns={"tokens": Column(f"fixed_size_list<item: int32>[{TOKENS}]")})
    for number in range(shards):
        data = shard(number)
        digest = hashlib.sha256(data).hexdigest()[:32]
        index.shards.append(Shard(f"{number:05}.arrow", "train", BLOCKS, len(data), 4 * BLOCKS * TOKENS, digest))
    Handler.index = json.dumps({"format": FORMAT, **asdict(index)}).encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(server.server_address[1])
    server.serve_forever()


def read(port: int, folder: str, group: Path | None, limit: int, workers: int, pipe: Any) -> None:
    """Read all examples, and send how many there were."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    import torch

    from batchwise.batching.shards import BlockShuffled
    from batchwise.sources.shards import Shards

    torch.set_num_threads(1)
    data = Shards(
        f"http://127.0.0.1:{port}", "tokens", None, cache=f"{folder}/cache", cache_gib=limit / 2**30, batch_size=256,
        order=BlockShuffled(6), seed=0, num_workers=workers,
    )  # fmt: skip
    data.setup("fit")
    pipe.send(0)
    seen = 0
    for batch in data.train_dataloader():
        (part,) = batch.micro_batches
        right = torch.stack([part.index % BLOCKS, part.index // BLOCKS], 1)
        assert torch.equal(part.inputs[:, :2].long(), right)
        seen += len(part)
        pipe.send(seen)
    pipe.send(None)


def memory(pid: int) -> tuple[int, int]:
    """Return the memory of a process and of those it has started: its own, and that of mapped files, in bytes."""
    own = mapped = 0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for each in [pid, *map(int, children)]:
        with contextlib.suppress(OSError):
            status = dict(line.split(":", 1) for line in Path(f"/proc/{each}/status").read_text().splitlines())
            own += int(status["RssAnon"].split()[0]) * 1024
            mapped += int(status["RssFile"].split()[0]) * 1024
    return own, mapped


def disk(folder: Path) -> int:
    """Return the bytes in a folder."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):
            size += path.stat().st_blocks * 512
    return size


def make_group(limit: int) -> Path | None:
    """Return a new control group with a limit of memory, if that is allowed."""
    for parent, name in zip(GROUPS, LIMITS, strict=True):
        with contextlib.suppress(OSError):
            group = parent / f"long_shards_{os.getpid()}"
            group.mkdir()
            (group / name).write_text(str(limit))
            return group
    return None


def main() -> int:
    """Read, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=300, help="of 64 MiB")
    parser.add_argument("--cache_gib", type=float, default=1.0)
    parser.add_argument("--memory_gib", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    start = multiprocessing.get_context("spawn")
    group = make_group(int(given.memory_gib * 2**30))
    print(f"memory limit: {given.memory_gib} GiB" if group else "no memory limit: no control group can be made")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = start.Pipe()
        server = start.Process(target=serve, args=(given.shards, theirs), daemon=True)
        server.start()
        port = ours.recv()
        limit = int(given.cache_gib * 2**30)
        reader = start.Process(target=read, args=(port, folder, group, limit, given.workers, theirs))
        reader.start()
        begun, said, most, total = time.perf_counter(), 0.0, [0, 0, 0], given.shards * BLOCKS
        print("| seconds | GB read | own memory, MB | mapped files, MB | cache, MB |\n|--:|--:|--:|--:|--:|")
        seen: int | None = 0
        while seen is not None:
            if not ours.poll(5) and not reader.is_alive():
                break
            while ours.poll():
                seen = ours.recv()
                if seen is None:
                    break
            else:
                now = [*memory(reader.pid or 0), disk(Path(folder, "cache"))]
                most = list(map(max, most, now))
                if seen and seen >= said * total:
                    said += 0.1
                    figures = [time.perf_counter() - begun, seen * TOKENS * 4 / 1e9, *(value / 1e6 for value in now)]
                    print("| " + " | ".join(f"{value:,.1f}" for value in figures) + " |", flush=True)
                time.sleep(0.05)
        reader.join()
        server.kill()
        print(f"most: own {most[0] / 1e6:,.0f} MB, mapped {most[1] / 1e6:,.0f} MB, cache {most[2] / 1e6:,.0f} MB")
        print(f"{total * TOKENS * 4 / 1e9:.1f} GB in {time.perf_counter() - begun:.0f} s")
    if group:
        with contextlib.suppress(OSError):
            group.rmdir()
    return reader.exitcode or 0


if __name__ == "__main__":
    sys.exit(main())
