"""Shards from a server that fails, killed processes and a small cache: the result is that of the same files at hand."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import TWO, Result, Started, furthest, run_here, run_process

from batchwise.sources.digits import Digits
from batchwise.sources.shard_index import read_index
from batchwise.sources.shard_writing import write_shards
from batchwise.sources.store import Store

FIT = (
    *("fit", "--config", "configs/shards.yaml", "--trainer.precision", "64-true", "--trainer.accelerator", "cpu"),
    *("--data.inputs", "inputs", "--data.target", "targets", "--data.order.window", 4, "--data.batch_size", 100),
    *("--trainer.enable_progress_bar", "false", "--trainer.max_epochs", 2),
)


class Handler(SimpleHTTPRequestHandler):
    """Serves files. Some answers are errors, and some end too early."""

    asked = 0

    def do_GET(self) -> None:
        Handler.asked += 1
        if Handler.asked % 10 == 3 and self.path.endswith(".arrow"):
            self.send_error(503)
        elif Handler.asked % 10 == 7 and self.path.endswith(".arrow"):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half of it")
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(folder: str, port: int = 0) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "made"
    write_shards(Digits(batch_size=64), folder, 0.004)
    return folder


@pytest.fixture(scope="module")
def at_hand(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    result = run_here(*FIT, "--data.path", shards, "--trainer.default_root_dir", tmp_path_factory.mktemp("runs"))
    assert result.code == 0, result.err
    return result


@pytest.mark.weekly
def test_a_server_that_fails_and_is_away_for_a_while(shards: Path, at_hand: Result) -> None:
    """Two processes, micro-batches, and a cache that holds half of the shards."""
    sizes = [shard.size for shard in read_index(Store(str(shards))).shards]
    small = ("--data.cache_gib", sum(sizes) / 2 / 2**30, "--data.micro_batch_size", 17)
    with serving(str(shards)) as port:
        run = Started(*FIT, *TWO, *small, "--data.path", f"http://127.0.0.1:{port}", OMP_NUM_THREADS="1")
        while run.process.poll() is None and len(list(Path(".cache/shards").glob("*.arrow"))) < 5:
            time.sleep(0.01)
    time.sleep(1)
    with serving(str(shards), port):
        result = run.end(120)
    assert result.code == 0, result.out + result.err
    assert "cannot be read" in result.out
    assert "trying again in" in result.out
    assert furthest(result, at_hand) < 1e-12
    kept = [path.stat().st_size for path in Path(".cache/shards").iterdir() if path.suffix != ".lock"]
    assert 0 < sum(kept) <= sum(sizes) / 2


@pytest.mark.slow
def test_killed_while_it_writes_the_cache(shards: Path, at_hand: Result) -> None:
    with serving(str(shards)) as port:
        path = ("--data.path", f"http://127.0.0.1:{port}", "--ckpt_path", "last")
        for number in range(2):
            run = Started(*FIT, *path)
            while run.process.poll() is None and not (
                list(Path(".cache/shards").glob("*.room")) and len(list(Path(".cache/shards").glob("*.arrow"))) > number
            ):
                time.sleep(0.0005)
            run.kill()
            run.end(30)
        result = run_process(*FIT, *path)
    assert result.code == 0, result.out + result.err
    assert furthest(result, at_hand) < 1e-12
    assert {path.suffix for path in Path(".cache/shards").iterdir()} == {".lock", ".arrow"}


@pytest.mark.slow
def test_an_index_that_cannot_be_written(shards: Path) -> None:
    with serving(str(shards)) as port:
        result = run_here("shards", f"http://127.0.0.1:{port}")
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


@pytest.mark.slow
def test_a_server_that_is_not_there() -> None:
    with serving(".") as port:
        pass
    gone = run_here(*FIT, "--data.path", f"http://127.0.0.1:{port}")
    assert gone.code == 2
    assert gone.err.startswith(f"error: data.path http://127.0.0.1:{port} cannot be read: ")
    assert gone.err.count("\n") == 1
