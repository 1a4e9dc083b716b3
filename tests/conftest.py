"""How many tests run at once."""

import os


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests that start processes wait for them most of the time."""
    return (os.cpu_count() or 1) + 1
