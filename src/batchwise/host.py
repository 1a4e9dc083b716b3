"""The cores, the memory and the files that a process uses."""

import contextlib
import os
import re
import resource
import sys
from pathlib import Path

import torch


def set_threads(count: int) -> None:
    """Let PyTorch compute with `count` threads, in this process and in those that it starts."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)  # else Lightning shares the cores out among the processes it starts


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that nobody ever sees a part of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    part.replace(path)


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
