"""The name of the package that this process was started as."""

name = "batchwise"
"""The package behind `python -m`. Messages name it, and it is the default project in W&B."""
