"""The table of the profiler's overlay."""

from helpers import DIGITS, run_here


def test_the_overlay_prints_a_table_that_fits_a_terminal() -> None:
    result = run_here(
        "fit", *DIGITS, "--config", "configs/overlays/profile.yaml", "--trainer.max_epochs", 1,
        "--trainer.profiler.rows", 7,
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.split() == ["action", "calls", "seconds", "share"])
    rows = [line.split() for line in lines[begin + 1 : begin + 8]]
    assert max(len(line) for line in lines[begin : begin + 8]) <= 80
    assert {int(calls) for name, calls, _, _ in rows if name == "run_training_batch"} == {20}
    seconds = [float(row[2]) for row in rows]
    assert seconds == sorted(seconds, reverse=True)
    assert lines[begin + 8].startswith("best val/accuracy")
