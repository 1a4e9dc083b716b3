"""`python -m project` loads quickly, and leaves no trace of how."""

import subprocess
import sys

CODE = """
import gc, sys
from batchwise.run.main import _load
run = _load()
assert run is sys.modules["batchwise.run.cli"].run
assert gc.isenabled() and gc.get_freeze_count() > 100_000
assert "scipy.signal" not in sys.modules, "what stood in for it is still there"
import scipy.signal
import torchmetrics
assert scipy.signal.convolve([1, 1], [1, 1]).tolist() == [1, 2, 1]
"""
LATER = """
import sys
from batchwise.run.main import _OnDemand
sys.modules["scipy.signal"] = _OnDemand("scipy.signal")
from scipy.signal import convolve  # what another version of torchmetrics might do
assert convolve([1, 1], [1, 1]).tolist() == [1, 2, 1]
assert type(sys.modules["scipy.signal"]).__name__ == "module"
"""


def test_loading_leaves_no_trace() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_stands_in_for_scipy_signal_gives_way_where_it_is_needed() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
