"""A batch size that changes while training is as exact as one that does not."""

import re

from helpers import CSV, DIGITS, furthest, run_here, run_process

TWO = ("--config", "configs/overlays/two_cpus.yaml")
RUN = (
    *("fit", *DIGITS, *CSV, "--config", "configs/overlays/growing_batch.yaml", "--trainer.precision", "64-true"),
    *("--trainer.max_epochs", 3, "--model.reference_batch_size", 64, "--model.schedule.warmup_examples", 200),
)


def test_a_schedule_is_resumed_after_its_switch_on_two_processes() -> None:
    """1,259 examples; from half of three epochs on (1,889 examples) 256 at once: the switch is within the second."""
    whole = run_here(*RUN, "--name", "whole")
    assert whole.code == 0, whole.err
    assert re.search(r"after 1,889 examples  256\n", whole.out)
    assert "step 30: batch_size 256 from here" in whole.out  # 20 + 10 steps: 1,259 + 640 examples
    assert "learning rate 0.003 at 64 examples per step is 0.006 at 256" in whole.out
    examples = whole.rows("examples")
    assert [examples[step] for step in (29, 30, 31, 32, 33, 38)] == [1835, 1899, 2155, 2411, 2518, 3 * 1259]
    assert list(examples) == list(range(1, 39))  # 20 + 13 + 5 steps
    rates = whole.rows("learning_rate")
    assert {rates[step] for step in (5, 30)} == {0.003}
    assert {rates[step] for step in (31, 38)} == {0.006}

    # 3 steps after the switch, in the middle of the last epoch.
    first = run_here(*RUN, "--trainer.max_steps", 35)
    assert max(first.rows("examples")) == 35
    resumed = run_process(*RUN, *TWO, "--ckpt_path", "last", OMP_NUM_THREADS="1")
    assert resumed.code == 0, resumed.err
    assert "resuming after step 35" in resumed.out
    assert furthest(whole, resumed) < 1e-12
    for column in ("train/loss", "gradient_norm", "examples", "learning_rate", "val/loss", "train/loss_epoch"):
        ours, theirs = resumed.rows(column), whole.rows(column)
        assert max(abs(ours[step] - theirs[step]) for step in theirs) < 1e-12, column

    changed = run_here(*RUN, "--ckpt_path", "last", "--trainer.max_epochs", 4)
    assert changed.code == 2
    assert "data.changes: [[1889, 256]] -> [[2518, 256]]" in changed.err


def test_a_share_of_the_batches_is_taken_once() -> None:
    result = run_here("fit", *DIGITS, *CSV, "--trainer.max_epochs", 2, "--trainer.limit_train_batches", 0.5)
    assert max(result.rows("examples").items()) == (20, 1280)
