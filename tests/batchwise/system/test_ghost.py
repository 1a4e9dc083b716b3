"""Batch norm, dropout and augmentation that do not depend on how the batch is executed: real processes, float64."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from helpers import CSV, DIGITS, TWO, Result, furthest, run_here, run_process

NOISY = """
from dataclasses import replace
import torch
from batchwise.batching.random import mix, uniform
from batchwise.sources.digits import Digits

class Noisy(Digits):
    def transform(self, batch, training):
        batch = super().transform(batch, training)
        if not training:
            return batch
        # Noise as a function of (seed, epoch, example, pixel).
        keys = mix(mix(self.seed, batch.epoch), batch.index)
        noise = uniform(keys[:, None], torch.arange(64)).view(-1, 1, 8, 8)
        return replace(batch, inputs=batch.inputs + (noise - 0.5).to(batch.inputs))
"""
CONVNET = (
    "{class_path: batchwise.models.convnet.ConvNet, "
    "init_args: {in_channels: 1, num_classes: 10, channels: [4, 8], norm: batch, dropout: 0.2}}"
)
GHOSTS = ("--model.network", CONVNET, "--model.ghost_batch_size", 8)
# 1,259 examples in batches of 100, the last of 59: 12.5 ghost batches, the last of 4; and of 59: seven, the last of 11.
BATCHES = ("--data", "noisy.Noisy", "--data.batch_size", 100, "--trainer.precision", "64-true")
FIT = ("fit", *DIGITS, *CSV, *BATCHES, *GHOSTS, "--trainer.max_epochs", 4, "--model.optimizer.lr", 0.02)


def processes(number: int) -> tuple[object, ...]:
    return *TWO, "--trainer.devices", number


@pytest.fixture(autouse=True)
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.syspath_prepend(str(tmp_path))


def fit(*arguments: object) -> Result:
    several = "--trainer.devices" in arguments
    run = (lambda *a: run_process(*a, PYTHONPATH=str(Path.cwd()), OMP_NUM_THREADS="1")) if several else run_here
    result = run(*FIT, *arguments)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "noisy.py").write_text(NOISY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return fit("--trainer.default_root_dir", folder)


@pytest.mark.parametrize(
    ("execution", "micro_batches"),
    [
        (("--trainer.accumulate_grad_batches", 5), 5),
        (processes(2), 1),
        pytest.param((*processes(3), "--data.micro_batch_size", 24), 2, marks=pytest.mark.weekly),
    ],
    ids=["5 micro-batches", "2 processes", "3 processes x 2 micro-batches"],
)
@pytest.mark.slow
def test_weights_running_statistics_and_losses(whole_batch: Result, execution: tuple, micro_batches: int) -> None:
    result = fit(*execution)
    assert re.search(rf"accumulate_grad_batches  {micro_batches}$", result.out, re.MULTILINE)
    figures = {"weights and running statistics": furthest(whole_batch, result)}
    for column in ("train/loss", "train/loss_epoch", "gradient_norm", "val/loss"):
        ours, theirs = result.rows(column), whole_batch.rows(column)
        assert ours.keys() == theirs.keys()
        figures[column] = max(abs(ours[step] - theirs[step]) for step in theirs)
    print(figures)
    assert max(figures.values()) < 1e-10, figures
    assert len(whole_batch.rows("train/loss")) == 4 * 13
    state = result.checkpoint()["state_dict"]
    statistics = [value for name, value in state.items() if "running" in name]
    assert len(statistics) == 8
    assert all((value - value.round()).abs().max() > 1e-3 for value in statistics)  # they have moved


@pytest.mark.slow
def test_what_is_compared_depends_on_epoch_dropout_and_ghosts(whole_batch: Result) -> None:
    """Otherwise the agreement above would say nothing."""
    losses = whole_batch.rows("train/loss")
    assert losses[52] < 0.8 * losses[1]
    clean = ("--data", "batchwise.sources.digits.Digits", "--data.batch_size", 100)
    for change in (("--model.ghost_batch_size", 10), ("--model.network.dropout", 0), clean):
        result = run_here(*FIT, *change, "--trainer.max_steps", 1, "--name", "changed")
        assert result.code == 0, result.err
        assert abs(result.rows("train/loss")[1] - losses[1]) > 1e-6, change


@pytest.mark.slow
def test_ordinary_batch_norm_is_warned_of_and_the_remedy_works() -> None:
    fit = ("fit", *DIGITS, *CSV, "--model.network.norm", "batch", "--trainer.max_steps", 3)
    fit = (*fit, "--trainer.precision", "64-true", "--data.micro_batch_size")
    with pytest.warns(UserWarning, match="the network has batch norm") as caught:
        cut = run_here(*fit, 16)
    (message,) = [str(warning.message) for warning in caught if "batch norm" in str(warning.message)]
    assert "over the 16 examples that run at once and not over the batch of 64" in message
    remedy = re.search(r"write model\.(ghost_batch_size), such as (\d+)", message)
    assert remedy
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*batch norm.*")
        whole = run_here(*fit, 64)
        remedied = [run_here(*fit, size, f"--model.{remedy[1]}", remedy[2]) for size in (16, 64)]
    assert furthest(cut, whole) > 1e-3
    # AdamW divides by 1e-8 where the gradient is zero but for rounding (pixels that are the same in all images).
    assert furthest(*remedied) < 1e-10


@pytest.mark.slow
def test_wrong_ghost_batch_sizes() -> None:
    for arguments, words in (
        (("--model.ghost_batch_size", 8), "the network has no batch norm"),
        (("--model.network.norm", "batch", "--model.ghost_batch_size", 1), "ghost_batch_size is 1"),
        (
            ("--model.network.norm", "batch", "--model.ghost_batch_size", 8, "--data.micro_batch_size", 4),
            "micro_batch_size is 4, but 8 examples must stay together",
        ),
    ):
        result = run_here("fit", *DIGITS, *CSV, *arguments)
        assert result.code == 2
        assert words in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.slow
def test_evaluation_of_ghost_norm_uses_the_running_statistics(whole_batch: Result) -> None:
    """What `validate` measures does not depend on the evaluation batch."""
    measured = [
        run_here(
            *("validate", *DIGITS, *BATCHES, *GHOSTS, "--data.eval_batch_size", size, "--ckpt_path"),
            whole_batch.folder / "checkpoints" / "last.ckpt",
        )
        for size in (7, 300)
    ]
    assert [result.code for result in measured] == [0, 0], measured[0].err
    assert measured[0].out == measured[1].out
    assert f"val/loss {whole_batch.rows('val/loss')[52]:.4f}" in measured[0].out
    assert torch.get_default_dtype() == torch.float32
