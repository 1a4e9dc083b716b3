"""The learning-rate range test: what it suggests where the answer is known, and on the digits."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch

from batchwise.choosing import short
from batchwise.choosing.range_test import HIGHEST, LOWEST, STEPS, RangeTest
from batchwise.models.mlp import MLP
from batchwise.optim.schedule import Schedule
from batchwise.sources.digits import Digits
from batchwise.tasks.classification import Classification
from batchwise.trainer import Trainer


def test_the_slope_is_against_the_logarithm_of_the_rate() -> None:
    """Against the rate itself, the steepest place of this curve is ten times as low."""
    test = RangeTest(lambda step: None)
    test.rates = [1e-5 * 10 ** (i / 20) for i in range(100)]
    middle = math.log(1e-2)
    test.losses = [2.3 / (1 + math.exp(1.5 * (math.log(rate) - middle))) + 0.05 * (-1) ** i
                   for i, rate in enumerate(test.rates)]  # fmt: skip
    assert test.steepest() == pytest.approx(1e-2, rel=0.15)
    test.losses = [1.0 + rate for rate in test.rates]
    assert test.steepest() is None
    assert "does not fall" in str(test)


@pytest.mark.parametrize(
    ("optimizer", "low", "high"),
    [
        (partial(torch.optim.AdamW, lr=3e-3), 5e-4, 5e-3),
        (partial(torch.optim.AdamW, lr=1e-4), 5e-4, 5e-3),  # wherever it starts
        (partial(torch.optim.SGD, lr=0.1), 0.05, 0.5),
    ],
)
def test_digits(optimizer: partial, low: float, high: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path)
    task = Classification(MLP(64, 10, [128]), optimizer=optimizer, schedule=Schedule(), max_skipped_steps=0)
    seen: list[int] = []
    test = RangeTest(seen.append)
    short.train(trainer, task, Digits(batch_size=64, seed=0), STEPS, [test])
    steepest, configured = test.steepest(), optimizer.keywords["lr"]
    assert steepest is not None
    assert low < steepest < high
    assert test.rule == configured
    assert test.rates[0] == pytest.approx(LOWEST * configured)
    assert test.rates[-1] <= HIGHEST * configured * 1.001
    assert seen == list(range(1, len(test.losses) + 1))
    assert f"{configured:.4g} by the rule; as the rate rises, the loss falls fastest at about {steepest:.2g}" in str(
        test
    )
