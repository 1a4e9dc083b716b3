"""Batchwise: the batch you write is the batch you train on."""

from time import perf_counter

__version__ = "0.1.0"
STARTED = perf_counter()
"""When this process began, as near as the package knows."""
