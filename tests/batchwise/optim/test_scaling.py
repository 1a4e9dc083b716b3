"""The learning rate follows the batch."""

import math

import pytest
import torch
from helpers import CSV, DIGITS, run_here
from torch import nn

from batchwise.optim.scaling import FOLLOWING, Scaling, default_rule

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
    lines = Scaling(64, rule).apply(optimizer, 256)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor)
    assert len(lines) == (rule != "none")
    assert not Scaling(64, rule).apply(optimizer, 64)


@pytest.mark.parametrize(("batch_size", "factor"), [(32, 0.5), (100, 100 / 64), (128, 2), (512, 2)])
def test_the_rate_rises_up_to_a_limit(batch_size: int, factor: float) -> None:
    for rule, power in (("linear", 1), ("sqrt", 0.5)):
        optimizer = made("SGD")
        Scaling(64, rule, limit=128).apply(optimizer, batch_size)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * factor**power)
    lowest = made("SGD")
    Scaling(256, "linear", limit=128).apply(lowest, 64)  # it was as high at 128 as at 256
    assert lowest.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(("name", "expected"), [("AdamW", 0.05 * 2), ("Adam", 0.05), ("SGD", 0.05)])
def test_weights_shrink_as_much_per_example(name: str, expected: float) -> None:
    optimizer = made(name, weight_decay=0.05)
    Scaling(64).apply(optimizer, 256)
    assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
    if name == "AdamW":  # rate x decay x steps per example
        assert optimizer.param_groups[0]["lr"] * 0.1 / 256 == pytest.approx(0.1 * 0.05 / 64)


@pytest.mark.parametrize("limit", [None, 128])
def test_weights_of_sgd_shrink_as_much_per_example_at_any_rate(limit: int | None) -> None:
    optimizer = made("SGD", weight_decay=0.05, momentum=0.9)
    Scaling(64, "sqrt", limit, keeps=()).apply(optimizer, 256)
    (group,) = optimizer.param_groups
    assert group["lr"] / (1 - group["momentum"]) * group["weight_decay"] / 256 == pytest.approx(0.05 / 64)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RAdam"])
@pytest.mark.parametrize(("batch_size", "beta2"), [(16, 0.998**0.25), (256, 0.998**4), (64 * 1000, 0.9)])
def test_adam_remembers_as_many_examples(name: str, batch_size: int, beta2: float) -> None:
    optimizer = made(name, betas=(0.9, 0.998), eps=1e-6)
    Scaling(64).apply(optimizer, batch_size)
    assert optimizer.param_groups[0]["betas"] == (0.9, pytest.approx(beta2))
    assert optimizer.param_groups[0]["eps"] == pytest.approx(1e-6 / math.sqrt(batch_size / 64))


def test_rmsprop_remembers_as_many_examples() -> None:
    optimizer = made("RMSprop", alpha=0.99)
    Scaling(64).apply(optimizer, 16)
    assert optimizer.param_groups[0]["alpha"] == pytest.approx(0.99**0.25)
    assert optimizer.param_groups[0]["eps"] == pytest.approx(2e-8)


@pytest.mark.parametrize("batch_size", [16, 256])
def test_the_momentum_of_sgd_remembers_as_many_examples(batch_size: int) -> None:
    """The steady step of a constant gradient is rate / (1 - momentum): it follows the batch linearly."""
    optimizer, ratio = made("SGD", momentum=0.9), batch_size / 64
    Scaling(64, keeps=()).apply(optimizer, batch_size)
    (group,) = optimizer.param_groups
    assert group["momentum"] == pytest.approx(0.9**ratio)
    assert group["lr"] / (1 - group["momentum"]) == pytest.approx(1.0 * ratio)
    by_default = made("SGD", momentum=0.9)
    Scaling(64).apply(by_default, batch_size)
    assert by_default.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize("keeps", FOLLOWING)
def test_each_can_be_turned_off(keeps: str) -> None:
    adam, sgd = made("AdamW", weight_decay=0.1), made("SGD", momentum=0.9)
    said = [*Scaling(64, keeps=(keeps,)).apply(adam, 256), *Scaling(64, keeps=(keeps,)).apply(sgd, 256)]
    kept = {"weight_decay": 0.1, "beta2": (0.9, 0.999), "eps": 1e-8, "momentum": 0.9}[keeps]
    group = (sgd if keeps == "momentum" else adam).param_groups[0]
    assert group["betas" if keeps == "beta2" else keeps] == kept
    names = [line.split(" ")[0] for line in said if not line.startswith("learning rate")]
    assert sorted([*names, keeps]) == sorted(FOLLOWING)
    sources = {line.split("(")[1] for line in said}
    assert all("arXiv" in source for source in sources)


@pytest.mark.slow
def test_a_run_says_and_uses_the_rate() -> None:
    common = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 1, "--model.schedule.shape", "constant")
    common = (*common, "--model.schedule.warmup", 0)
    assert "learning rate" not in run_here(*common).out
    result = run_here(*common, "--data.batch_size", 256)
    rate, decay, beta2, eps = (line for line in result.out.splitlines() if " at 64 examples per step is " in line)
    assert rate == "learning rate 0.003 at 64 examples per step is 0.006 at 256 (model.scaling sqrt, arXiv 2205.10287)"
    assert decay == "weight_decay 0.05 at 64 examples per step is 0.1 at 256 (arXiv 2405.13698)"
    assert beta2 == "beta2 0.999 at 64 examples per step is 0.996 at 256 (arXiv 2507.07101)"
    assert eps == "eps 1e-08 at 64 examples per step is 5e-09 at 256 (arXiv 2205.10287)"
    (optimizer,) = result.checkpoint()["optimizer_states"]
    assert optimizer["param_groups"][0]["betas"] == (0.9, pytest.approx(0.999**4))
    limited = run_here(
        *common, "--data.batch_size", 256, "--model.scaling_limit", 100, "--model.scaling_keeps", "[eps]"
    )
    assert "is 0.00375 at 256" in limited.out
    assert "eps 1e-08" not in limited.out
    assert set(result.rows("learning_rate").values()) == {0.006}
    linear = run_here(*common, "--data.batch_size", 256, "--model.scaling", "linear")
    assert all(math.isclose(rate, 0.012) for rate in linear.rows("learning_rate").values())
    as_it_stands = run_here(*common, "--data.batch_size", 256, "--model.reference_batch_size", "null")
    assert set(as_it_stands.rows("learning_rate").values()) == {0.003}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--model.scaling", "cubic"), "model.scaling is cubic: write linear, sqrt, none, or null"),
        (("--model.scaling_limit", 0), "model.scaling_limit is 0: write a number of examples, or null"),
        (
            ("--model.scaling_keeps", "[beta1]"),
            "model.scaling_keeps has beta1: write some of weight_decay, beta2, eps, momentum",
        ),
        (
            ("--model.reference_batch_size", "null", "--model.scaling_limit", 5),
            "model.scaling_limit is set, but model.reference_batch_size is not set: write it too",
        ),
        (("--model.reference_batch_size", 0), "model.reference_batch_size is 0: write a number of examples"),
        (
            ("--model.reference_batch_size", "null", "--model.scaling", "sqrt"),
            "model.reference_batch_size is not set: write it too",
        ),
    ],
)
@pytest.mark.slow
def test_bad_input(arguments, line) -> None:
    result = run_here("fit", *DIGITS, *arguments)
    assert result.code == 2
    assert line in result.err
