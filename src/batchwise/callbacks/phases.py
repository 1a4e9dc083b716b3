"""The host's clock, phase by phase."""

from time import perf_counter

from batchwise import STARTED


class Phases:
    """Seconds spent so far in each phase of a run, which is in one of them at any time, from the import on."""

    def __init__(self) -> None:
        phases = "start", "training", "validation", "checkpoints", "end"
        self.seconds: dict[str, float] = dict.fromkeys(phases, 0.0)
        self.now = "start"
        self._since = STARTED

    def enter(self, phase: str) -> str:
        """Go over to a phase (or stay in it, which brings `seconds` up to date); return the one before."""
        time, before = perf_counter(), self.now
        self.seconds[before] += time - self._since
        self._since, self.now = time, phase
        return before
