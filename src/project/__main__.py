"""The command line: `python -m project --help`."""

import sys

from batchwise.run.main import main

if __name__ == "__main__":
    sys.exit(main(__package__))
