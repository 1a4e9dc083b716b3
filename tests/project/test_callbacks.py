"""The callback: it draws an image that the model gets wrong."""

import re
from collections.abc import Callable

from project.data import Digits


def test_mistakes(run: Callable) -> None:
    result = run("fit", "--config", "configs/digits.yaml", "--trainer.max_epochs", 1, "--trainer.logger", "false")
    assert result.code == 0, result.err
    (found,) = re.findall(r"validation example (\d+) is a (\d), taken for a (\d):\n((?: {4}.{16}\n){8})", result.out)
    number, digit, taken = map(int, found[:3])
    images, digits = Digits().load("val")
    assert digits[number] == digit != taken
    drawn = [line[4:] for line in found[3].splitlines()]
    inked = images[number, 0] >= images[number].max() / 9
    assert [[character != " " for character in line[::2]] for line in drawn] == inked.tolist()
