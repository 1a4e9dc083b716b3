"""What the machine says of this process."""

import os
import subprocess
import sys
from time import perf_counter

import pytest

from batchwise.host import core_waits


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says it")
def test_a_process_beside_busy_ones_waits_for_a_core() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        before, start = core_waits(), perf_counter()
        while core_waits() - before < 0.1:
            assert perf_counter() - start < 30
    finally:
        for other in others:
            other.kill()
            other.wait()
