"""A folder of files, on this machine or in an object store that `fsspec` knows."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from batchwise.host import write_whole


class Store:
    """A folder that is read by name, in any process.

    Args:
        address: a path, or an address such as s3://bucket/folder, gs://..., https://..., memory://....
        options: of the file system, such as an endpoint.

    Raises:
        ValueError: what reads such addresses is not installed.
    """

    def __init__(self, address: str, options: dict[str, Any] | None = None) -> None:
        self.address, self.options = os.path.expanduser(address), options or {}
        self._opened: tuple[int, Any, str] | None = None
        try:
            self.local = Path(self._open()[1]) if isinstance(self._open()[0], LocalFileSystem) else None
        except ImportError as error:
            raise ValueError(f"data.path {address}: {error}") from error
        except ValueError as error:
            raise ValueError(f"data.path {address} is no address that can be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the folder's name in it: anew after a fork, which no connection outlives."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), *fsspec.url_to_fs(self.address, **self.options)
        return self._opened[1:]

    def _at(self, name: str) -> tuple[Any, str]:
        system, root = self._open()
        return system, f"{root.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Return the names of all files, sorted, without hidden ones."""
        system, root = self._open()
        found = [path[len(root.rstrip("/")) + 1 :] for path in system.find(root)]
        return sorted(name for name in found if not any(part.startswith(".") for part in name.split("/")))

    def read(self, name: str) -> bytes:
        """Return what is in a file."""
        system, path = self._at(name)
        return system.cat_file(path)

    def write(self, name: str, data: bytes) -> None:
        """Write a file: whole or not at all, if the store is this machine.

        Raises:
            ValueError: the store is read only.
        """
        system, path = self._at(name)
        if self.local is None:
            try:
                system.pipe_file(path, data)
            except Exception as error:  # each store raises its own
                raise ValueError(
                    f"{name} cannot be written to {self.address} ({said(error)}): make it on a copy of the files, and "
                    "put it beside them"
                ) from error
            return
        write_whole(Path(path), data)

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        system, path = self._at(name)
        if system.exists(path):
            system.rm_file(path)

    def size(self, name: str) -> int:
        """Return the bytes of a file."""
        system, path = self._at(name)
        return int(system.size(path))

    def get(self, name: str, path: Path, each: Callable[[int], None]) -> None:
        """Copy a file to this machine.

        Args:
            name: of the file.
            path: where it goes.
            each: is called with the number of bytes that have come since the last call.
        """
        system, source = self._at(name)
        system.get_file(source, str(path), callback=_Counting(each))


def said(error: Exception) -> str:
    """Return an error in one short line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Counting(Callback):
    def __init__(self, each: Callable[[int], None]) -> None:
        super().__init__()
        self._each = each

    def relative_update(self, inc: int = 1) -> None:
        self._each(inc)

    def absolute_update(self, value: int) -> None:
        self._each(value - self.value)
        self.value = value
