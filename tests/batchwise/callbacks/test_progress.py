"""The progress bar, on a terminal of 80 columns."""

import contextlib
import io
import re

import pytest
from helpers import CSV, DIGITS, absolute

from batchwise.run.main import main


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_steps_loss_and_examples_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    with contextlib.redirect_stdout(Terminal()) as terminal:
        assert main("batchwise", absolute(("fit", *DIGITS, *CSV, "--trainer.max_epochs", 2))) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"epoch 2 .*20/20", text)
    assert "train/loss:" in text
    assert re.search(r"examples/s:\s+[\d,]+", text)
    assert "v_num" not in text
    assert "epoch 2  average loss" in text


@pytest.mark.parametrize("kind", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.slow
def test_a_bar_of_lightning_takes_the_place_of_ours(kind: str, stream: type[io.StringIO]) -> None:
    arguments = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, f"--trainer.callbacks+={kind}")
    with contextlib.redirect_stdout(stream()) as terminal:
        assert main("batchwise", absolute(arguments)) == 0
    assert "epoch 1  average loss" in terminal.getvalue()
