"""A lock, so that no two trainings write the checkpoints of one run at the same time."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from lightning.pytorch.utilities import rank_zero_only


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, in the first process of a training. The system frees it if the process dies.

    It is a lock of `lockf`, which no process inherits: after `kill -9`, the processes that read the data live on for
    some seconds, and must not hold it. Where the file system has no locks, nothing is held.

    Raises:
        ValueError: another training holds it.
    """
    if rank_zero_only.rank != 0:
        yield
        return
    path = folder / "checkpoints" / ".lock"
    with _locked(path) as file:
        try:
            with contextlib.suppress(OSError):  # of a full disk: the lock holds without the name of its holder
                file.truncate(0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO:
    """Return the file, open and locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                raise ValueError(
                    f"ckpt_path is of {path.parents[1]}, where {holder} is training: wait until it has ended, or leave "
                    "ckpt_path out to begin a new run"
                ) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its holder has just ended, and removed it
