"""How many tests run at once, and what none of them needs."""

import os

# W&B would read the metadata of all packages that are installed, in each run.
os.environ["WANDB__SAVE_REQUIREMENTS"] = "false"


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests that start processes wait for them most of the time."""
    return (os.cpu_count() or 1) + 1
