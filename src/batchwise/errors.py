"""The two ways in which a run ends with one line and no traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from batchwise.origin import place

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Mistake(ValueError):
    """The user's mistake, found before training: one line that names key, value and remedy. Exit code 2."""


class WrongArgument(Mistake, TypeError):
    """An argument in Python that has a wrong type, or is out of its range."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, what is saved, and what to do.

    Args:
        message: one line.
        code: the exit code.
        everywhere: all processes stop for the same reason, so only the first of them says it.
    """

    def __init__(self, message: str, code: int = 1, everywhere: bool = False) -> None:
        super().__init__(message)
        self.code, self.everywhere = code, everywhere


def disk_is_full(error: BaseException) -> bool:
    """Return whether an error says that nothing more can be written to a disk."""
    return isinstance(error, OSError) and error.errno in FULL


def lost_connection(error: RuntimeError) -> bool:
    """Return whether an error says that another process of the same training no longer answers."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn a wrong value or file into the user's mistake, but for a full disk. For use before training."""
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        if disk_is_full(error):
            raise
        raise Mistake(" ".join(line.strip() for line in str(error).splitlines()) + place(error)) from error


def optional(module: str, extra: str) -> Any:
    """Import and return a module that is installed with an extra of this package.

    Raises:
        ValueError: the module is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[{extra}]'") from error
