"""Shards on this machine: fetched once, checked, and kept in a folder of bounded size that all processes share."""

import errno
import os
import shutil
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from batchwise.batching.fetch import DataError
from batchwise.sources.shard_files import is_plain, plain_table, read_shard, save_table
from batchwise.sources.shard_index import Shard, sha256
from batchwise.sources.store import Store, said

if TYPE_CHECKING:
    from pyarrow import Table

FORMAT = 1
"""Version of the files in the cache."""
TRIES = 3
"""How often a shard is read that is missing or is another one than the index says."""
ROOM = ".room"
ROOM_LOCK = "room.lock"
WORK = (".part", ".raw", ROOM)
"""Endings of temporary files: the shard as it is written, as it came, and a sparse file of the length of both."""
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of a folder that cannot be written."""
SHORT_WAIT = 0.02
"""Seconds between two looks for room."""
LONGEST_WAIT = 30.0
"""The most seconds between two tries, and before a line says that a shard is slow."""


class WrongShard(ValueError):
    """The size or the hash of a shard differs from that in the index."""


class Cache:
    """A folder of Arrow files, one for each shard that is in use, with the columns that are wanted.

    A file has its name only when it is complete. While one process makes it, the others wait. What has not been used
    for the longest time is deleted when room is needed. A file that is deleted stays readable to those who have it
    open. An Arrow file on this machine is used where it is, once it was checked.

    Args:
        store: has the shards.
        folder: of the cache.
        limit: its most bytes.
        columns: those that are kept.
        patience: seconds for which a store is asked again that does not answer.
    """

    def __init__(self, store: Store, folder: Path, limit: int, columns: list[str], patience: float) -> None:
        self.store, self.folder, self.limit, self.columns, self.patience = store, folder, limit, columns, patience

    def prepare(self, shard: Shard) -> None:
        """Have a shard ready for `open`: on this machine, and on the way from the disk to the memory."""
        path = self._path(shard)
        if not path.exists():
            self.try_to_open(shard)
        with suppress(FileNotFoundError), (self.direct(shard) or path).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def open(self, shard: Shard) -> tuple[Path, "Table"]:
        """Return a shard, which is mapped into memory, and its file in the cache. Errors are tried again.

        Raises:
            DataError: it is missing or damaged, the store does not answer, or the disk is full.
        """
        begun, tries = monotonic(), 0
        while True:
            try:
                return self.try_to_open(shard)
            except DataError:
                raise
            except Exception as error:  # each store raises its own
                tries += 1
                self._judge(shard, error, tries, monotonic() - begun)
                wait = min(LONGEST_WAIT, 2.0 ** (tries - 2))
                print(f"shard {shard.name} cannot be read ({said(error)}): trying again in {wait:.3g} s", flush=True)
                sleep(wait)

    def _judge(self, shard: Shard, error: Exception, tries: int, seconds: float) -> None:
        """Raise DataError if another try cannot help."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"shard {shard.name} does not fit into data.cache {self.folder}: the disk is full; make room, write "
                "another folder, or a smaller data.cache_gib"
            ) from error
        if isinstance(error, OSError) and error.errno in CLOSED and str(self.folder) in str(error):
            raise DataError(f"data.cache {self.folder} cannot be written: write another folder") from error
        missing = isinstance(error, FileNotFoundError | PermissionError)
        if tries >= TRIES and isinstance(error, WrongShard):
            raise DataError(str(error)) from error
        if tries >= TRIES and (missing or isinstance(error, ValueError)):
            what = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({said(error)})"
            raise DataError(
                f"shard {shard.name} of data.path {self.store.address} {what}: put it back, or make the index anew "
                "with the command shards"
            ) from error
        if seconds > self.patience:
            raise DataError(
                f"shard {shard.name} of data.path {self.store.address} could not be read for {seconds:.0f} s "
                f"({said(error)}): --ckpt_path last goes on once it can be; data.patience says how long to wait"
            ) from error

    def try_to_open(self, shard: Shard) -> tuple[Path, "Table"]:
        """Return a shard and its file in the cache, without a second try."""
        path, direct = self._path(shard), self.direct(shard)
        for _ in range(TRIES):  # another process may delete it in between
            if not path.exists():
                with self._lock(path):
                    if not path.exists():
                        self._make(shard, path, direct)
            with suppress(FileNotFoundError):
                note_use(path)
                if direct is not None:
                    return path, read_shard(direct, shard.name, self.columns)
                try:
                    return path, read_shard(path, path.name, self.columns)
                except ValueError:  # as after a power failure: it is made anew
                    path.unlink()
        raise FileNotFoundError(f"{path} was deleted again and again: write a larger data.cache_gib")

    def direct(self, shard: Shard) -> Path | None:
        """Return the file of a shard that needs no copy."""
        if self.store.local is None or not shard.name.endswith(".arrow"):
            return None
        path = self.store.local / shard.name
        with suppress(ValueError):  # what is wrong with it is found when it is checked
            return path if path.exists() and is_plain(read_shard(path, shard.name, self.columns)) else None
        return None

    def _path(self, shard: Shard) -> Path:
        """Return the shard's file in the cache. Of a file that needs no copy, it says that it was checked."""
        content: list[Any] = [FORMAT, shard.sha256, shard.bytes, shard.name.partition(".")[2], self.columns]
        if self.store.local is not None:
            path = self.store.local / shard.name
            status = path.stat() if path.exists() else None
            content += [str(path), status and (status.st_size, status.st_mtime_ns)]
        return self.folder / f"{blake2b(repr(content).encode(), digest_size=12).hexdigest()}.arrow"

    def _make(self, shard: Shard, path: Path, direct: Path | None) -> None:
        """Fetch a shard, check it, and write its columns to the cache. The lock of `path` is held."""
        part, raw, room = (path.with_suffix(ending) for ending in WORK)
        local = self.store.local and self.store.local / shard.name
        try:
            if direct is not None:
                self._check(shard, direct)
                path.touch()
                return
            self._reserve(shard.size + (0 if local else shard.bytes), room)
            if local is None:
                self.store.get(shard.name, raw, _Slow(shard))
            self._check(shard, local or raw)
            if local is None and shard.name.endswith(".arrow") and is_plain(read_shard(raw, shard.name, self.columns)):
                made = raw
            else:
                made = part
                save_table(plain_table(read_shard(local or raw, shard.name, self.columns), shard.name), part)
            with FileLock(self.folder / ROOM_LOCK):  # so that whoever counts sees the one or the other
                made.replace(path)
                room.unlink()
        finally:
            for left in (part, raw, room):
                left.unlink(missing_ok=True)

    def _check(self, shard: Shard, path: Path) -> None:
        size = path.stat().st_size
        if size != shard.bytes:
            raise WrongShard(
                f"shard {shard.name} has {size:,} bytes, and the index says {shard.bytes:,}: put the whole file back, "
                "or make the index anew with the command shards"
            )
        found = sha256(path)
        if found != shard.sha256:
            raise WrongShard(
                f"shard {shard.name} has changed (its hash is {found[:8]}, and the index says {shard.sha256[:8]}): put "
                "it back, or make the index anew with the command shards"
            )

    def _reserve(self, need: int, room: Path) -> None:
        """Reserve so many bytes with a file of that length, once others have made what they have reserved.

        Raises:
            OSError: the disk has no room, whatever is deleted.
        """
        while not self._try_to_reserve(need, room):
            sleep(SHORT_WAIT)

    def _try_to_reserve(self, need: int, room: Path) -> bool:
        """Delete what has not been used for the longest time, and reserve; return whether there was room."""
        with FileLock(self.folder / ROOM_LOCK):
            free, reserved, kept = shutil.disk_usage(self.folder).free, 0, list[tuple[int, int, Path]]()
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    if path.suffix == ".arrow":
                        kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                    elif path.suffix in WORK and not self._in_work(path):
                        path.unlink()  # of a process that was killed
                    elif path.suffix == ROOM:
                        reserved += path.stat().st_size
            total = reserved + sum(size for _, size, _ in kept)
            limit = min(self.limit, total + free)
            if reserved and reserved + need > limit:
                return False
            for _, size, path in sorted(kept):
                if total + need <= limit:
                    break
                if size:
                    path.unlink(missing_ok=True)
                    total, free = total - size, free + size
            if need > free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with room.open("wb") as file:
                file.truncate(need)
        return True

    def _lock(self, path: Path, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f"{path.name[:2]}.lock", timeout)

    def _in_work(self, path: Path) -> bool:
        try:
            with self._lock(path, 0):
                return False
        except Timeout:
            return True


def note_use(path: Path) -> None:
    """Give a file the time of now, if it may be changed: a cache that is complete may be read only, or another's."""
    try:
        os.utime(path)
    except OSError as error:
        if error.errno not in CLOSED:
            raise


class _Slow:
    """Says at times that a shard is slow."""

    def __init__(self, shard: Shard) -> None:
        self._shard, self._begun, self._bytes, self._next = shard, monotonic(), 0, LONGEST_WAIT

    def __call__(self, count: int) -> None:
        self._bytes += count
        seconds = monotonic() - self._begun
        if seconds > self._next:
            self._next *= 2
            speed = self._bytes / seconds / 1e6
            print(f"shard {self._shard.name} is slow: {self._bytes:,} bytes in {seconds:.0f} s, {speed:.3g} MB/s")
