"""The command line: where a run is placed, checked, started, and how it ends."""
