"""Where the time goes, in a table that fits a terminal."""

import re
import time
from math import fsum

from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import rank_zero_only


class TableProfiler(SimpleProfiler):
    """Lightning's simple profiler, with only the longest actions in its report, and printed rather than logged.

    It measures on the host: work of a GPU counts where the host waits for it.

    Args:
        rows: actions in the table.
    """

    def __init__(self, rows: int = 20) -> None:
        super().__init__()
        self.rows = rows

    def summary(self) -> str:
        """Return the table. An action may be part of another, so the shares do not add up to 100 %."""
        whole = time.perf_counter() - self.start_time
        lines = [f"{'action':<56}{'calls':>7}{'seconds':>10}{'share':>7}"]
        totals = {action: fsum(seconds) for action, seconds in self.recorded_durations.items()}
        for action in sorted(totals, key=totals.__getitem__, reverse=True)[: self.rows]:
            name = re.sub(r"\{.*\}", "", action)[:55]  # a ModelCheckpoint says all its settings
            calls, seconds = len(self.recorded_durations[action]), totals[action]
            lines.append(f"{name:<56}{calls:>7,}{seconds:>10,.3f}{seconds / whole:>7.1%}")
        return "\n".join(lines)

    @rank_zero_only
    def describe(self) -> None:
        """Print the table."""
        print(self.summary(), flush=True)
