"""The cores, the memory and the files that a process uses."""

import contextlib
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

import torch


def set_threads(count: int) -> None:
    """Let PyTorch compute with `count` threads, in this process and in those that it starts."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)  # else Lightning shares the cores out among the processes it starts


def check_writable(key: str, path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{key} {path} cannot be written ({error.strerror}): write another") from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an error of the disk the name of the file: if a write fails, and not the opening, Python leaves it out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` at the end. Nobody ever sees a part of the file.

    Of two processes that write it at once, the last one's stays, whole.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
            yield part
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def available_memory() -> int:
    """Return the bytes of memory that are free or can be freed (elsewhere than on Linux: half of all)."""
    info = Path("/proc/meminfo")
    if info.exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) * 1024  # type: ignore[index]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def core_waits() -> float:
    """Return the seconds that the threads of this process have waited for a core, all together (not on Linux: 0)."""
    found = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # it has ended
            found += int(thread.read_text().split()[1])
    return found / 1e9


def use(device: torch.device) -> None:
    """Take a GPU as that of this process, as Lightning does when training begins: nothing is put on another one."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all of its work."""
    torch.get_device_module(device).synchronize()


def release_memory(device: torch.device) -> None:
    """Give back the memory that PyTorch keeps on a device for later use."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes used so far: of the device where that is known, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Count the most bytes anew from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
