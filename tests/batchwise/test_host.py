"""What the machine says of this process."""

import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest

from batchwise.host import core_waits, whole


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


def test_of_two_processes_that_write_a_file_at_once_the_last_ones_stays_whole() -> None:
    code = """
from pathlib import Path
from batchwise.host import whole
with whole(Path("file")) as part:
    part.write_text("first")
    input(print("writing", flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        assert one.stdout
        assert one.stdout.readline() == "writing\n"
        with whole(Path("file")) as part:
            part.write_text("second")
        assert Path("file").read_text() == "second"
        one.communicate("\n")
    assert (one.returncode, Path("file").read_text(), os.listdir()) == (0, "first", ["file"])
