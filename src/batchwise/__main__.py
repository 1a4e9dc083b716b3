"""The engine's own command line, `python -m batchwise`: for its tests, and for whoever has no package beside it."""

import sys

from batchwise.run.main import main

if __name__ == "__main__":
    sys.exit(main(__package__))
