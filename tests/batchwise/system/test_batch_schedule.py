"""A batch size that changes while training is as exact as one that does not."""

import re
import shutil

import pytest
from helpers import CSV, DIGITS, TWO, furthest, run_here, run_process

GROWING = (
    *("--data.batch_size", 64, "--data.batch_size_schedule", "batchwise.batching.schedule.Milestones"),
    *("--data.batch_size_schedule.shares", "[0.5]", "--data.batch_size_schedule.sizes", "[256]"),
    *("--model.schedule.shape", "constant"),
)
RUN = (
    *("fit", *DIGITS, *CSV, *GROWING, "--trainer.precision", "64-true"),
    *("--trainer.max_epochs", 3, "--model.reference_batch_size", 64, "--model.schedule.warmup_examples", 200),
)


@pytest.mark.slow
def test_a_schedule_is_resumed_after_its_switch_on_two_processes() -> None:
    """1,259 examples; from half of three epochs on (1,889 examples) 256 at once: the switch is within the second."""
    whole = run_here(*RUN, "--name", "whole")
    assert whole.code == 0, whole.err
    assert re.search(r"after 1,889 examples  256\n", whole.out)
    assert "step 30: batch_size 256 from here" in whole.out  # 20 + 10 steps: 1,259 + 640 examples
    assert "learning rate 0.003 at 64 examples per step is 0.006 at 256" in whole.out
    assert "beta2 0.999 at 64 examples per step is 0.996 at 256" in whole.out
    assert whole.checkpoint()["optimizer_states"][0]["param_groups"][0]["betas"] == (0.9, pytest.approx(0.999**4))
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


@pytest.mark.weekly
def test_an_adaptive_batch_is_resumed_with_the_sizes_that_were_chosen() -> None:
    schedule = "{class_path: batchwise.batching.schedule.Adaptive, init_args: {most: 128}}"
    noise = "{class_path: batchwise.callbacks.noise_scale.NoiseScale, init_args: {every_n_steps: 1}}"
    run = (
        *("fit", *DIGITS, *CSV, "--trainer.precision", "64-true", "--trainer.max_epochs", 5, "--data.batch_size", 32),
        *("--data.micro_batch_size", 8, "--data.batch_size_schedule", schedule),
        *("--model.schedule.shape", "constant", "--model.schedule.warmup_examples", 200),
        *("--model.network.hidden_features", "[16]"),
    )
    unmeasured = run_here(*run)
    assert unmeasured.code == 2
    assert "write batchwise.callbacks.noise_scale.NoiseScale under trainer.callbacks" in unmeasured.err
    run = (*run, "--trainer.callbacks", f"[{noise}]")
    whole = run_here(*run, "--name", "whole")
    assert whole.code == 0, whole.err
    changes = whole.checkpoint()["Digits"]["changes"]
    assert len(changes) >= 2
    assert all(seen % 1259 == 0 and size in (32, 64, 128) for seen, size in changes)
    steps = [whole.rows("examples")[step] for step in whole.rows("examples")]
    for seen, size in changes:
        assert {seen + size, seen + 2 * size} <= set(steps)
    # Where the first change begins, decided; within its epoch; and where the second begins, not yet decided.
    (first, size), (second, _) = changes[:2]
    start = first // 1259 * -(-1259 // 32)
    end = start + (second - first) // 1259 * -(-1259 // size)
    middle = run_here(*run, "--name", "middle", "--trainer.max_steps", start + 3)
    run_here(*run, "--name", "end", "--trainer.max_steps", end)
    kept = middle.folder / "checkpoints" / "kept.ckpt"
    shutil.copy(middle.folder / "checkpoints" / "previous.ckpt", kept)
    for step, name, checkpoint in ((start + 3, "middle", "last"), (start, "middle", kept), (end, "end", "last")):
        resumed = run_here(*run, "--name", name, "--ckpt_path", checkpoint)
        assert f"resuming after step {step}" in resumed.out
        assert resumed.checkpoint()["Digits"]["changes"] == changes
        assert furthest(whole, resumed) < 1e-12
