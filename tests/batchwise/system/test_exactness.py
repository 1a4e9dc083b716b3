"""The result does not depend on how the batch is executed: real processes, float64, a ragged last batch."""

import pytest
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process


def fit(*arguments: object) -> Result:
    command = ("fit", *DIGITS, *CSV, "--trainer.max_epochs", 3, *arguments)
    result = run_process(*command, OMP_NUM_THREADS="1") if "ddp" in command else run_here(*command)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One process, one micro-batch per step; 1,259 examples in batches of 100, the last of 59."""
    return fit(*double(), "--trainer.default_root_dir", tmp_path_factory.mktemp("whole"))


def double() -> tuple[object, ...]:
    return "--trainer.precision", "64-true", "--data.batch_size", 100


@pytest.mark.parametrize(
    "execution",
    [
        ("--data.micro_batch_size", 15),
        TWO,
        (*TWO, "--trainer.accumulate_grad_batches", 3),
    ],
    ids=["7 micro-batches", "2 processes", "2 processes x 3 micro-batches"],
)
def test_every_execution_gives_the_same_weights_and_losses(whole_batch: Result, execution: tuple) -> None:
    result = fit(*double(), *execution)
    assert "accumulate_grad_batches  1" not in result.out or execution == TWO  # it was really executed otherwise
    assert furthest(whole_batch, result) < 1e-12
    for column in ("train/loss", "train/loss_epoch", "gradient_norm", "val/loss"):
        ours, theirs = result.rows(column), whole_batch.rows(column)
        assert ours.keys() == theirs.keys()
        assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-12, column
    assert result.rows("val/accuracy") == whole_batch.rows("val/accuracy")
    assert len(whole_batch.rows("train/loss")) == 39


@pytest.mark.weekly
def test_two_processes_have_the_loss_curve_of_one_in_float32() -> None:
    one, two = fit(), fit(*TWO)
    ours, theirs = two.rows("train/loss"), one.rows("train/loss")
    assert len(theirs) == 60
    assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-5
