"""The two ways in which a run ends with one line and no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException


class Mistake(Exception):
    """The user's mistake, found before training: one line that names key, value and remedy. Exit code 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why, what is saved, and what to do.

    Args:
        message: one line.
        code: the exit code.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def mistakes() -> Iterator[None]:
    """While nothing has been trained, turn a wrong value or file into the user's mistake."""
    try:
        yield
    except (ValueError, OSError, MisconfigurationException) as error:
        raise Mistake(str(error)) from error
