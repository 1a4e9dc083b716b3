"""Running the project in tests, and reading what it left behind."""

import contextlib
import csv
import io
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
DIGITS = ("--config", "configs/digits.yaml")
CSV = ("--config", "configs/overlays/csv.yaml", "--trainer.log_every_n_steps", 1)


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


def run_here(*arguments: object) -> Result:
    """Run a command of the project in this process: importing Lightning once is enough."""
    from project.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(absolute(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def run_process(*arguments: object, timeout: float = 120, **environment: str) -> Result:
    """Run a command of the project as a process of its own, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "project", *absolute(arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def furthest(first: Result, second: Result) -> float:
    """Return the largest difference between the weights of two runs."""
    a, b = first.checkpoint()["state_dict"], second.checkpoint()["state_dict"]
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def wandb_records(path: Path) -> Iterator[Any]:
    """Read an offline run file: wandb's records in LevelDB's log format (wandb 0.31 has no reader any more)."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # a block ends in padding where no header fits
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""
