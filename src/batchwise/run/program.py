"""What this process was started as."""

name = "batchwise"
"""The package behind `python -m`: it stands in messages, and is the default project in W&B."""
