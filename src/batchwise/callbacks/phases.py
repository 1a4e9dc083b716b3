"""The time that a run spends in each of its phases."""

from time import perf_counter

from batchwise import STARTED


class Phases:
    """The seconds spent in each phase of a run so far. A run is always in one phase.

    Args:
        since: when the first phase began; by default when the package was imported.
    """

    def __init__(self, since: float = STARTED) -> None:
        phases = "start", "training", "validation", "checkpoints", "end"
        self.seconds: dict[str, float] = dict.fromkeys(phases, 0.0)
        self.now = "start"
        self._since = since

    def enter(self, phase: str) -> str:
        """Begin a phase and return the one before. Entering the current phase again updates `seconds`."""
        time, before = perf_counter(), self.now
        self.seconds[before] += time - self._since
        self._since, self.now = time, phase
        return before
