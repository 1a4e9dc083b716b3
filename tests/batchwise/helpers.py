"""Running the project in tests, and reading what it left behind."""

import contextlib
import csv
import functools
import gc
import io
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import torch

ROOT = Path(__file__).parents[2]
DIGITS = ("--config", f"{Path(__file__).parent}/digits.yaml")
CSV = ("--config", f"{Path(__file__).parent}/csv.yaml", "--trainer.log_every_n_steps", 1)
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", 2, "--trainer.accelerator", "cpu")
BF16 = ("--trainer.precision", "bf16-mixed")


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        found = re.search(r"^run folder: (.*)$", self.out, re.MULTILINE)
        assert found, self.out + self.err
        return Path(found[1]).absolute()

    def checkpoint(self, name: str = "last") -> dict[str, Any]:
        return torch.load(self.folder / "checkpoints" / f"{name}.ckpt", weights_only=True)

    def rows(self, column: str) -> dict[int, float]:
        """The values of a column of the CSV log, by step."""
        values = {}
        for path in sorted(self.folder.glob("log/version_*/metrics.csv")):
            with path.open() as file:
                values |= {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}
        return values


def absolute(arguments: tuple[object, ...]) -> list[str]:
    """Let `configs/...` mean that of the repository, wherever the test runs."""
    return [re.sub(r"^configs/", f"{ROOT}/configs/", str(argument)) for argument in arguments]


@functools.cache
def command_line() -> Callable[[list[str]], int]:
    """Import the project; what is imported is not garbage, and the collector need not look through it each time."""
    import batchwise.run.cli  # noqa: F401 - which `main` imports otherwise
    from batchwise.run.main import main

    gc.freeze()
    return main


def run_here(*arguments: object) -> Result:
    """Run a command of the project in this process: importing Lightning once is enough."""
    main = command_line()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main("batchwise", absolute(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


class Started:
    """A command of the project, running in a process of its own, which leads a process group of its own.

    Args:
        arguments: of the command.
        fresh: start a new interpreter, as a user does, and not a fork of one that has imported the project.
        environment: variables to add. What makes W&B log to the process of this one's W&B is left out.
    """

    def __init__(self, *arguments: object, fresh: bool = False, **environment: str) -> None:
        pipes = [os.pipe(), os.pipe()]
        self.process = (subprocess.Popen if fresh else forks.Process)(
            [sys.executable, "-m", "batchwise", *absolute(arguments)],
            stdout=pipes[0][1],
            stderr=pipes[1][1],
            env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} | environment,
            process_group=0,
        )
        self._text = [b"", b""]
        self._readers = [
            threading.Thread(target=self._read, args=(number, pipe[0]), daemon=True)
            for number, pipe in enumerate(pipes)
        ]
        for reader, pipe in zip(self._readers, pipes, strict=True):
            os.close(pipe[1])
            reader.start()

    def _read(self, number: int, descriptor: int) -> None:
        while data := os.read(descriptor, 2**16):
            self._text[number] += data
        os.close(descriptor)

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        return self._text[0].decode(errors="replace")

    @property
    def err(self) -> str:
        return self._text[1].decode(errors="replace")

    def until(self, words: str, seconds: float = 60) -> None:
        """Wait until it has written these words to stdout."""
        deadline = time.monotonic() + seconds
        while words not in self.out:
            trains = self.process.poll() is None and time.monotonic() < deadline
            assert trains, self.out + self.err
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it and the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, timeout: float) -> Result:
        """Wait for its end, and that of all processes that share its output."""
        deadline = time.monotonic() + timeout
        for reader in self._readers:
            reader.join(max(0, deadline - time.monotonic()))
        if any(reader.is_alive() for reader in self._readers):
            self.kill()
            raise TimeoutError(f"still running after {timeout} seconds:\n{self.out}{self.err}")
        return Result(self.process.wait(max(0, deadline - time.monotonic())), self.out, self.err)


def run_process(*arguments: object, fresh: bool = False, timeout: float = 120, **environment: str) -> Result:
    """Run a command of the project as a process of its own; a `fresh` one is started as a user does."""
    return Started(*arguments, fresh=fresh, **environment).end(timeout)


def furthest(first: Result, second: Result) -> float:
    """Return the largest difference between the weights of two runs."""
    a, b = first.checkpoint()["state_dict"], second.checkpoint()["state_dict"]
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def p_value(counts: torch.Tensor) -> float:
    """Return the p-value of a chi-square test that the counts come from equally likely cells."""
    counts = counts.double().flatten()
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), statistic / 2))


def wandb_records(path: Path) -> list[Any]:
    """Return W&B's records from an offline run file, once the run has ended there; after a crash it never does.

    W&B still writes for a moment after `finish` has returned.
    """
    until = time.monotonic() + 3
    while True:
        records = list(_wandb_records(path.read_bytes()))
        if any(record.HasField("exit") for record in records) or time.monotonic() > until:
            return records
        time.sleep(0.05)


def _wandb_records(data: bytes) -> Iterator[Any]:
    """Yield the records of a file, which has LevelDB's log format; W&B 0.31 has no reader of its own.

    What a crash has cut off at the end is passed over.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    block, header = 32768, 7  # bytes
    position, message = header, b""  # the file has a header too
    while position + header <= len(data):
        left = block - position % block
        if left < header:  # a block ends in padding where no header fits
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + header, position + header + length
        message += data[start:position]
        if kind in (1, 4) and position <= len(data):  # a full record, or the last part of one
            yield Record.FromString(message)
            message = b""
