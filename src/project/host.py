"""What a process takes of its machine: cores and memory."""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def set_threads(count: int) -> None:
    """Let PyTorch compute with `count` threads, in this process and in those that it starts."""
    torch.set_num_threads(count)
    os.environ["OMP_NUM_THREADS"] = str(count)  # else Lightning shares the cores out among the processes it starts


def keep_memory(keep: bool) -> bool:
    """Let freed memory stay with this process, or not; return whether the C library can (glibc can).

    By default blocks of more than 32 MiB go back to the system when they are freed, and each page of the next one is
    a fault again: a step with large activations spends more time on that than on arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0 if keep else 65536) and mallopt(_TRIM_THRESHOLD, -1 if keep else 2**26))
