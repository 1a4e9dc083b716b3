"""The engine's own command line, `python -m batchwise`, for its tests and for a user without a package of their own."""

import sys

from batchwise.run.main import main

if __name__ == "__main__":
    sys.exit(main(__package__))
