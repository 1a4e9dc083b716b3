"""SIGKILL at random moments loses nothing: the short form of `scripts/lab/kill.py`."""

import random
from pathlib import Path

import forks
import pytest
from kill import PHASES, make_chain, torture

WEEKLY = pytest.mark.weekly


@pytest.mark.parametrize(
    ("number", "shards"), [(1, False), pytest.param(2, False, marks=WEEKLY), pytest.param(2, True, marks=WEEKLY)]
)
@pytest.mark.slow
def test_kills_lose_nothing(number: int, shards: bool, tmp_path: Path) -> None:
    """Three kills of a chain of runs; weekly, three more of another chain beside it, and with shards in one cache."""
    choice = random.Random(4)
    chains = [make_chain(choice, 3, [1, 3], same=False), make_chain(choice, 3, [2], same=True)][:number]
    assert {run.processes for run in chains[0]} == {1, 2, 3}
    assert all({run.phase for run in chain[:-1]} == PHASES.keys() for chain in chains)
    reports = torture(chains, tmp_path, popen=forks.Process, shards=shards)
    assert [violation for report in reports for violation in report.violations] == []
    assert sum(report.kills.total() for report in reports) == 3 * number
