"""The learning rate follows the batch."""

import math

import pytest
import torch
from helpers import CSV, DIGITS, run_here
from torch import nn

from batchwise.optim.scaling import default_rule, scale

ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Adafactor")


def made(name: str, **arguments: float) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(nn.Linear(3, 2).parameters(), lr=0.1, **arguments)


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, "sqrt") for name in ADAPTIVE), ("SGD", "linear"), ("ASGD", "linear")]
)
def test_the_default_is_by_the_class(name: str, rule: str) -> None:
    assert default_rule(made(name)) == rule


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4), ("sqrt", 2), ("none", 1)])
def test_rules(rule: str, factor: float) -> None:
    optimizer = made("SGD")
    assert scale(optimizer, 256, 64, rule) == rule
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor)


@pytest.mark.parametrize(("name", "expected"), [("AdamW", 0.05 * 2), ("Adam", 0.05), ("SGD", 0.05)])
def test_weights_shrink_as_much_per_example(name: str, expected: float) -> None:
    optimizer = made(name, weight_decay=0.05)
    scale(optimizer, 256, 64)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
    if name == "AdamW":  # rate x decay x steps per example
        assert optimizer.param_groups[0]["lr"] * 0.1 / 256 == pytest.approx(0.1 * 0.05 / 64)


def test_a_run_says_and_uses_the_rate() -> None:
    common = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--model.schedule.shape", "constant")
    common = (*common, "--model.schedule.warmup", 0)
    assert "learning rate" not in run_here(*common).out
    result = run_here(*common, "--data.batch_size", 256)
    assert "learning rate 0.003 at 64 examples per step is 0.006 at 256 (model.scaling sqrt)" in result.out
    assert set(result.rows("learning_rate").values()) == {0.006}
    linear = run_here(*common, "--data.batch_size", 256, "--model.scaling", "linear")
    assert all(math.isclose(rate, 0.012) for rate in linear.rows("learning_rate").values())
    as_it_stands = run_here(*common, "--data.batch_size", 256, "--model.reference_batch_size", "null")
    assert set(as_it_stands.rows("learning_rate").values()) == {0.003}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--model.scaling", "cubic"), "model.scaling is cubic: write linear, sqrt, none, or null"),
        (("--model.reference_batch_size", 0), "model.reference_batch_size is 0: write a number of examples"),
        (
            ("--model.reference_batch_size", "null", "--model.scaling", "sqrt"),
            "model.reference_batch_size is not set: write it too",
        ),
    ],
)
def test_bad_input(arguments, line) -> None:
    result = run_here("fit", *DIGITS, *arguments)
    assert result.code == 2
    assert line in result.err
