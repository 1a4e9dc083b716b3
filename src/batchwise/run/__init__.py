"""The command line, which places, checks, starts and ends a run."""
