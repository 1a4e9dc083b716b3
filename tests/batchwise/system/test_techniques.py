"""Averaged weights, ghost batch norm, frozen layers, class weights, clipping, all at once: exact, and resumable."""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process
from torch import Tensor

from batchwise.callbacks.ema import RAW

SPY = """
import torch
from lightning.pytorch.callbacks import Callback
from batchwise.sources.digits import Digits

steps, validated = [], []

def weights(task):
    return {name: value.detach().clone() for name, value in task.state_dict().items()}

class Spy(Callback):
    def on_train_start(self, trainer, task):
        steps.append((0, 0, weights(task)))

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if task._step.finite.skipped_in_a_row == 0:
            steps.append((trainer.global_step, batch.size, weights(task)))

    def on_validation_batch_start(self, trainer, task, *_):
        validated.append((trainer.global_step, weights(task)))

class Spoilt(Digits):
    def transform(self, batch, training):
        batch = super().transform(batch, training)
        if training:
            batch.inputs[batch.index == 525] = torch.nan
        return batch
"""
CONVNET = "{class_path: batchwise.models.convnet.ConvNet, init_args: {channels: [4, 6], norm: batch, dropout: 0.2}}"
HALF_LIFE = 300
FROZEN = ("network.features.0.", "network.features.1.")
# 13 steps per epoch; one is skipped, for an example is not finite. The first convolution and its norm are frozen.
FIT = (
    *("fit", *DIGITS, *CSV, "--data", "spy.Spoilt", "--data.batch_size", 100, "--trainer.precision", "64-true"),
    *("--trainer.callbacks+", "spy.Spy", "--trainer.callbacks+", "batchwise.callbacks.ema.EMA"),
    *("--trainer.callbacks.half_life_examples", HALF_LIFE),
    *("--model.network", CONVNET, "--model.ghost_batch_size", 8, "--model.class_weights", "balanced"),
    *("--model.freeze", "['features.[01]']"),
    *("--model.lr_factors", "{features: 0.3}", "--model.schedule", "{shape: constant, warmup_examples: 300}"),
    *("--model.optimizer.lr", 0.02, "--trainer.gradient_clip_val", 0.3, "--trainer.max_steps"),
)
STEPS = 18


def fit(steps: int, *arguments: object, run: Any = run_here, **environment: str) -> Result:
    result = run(*FIT, steps, *arguments, **environment)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module", autouse=True)
def spy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("spy")
    (folder / "spy.py").write_text(SPY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import_module("spy")
        yield folder
    sys.modules.pop("spy", None)


Step = tuple[int, int, dict[str, Tensor]]
"""Number, examples, and the weights after it, of a step that was taken."""


@pytest.fixture(scope="module")
def runs(spy: Path) -> tuple[Result, list[Step]]:
    """One process, one micro-batch per step; and what it had after each step, and before the first."""
    result = fit(STEPS, "--trainer.default_root_dir", spy)
    return result, list(sys.modules["spy"].steps)


@pytest.fixture(scope="module")
def whole(runs: tuple[Result, list[Step]]) -> Result:
    return runs[0]


@pytest.fixture(scope="module")
def steps(runs: tuple[Result, list[Step]]) -> list[Step]:
    return runs[1]


@pytest.fixture(scope="module")
def two(whole: Result, spy: Path) -> Result:
    arguments = (*TWO, "--trainer.default_root_dir", spy, "--name", "two")
    return fit(STEPS, *arguments, run=run_process, PYTHONPATH=str(spy), OMP_NUM_THREADS="1")


@pytest.fixture(scope="module")
def three(whole: Result, spy: Path) -> Result:
    return fit(STEPS, "--trainer.accumulate_grad_batches", 3, "--trainer.default_root_dir", spy, "--name", "three")


@pytest.mark.parametrize("execution", ["two", "three"])
@pytest.mark.slow
def test_the_execution_changes_nothing(whole: Result, execution: str, request: pytest.FixtureRequest) -> None:
    result = request.getfixturevalue(execution)
    assert f"accumulate_grad_batches  {3 if execution == 'three' else 1}\n" in result.out
    figures = {"averages": furthest(whole, result)}
    ours, theirs = result.checkpoint()[RAW], whole.checkpoint()[RAW]
    figures["weights"] = max((ours[name] - theirs[name]).abs().max().item() for name in theirs)
    for column in ("train/loss", "gradient_norm", "val/loss"):
        mine, others = result.rows(column), whole.rows(column)
        assert mine.keys() == others.keys()
        figures[column] = max(abs(mine[step] - others[step]) for step in others if not math.isnan(others[step]))
    print(figures)
    assert max(figures.values()) < 1e-10, figures
    norms = whole.rows("gradient_norm")
    assert min(norms.values()) < 0.3 < max(norms.values())  # so some were clipped


def reference_average(steps: list[Step], name: str) -> Tensor:
    """The mean of the weights after each step, each weighted by what was new in it, times 1/2 per half-life since."""
    total, seen = sum(size for _, size, _ in steps), 0
    mean, weights = torch.zeros_like(steps[0][2][name]), 0.0
    for _, size, state in steps[1:]:
        seen += size
        weight = (1 - 0.5 ** (size / HALF_LIFE)) * 0.5 ** ((total - seen) / HALF_LIFE)
        mean, weights = mean + weight * state[name], weights + weight
    return mean / weights


@pytest.mark.parametrize("execution", ["whole", "two"])
@pytest.mark.slow
def test_the_average_is_that_of_a_reference(steps: list[Step], execution: str, request: pytest.FixtureRequest) -> None:
    checkpoint = request.getfixturevalue(execution).checkpoint()
    assert 0 < 1 + STEPS - len(steps) <= 2  # one step of each epoch was skipped
    names = [name for name in checkpoint[RAW] if "running" not in name and name != "weights"]
    assert len(names) == 14
    off = [(checkpoint["state_dict"][name] - reference_average(steps, name)).abs().max().item() for name in names]
    print(execution, "average against the reference", max(off))
    assert max(off) < 1e-10
    for name in names:
        torch.testing.assert_close(checkpoint[RAW][name], steps[-1][2][name], rtol=0, atol=1e-10)
    learn = [name for name in names if not name.startswith(FROZEN)]
    assert len(learn) == 11
    moved = [(checkpoint["state_dict"][name] - checkpoint[RAW][name]).abs().max() for name in learn]
    assert min(moved) > 1e-4


def test_what_is_frozen_is_bit_unchanged(steps: list[Step]) -> None:
    initial = steps[0][2]
    frozen = [name for name in initial if name.startswith(FROZEN)]
    assert len(frozen) == 5
    for _, _, state in steps[1:]:
        assert all(torch.equal(state[name], initial[name]) for name in frozen)
        assert not torch.equal(state["network.head.1.weight"], initial["network.head.1.weight"])


@pytest.mark.slow
def test_resumed_it_is_bit_equal(whole: Result, spy: Path) -> None:
    fit(5, "--name", "resumed")
    result = fit(STEPS, "--name", "resumed", "--ckpt_path", "last")
    assert "resuming after step 5" in result.out
    ours, theirs = result.checkpoint(), whole.checkpoint()
    for part in ("state_dict", RAW):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


@pytest.mark.slow
def test_validation_best_and_resume(spy: Path) -> None:
    """Validation at step 1 uses the average; `best` has it, and `last` has the weights from which training goes on."""
    module = sys.modules["spy"]
    module.steps.clear()
    module.validated.clear()
    result = fit(3, "--trainer.val_check_interval", 1)
    raw, seen = module.steps, dict(module.validated)
    assert list(seen) == [step for step, _, _ in raw[1:]] == [1, 2, 3]
    for step in seen:
        for name in ("network.head.1.weight", "network.features.3.weight"):
            expected = reference_average(raw[: step + 1], name)
            torch.testing.assert_close(seen[step][name], expected, rtol=0, atol=1e-10)
            assert step == 1 or (seen[step][name] - raw[step][2][name]).abs().max() > 1e-4
    best = result.checkpoint("best")
    step = best["global_step"]
    assert all(torch.equal(best["state_dict"][name], seen[step][name]) for name in seen[step])
    measured = run_here(
        "validate", *FIT[1:-1], "--trainer.callbacks=null", "--ckpt_path", result.folder / "checkpoints" / "best.ckpt"
    )
    assert measured.code == 0, measured.err
    assert f"val/loss {result.rows('val/loss')[step]:.4f}" in measured.out
    measured = run_here("validate", *FIT[1:-1], "--ckpt_path", result.folder / "checkpoints" / "best.ckpt")
    assert f"val/loss {result.rows('val/loss')[step]:.4f}" in measured.out
    for change, words in (
        (("--trainer.callbacks", "[{class_path: spy.Spy}]"), "EMA.half_life_examples: 300.0 -> None"),
        (("--trainer.callbacks.half_life_examples", 200), "EMA.half_life_examples: 300.0 -> 200.0"),
    ):
        resumed = run_here(*FIT, 4, *change, "--ckpt_path", "last")
        assert resumed.code == 2
        assert words in resumed.err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="PyTorch synchronises batch norm between GPUs alone")
def test_synchronised_batch_norm_of_two_gpus_is_that_of_one() -> None:
    run = ("fit", *DIGITS, *CSV, "--model.network", CONVNET, "--trainer.precision", "64-true", "--trainer.max_steps", 5)
    one = run_process(*run, "--trainer.accelerator", "gpu", "--trainer.devices", 1)
    more = ("--trainer.accelerator", "gpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    two = run_process(*run, *more, "--trainer.sync_batchnorm", "true")
    assert one.code == two.code == 0, one.err + two.err
    assert furthest(one, two) < 1e-10
