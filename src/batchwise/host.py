"""What a process takes of its machine: cores and memory."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # of glibc's malloc.h

keeps_memory = False
"""What `keep_memory` was last told."""


def set_threads(count: int) -> None:
    """Let PyTorch compute with `count` threads, in this process and in those that it starts."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)  # else Lightning shares the cores out among the processes it starts


def keep_memory(keep: bool) -> bool:
    """Let freed memory stay with this process, or not; return whether the C library can (glibc can).

    By default blocks of more than 32 MiB go back to the system when they are freed, and each page of the next one is
    a fault again: a step with large activations spends more time on that than on arithmetic.
    """
    global keeps_memory
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or keep == keeps_memory:
        return mallopt is not None
    keeps_memory = keep
    # Once told anything, glibc no longer raises its thresholds by itself; these are what it raises them to.
    mallopt(_MMAP_THRESHOLD, 2**25)
    return bool(mallopt(_MMAP_MAX, 0 if keep else 65536) and mallopt(_TRIM_THRESHOLD, -1 if keep else 2**26))


def available_memory() -> int:
    """Return the bytes of memory that are free or can be freed (elsewhere than on Linux: half of all)."""
    info = Path("/proc/meminfo")
    if info.exists():
        return int(re.search(r"MemAvailable:\s+(\d+)", info.read_text())[1]) * 1024  # type: ignore[index]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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
